"""Rebalance, publish: `CpuGpuEvent` hands work from one thread and stream to another thread and stream."""

import threading
from typing import Any

from eplb.gate import StreamLike


class CpuGpuEvent:
    """An event that a host thread can wait for before it exists on the device.

    A CUDA event that was not recorded yet counts as complete, so a second thread that waits for it too early waits
    for nothing. This event couples a host flag to it: `wait()` blocks the host until another thread called
    `record()`, and only then makes the stream wait for the device's part. One `record()` is consumed by one `wait()`;
    then the event may be used again. A wait that raises, or with ``consume=False``, leaves the record for the next one.
    Without a stream it works with no GPU at all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._recorded = False
        self._device_event: Any = None
        self._error: BaseException | None = None

    def is_recorded(self) -> bool:
        """Whether `wait()` would find a record (or an error) at once. Never blocks on the device."""
        with self._lock:
            return self._recorded

    def query(self) -> bool:
        """Whether it is recorded, and its device part over: then a `wait()` asks nothing of its stream. Never blocks."""
        with self._lock:
            if self._device_event is not None and self._device_event.query():
                self._device_event = None
            return self._recorded and self._device_event is None

    def record(self, stream: StreamLike | None = None) -> None:
        """Record the event: after all work queued on `stream` so far, or on the host alone without a stream.

        Raises:
            RuntimeError: an earlier record was not waited for yet. Nothing is overwritten.
        """
        self._set(stream, None)

    def fail(self, error: BaseException) -> None:
        """Record an error in place of the work: `wait()` raises it.

        Raises:
            RuntimeError: an earlier record was not waited for yet. Nothing is overwritten.
        """
        self._set(None, error)

    def wait(self, stream: StreamLike | None = None, timeout: float | None = None, *, consume: bool = True) -> None:
        """Block the host until the event is recorded, then make `stream` (not the host) wait for its device part.

        Args:
            stream: what shall wait for the device part; needed if the event was recorded on a stream.
            timeout: seconds to wait for the record; None waits for ever, 0 polls.
            consume: False leaves the record, or the error, for another wait, of the same stream or of another one.

        Raises:
            TimeoutError: nothing was recorded in time. The event is as it was.
            RuntimeError: the event was recorded on a stream and none was given to wait with. The event is as it was.
            BaseException: the error that `fail()` was given.
        """
        with self._lock:  # the lock itself: behind a forward each function of Python's takes a microsecond
            if not self._recorded and not self._changed.wait_for(lambda: self._recorded, timeout):
                raise TimeoutError(f"CpuGpuEvent was not recorded within {timeout} s")
            if self._device_event is not None and stream is None:
                raise RuntimeError("CpuGpuEvent was recorded on a stream: wait() needs the stream that shall wait")
            if self._device_event is not None:
                assert stream is not None
                stream.wait_event(self._device_event)  # before it is forgotten: this may raise
            error = self._error
            if consume:
                self._recorded, self._device_event, self._error = False, None, None
        if error is not None:
            raise error

    def _set(self, stream: StreamLike | None, error: BaseException | None) -> None:
        with self._lock:
            if self._recorded:
                raise RuntimeError("CpuGpuEvent recorded again before its last record was waited for")
            self._device_event = stream.record_event() if stream is not None else None
            self._error = error
            self._recorded = True
            self._changed.notify_all()
