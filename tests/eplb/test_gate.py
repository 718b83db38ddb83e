"""The order between forwards and flips over streams and threads (I3), and that no part of it rests on the GIL (I8)."""

import threading
import time

import pytest

from eplb.relocation.handoff import Inbox
from eplb.relocation.resident import ResidentExperts
from eplb.streams import HostStreams
from tests.eplb.by_hand import filled, is_graced, make_layer, published, sim_streams
from tests.eplb.simulated import SimStream


def read(layer: ResidentExperts, expert: int) -> list[list[int]]:
    """Enqueues a forward on the current stream: choose, then read the weights. They are in the list once it has run."""
    found: list[list[int]] = []
    chosen: list[int] = []

    def choose() -> None:
        lane = int(layer.table.lanes_P[int(layer.table.offsets_E1[expert])])
        chosen.append(int(layer.table.lane_to_slot_S[lane]))

    with layer.choice() as pin:
        layer.streams.current().enqueue(choose)
    layer.streams.current().enqueue(lambda: found.append(layer.pool.tensors["weight"][chosen[0]].tolist()))
    pin.release()
    return found


def drain(stream: SimStream) -> None:
    while stream.advance():
        pass


def test_i3_a_stream_that_runs_its_first_forward_after_a_flip_is_behind_it():
    streams = sim_streams()
    layer = make_layer(streams)
    main, second = streams.computes
    read(layer, 0)
    drain(main)
    fill, handoff = published(layer, 0)
    busy = [True]
    main.items.append(lambda: not busy[0])  # `main` has a backlog
    handoff.flip(streams)
    streams.now = 1
    found = read(layer, 0)
    second.advance()  # the choice, if nothing held it up
    busy[0] = False
    drain(main)
    assert is_graced(fill, handoff)
    filled(layer, 1)  # takes the slot that expert 0 has left
    drain(second)
    assert found == [[100] * 4]


def test_i3_a_forward_that_chose_before_a_flip_and_computes_after_it_keeps_its_version():
    """On another thread. Neither the flip nor the pin alone would do."""
    streams = sim_streams()
    layer = make_layer(streams)
    second = streams.computes[1]
    streams.now = 1
    with layer.choice() as pin:
        pass
    streams.now = 0
    fill, handoff = published(layer, 0)
    handoff.flip(streams)
    streams.drain()
    assert not is_graced(fill, handoff) and layer.held_by(1) == {0: 1}
    done: list[int] = []
    streams.now = 1
    second.enqueue(lambda: done.append(1))  # its GEMMs
    pin.release()
    assert not is_graced(fill, handoff), "they have not run"
    assert layer.held_by(1) == {0: 1}
    streams.drain()
    assert done and is_graced(fill, handoff) and layer.held_by(1) == {}


def test_streams_are_ordered_before_and_after_a_flip():
    streams = sim_streams(3)
    layer = make_layer(streams)
    log: list[str] = []
    for now in range(3):
        streams.now = now
        read(layer, 0)
    streams.drain()
    _, handoff = published(layer, 0)
    for now in range(3):
        streams.computes[now].enqueue(lambda now=now: log.append(f"before {now}"))
    streams.now = 0
    handoff.flip(streams)
    for now in range(3):
        streams.computes[now].enqueue(lambda now=now: log.append(f"after {now}"))
    for now in (2, 0, 1):
        drain(streams.computes[now])
    assert log == ["before 2", "before 0", "before 1"]
    streams.drain()
    assert sorted(log[3:]) == ["after 0", "after 1", "after 2"]


def test_a_stream_that_only_steps_is_ordered_too():
    """It replays graphs of forwards, which go through no choice."""
    streams = sim_streams()
    layer = make_layer(streams)
    streams.now = 1
    streams.gate.enter()
    log: list[str] = []
    streams.computes[1].enqueue(lambda: log.append("replay"))
    _, handoff = published(layer, 0)
    streams.now = 0
    assert handoff.flip(streams)
    drain(streams.computes[0])
    assert not handoff.flipped.query()
    drain(streams.computes[1])
    drain(streams.computes[0])
    assert log and handoff.flipped.query()


def test_nothing_is_recorded_on_a_stream_that_is_captured():
    """A flip passes it by. It is put behind the flip when it runs a forward again, and holds grace until it can say so."""
    streams = sim_streams()
    layer = make_layer(streams)
    main, second = streams.computes
    captured = [False]
    streams.is_capturing = lambda: captured[0] and streams.current() is second
    streams.gate.is_captured = lambda stream: captured[0] and stream is second
    streams.now = 1
    read(layer, 0)  # runs, and is still on its way when the capture begins
    captured[0] = True
    before = len(second.items)
    with layer.choice() as pin:
        pass
    pin.release()
    streams.now = 0
    fill, handoff = published(layer, 0)
    handoff.flip(streams)
    assert len(second.items) == before
    drain(main)
    assert handoff.flipped.query() and not is_graced(fill, handoff)
    captured[0] = False
    assert not is_graced(fill, handoff)
    drain(second)
    assert is_graced(fill, handoff)
    streams.now = 1
    gate = streams.gate
    assert 1 not in gate.ordered
    read(layer, 0)
    assert gate.ordered[1] is second


