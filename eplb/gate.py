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
    def record_event(self) -> Any:
        """A new event, recorded."""
        ...

    def wait_event(self, event: Any) -> None: ...


class CurrentStreams(Protocol):
    """The part of `DeviceStreams` that the gate uses."""

    def current(self) -> StreamLike: ...

    def current_handle(self) -> int: ...

    def is_capturing(self) -> bool: ...

    def is_captured(self, stream: StreamLike) -> bool: ...


class Gate:
    """Who reads the tables of a device, when they may change, and which streams are behind the last change.

    `lock` guards everything here, and the pins and current versions of all layers on the device.

    Attributes:
        keys: a new one for each pin.
        inside: the pins that choose now, by key, and the thread of each. The same thread may enter again.
        is_closing: how many flips wait.
        seen: the streams that ran forwards, by handle.
        ordered: those of them that are behind the last flip.
        last_flip: the event behind it.
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
        self.is_captured = streams.is_captured
        self.seen: dict[int, StreamLike] = {}
        self.last_flip: EventLike | None = None
        self._streams = streams
        self._changed = threading.Condition(self.lock)

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
            stream = self.seen.get(handle)
            if stream is None:
                stream = self._streams.current()
            if self.last_flip is not None:
                stream.wait_event(self.last_flip)
            self.seen[handle] = self.ordered[handle] = stream
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

    def order_before(self, handle: int, stream: StreamLike) -> list[StreamLike]:
        """Of the calling thread, which flips on it: make it wait for every other stream that ran a forward.

        Returns:
            The streams that it cannot wait for because they are being captured.
        """
        captured = self._join(stream)
        self.ordered = {handle: stream}
        return captured

    def order_after(self, flipped: EventLike) -> None:
        """Put all other streams behind the flip that was enqueued."""
        for handle, other in self.seen.items():
            if handle not in self.ordered and not self.is_captured(other):
                other.wait_event(flipped)
                self.ordered[handle] = other

    # ---- others

    def enter(self) -> None:
        """Note the calling thread's stream as one that runs forwards, as it may replay graphs of them."""
        with self.lock:
            self.note(self.current_handle())

    def join(self, stream: StreamLike) -> None:
        """Make `stream` wait for all forwards enqueued so far, on whichever stream."""
        with self.lock:
            self._join(stream)

    def events(self) -> list[EventLike]:
        """One behind all forwards enqueued so far, for each stream."""
        stream = self._streams.current()
        with self.lock:
            others = [other for other in self.seen.values() if other != stream]
            return [one.record_event() for one in (stream, *others) if not self.is_captured(one)]

    def _join(self, stream: StreamLike) -> list[StreamLike]:
        captured = []
        for other in self.seen.values():
            if other == stream:
                continue
            if self.is_captured(other):
                captured.append(other)
            else:
                stream.wait_event(other.record_event())
        return captured

    def _is_empty(self) -> bool:
        while self.dropped:
            self.leave(self.dropped[0])
            self.dropped.popleft()
        return not self.inside
