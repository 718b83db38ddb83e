"""Rebalance, publish → flip: `Handoff`, a version on its way to the main thread; `Inbox`, where it waits for a flip."""

from collections.abc import Callable, Sequence

from eplb.gate import EventLike
from eplb.relocation.resident import ResidentExperts
from eplb.relocation.table import prepared_flip
from eplb.relocation.versions import Version
from eplb.rhythm import Rhythm
from eplb.streams import DeviceStreams


class Handoff:
    """One wave's new tables, staged on the device, where they are by now, and published on the host.

    Args:
        version: its number.
        layers: whose tables to flip, and to which version each.

    Attributes:
        layers: those above, without their versions.
        flipped: the compute stream's event behind the flip, once a thread has enqueued it.
        notify: called when that is so: grace has begun, and nothing else tells the worker.
        note_failure: called with what could not be done, and the error, in place of raising it.
    """

    notify: Callable[[], object] | None = None
    note_failure: Callable[[str, Exception], object] | None = None

    def __init__(self, version: int, layers: Sequence[tuple[ResidentExperts, Version]]) -> None:
        self.version = version
        self.flipped: EventLike | None = None
        # Prepared here, by the worker: the thread that flips has a forward to run, and nothing of this in its caches.
        self._versions = [(layer.versions, version) for layer, version in layers]
        self.layers = [layer for layer, _ in layers]
        streams = self.layers[0].streams
        self._copy = streams.prepared(prepared_flip([layer.table for layer in self.layers]))
        self._event, self._record = streams.make_event()

    def flip(self, streams: DeviceStreams) -> bool:
        """Enqueue the flip on the calling thread's stream, between all forwards before and all after it.

        Once it has succeeded, another call does nothing. One that failed, at whatever point, is made again: until then the
        old versions stay in force, and their slots too (I6).

        Returns:
            Whether this call has done it.

        Raises:
            RuntimeError, TimeoutError: of `Gate.wait_until_empty()`, unless there is `note_failure`.
        """
        # One function, and nothing that need not be called: behind a forward each takes some microseconds.
        gate = streams.gate
        try:
            with gate.lock:
                if gate.inside or gate.dropped:
                    gate.wait_until_empty()
                handle = gate.current_handle()
                stream = gate.ordered.get(handle) or gate.note(handle)
                if self.flipped is not None:
                    return False
                assert stream is not None, "no flip while the stream is captured"
                others = len(gate.seen) > 1
                captured = gate.order_before(handle, stream) if others else ()
                gate.last_flip = self._event
                try:
                    self._copy()
                finally:  # what is enqueued must be behind the event, also if nothing more comes of it
                    self._record(stream)
                if others:
                    gate.order_after(self._event)
                if captured:
                    for layer in self.layers:
                        layer.pins.used_on(layer.current.number, *captured)
                for versions, version in self._versions:
                    versions.current = version
                self.flipped = self._event  # last: it is what grace asks for
            if self.notify is not None:
                self.notify()
        except Exception as error:
            if self.note_failure is None:
                raise
            self.note_failure("a flip could not be enqueued", error)
            return False
        return True


class Inbox:
    """The worker posts a handoff; a thread that steps flips it. The next one is posted when it was.

    Args:
        notify, note_failure: of the handoffs.

    Attributes:
        posted: the last one; it waits while `flipped` is None.
        rhythm: where a thread that steps says so, while somebody asks.
    """

    def __init__(
        self, streams: DeviceStreams, notify: Callable[[], object], note_failure: Callable[[str, Exception], object]
    ) -> None:
        self.posted: Handoff | None = None
        self.rhythm: Rhythm | None = None
        self._streams = streams
        self._notify = notify
        self._note_failure = note_failure

    def post(self, handoff: Handoff) -> None:
        assert self.posted is None or self.posted.flipped is not None, "a version was skipped"
        handoff.notify, handoff.note_failure = self._notify, self._note_failure
        self.posted = handoff

    def adopt(self) -> None:
        """Flip what waits. The calling thread's stream counts as one that runs forwards, as it may replay graphs of them."""
        posted = self.posted
        if posted is not None and posted.flipped is None:
            posted.flip(self._streams)
            return
        try:
            self._streams.gate.enter()
        except Exception as error:
            self._note_failure("a stream could not be put behind the last flip; the next step tries again", error)