# ---- threads


class Thread(threading.Thread):
    """Keeps what went wrong."""

    error: BaseException | None = None

    def __init__(self, work) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.join(30)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def test_a_flip_waits_for_those_inside_and_newcomers_wait_for_the_flip():
    layer = make_layer(HostStreams())
    gate = layer.streams.gate
    _, handoff = published(layer, 0)
    log: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with layer.choice():
            inside.set()
            assert leave.wait(10)
            with layer.choice():  # the same thread enters again, although a flip waits: no deadlock
                log.append("first")

    def flip() -> None:
        handoff.flip(layer.streams)
        log.append("flip")

    def newcomer() -> None:
        with layer.choice() as pin:
            log.append(f"newcomer under {pin.version.number}")

    threads = [Thread(first)]
    assert inside.wait(10)
    threads.append(Thread(flip))
    deadline = time.monotonic() + 10
    while not gate.is_closing and time.monotonic() < deadline:
        pass
    threads.append(Thread(newcomer))
    time.sleep(0.05)
    assert log == [] and layer.current.number == 0
    leave.set()
    for thread in threads:
        thread.end()
    assert log[0] == "first" and sorted(log[1:]) == ["flip", "newcomer under 1"]


def test_a_flip_gives_up_on_a_forward_that_does_not_leave_and_can_be_tried_again(monkeypatch):
    monkeypatch.setattr("eplb.gate.Gate.wait_until_empty.__defaults__", (0.05,))
    layer = make_layer(HostStreams())
    _, handoff = published(layer, 0)
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with layer.choice():
            inside.set()
            assert leave.wait(10)

    thread = Thread(stay)
    assert inside.wait(10)
    with pytest.raises(TimeoutError, match=r"another thread has been choosing experts for 0\.05 s"):
        handoff.flip(layer.streams)
    assert layer.current.number == 0
    with layer.choice():  # nobody waits for a flip that has given up
        pass
    leave.set()
    thread.end()
    handoff.flip(layer.streams)
    assert layer.current.number == 1


def test_a_step_inside_a_choice_is_an_error_and_no_deadlock():
    layer = make_layer(HostStreams())
    _, handoff = published(layer, 0)
    with layer.choice(), pytest.raises(RuntimeError, match=r"step\(\) was called inside a forward"):
        handoff.flip(layer.streams)
    handoff.flip(layer.streams)
    assert layer.current.number == 1


def test_a_choice_that_was_left_without_exit_does_not_stop_flips():
    """As a KeyboardInterrupt in the wrong place would."""
    layer = make_layer(HostStreams())
    pin = layer.choice().__enter__()
    fill, handoff = published(layer, 0)
    del pin
    handoff.flip(layer.streams)
    assert is_graced(fill, handoff)


def test_i8_i3_choices_flips_and_pins_from_several_threads(switch_often):
    """On a CPU a forward runs where it is enqueued: what it chose must be in its slot until it lets go."""
    layer = make_layer(HostStreams(), num_experts=3, num_shadow_slots=2)
    errors: list[BaseException] = []
    inbox, stop = Inbox(layer.streams, lambda: None, lambda _, error: errors.append(error)), threading.Event()
    weights, table = layer.pool.tensors["weight"], layer.table

    def forwards(seed: int) -> None:
        kept = []
        for number in range(10**6):
            if stop.is_set():
                return
            expert = (seed + number) % 3
            with layer.choice() as pin:
                slot = int(table.lane_to_slot_S[int(table.lanes_P[int(table.offsets_E1[expert])])])
                assert slot == pin.version.slots_S[pin.version.placement.lanes_WS[0].tolist().index(expert)]
            assert weights[slot, 0] == 100 + expert, "the slot was written under a forward"
            if number % 3 == 0:
                pin.release()
                pin.release()
            elif number % 3 == 1:
                kept = [pin]  # a graph that is freed some time later
            else:
                held = layer.pin()
                if number % 2:
                    held.release()
                del held
        assert kept

    def steps() -> None:
        while not stop.is_set():
            inbox.adopt()

    threads = [Thread(lambda seed=seed: forwards(seed)) for seed in range(3)] + [Thread(steps), Thread(steps)]
    try:
        deadline = time.monotonic() + 60
        for number in range(40):
            fill, handoff = published(layer, number % 3)
            inbox.post(handoff)
            while handoff.flipped is None or not is_graced(fill, handoff):
                assert time.monotonic() < deadline and all(thread.is_alive() for thread in threads), "stuck"
                time.sleep(0)
            weights[[slot for slot in range(5) if slot not in layer.newest.slots_S]] = -1
    finally:
        stop.set()
        for thread in threads:
            thread.end()
    assert not errors and layer.held_by(1000) == {} and layer.current.number == 40
