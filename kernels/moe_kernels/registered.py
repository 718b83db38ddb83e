"""How an op is registered with `torch.library`: its arguments may be dataclasses of tensors and plain values.

A schema of `torch.library` knows tensors and plain values alone. So an argument that is a dataclass becomes one
argument for each of its fields, named `argument_field`, on the way in; and it is put together again for the op's
function, its fake and its autograd functions. Each op thus states its arguments as its public function does.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

import torch

_PLAIN = {torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)}
_TENSORS = (torch.Tensor, torch.Tensor | None)


class RegisteredOp:
    """A function registered with `torch.library`; called directly where registration would add nothing but host time.

    That is: in eager mode, for plain tensors that hold something (not on "meta"; the first argument tells), without
    gradients, modes, transforms or tracers. A registered op's way through the dispatcher and back to Python takes longer
    than many of these kernels run. A direct call neither takes dataclasses apart nor puts them together.

    Attributes:
        registered: the op itself, of flat arguments (see `flatten`).
        names: of the flat arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> None:
        self.function = function
        hints = typing.get_type_hints(function)
        returns = hints.pop("return")
        flat: dict[str, Any] = {}
        structures: list[tuple[str, ...] | None] = []  # by argument: the fields of a dataclass
        self._types = tuple(hints.values())
        self._tensors: list[tuple[int, Callable[[Any], tuple[Any, ...]]]] = []  # of the dataclasses that have some
        for place, (argument, hint) in enumerate(hints.items()):
            if not is_dataclass(hint):
                structures.append(None)
                flat[argument] = hint
                continue
            types = typing.get_type_hints(hint)
            structures.append(tuple(field.name for field in fields(hint)))
            flat |= {f"{argument}_{field.name}": types[field.name] for field in fields(hint)}
            tensors = [field.name for field in fields(hint) if types[field.name] in _TENSORS]
            if tensors:
                assert len(tensors) > 1, f"{hint}: attrgetter returns a tuple only of several"
                self._tensors.append((place, attrgetter(*tensors)))
        self._structures = tuple(structures)
        self._plain = frozenset(_PLAIN | {hint for hint in self._types if is_dataclass(hint)})
        self.names = tuple(flat)

        def of_flat(*arguments: Any) -> Any:
            return function(*self._rebuild(arguments))

        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint)
            for name, hint in flat.items()
        ]
        of_flat.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        self.registered = torch.library.custom_op(name, of_flat, mutates_args=mutates_args)

    def flatten(self, *arguments: Any) -> tuple[Any, ...]:
        """The arguments with each dataclass replaced by its fields, in order."""
        flat: list[Any] = []
        for argument, names in zip(arguments, self._structures, strict=True):
            if names is None:
                flat.append(argument)
            else:
                for name in names:
                    flat.append(getattr(argument, name))
        return tuple(flat)

    def _rebuild(self, flat: tuple[Any, ...]) -> list[Any]:
        """The reverse of `flatten`. What a dataclass checks when it is made was checked when the first one was."""
        arguments: list[Any] = []
        start = 0
        for kind, names in zip(self._types, self._structures, strict=True):
            if names is None:
                arguments.append(flat[start])
                start += 1
            else:
                argument = object.__new__(kind)
                argument.__dict__.update(zip(names, flat[start : start + len(names)], strict=True))
                arguments.append(argument)
                start += len(names)
        return arguments

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator of the function that makes empty outputs; it takes the op's arguments."""
        self.registered.register_fake(lambda *flat: fake(*self._rebuild(flat)))
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Make the op differentiable.

        Args:
            backward: of (ctx, needs, gradients of the outputs). `needs` holds the names of the flat arguments whose
                gradients are asked for; it returns them by name.
            setup_context: of (ctx, the op's arguments, its output).
        """

        def flat_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, self._rebuild(inputs), output)

        def flat_backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
            needs = {name for name, needed in zip(self.names, ctx.needs_input_grad, strict=True) if needed}
            found = backward(ctx, needs, *gradients)
            return tuple(found.get(name) if name in needs else None for name in self.names)

        self.registered.register_autograd(flat_backward, setup_context=flat_setup_context)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.registered(*self.flatten(*arguments))
        values = [*arguments]
        for place, tensors in self._tensors:
            values += tensors(arguments[place])
        if (
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or not self._plain.issuperset(map(type, values))
            or values[0].is_meta
            or (
                torch.is_grad_enabled()
                and any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
            )
        ):
            return self.registered(*self.flatten(*arguments))
        return self.function(*arguments)


def registered_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], RegisteredOp]:
    """Decorator: `RegisteredOp`; `mutates_args` are names of flat arguments."""
    return lambda function: RegisteredOp(name, function, mutates_args)
