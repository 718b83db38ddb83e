"""Which implementation runs, the Triton kernels or the PyTorch references beside them; and how kernels are launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "INTERPRETED",
    "PreparedLaunch",
    "RegisteredOp",
    "current_device",
    "gdc_launch_dependents",
    "gdc_wait",
    "on_device",
    "raw_stream",
    "registered_op",
    "resolve_backend",
    "uses_pdl",
]

# Fixed when Triton's decorators run, that is when this package is imported; setting it later changes nothing.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# Triton launches on the current device: `with on_device(x): kernel[grid](...)` makes it that of x (nothing on a CPU).
on_device = torch.cuda.device_of


def resolve_backend(backend: str, device: torch.device | str) -> Literal["triton", "torch"]:
    """The implementation that `backend` means on `device`.

    Args:
        backend: "auto" is "triton" on CUDA and "torch" elsewhere; "torch" runs anywhere; "triton" runs on CUDA, and on
            a CPU only in Triton's interpreter (`TRITON_INTERPRET=1`, set before this package is imported).
        device: where the tensors are.

    Raises:
        ValueError: unknown `backend`, or "triton" where it can't run (it is never replaced silently).
    """
    device_type = torch.device(device).type
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


def uses_pdl(tensor: torch.Tensor) -> bool:
    """Whether kernels on the device of `tensor` are launched while the one before still runs (`launch_pdl`).

    Such a kernel (programmatic dependent launch, from Hopper on) is set up beforehand and holds at `gdc_wait()` until its
    predecessor has ended and all of that one's writes are seen. *Every* program begins with that wait, also one that
    reads nothing new: a wait covers only the one kernel before, so what an older kernel wrote is there only if that
    predecessor had itself waited. (`one_token` has one founded exception.) After it, `gdc_launch_dependents()` lets the
    next kernel be set up at once.
    """
    return not INTERPRETED and tensor.is_cuda and _has_pdl(tensor.device.index)


@functools.cache
def _has_pdl(device_index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device_index) >= (9, 0)


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


class PreparedLaunch:
    """`kernel[grid]` with all but the tensors' addresses fixed, compiled at the first call: a third of the host's time.

    Triton looks at each argument of each launch to find the compiled kernel; here the owner knows that nothing which the
    kernel was specialised on has changed: dtypes, numbers, and addresses that are multiples of 16 bytes (but for arguments
    in its `do_not_specialize_on_alignment`). `constants` are in the order of the kernel's last parameters.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], options: dict[str, Any], **constants: Any) -> None:
        self._kernel, self._grid, self._options, self._constants = kernel, grid, options, constants
        self._values = tuple(constants.values())
        self._compiled: Any = None

    def __call__(self, stream: int, *arguments: Any) -> None:
        compiled = self._compiled
        if compiled is None:
            compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
            if not INTERPRETED:
                self._compiled = compiled
        elif _may_have_launch_hooks():
            compiled[self._grid](*arguments, *self._values, stream=stream)
        else:
            # As `compiled[grid]` and Triton's own launcher do it, but with neither metadata nor hooks.
            handles = (compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(*self._grid, stream, *handles, *arguments, *self._values)


def _may_have_launch_hooks() -> bool:
    """Whether somebody, a profiler say, hooks into launches. Not so empty chains, which would cost 1 µs a launch."""
    knobs = triton.knobs
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if type(enter) is type(leave) is knobs.HookChain:
        return bool(enter.calls or leave.calls)
    return True  # let Triton look


def current_device() -> int:
    """The index of the current CUDA device; -1, as `Tensor.get_device` says of CPU tensors, where there is none."""
    return torch._C._cuda_getDevice() if torch.cuda.is_initialized() else -1


def raw_stream(device_index: int) -> int:
    """The handle of the current stream of a CUDA device, as a launch takes it; 0 in the interpreter."""
    return 0 if INTERPRETED else torch._C._cuda_getCurrentRawStream(device_index)
