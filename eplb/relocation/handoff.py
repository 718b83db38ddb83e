"""Rebalance, publish → flip: `Handoff`, a version on its way to the main thread; `Inbox`, where it waits for a flip."""

import threading
from collections.abc import Sequence

from eplb.gate import EventLike
from eplb.relocation.events import CpuGpuEvent
from eplb.relocation.resident import ResidentExperts
from eplb.relocation.table import prepared_flip
from eplb.relocation.versions import Version
from eplb.streams import DeviceStreams


class Handoff:
    """One wave's new tables, staged on the device and published on the host.

    Args:
        version: its number.
        layers: whose tables to flip, and to which version each.
        staged: recorded on the side stream behind the upload of the tables.

    Attributes:
        layers: those above, without their versions.
        flipped: the compute stream's event behind the flip, once a thread has enqueued it.
    """

    def __init__(self, version: int, layers: Sequence[tuple[ResidentExperts, Version]], staged: CpuGpuEvent) -> None:
        self.version = version
        self.staged = staged
        self.flipped: EventLike | None = None
        # Prepared here, by the worker: the thread that flips has a forward to run, and nothing of this in its caches.
        self._versions = [(layer.versions, version) for layer, version in layers]
        self.layers = [layer for layer, _ in layers]
        self._copy = prepared_flip([layer.table for layer in self.layers])
        self._event = self.layers[0].streams.make_event() if self.layers else None

    def flip(self, streams: DeviceStreams) -> None:
        """Enqueue the flip on the calling thread's stream, between all forwards before and all after it.

        Once it has succeeded, another call does nothing. One that raised, at whatever point, is made again: until then the
        old versions stay in force, and their slots too (I6).

        Raises:
            RuntimeError, TimeoutError: of `Gate.wait_until_empty()`.
        """
        gate = streams.gate
        with gate.lock:
            if gate.inside or gate.dropped:
                gate.wait_until_empty()
            if self.flipped is not None:
                return
            stream, captured = gate.begin_flip()
            self.staged.wait(stream, timeout=0, consume=False)
            streams.run_here(self._copy)
            flipped = gate.end_flip(stream, self._event)
            if captured:
                for layer in self.layers:
                    layer.pins.used_on(layer.current.number, *captured)
            for versions, version in self._versions:
                versions.current = version
            self.flipped = flipped  # last: it is what grace asks for


class Inbox:
    """Holds at most one handoff. The worker posts it; a thread that steps flips it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.waiting: Handoff | None = None

    def post(self, handoff: Handoff) -> None:
        with self._lock:
            assert self.waiting is None or self.waiting.flipped is not None, "a version was skipped"
            self.waiting = handoff

    def flip(self, streams: DeviceStreams) -> bool:
        """Flip the handoff that waits, if there is one; whether there was. It stays there until it was flipped.

        Notes the calling thread's stream as one that runs forwards, as it may replay graphs of them.
        """
        with self._lock:
            handoff = self.waiting
            if handoff is not None:
                handoff.flip(streams)
                self.waiting = None
                return True
        gate = streams.gate
        with gate.lock:
            gate.note(gate.current_handle())
        return False
