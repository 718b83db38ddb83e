"""All steps of a forward: launches kernels on the device of their arguments, with little host time."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.base.backend import INTERPRETED

__all__ = [
    "Launcher",
    "PreparedLaunch",
    "gdc_launch_dependents",
    "gdc_wait",
    "has_pdl",
    "num_multiprocessors",
    "on_device",
    "raw_stream",
]

_log = logging.getLogger(__name__)

# Triton's versions whose compiled kernels are launched by `PreparedLaunch` itself, through Triton's internals.
_TESTED_TRITON = ("3.6", "3.7")
_DESCRIPTORS = (TensorDescriptor, GluonTensorDescriptor)
_MOST_PREPARED = 1024  # of a kernel; there is one for each of its specialisations, of which a process has few


class Launcher:
    """Decorator of a Triton kernel. The call stays Triton's: `kernel[grid](*arguments, **constants)`.

    A launch takes less host time than Triton's own. Triton examines each argument of each launch, which takes longer than
    many of these kernels run. A Launcher makes a key of the arguments and looks the compiled kernel up. It calls the hooks of
    launches. It reads Triton's knobs for debugging and instrumentation, and the hooks before runs, only at the first launch
    of a kernel. With a Triton version that is not tested it launches through Triton's public interface.

    The kernel runs on the device of the first argument, which is never None. The Launcher sets the kernel's parameter PDL:
    whether the GPU may start a kernel while the one before it still runs (programmatic dependent launch, from Hopper on).

    With PDL, the GPU sets a kernel up early. The kernel then waits in `gdc_wait()` until its predecessor has ended and the
    predecessor's writes are visible. *Every* program begins with that wait, even one that reads nothing new. A wait covers
    one predecessor only, so the writes of an older kernel are visible only if the predecessor itself has waited.
    (`one_token_*.py` and `send_rows.py` have exceptions, and their reasons.) After the wait, `gdc_launch_dependents()` lets
    the GPU set up the next kernel. A launch with the constant PDL=False is not set up early.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._has_pdl_parameter = "PDL" in jit.arg_names
        self._prepared: dict[tuple[Any, ...], PreparedLaunch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def prepare(self, device_index: int, **constants: Any) -> PreparedLaunch:
        """A launch without a key, for a caller that itself knows when the specialisation changes (`one_token.py`)."""
        if self._has_pdl_parameter:
            constants["PDL"] = constants.get("PDL", True) and has_pdl(device_index)
            if constants["PDL"]:
                constants["launch_pdl"] = True  # an option that not every backend of Triton has
        return PreparedLaunch(self.jit, constants)

    @functools.cached_property
    def _by_value(self) -> list[bool]:
        """Of each parameter, whether a number is specialised on (an internal of Triton's)."""
        return [not parameter.do_not_specialize for parameter in self.jit.params]

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        first = arguments[0]
        device_index = (first.base if type(first) in _DESCRIPTORS else first).get_device()
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
        """The properties of the arguments on which Triton specialises a kernel. Of a number, the key has its value."""
        parts: list[Any] = []
        for argument, by_value in zip(arguments, self._by_value, strict=False):
            kind = type(argument)
            if isinstance(argument, torch.Tensor):
                parts += argument.dtype, argument.data_ptr() & 15
            elif kind is int:
                parts.append(argument if by_value else -(2**31) <= argument < 2**31)
            elif kind in _DESCRIPTORS:  # of a kernel of Gluon, the layout is in the kernel's source
                parts += argument.base.dtype, argument.padding, *argument.block_shape
            elif kind is float or argument is None:
                parts.append(kind)
            else:
                raise TypeError(f"{self.jit.__name__}: a {kind.__name__} can't be an argument, got {argument!r}")
        return parts


class PreparedLaunch:
    """Launches one specialisation of a kernel: the first call compiles it, later calls only launch it.

    The caller ensures that later arguments have the same specialisation: dtypes, numbers (but those of `do_not_specialize`),
    and whether addresses are multiples of 16 bytes (but those of `do_not_specialize_on_alignment`).

    A kernel with the constant CLUSTERS is launched as clusters of two programs; of an odd number, the last gets one beside it
    that has nothing to do. To the kernel they are programs like others: Triton compiles it without clusters. Triton's own
    launches (the first, those with hooks, all with a version that is not tested) have none.
    """

    def __init__(self, jit: Any, constants: dict[str, Any]) -> None:
        self._jit, self._constants = jit, constants
        self._cluster = 2 if constants.get("CLUSTERS") else 1
        self._compiled: Any = None
        self._metadata: Any = None
        self._values: tuple[Any, ...] = ()

    def __call__(self, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        compiled = self._compiled
        if compiled is None:
            compiled = self._jit[grid](*arguments, **self._constants)
            if _prepares():
                self._values = tuple(self._constants[name] for name in self._jit.arg_names[len(arguments) :])
                warps, _, shared = compiled.packed_metadata
                self._metadata = (warps, self._cluster, shared)
                self._compiled = compiled
        elif _may_have_launch_hooks():
            compiled[grid](*arguments, *self._values, stream=stream)
        else:
            # The same call that `compiled[grid]` makes, without metadata and hooks.
            x, y, z = grid
            handles = (compiled.function, self._metadata, None, None, None)
            compiled.run(-(-x // self._cluster), y, z, stream, *handles, *arguments, *self._values)


def _prepares() -> bool:
    """Whether a second launch goes past Triton's own look at the arguments.

    Not in the interpreter; nor on AMD's GPUs, for which Triton also compiles by the sizes of tensors; nor with a Triton whose
    internals are not known.
    """
    if INTERPRETED or torch.version.cuda is None:
        return False
    return _TRITON_IS_TESTED or _launches_publicly()


def _is_tested(version: str) -> bool:
    return ".".join(version.split(".")[:2]) in _TESTED_TRITON


_TRITON_IS_TESTED = _is_tested(triton.__version__)


@functools.cache
def _launches_publicly() -> Literal[False]:
    """Logs that, once."""
    _log.warning(
        "Triton %s is not one of %s: kernels are launched through Triton's public interface, which takes more host time",
        triton.__version__,
        ", ".join(_TESTED_TRITON),
    )
    return False


def _may_have_launch_hooks() -> bool:
    """Whether a profiler, say, hooks into launches. An empty chain of hooks counts as none: to call it costs 1 µs."""
    knobs = triton.knobs
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if type(enter) is type(leave) is knobs.HookChain:
        return bool(enter.calls or leave.calls)
    return True  # let Triton look


@functools.cache
def has_pdl(device_index: int) -> bool:
    """Whether a CUDA device (-1: the CPU) can start a kernel while the one before it still runs; see `Launcher`."""
    if INTERPRETED or device_index < 0 or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device_index) >= (9, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 for the interpreter, so that its programs are persistent too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def on_device(device_index: int) -> Any:
    """A context that makes this CUDA device the current one, on which Triton launches. (-1: the interpreter's, none.)"""
    if device_index < 0 or device_index == torch._C._cuda_getDevice():
        return nullcontext()  # `torch.cuda.device` costs 2 µs also where it changes nothing
    return torch.cuda.device(device_index)


def raw_stream(device_index: int) -> int:
    """The handle of a CUDA device's current stream; 0 in the interpreter."""
    return 0 if INTERPRETED else torch._C._cuda_getCurrentRawStream(device_index)
