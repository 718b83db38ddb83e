"""All steps of a rebalance: streams and events. CUDA's on a GPU, program order on a CPU, a seeded scheduler in tests.

A stream here is anything with `torch.cuda.Stream`'s `record_event()` and `wait_event()`; `DeviceStreams` adds the
few things that differ between devices, so that everything that acts is written once and can be simulated.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Protocol

import torch

from eplb.gate import EventLike, Gate, StreamLike

# CU_STREAM_CAPTURE_MODE_THREAD_LOCAL and hipStreamCaptureModeThreadLocal ("Stream Management" of both APIs).
_CAPTURE_MODE_THREAD_LOCAL = 1


class DeviceStreams(Protocol):
    """The streams of one device as the rebalancer sees them."""

    @property
    def device(self) -> torch.device: ...

    @property
    def side(self) -> StreamLike:
        """What fills slots and stages tables."""
        ...

    @property
    def gate(self) -> Gate:
        """Between the forwards and the flips of all layers on the device."""
        ...

    def current(self) -> StreamLike:
        """The calling thread's compute stream."""
        ...

    def current_handle(self) -> int:
        """What `current()` is known by; quicker to ask for, as each forward does."""
        ...

    def run(self, stream: StreamLike, work: Callable[[], object]) -> None:
        """Enqueue the tensor operations of `work`, which write in place, on `stream`.

        In inference mode, as both normal tensors and those of a model that was built in inference mode may be written there.
        """
        ...

    def prepared(self, work: Callable[[], object]) -> Callable[[], object]:
        """What enqueues `work` on the compute stream of the thread that calls it, in the mode that this thread is in.

        For tensors that may be written in any mode; nothing stands between the call and the work.
        """
        ...

    def make_event(self) -> tuple[EventLike, Callable[[StreamLike], object]]:
        """An event for which the device is asked now, and what records it on a stream, which then takes little time."""
        ...

    def is_capturing(self) -> bool:
        """Whether the calling thread's current stream is being captured into a CUDA graph."""
        ...

    def is_captured(self, stream: StreamLike) -> bool:
        """Whether `stream` is being captured into a CUDA graph."""
        ...

    def adopt_thread(self) -> None:
        """Prepare the calling thread, which is not the main one, for work on this device."""
        ...


class _Done:
    def query(self) -> bool:
        return True


class HostStream:
    """A CPU's only stream: work is done when the call returns."""

    def record_event(self) -> _Done:
        return _Done()

    def wait_event(self, event: EventLike) -> None:
        del event


class HostStreams:
    """`DeviceStreams` of a CPU; of "meta" too, where nothing runs."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.side: StreamLike = HostStream()
        self.gate = Gate(self)

    def current(self) -> StreamLike:
        return self.side

    def current_handle(self) -> int:
        return 0

    def run(self, stream: StreamLike, work: Callable[[], object]) -> None:
        del stream
        with torch.inference_mode():
            work()

    def prepared(self, work: Callable[[], object]) -> Callable[[], object]:
        return work

    def make_event(self) -> tuple[EventLike, Callable[[StreamLike], object]]:
        return _Done(), lambda _: None

    def is_capturing(self) -> bool:
        return False

    def is_captured(self, stream: StreamLike) -> bool:
        return False

    def adopt_thread(self) -> None:
        """Nothing to prepare on a CPU."""


class CudaStreams:
    """`DeviceStreams` of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # High priority: a copy of a few microseconds should not queue behind a long GEMM's blocks.
        self.side: StreamLike = torch.cuda.Stream(device, priority=-1)
        # No function of Python's between: each step asks, and finds nothing in the caches.
        self.current_handle: Callable[[], int] = functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
        self._current_device, self._is_capturing = torch._C._cuda_getDevice, torch._C._cuda_isCurrentStreamCapturing
        self.gate = Gate(self)

    def current(self) -> StreamLike:
        return torch.cuda.current_stream(self.device)

    def run(self, stream: StreamLike, work: Callable[[], object]) -> None:
        if stream.cuda_stream == self.current_handle():  # type: ignore[attr-defined]
            with torch.inference_mode():  # the other context costs 5 µs, and each snapshot of the load comes here
                work()
            return
        with torch.inference_mode(), torch.cuda.stream(stream):  # type: ignore[arg-type]
            work()

    def prepared(self, work: Callable[[], object]) -> Callable[[], object]:
        return work

    def make_event(self) -> tuple[EventLike, Callable[[StreamLike], object]]:
        event: torch.cuda.Event = self.side.record_event()  # the first record makes it
        # The method of C, without Python's around it.
        return event, super(torch.cuda.Event, event).record  # type: ignore[return-value]

    def is_capturing(self) -> bool:
        if self._current_device() == self.device.index:  # as nearly always; the context costs 2 µs
            return self._is_capturing()
        with torch.cuda.device(self.device):
            return self._is_capturing()

    def is_captured(self, stream: StreamLike) -> bool:
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            return self._is_capturing()

    def adopt_thread(self) -> None:
        """Select the device, and take this thread out of the way of graph captures on other threads.

        By default CUDA forbids event queries and allocations on *every* thread while any thread captures a graph
        (capture mode "global"), and a violation invalidates the user's capture. In thread-local mode only a capture
        by this thread, of which there is none, would restrict it.
        """
        torch.cuda.set_device(self.device)
        library, name = "libcuda.so.1", "cuThreadExchangeStreamCaptureMode"
        if torch.version.hip is not None:  # ROCm has the same call under another name
            library, name = "libamdhip64.so", "hipThreadExchangeStreamCaptureMode"
        mode = ctypes.c_int(_CAPTURE_MODE_THREAD_LOCAL)
        status = getattr(ctypes.CDLL(library), name)(ctypes.byref(mode))
        if status != 0:
            raise RuntimeError(f"{name} failed with error {status}")


@functools.cache
def _streams_of(device: torch.device) -> DeviceStreams:
    """One for all layers of a device: they share a gate, and torch hands out few streams before it begins anew."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams(device)


def streams_of(device: torch.device) -> DeviceStreams:
    """The streams of `device`. Those of "meta" do nothing; a layer gets others with its memory.

    "cuda" without an index is the current device, as everywhere in PyTorch.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device, nor "meta".
    """
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device must be a CPU or a CUDA device, got {device}")
    if device.type != "cuda":
        return _streams_of(torch.device(device.type))
    return _streams_of(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))


__all__ = [
    "CudaStreams",
    "DeviceStreams",
    "EventLike",
    "HostStream",
    "HostStreams",
    "StreamLike",
    "streams_of",
]
