"""Which implementation runs, the Triton kernels or the PyTorch references beside them; and how ops are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import triton

# Fixed when Triton's decorators run, that is when this package is imported; setting it later changes nothing.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def resolve_backend(backend: str, device: torch.device | str) -> Literal["triton", "torch"]:
    """The implementation that `backend` means on `device`.

    Args:
        backend: "auto" is "triton" on CUDA and "torch" elsewhere; "torch" runs anywhere; "triton" runs on CUDA, and on
            a CPU only in Triton's interpreter (`TRITON_INTERPRET=1`, set before this package is imported).
        device: where the tensors are.

    Raises:
        ValueError: unknown `backend`, or "triton" where it can't run (it is never replaced silently).
    """
    device_type = (device if isinstance(device, torch.device) else torch.device(device)).type
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if device_type == "cuda" else "torch"
    if backend == "triton":
        if device_type == "cuda" or (device_type == "cpu" and INTERPRETED):
            return "triton"
        raise ValueError(
            f'backend="triton" can\'t run on device type "{device_type}": Triton kernels need CUDA, or a CPU with '
            "TRITON_INTERPRET=1 set before moe_kernels is imported"
        )
    raise ValueError(f'backend={backend!r}: must be "auto", "triton" or "torch"')


_PLAIN = {torch.Tensor, torch.nn.Parameter, int, float, bool, str, list, type(None)}


class RegisteredOp:
    """A function registered with `torch.library`; called directly where registration would add nothing but host time.

    That is: in eager mode, for plain tensors that hold something (not on "meta"; the first argument tells), without
    gradients, modes, transforms or tracers. A registered op's way through the dispatcher and back to Python takes longer
    than many of these kernels run.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=mutates_args)
        self.register_fake = self.registered.register_fake
        self.register_autograd = self.registered.register_autograd

    def __call__(self, *arguments: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or not _PLAIN.issuperset(map(type, arguments))
            or arguments[0].is_meta
            or (
                torch.is_grad_enabled()
                and any(isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments)
            )
        ):
            return self.registered(*arguments)
        return self.function(*arguments)


def registered_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], RegisteredOp]:
    """Decorator: `RegisteredOp`."""
    return lambda function: RegisteredOp(name, function, mutates_args)
