"""Pins: what holds a version, until when, and that nothing else does."""

import gc
import threading

import pytest

from eplb.streams import HostStreams
from tests.eplb.by_hand import is_graced, make_layer, published, sim_streams


def test_a_release_counts_once():
    layer = make_layer(HostStreams())
    with layer.choice() as one, layer.choice() as other:
        assert one.version is other.version is layer.current
    assert layer.held_by(1) == {0: 2} and layer.held_by(0) == {}
    one.release()
    one.release()
    assert layer.held_by(1) == {0: 1}
    del one
    assert layer.held_by(1) == {0: 1}
    del other
    assert layer.held_by(1) == {}


def test_a_pin_that_nobody_releases_lasts_until_it_is_freed():
    layer = make_layer(HostStreams())
    pin = layer.pin()
    fill, handoff = published(layer, 0)
    handoff.flip(layer.streams)
    newer = layer.pin()
    assert layer.held_by(1) == {0: 1} and layer.held_by(2) == {0: 1, 1: 1}
    assert not is_graced(fill, handoff)
    del pin
    assert is_graced(fill, handoff) and layer.held_by(2) == {1: 1}
    newer.release()
    assert not layer.is_pinned_before(2)


def test_no_event_is_recorded_where_no_flip_came_between():
    streams = sim_streams()
    layer = make_layer(streams)
    for _ in range(3):
        with layer.choice() as pin:
            pass
        pin.release()
    del pin
    layer.pin()
    assert not layer.held_by(1) and not streams.current().items


@pytest.mark.parametrize("how", ["release", "free", "release on another stream"])
def test_what_ran_under_an_old_version_holds_it_until_the_device_is_through(how):
    streams = sim_streams()
    layer = make_layer(streams)
    with layer.choice() as pin:
        pass
    fill, handoff = published(layer, 0)
    handoff.flip(streams)
    streams.drain()
    late = streams.computes[how == "release on another stream"]
    late.items.append(lambda: may_run[0])
    may_run = [False]
    streams.now = int(how == "release on another stream")
    if how != "free":
        pin.release()
    del pin
    streams.drain()
    assert not is_graced(fill, handoff)
    may_run[0] = True
    streams.drain()
    assert is_graced(fill, handoff)


def test_a_pin_may_be_freed_while_its_own_thread_holds_the_lock():
    """The garbage collector runs in the middle of anything."""
    layer = make_layer(HostStreams())
    pin, held = layer.choice().__enter__(), layer.pin()
    done = threading.Event()

    def free() -> None:
        nonlocal pin, held
        with layer.streams.gate.lock:
            pin = held = None
        done.set()

    threading.Thread(target=free, daemon=True).start()
    assert done.wait(10), "a deadlock"
    assert layer.held_by(1) == {}


def test_a_pin_lets_go_once():
    layer = make_layer(HostStreams())
    first, second = layer.pin(), layer.pin()
    assert layer.held_by(1) == {0: 2}
    first.release()
    first.release()
    assert layer.held_by(1) == {0: 1}
    del first, second
    assert layer.held_by(1) == {}


def test_pins_that_are_freed_do_not_pile_up_where_nothing_is_relocated():
    layer = make_layer(HostStreams())
    for _ in range(100):
        layer.pin()
    assert len(layer.pins.dropped) + len(layer.pins.held) < 4


def test_pins_lead_in_no_circle():
    layer = make_layer(HostStreams())
    pool = layer.pool
    gc.disable()
    try:
        pin = layer.pin()
        del layer
        assert len(pool._versions()) == 1
        pin.release()
        del pin
        assert pool._versions() == []
    finally:
        gc.enable()
