"""The handoff to the main thread: a version is flipped once, whatever fails or interrupts on the way (I6)."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import eplb
from eplb.relocation.handoff import Inbox
from tests.eplb.by_hand import is_graced_in_the_end, make_layer, published, sim_streams

ROOT = str(Path(eplb.__file__).parent)


class Interrupter:
    """Raises KeyboardInterrupt at the n-th point of eplb's code that `call` passes; `was_late` if it has fewer.

    The points are those where Python handles signals: where a function begins, and after a call of one written in C. Not
    in a finalizer: Python itself swallows what is raised there.
    """

    def __init__(self, point: int) -> None:
        self._left = point
        self.was_late = False

    def run(self, call: Callable[[], object]) -> None:
        sys.setprofile(self._profile)
        try:
            call()
            self.was_late = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)

    def _profile(self, frame, event, argument):
        code = frame.f_code
        if event in ("call", "c_return") and code.co_filename.startswith(ROOT) and code.co_name != "__del__":
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt


def at_every_point(check: Callable[[Interrupter], None]) -> int:
    for point in range(1, 1000):
        interrupter = Interrupter(point)
        check(interrupter)
        if interrupter.was_late:
            return point
    raise AssertionError("it never ends")


def test_an_interrupt_at_any_point_of_a_flip_loses_no_version():
    def check(interrupter: Interrupter) -> None:
        streams = sim_streams()
        layer = make_layer(streams)
        layer.pin()  # both streams have run forwards
        streams.now = 1
        layer.pin()
        fill, handoff = published(layer, 0)
        interrupter.run(lambda: handoff.flip(streams))
        streams.now = 0
        handoff.flip(streams)  # the next step, on another stream
        assert handoff.flipped is not None and not handoff.flip(streams)
        assert is_graced_in_the_end(fill, handoff, streams)
        assert layer.current is layer.newest and layer.current.number == 1
        assert layer.table.lanes_P.tolist() == [2, 1]
        _, handoff = published(layer, 1)  # and on it goes
        assert handoff.flip(streams)

    assert at_every_point(check) > 8


def test_an_interrupt_at_any_point_of_a_choice_leaves_nothing_behind():
    def check(interrupter: Interrupter) -> None:
        streams = sim_streams()
        layer = make_layer(streams)
        layer.pin()

        def forward() -> None:
            with layer.choice() as pin:
                pass
            pin.release()

        interrupter.run(forward)
        fill, handoff = published(layer, 0)
        handoff.flip(streams)
        assert is_graced_in_the_end(fill, handoff, streams)

    assert at_every_point(check) > 10


def test_i3_a_copy_that_was_enqueued_is_before_the_other_streams_forwards_though_the_flip_was_interrupted():
    streams = sim_streams()
    layer = make_layer(streams)
    layer.pin()
    _, handoff = published(layer, 0)
    streams.drain()
    copy = handoff._copy

    def interrupted() -> None:
        copy()
        raise KeyboardInterrupt

    handoff._copy = interrupted
    with pytest.raises(KeyboardInterrupt):
        handoff.flip(streams)
    streams.now = 1
    layer.pin()  # the first forward of another stream
    ran: list[int] = []
    streams.computes[1].enqueue(lambda: ran.append(1))
    while streams.computes[1].advance():
        pass
    assert streams.computes[0].items and not ran, "it may read a table that is being written"
    streams.drain()
    assert ran


def test_a_flip_that_fails_at_any_point_is_tried_again():
    for failing in range(1, 100):
        streams = sim_streams()
        layer = make_layer(streams)
        layer.pin()
        streams.now = 1
        layer.pin()
        fill, handoff = published(layer, 0)
        calls = 0

        def fail(work, at: int = failing):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls == at:
                    raise OSError("device lost")
                return work(*arguments)

            return call

        undo = [(stream, name, getattr(stream, name)) for stream in streams.computes for name in NAMES]
        undo.append((streams, "run", streams.run))
        for owner, name, work in undo:
            setattr(owner, name, fail(work))
        try:
            handoff.flip(streams)
        except OSError:
            assert handoff.flipped is None and layer.current.number == 0
        has_failed = calls >= failing
        for owner, name, work in undo:
            setattr(owner, name, work)
        streams.now = 0
        waits = len(streams.computes[0].items)
        if has_failed:
            assert handoff.flip(streams) and len(streams.computes[0].items) > waits
        assert is_graced_in_the_end(fill, handoff, streams) and layer.table.lanes_P.tolist() == [2, 1]
        if not has_failed:
            assert failing > 5, "the points of failure were not reached"
            return
    raise AssertionError("it never ends")


NAMES = ("record_event", "wait_event")


def test_a_version_is_flipped_once():
    streams = sim_streams()
    layer = make_layer(streams)
    _, handoff = published(layer, 0)
    handoff.flip(streams)
    flipped, items = handoff.flipped, len(streams.current().items)
    assert not handoff.flip(streams)
    assert handoff.flipped is flipped and len(streams.current().items) == items
    streams.now = 1  # a thread that came too late: its stream runs forwards all the same
    assert not handoff.flip(streams)
    assert set(streams.gate.seen) == {0, 1}


def test_a_step_tells_the_worker_what_it_flipped_and_what_it_could_not():
    streams = sim_streams()
    layer = make_layer(streams)
    said: list[str] = []
    inbox = Inbox(streams, lambda: said.append("flipped"), lambda what, error: said.append(f"{what}: {error}"))
    inbox.adopt()
    assert said == [] and streams.gate.seen  # what steps is known, before anything is flipped
    _, handoff = published(layer, 0)
    inbox.post(handoff)
    with layer.choice():
        inbox.adopt()
    assert said.pop().startswith("a flip could not be enqueued: step() was called inside a forward")
    assert handoff.flipped is None
    inbox.adopt()
    inbox.adopt()
    assert said == ["flipped"] and handoff.flipped is not None


def test_a_version_must_be_flipped_before_the_next_is_posted():
    streams = sim_streams()
    inbox = Inbox(streams, lambda: None, lambda *_: None)
    layer = make_layer(streams)
    _, handoff = published(layer, 0)
    inbox.post(handoff)
    with pytest.raises(AssertionError, match="a version was skipped"):
        inbox.post(handoff)
