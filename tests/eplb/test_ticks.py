"""How often a worker looks after its work, what wakes it, and that no look holds the interpreter for long."""

import threading
import time

import numpy as np
import pytest

from eplb import EplbConfig, EplbController
from eplb.planning.plan import Wave
from eplb.relocation.communicator import LocalCommunicator
from eplb.relocation.communicator.base import Awaited
from eplb.rhythm import Rhythm
from eplb.rounds.protocol import Agreed, Phase, Record, is_through
from eplb.streams import HostStreams
from eplb.worker import Worker, thread
from eplb.worker.looks import Looks
from eplb.worker.wake import Wake
from tests.eplb.by_hand import filled, make_layer, published, sim_streams
from tests.eplb.stub import QUICK, StubLayer
from tests.eplb.test_worker_pieces import Clock, ready


class ByHand(EplbController):
    """Its worker ticks when the test says so."""

    def _run_in_background(self, worker, streams):
        del worker, streams

    @property
    def worker(self) -> Worker:
        assert self._worker is not None
        return self._worker


@pytest.fixture
def by_hand():
    clock = Clock()
    config = EplbConfig(**{**QUICK, "round_interval": 0.02, "heartbeat_interval": 0.2}, planning="thread")
    controller = ByHand(config, clock=clock)
    controller.register(StubLayer())
    controller.step()
    for _ in range(4):
        controller.worker.tick()
    assert controller.health().phase == "IDLE"
    return controller, controller.worker, clock


# ---- when


def test_looks_at_the_device_become_rarer_the_longer_it_takes(by_hand):
    _, worker, clock = by_hand
    assert worker.seconds_to_next_tick() == 0.2  # at rest
    worker.relocation.zombies = [Unending()]
    worker.tick()
    began, seen = clock.now, []
    while clock.now < began + 1.0:
        seen.append(worker.seconds_to_next_tick())
        clock.now += seen[-1]
        worker.tick()
    assert seen[0] == 0.0005 and seen[-1] == 0.02 and seen == sorted(seen)
    # An eighth of the time that it has taken: of a transfer of 0.16 s 40 looks, not 160.
    assert sum(np.cumsum(seen) < 0.16) < 45


class Unending:
    def bury(self) -> bool:
        return False


def test_a_change_brings_quick_looks_back(by_hand):
    _, worker, clock = by_hand
    worker.relocation.zombies = [Unending()]
    worker.tick()
    clock.now += 1.0
    worker.tick()
    assert worker.seconds_to_next_tick() == 0.02
    worker.relocation.zombies = [Unending(), Unending()]
    worker.tick()
    assert worker.seconds_to_next_tick() == 0.0005


@pytest.mark.parametrize("awaited", [Awaited.COPIES, Awaited.FLIP])
def test_what_took_some_time_before_is_looked_at_shortly_before_that_is_over(awaited):
    looks, now = Looks(0.0), 0.0
    looks.note("first", awaited, now)
    assert looks.seconds(now, 1.0) == 0.0005
    looks.note("over", None, now := 0.008)
    assert looks.seconds(now, 1.0) == 1.0
    looks.note("second", awaited, now := 0.1)
    assert looks.seconds(now, 1.0) == pytest.approx(0.007)
    assert looks.seconds(now, 0.003) == 0.003, "but no later than this rank must speak"
    now += 0.007
    looks.note("second", awaited, now)
    assert looks.seconds(now, 1.0) == 0.0005, "and then often"
    assert looks.seconds(now + 0.313, 1.0) == pytest.approx(0.01)
    looks.note("over", None, now)
    looks.note("third", awaited, now := 0.2)
    assert looks.seconds(now, 1.0) == pytest.approx(0.007 * 7 / 8), "it may be quicker each time"


def test_what_may_come_at_once_is_looked_for_at_once_however_long_it_took_before():
    looks = Looks(0.0)
    looks.note("first", Awaited.STEP, 0.0)
    looks.note("over", None, 0.5)
    looks.note("second", Awaited.STEP, 1.0)
    assert looks.seconds(1.0, 1.0) == 0.0005


def test_a_bound_is_kept_up_with_however_long_the_wave_takes():
    """A burst is 4 ms: who looks more rarely loses bytes that were due."""
    looks = Looks(0.0)
    looks.note("copying", Awaited.PACE, 0.0)
    assert {looks.seconds(0.001 * ms, 0.02) for ms in range(500)} == {0.003}


