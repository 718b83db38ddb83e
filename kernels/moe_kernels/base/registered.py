"""All steps of a forward: registers an op with `torch.library`, and lets calls that need no registration go around it.

An op's function, its fake and its autograd functions take the same arguments as the op's public function: tensors, plain
values, and dataclasses of them, each one argument (see `structures.py`).
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from moe_kernels.base.once import refuse_tangents
from moe_kernels.base.structures import TENSORS, Structure

_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


class RegisteredOp:
    """A function registered with `torch.library`; called directly where registration would add nothing but host time.

    That is: in eager mode, for plain tensors that hold something (not on "meta"; the first argument tells), without modes,
    transforms or tracers. A registered op's way through the dispatcher and back to Python takes longer than many of these
    kernels run. A direct call takes no dataclass apart. Where a gradient is needed, it is one node of autograd.

    Attributes:
        registered: the op itself, of flat arguments (see `flatten`): what compiled models call. Not by
            `torch.library.custom_op`, by which a call of ten arguments took the host 43 µs if one of them is mutated; now 7.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], mutates_args: tuple[str, ...] = (), has_gradient: bool = False
    ) -> None:
        self.function = function
        hints = typing.get_type_hints(function)
        returns = hints.pop("return")
        self._structures = tuple(Structure(hint) if is_dataclass(hint) else None for hint in hints.values())
        flat: dict[str, Any] = {}
        tensors: dict[str, str] = {}  # name of the flat argument → how it is reached
        for (argument, hint), structure in zip(hints.items(), self._structures, strict=True):
            if structure is None:
                flat[argument] = hint
                tensors |= {argument: argument} if hint in TENSORS else {}
            else:
                flat |= {f"{argument}_{name}": kind for name, kind in structure.types.items()}
                tensors |= {f"{argument}_{name}": f"{argument}.{name}" for name in structure.tensors}
        self._names = tuple(flat)
        self._tensor_names = tuple(tensors)
        # Compiled, because to walk the fields in a loop takes as long as the rest of a call.
        self._tensors = eval(f"lambda {', '.join(hints)}: ({', '.join(tensors.values())},)")
        self._node: type[torch.autograd.Function] | None = None

        def of_flat(*arguments: Any) -> Any:
            return function(*self._rebuild(arguments))

        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint)
            for name, hint in flat.items()
        ]
        of_flat.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        self._name = name
        namespace, _, short = name.partition("::")
        schema = torch.library.infer_schema(of_flat, mutates_args=mutates_args)
        self._library = torch.library.Library(namespace, "FRAGMENT")
        self._library.define(short + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(short, of_flat, "CompositeExplicitAutograd")
        self.registered: torch._ops.OpOverload = getattr(getattr(torch.ops, namespace), short).default
        if not has_gradient:
            self._library.impl(short, _without_gradient(self.registered), "Autograd", with_keyset=True)

    def flatten(self, *arguments: Any) -> tuple[Any, ...]:
        """What `registered` takes for these arguments."""
        flat: list[Any] = []
        for argument, structure in zip(arguments, self._structures, strict=True):
            if structure is None:
                flat.append(argument)
            else:
                flat.extend(structure.flatten(argument))
        return tuple(flat)

    def _rebuild(self, flat: tuple[Any, ...]) -> list[Any]:
        """The reverse of `flatten`."""
        values = iter(flat)
        return [next(values) if structure is None else structure.rebuild(values) for structure in self._structures]

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator of the function that makes empty outputs; it takes the op's arguments."""
        torch.library.register_fake(self._name, lambda *flat: fake(*self._rebuild(flat)), lib=self._library)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Make the op differentiable.

        Args:
            backward: of (ctx, needs, gradients of the outputs). `needs` holds the names of the tensors whose gradients are
                asked for; it returns them by name. A field of a dataclass is named `argument_field`.
            setup_context: of (ctx, the op's arguments, its output). `ctx.needs` holds the names of the tensors that require a
                gradient; `ctx.is_direct` says that it is a direct call, whose outputs only the op's public function sees.
        """

        def names_of(names: tuple[str, ...], needed: tuple[bool, ...]) -> set[str]:
            return {name for name, is_needed in zip(names, needed, strict=False) if is_needed}

        def gradients(ctx: Any, names: tuple[str, ...], needed: tuple[bool, ...], grads: Any) -> list[Any]:
            needs = names_of(names, needed)
            found = backward(ctx, needs, *grads)
            return [found.get(name) if name in needs else None for name in names]

        def setup_of_flat(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.needs, ctx.is_direct = names_of(self._names, ctx.needs_input_grad), False
            setup_context(ctx, self._rebuild(inputs), output)

        torch.library.register_autograd(
            self._name,
            lambda ctx, *grads: tuple(gradients(ctx, self._names, ctx.needs_input_grad, grads)),
            setup_context=setup_of_flat,
            lib=self._library,
        )
        function, tensor_names = self.function, self._tensor_names

        class Node(torch.autograd.Function):
            """A direct call; `tensors` are those among the arguments."""

            @staticmethod
            def forward(ctx: Any, arguments: tuple[Any, ...], *tensors: torch.Tensor | None) -> Any:
                output = function(*arguments)
                ctx.needs, ctx.is_direct = names_of(tensor_names, ctx.needs_input_grad[1:]), True
                setup_context(ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return None, *gradients(ctx, tensor_names, ctx.needs_input_grad[1:], grads)

        self._node = Node

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.registered(*self.flatten(*arguments))
        tensors = self._tensors(*arguments)
        if (
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or not _PLAIN.issuperset(map(type, tensors))
            or tensors[0].is_meta
            or forward_ad._current_level >= 0
        ):
            refuse_tangents(self._name, tensors)
            return self.registered(*self.flatten(*arguments))
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    node = self._node
                    return (
                        self.registered(*self.flatten(*arguments)) if node is None else node.apply(arguments, *tensors)
                    )
        return self.function(*arguments)


def _without_gradient(op: Any) -> Callable[..., Any]:
    """What autograd does with an op that has no gradient: the op; a backward through it is an error."""

    def below(keyset: Any, *flat: Any) -> Any:
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *flat)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> Any:
            return below(keyset, *flat)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"{op.name()} has no gradient: call it under torch.no_grad(), or detach what goes in")

    def autograd(keyset: Any, *flat: Any) -> Any:
        if torch.is_grad_enabled():
            for one in flat:
                if isinstance(one, torch.Tensor) and one.requires_grad:
                    return Node.apply(keyset, *flat)
        return below(keyset, *flat)

    return autograd


def registered_op(
    name: str, mutates_args: tuple[str, ...] = (), has_gradient: bool = False
) -> Callable[[Callable[..., Any]], RegisteredOp]:
    """Decorator: `RegisteredOp`; `mutates_args` are names of flat arguments. `has_gradient`: `register_autograd` follows."""
    return lambda function: RegisteredOp(name, function, mutates_args, has_gradient)
