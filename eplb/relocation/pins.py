"""Rebalance, grace: `Pin`, a forward or backward that uses a version; `Pins`, all of a layer. They hold up grace (I3)."""

import threading
from collections import deque
from typing import Any

from eplb.gate import EventLike, Gate, StreamLike
from eplb.relocation.versions import Version, Versions


class Pins:
    """Which versions of one layer are in use, on the host or still on the device. `gate.lock` guards it.

    Attributes:
        held: the version number of each pin, by key.
        dropped: key and stream of pins that were freed without a release. A deque, because a finalizer may run while
            its own thread holds the lock, and appending needs none.
    """

    def __init__(self, versions: Versions, gate: Gate) -> None:
        self.versions = versions
        self.gate = gate
        self.held: dict[int, int] = {}
        self.dropped: deque[tuple[int, StreamLike | None]] = deque()
        self._unrecorded: list[tuple[int, StreamLike]] = []
        self._running: list[tuple[int, EventLike]] = []

    def held_by(self, number: int) -> dict[int, int]:
        """How many forwards and backwards hold each version older than `number`: to come, or still on the device.

        On the thread that relocates: it asks the device for events, which a graph capture forbids to other threads.
        """
        with self.gate.lock:
            self.collect_dropped()
            self._record()
            self._running = [one for one in self._running if not one[1].query()]
            used = [*self.held.values(), *(at for at, _ in self._unrecorded), *(at for at, _ in self._running)]
        # No Counter: it asks all classes of the process whether a generator is a mapping, which takes up to 0.2 s.
        held: dict[int, int] = {}
        for at in used:
            if at < number:
                held[at] = held.get(at, 0) + 1
        return held

    def let_go(self, key: int, *streams: StreamLike | None) -> None:
        """With the lock held: nothing more is enqueued under the pin; what was is on `streams`. Again does nothing."""
        number = self.held.get(key)
        # While a version is current, the next flip waits for all streams anyway.
        if number is not None and number != self.versions.current.number:
            self.used_on(number, *streams)
        self.held.pop(key, None)  # last: an interrupt before it costs a second event

    def used_on(self, number: int, *streams: StreamLike | None) -> None:
        """With the lock held: what is on `streams` so far may use a version that is no longer current."""
        self._unrecorded += [(number, stream) for stream in dict.fromkeys(streams) if stream is not None]
        self._record()

    def collect_dropped(self) -> None:
        """With the lock held. Asks nothing of the device, unless a pin of an older version was dropped."""
        while self.dropped:
            self.let_go(*self.dropped[0])
            self.dropped.popleft()  # last: an interrupt before it loses nothing

    def _record(self) -> None:
        captured = []
        for number, stream in self._unrecorded:
            if self.gate.is_captured(stream):  # nothing may be recorded there now
                captured.append((number, stream))
            else:
                self._running.append((number, stream.record_event()))
        self._unrecorded = captured


class Pin:
    """Holds one version of a layer from `with` on until `release()`, or until it is freed.

    Inside the `with` no table changes. On entry the calling thread's stream is put behind the last flip.

    Attributes:
        version: what it holds.
    """

    __slots__ = ("_has_chosen", "_is_released", "_key", "_pins", "_stream", "version")

    version: Version

    def __init__(self, pins: Pins) -> None:
        self._has_chosen = self._is_released = True
        self._pins = pins

    def __enter__(self) -> "Pin":
        pins = self._pins
        gate = pins.gate
        handle, thread = gate.current_handle(), threading.get_ident()
        with gate.lock:
            if gate.is_closing and thread not in gate.inside.values():
                gate.wait_until_open()
            if pins.dropped:  # here too, or they would pile up where nothing is ever relocated
                pins.collect_dropped()
            stream = gate.ordered.get(handle)
            self._stream = gate.note(handle) if stream is None else stream
            self.version = pins.versions.current
            self._key = key = next(gate.keys)
            self._has_chosen = self._is_released = False  # from here on, whatever interrupts is undone by the finalizer
            gate.inside[key] = thread
            pins.held[key] = self.version.number
        return self

    def __exit__(self, *exception: Any) -> None:
        gate = self._pins.gate
        with gate.lock:
            del gate.inside[self._key]
            if gate.is_closing:
                gate.leave(self._key)
        self._has_chosen = True

    def release(self) -> None:
        """Nothing more is enqueued under this version on the calling thread's stream. A second call does nothing."""
        if self._is_released:
            return
        pins = self._pins
        gate = pins.gate
        handle = gate.current_handle()
        with gate.lock:
            stream = gate.ordered.get(handle)
            if stream is None:  # a backward may run on a stream that ran no forward
                stream = gate.note(handle)
            if self.version is pins.versions.current:
                pins.held.pop(self._key, None)
            else:
                pins.let_go(self._key, self._stream, stream)
        self._is_released = True

    def __del__(self) -> None:
        if not getattr(self, "_has_chosen", True):  # its constructor may have been interrupted
            self._pins.gate.dropped.append(self._key)
        if not getattr(self, "_is_released", True):
            self._pins.dropped.append((self._key, self._stream))
