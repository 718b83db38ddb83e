"""Rebalance, flip: `Gate` orders forwards and flips on one device, over all its streams and threads (I3).

A forward chooses its replicas inside the gate. A flip closes the gate: it waits until nobody is inside, which takes host
time only, and orders every stream that ran a forward before and after itself.
"""

import itertools
import threading
from collections import deque
from typing import Any, Protocol

# Seconds. A choice takes microseconds, but the first one may compile a kernel; a flip that gives up is tried again.
CLOSE_TIMEOUT = 10.0
# Seconds for which a choice waits for flips; each of them ends within its own time.
OPEN_TIMEOUT = 60.0


class EventLike(Protocol):
    def query(self) -> bool:
        """True when all work recorded before the event has completed. Never blocks."""
        ...


class StreamLike(Protocol):
    def record_event(self, event: Any = None) -> Any:
        """Records `event`, a new one if None, and returns it."""
        ...

    def wait_event(self, event: Any) -> None: ...


class CurrentStreams(Protocol):
    """The part of `DeviceStreams` that the gate uses."""

    def current(self) -> StreamLike: ...

    def current_handle(self) -> int: ...

    def is_capturing(self, stream: StreamLike | None = None) -> bool: ...


class Gate:
    """Who reads the tables of a device, when they may change, and which streams are behind the last change.

    `lock` guards everything here, and the pins and current versions of all layers on the device.

    Attributes:
        keys: a new one for each pin.
        inside: the pins that choose now, by key, and the thread of each. The same thread may enter again.
        is_closing: how many flips wait.
        ordered: the streams that ran forwards and are behind the last flip, by handle.
        dropped: keys of pins that were freed inside, as by a KeyboardInterrupt. A deque, because a finalizer may run
            while its own thread holds the lock, and appending needs none.
    """

    def __init__(self, streams: CurrentStreams) -> None:
        self.lock = threading.Lock()
        self.keys = itertools.count()
        self.inside: dict[int, int] = {}
        self.is_closing = 0
        self.ordered: dict[int, StreamLike] = {}
        self.dropped: deque[int] = deque()
        self.current_handle = streams.current_handle
        self.is_captured = streams.is_capturing
        self._streams = streams
        self._changed = threading.Condition(self.lock)
        self._seen: dict[int, StreamLike] = {}
        self._last_flip: EventLike | None = None

    # ---- with the lock held

    def wait_until_open(self) -> None:
        """Wait for the flips that have begun.

        Raises:
            TimeoutError: they did not end.
        """
        if not self._changed.wait_for(lambda: not self.is_closing, OPEN_TIMEOUT):
            raise TimeoutError(f"a flip of expert tables did not end within {OPEN_TIMEOUT} s")

    def leave(self, key: int) -> None:
        """The pin has chosen, or never will. A second call does nothing."""
        self.inside.pop(key, None)
        if self.is_closing and not self.inside:
            self._changed.notify_all()

    def note(self, handle: int) -> StreamLike | None:
        """The calling thread's stream runs a forward: put it behind the last flip, and before the next.

        None for a stream that is being captured: what will run is the graph, wherever it is replayed.
        """
        stream = self.ordered.get(handle)
        if stream is None and not self._streams.is_capturing():
            stream = self._seen.get(handle)
            if stream is None:
                stream = self._streams.current()
            if self._last_flip is not None:
                stream.wait_event(self._last_flip)
            self._seen[handle] = self.ordered[handle] = stream
        return stream

    # ---- flips

    def wait_until_empty(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """With the lock held: until it is given up, nobody is inside. Those who come meanwhile wait, so a flip cannot starve.

        Raises:
            RuntimeError: the calling thread is inside itself.
            TimeoutError: another thread did not leave in time.
        """
        if not self._is_empty() and threading.get_ident() in self.inside.values():
            raise RuntimeError("step() was called inside a forward, between the choice of its experts and its end")
        self.is_closing += 1
        try:
            if not self._changed.wait_for(self._is_empty, timeout):
                raise TimeoutError(f"a forward on another thread has been choosing experts for {timeout} s")
        finally:
            self.is_closing -= 1
            self._changed.notify_all()

    def begin_flip(self) -> tuple[StreamLike, list[StreamLike]]:
        """Behind `wait_until_empty()`: make the calling thread's stream wait for every stream that ran a forward.

        Returns:
            The calling thread's stream, and those that it cannot wait for because they are being captured.
        """
        handle = self.current_handle()
        stream = self.ordered.get(handle) or self.note(handle)
        assert stream is not None, "no flip while the stream is captured"
        captured = self._join(stream) if len(self._seen) > 1 else []
        self.ordered = {handle: stream}
        return stream, captured

    def end_flip(self, stream: StreamLike, event: EventLike | None = None) -> EventLike:
        """After the flip was enqueued on `stream`: put all other streams behind it.

        Returns:
            What is recorded behind it: `event`, or a new one.
        """
        flipped: EventLike = stream.record_event(event)
        self._last_flip = flipped
        if len(self._seen) > 1:
            for handle, other in self._seen.items():
                if handle not in self.ordered and not self._streams.is_capturing(other):
                    other.wait_event(flipped)
                    self.ordered[handle] = other
        return flipped

    # ---- others who need to be behind all forwards

    def join(self, stream: StreamLike) -> None:
        """Make `stream` wait for all forwards enqueued so far, on whichever stream."""
        with self.lock:
            self._join(stream)

    def events(self) -> list[EventLike]:
        """One behind all forwards enqueued so far, for each stream."""
        stream = self._streams.current()
        with self.lock:
            others = [other for other in self._seen.values() if other != stream]
            return [one.record_event() for one in (stream, *others) if not self._streams.is_capturing(one)]

    def _join(self, stream: StreamLike) -> list[StreamLike]:
        captured = []
        for other in self._seen.values():
            if other == stream:
                continue
            if self._streams.is_capturing(other):
                captured.append(other)
            else:
                stream.wait_event(other.record_event())
        return captured

    def _is_empty(self) -> bool:
        while self.dropped:
            self.leave(self.dropped[0])
            self.dropped.popleft()
        return not self.inside
