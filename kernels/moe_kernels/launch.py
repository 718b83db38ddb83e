"""How kernels are launched: on their arguments' device and its current stream, and with little of the host's time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.backend import INTERPRETED

__all__ = ["Launcher", "PreparedLaunch", "gdc_launch_dependents", "gdc_wait", "has_pdl", "on_device", "raw_stream"]

_MOST_PREPARED = 1024  # of a kernel; there is one for each of its specialisations, of which a process has few


class Launcher:
    """Decorator of a Triton kernel that is launched as ever, `kernel[grid](*arguments, **constants)`.

    It takes less of the host's time: Triton looks at each argument of each launch in a way that takes longer than many of
    these kernels run, here it is one look into a dictionary. (Hooks of launches are called. What else Triton asks at each
    launch, its knobs for debugging and instrumentation and hooks before runs, is asked at a kernel's first launch only.)

    It launches on the device of the first argument, which is never None. And it sets the kernel's parameter PDL: whether
    kernels are launched while the one before still runs.

    Such a kernel (programmatic dependent launch, from Hopper on) is set up beforehand and holds at `gdc_wait()` until its
    predecessor has ended and all of that one's writes are seen. *Every* program begins with that wait, also one that
    reads nothing new: a wait covers only the one kernel before, so what an older kernel wrote is there only if that
    predecessor had itself waited. (`one_token.py` has one founded exception.) After it, `gdc_launch_dependents()` lets the
    next kernel be set up at once.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._has_pdl_parameter = "PDL" in jit.arg_names
        # The interpreter's functions have no such list.
        self._by_value = [not parameter.do_not_specialize for parameter in getattr(jit, "params", ())]
        self._prepared: dict[tuple[Any, ...], PreparedLaunch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def prepare(self, device_index: int, **constants: Any) -> PreparedLaunch:
        """For an owner that knows better than `_launch` what doesn't change."""
        if self._has_pdl_parameter:
            constants["PDL"] = has_pdl(device_index)
            if constants["PDL"]:
                constants["launch_pdl"] = True  # an option that not every backend of Triton has
        return PreparedLaunch(self.jit, constants)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        first = arguments[0]
        device_index = (first.base if type(first) is TensorDescriptor else first).get_device()
        launch = key = None
        if _prepares():
            key = (device_index, *self._specialization(arguments), *constants, *constants.values())
            launch = self._prepared.get(key)
        if launch is None:
            launch = self.prepare(device_index, **constants)
            if key is not None:
                if len(self._prepared) >= _MOST_PREPARED:
                    self._prepared.clear()
                self._prepared[key] = launch
        with on_device(device_index):
            launch((*grid, 1, 1)[:3], raw_stream(device_index), *arguments)

    def _specialization(self, arguments: tuple[Any, ...]) -> list[Any]:
        """All of the arguments that Triton compiles for; of numbers their values, which is more."""
        parts: list[Any] = []
        for argument, by_value in zip(arguments, self._by_value, strict=False):
            kind = type(argument)
            if isinstance(argument, torch.Tensor):
                parts += argument.dtype, argument.data_ptr() & 15
            elif kind is int:
                parts.append(argument if by_value else -(2**31) <= argument < 2**31)
            elif kind is TensorDescriptor:
                parts += argument.base.dtype, argument.padding, *argument.block_shape
            elif kind is float or argument is None:
                parts.append(kind)
            else:
                raise TypeError(f"{self.jit.__name__}: a {kind.__name__} can't be an argument, got {argument!r}")
        return parts


class PreparedLaunch:
    """`kernel[grid]` of what it was first called with but for the tensors' addresses and unspecialised numbers.

    The owner knows that nothing which the kernel was specialised on has changed: dtypes, numbers, and whether addresses are
    multiples of 16 bytes (but for arguments in its `do_not_specialize_on_alignment`).
    """

    def __init__(self, jit: Any, constants: dict[str, Any]) -> None:
        self._jit, self._constants = jit, constants
        self._compiled: Any = None
        self._values: tuple[Any, ...] = ()

    def __call__(self, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        compiled = self._compiled
        if compiled is None:
            compiled = self._jit[grid](*arguments, **self._constants)
            if _prepares():
                self._values = tuple(self._constants[name] for name in self._jit.arg_names[len(arguments) :])
                self._compiled = compiled
        elif _may_have_launch_hooks():
            compiled[grid](*arguments, *self._values, stream=stream)
        else:
            # As `compiled[grid]` and Triton's own launcher do it, but with neither metadata nor hooks.
            handles = (compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(*grid, stream, *handles, *arguments, *self._values)


def _prepares() -> bool:
    """Not in the interpreter; nor on AMD's GPUs, for which Triton also compiles by the sizes of tensors."""
    return not INTERPRETED and torch.version.cuda is not None


def _may_have_launch_hooks() -> bool:
    """Whether somebody, a profiler say, hooks into launches. Not so empty chains, which would cost 1 µs a launch."""
    knobs = triton.knobs
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if type(enter) is type(leave) is knobs.HookChain:
        return bool(enter.calls or leave.calls)
    return True  # let Triton look


@functools.cache
def has_pdl(device_index: int) -> bool:
    """Whether kernels on a CUDA device (-1: the CPU) can be launched while the one before still runs; see `Launcher`."""
    if INTERPRETED or device_index < 0 or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device_index) >= (9, 0)


def on_device(device_index: int) -> Any:
    """A context in which this CUDA device (-1: none, in the interpreter) is the current one, on which Triton launches."""
    if device_index < 0 or device_index == torch._C._cuda_getDevice():
        return nullcontext()  # `torch.cuda.device` costs 2 µs also where it changes nothing
    return torch.cuda.device(device_index)


def raw_stream(device_index: int) -> int:
    """The handle of the current stream of a CUDA device, as a launch takes it; 0 in the interpreter."""
    return 0 if INTERPRETED else torch._C._cuda_getCurrentRawStream(device_index)