def test_what_waits_for_its_turn_alone_goes_on_at_once_however_long_the_wave_takes():
    looks = Looks(0.0)
    looks.note("copying", Awaited.TURN, 0.0)
    assert {looks.seconds(0.001 * ms, 0.02) for ms in range(500)} == {0.0005}


@pytest.mark.parametrize("ended_by", ["an error here", "the loss of the rounds"])
def test_a_bound_is_not_kept_up_with_where_a_wave_goes_on_no_more(by_hand, monkeypatch, ended_by):
    """Other ranks that do not answer may leave it so for as long as the process lives."""
    _, worker, clock = by_hand
    monkeypatch.setattr(worker.relocation, "awaits", lambda: Awaited.PACE)
    worker.tick()
    clock.now += 1.0
    worker.tick()
    assert worker.seconds_to_next_tick() == 0.003
    if ended_by == "an error here":
        monkeypatch.setattr(worker, "_act", lambda: None)  # it stays in this place of the protocol
        worker._stuck_at = (Phase.FILL, 1, 0)
    else:
        worker.rounds.is_lost = True
    worker.tick()
    clock.now += 1.0
    worker.tick()
    assert worker.seconds_to_next_tick() > 0.01


def test_nobody_looks_for_a_flip_that_the_main_thread_will_tell_of():
    streams = sim_streams()
    layer = make_layer(streams)
    relocation, _, agreed = ready(layer, Clock())
    assert relocation.awaits() is None, "the others' votes, which wake the worker"
    relocation.publish(Agreed(phase=Phase.GRACE, proposal=agreed.proposal, num_waves=2, version=1))
    while streams.side.advance():
        pass
    assert relocation.awaits() is None and relocation.stage_of_wave()[1] == (1, False)
    relocation.handoff.flip(streams)
    assert relocation.awaits() is Awaited.FLIP and relocation.stage_of_wave()[1] == (1, True)


def test_a_step_that_flips_wakes_the_worker(by_hand):
    controller, worker, _ = by_hand
    layer = controller._layers[0].resident
    controller._wake.clear()
    controller.step()
    assert not controller._wake.wait(0)
    _, handoff = published(layer, 0)
    worker.inbox.post(handoff)
    controller.step()
    assert handoff.flipped is not None and controller._wake.wait(0)


def test_a_wake_that_two_threads_wait_for_blocks_neither():
    """``use_async=False``: a `close()` beside a step."""
    wake = Wake()
    threads = [threading.Thread(target=lambda: [wake.clear() for _ in range(20000)], daemon=True) for _ in range(2)]
    for one in threads:
        one.start()
    while any(one.is_alive() for one in threads):
        wake.set()
    wake.clear()
    assert not wake.wait(0)
    wake.set()
    assert wake.wait(0) and wake.wait(0), "it stays set"
    wake.set()
    wake.clear()
    assert not wake.wait(0)


# ---- what they say


@pytest.mark.parametrize(
    ("phase", "record", "expected"),
    [
        (Phase.IDLE, Record(graced=5), (False, False)),
        (Phase.LOAD, Record(), (False, False)),
        (Phase.PLANNING, Record(), (False, True)),  # rank 0 plans, the others have nothing to do
        (Phase.PREPARE, Record(prepared=5), (False, False)),
        (Phase.PREPARE, Record(prepared=6), (True, True)),
        (Phase.FILL, Record(prepared=6), (False, False)),
        (Phase.FILL, Record(prepared=6, filled=6), (True, True)),
        (Phase.GRACE, Record(filled=5, graced=4), (False, False)),
        (Phase.GRACE, Record(filled=5, graced=5), (True, True)),
    ],
    ids=str,
)
def test_who_has_done_its_part_of_a_phase(phase, record, expected):
    agreed = Agreed(phase=phase, version=5)
    assert tuple(is_through(agreed, record, rank) for rank in (0, 1)) == expected


def test_a_rank_that_is_through_waits_in_the_round_and_not_before_it(by_hand):
    """Or the others' news would wait for its next turn; one that is not through is silent until it has news."""
    _, worker, clock = by_hand
    rounds = worker.rounds
    rounds.agreed, rounds._spoken = Agreed(phase=Phase.FILL, version=1), Record(prepared=2)
    rounds.spoke_at = clock.now
    assert not rounds.is_worth_saying(Record(prepared=2))
    assert rounds.is_worth_saying(Record(prepared=2), is_through=True)
    assert rounds.is_worth_saying(Record(prepared=2, filled=2))
    clock.now += 0.02
    assert rounds.is_worth_saying(Record(prepared=2))


# ---- what they cost


def test_health_is_made_anew_when_something_has_changed_or_some_time_has_passed(by_hand):
    _, worker, clock = by_hand
    clock.now += 1.0
    worker.tick()
    before = worker.health
    worker.tick()
    assert worker.health is before
    worker.note_failure("a test", ValueError("news"))
    worker.tick()
    assert worker.health is not before and worker.health.last_error == "ValueError: news"
    before = worker.health
    clock.now += 0.02
    worker.tick()
    assert worker.health is not before


def test_a_thread_breathes_only_after_it_has_held_the_interpreter_for_some_time(by_hand, monkeypatch):
    controller, worker, _ = by_hand
    slept, now = [], [0.0]
    worker_thread = thread.WorkerThread(worker, HostStreams(), controller._wake, controller.config)
    assert worker.relocation.breathe == worker_thread._breathe
    monkeypatch.setattr(thread.time, "sleep", slept.append)
    monkeypatch.setattr(thread.time, "perf_counter", lambda: now[0])
    worker_thread._tick()
    worker_thread._breathe()
    assert slept == []
    now[0] += 1.5e-4
    worker_thread._breathe()
    worker_thread._breathe()
    assert slept == [thread._BREATH] and 0 < thread._BREATH < 1e-3


@pytest.mark.parametrize(("bound", "waits"), [("auto", 1), (10**9, 1), (None, 0)])
def test_a_thread_keeps_to_the_rhythm_of_the_steps_where_relocations_have_a_bound(by_hand, bound, waits):
    controller, worker, _ = by_hand
    config, seen, stages = EplbConfig(max_bytes_per_second=bound), [], []
    worker_thread = thread.WorkerThread(worker, HostStreams(), controller._wake, config)
    assert worker_thread._tick() and worker.inbox.rhythm is None, "at rest nobody asks"
    worker.relocation.zombies = [Unending()]
    worker_thread._tick()
    assert (worker.inbox.rhythm is not None) == waits
    if worker.inbox.rhythm is not None:
        worker.inbox.rhythm.wait = lambda: seen.append(len(stages))
    worker.rounds.connect = lambda: stages.append("connect")
    worker_thread._tick()
    assert seen[:1] == waits * [0] and stages == ["connect"], "before it ticks"
    seen.clear()
    worker_thread._breathed_at -= 1.0
    worker_thread._breathe()
    assert len(seen) == waits


def test_what_was_held_before_goes_on_to_count_if_a_tick_has_waited_for_nothing(by_hand):
    controller, worker, _ = by_hand
    worker_thread = thread.WorkerThread(worker, HostStreams(), controller._wake, controller.config)
    rhythm = worker.inbox.rhythm = Rhythm()
    worker_thread._breathed_at = began = -1.0
    worker_thread._keep_out()
    assert worker_thread._breathed_at == began
    rhythm.wait = lambda: True
    worker_thread._keep_out()
    assert worker_thread._breathed_at > began


def test_a_step_says_so_while_somebody_asks(by_hand):
    controller, worker, _ = by_hand
    controller.step()
    rhythm = worker.inbox.rhythm = Rhythm()
    began = time.perf_counter()
    for number in range(1, 12):  # snapshots of the load too
        controller.step()
        steps, at = rhythm.last
        assert steps == controller._steps and began <= at <= time.perf_counter(), number
    worker.inbox.rhythm = None
    controller.step()
    assert rhythm.last == (steps, at)


def test_a_wave_is_prepared_in_pieces():
    """Between layers and moves other threads can have the interpreter."""
    breaths, streams = [], sim_streams()
    relocation, _, _ = ready(make_layer(streams, num_experts=4), Clock())
    relocation.fill = None
    relocation.breathe = lambda: breaths.append(1)
    wave = Wave(filled(make_layer(streams), 0).updates)
    layer = make_layer(streams)
    relocation._layers = [layer]
    assert relocation.prepare(wave, Agreed(phase=Phase.PREPARE), LocalCommunicator(streams))
    assert len(breaths) >= 3 and layer.table.lane_to_slot_S.tolist() == [0, 1, -1]
    while streams.side.advance():
        pass
    assert layer.table.lane_to_slot_S.tolist() == [0, 1, 2]
