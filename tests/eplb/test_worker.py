"""A worker that meets errors, hangs, waits or ends: `health()` says so, and what can go on does."""

import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from eplb import EplbController
from eplb.planning.policy import Proposal
from eplb.rounds.protocol import Work
from eplb.streams import HostStreams
from tests.eplb.stub import Recording, StubLayer, controller_of

# ---- a worker that fails, hangs or ends (I6: health says so)


def eventually(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.002)


def steps_until(controller: EplbController, condition: Callable[[], bool], what: str) -> None:
    eventually(lambda: controller.step() or condition(), what)


@pytest.mark.parametrize("use_async", [True, False])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("no"), MemoryError("none")], ids=repr)
def test_whatever_a_policy_raises_is_state_and_the_worker_goes_on(error, use_async):
    class Raising(Recording):
        def propose(self, load_LNE, physical_LWP, topology):
            if len(self.asked) < 1:
                self.asked.append(load_LNE)
                raise error
            return super().propose(load_LNE, physical_LWP, topology)

    policy = Raising()
    with controller_of(use_async=use_async, policy=policy, backoff=0.01, max_backoff=0.01) as controller:
        steps_until(controller, lambda: len(policy.asked) > 1, "it plans again")
        assert type(error).__name__ in controller.health().last_error
        assert controller.metrics().abandoned == controller.metrics().failures == 1


class Hanging(Recording):
    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def propose(self, load_LNE, physical_LWP, topology):
        proposal = super().propose(load_LNE, physical_LWP, topology)
        self.release.wait(20)
        return proposal


@pytest.mark.parametrize("use_async", [True, False])
def test_a_policy_that_does_not_return_is_given_up(use_async):
    policy, options = Hanging(), {"planning_timeout": 0.1, "backoff": 0.01, "max_backoff": 0.02}
    with controller_of(use_async=use_async, policy=policy, **options) as controller:
        steps_until(controller, lambda: controller.metrics().abandoned > 1, "it is given up, time and again")
        health = controller.health()
        assert "policy has not returned from an earlier proposal" in health.last_error and len(policy.asked) == 1
        assert health.state in ("idle", "rebalancing") and health.last_tick_seconds < 5.0
        policy.release.set()
        steps_until(controller, lambda: len(policy.asked) > 1, "it is asked again when it has returned")


def test_rounds_go_on_while_a_policy_thinks():
    policy = Hanging()
    with controller_of(policy=policy) as controller:
        steps_until(controller, lambda: len(policy.asked) > 0, "it is asked")
        before = controller.metrics().rounds
        eventually(lambda: controller.metrics().rounds > before + 5, "the other ranks hear that this one lives")
        assert controller.health().phase == "PLANNING"
        policy.release.set()
        eventually(lambda: controller.health().phase == "IDLE", "its plan is used")
        assert controller.metrics().failures == 0


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError, OSError])
def test_a_logging_handler_that_raises_does_not_end_the_worker(error):
    class Handler(logging.Handler):
        def emit(self, record):
            raise error("from a handler")

    class Failing(Recording):
        def propose(self, load_LNE, physical_LWP, topology):
            super().propose(load_LNE, physical_LWP, topology)
            raise ZeroDivisionError(f"number {len(self.asked)}")

    policy, handler = Failing(), Handler()
    logger = logging.getLogger("eplb")
    logger.addHandler(handler)
    try:
        with controller_of(policy=policy, backoff=0.01, max_backoff=0.02) as controller:
            steps_until(controller, lambda: len(policy.asked) > 2, "it goes on")
            assert controller._thread.is_alive() and controller.health().last_error is not None
    finally:
        logger.removeHandler(handler)


def test_an_error_that_cannot_be_logged_is_kept():
    class Handler(logging.Handler):
        def emit(self, record):
            raise OSError("disk full")

    controller, handler = controller_of(use_async=False), Handler()
    logging.getLogger("eplb").addHandler(handler)
    try:
        controller.step()
        controller._worker.fail(ValueError("what matters"))
    finally:
        logging.getLogger("eplb").removeHandler(handler)
    assert controller.health().last_error == "ValueError: what matters" and controller.metrics().failures == 2


def test_an_error_that_cannot_be_printed_is_kept_by_its_name():
    class SilentError(Exception):
        def __str__(self):
            raise MemoryError

    controller = controller_of(use_async=False)
    controller.step()
    controller._worker.fail(SilentError())
    assert controller.health().last_error == "SilentError" and controller.metrics().failures >= 1


def test_a_worker_that_raises_in_every_tick_is_lost_and_recovers():
    with controller_of(peer_timeout=0.1, backoff=0.05, max_backoff=0.05) as controller:
        controller.step()
        eventually(lambda: controller.health().state == "idle", "it runs")
        tick, failures = controller._worker.tick, controller.metrics().failures

        def raising():
            raise SystemExit("no tick")

        controller._worker.tick = raising
        eventually(lambda: controller.health().state == "lost", "health looks itself")
        assert 1 <= controller.metrics().failures - failures < 20, "it backs off"
        health = controller.health()
        assert "fails in every tick" in health.reason and health.last_error == "SystemExit: no tick"
        controller._worker.tick = tick
        eventually(lambda: controller.health().state == "idle", "it starts again")


def test_a_worker_that_hangs_is_lost():
    with controller_of(peer_timeout=0.1, close_timeout=0.2) as controller:
        controller.step()
        release, tick = threading.Event(), controller._worker.tick
        controller._worker.tick = lambda: release.wait(20) and tick()
        eventually(lambda: controller.health().state == "lost", "health looks itself")
        health = controller.health()
        assert "hangs" in health.reason and health.seconds_waiting > 0.1 and health.last_tick_seconds > 0.1
        release.set()
        eventually(lambda: controller.health().state == "idle", "it goes on")


def test_a_worker_whose_thread_has_ended_is_lost(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    with controller_of() as controller:
        controller.step()
        thread = controller._thread

        def ending():
            raise SystemExit

        thread._tick = ending
        thread.join(10)
        health = controller.health()
        assert health.state == "lost" and "has ended: SystemExit" in health.reason


def test_an_idle_worker_sleeps():
    with controller_of(heartbeat_interval=0.1, round_interval=0.1, step_interval=100) as controller:
        controller.step()
        eventually(lambda: controller.health().state == "idle", "it is idle")
        ticks, tick = [], controller._worker.tick

        def counting():
            ticks.append(time.monotonic())
            tick()

        controller._worker.tick = counting
        controller._wake.set()
        time.sleep(0.5)
        assert 2 <= len(ticks) <= 8


class NoCaptureMode(HostStreams):
    """A machine without the driver's library."""

    def __init__(self) -> None:
        super().__init__()
        self.tries: list[float] = []
        self.broken = True

    def adopt_thread(self) -> None:
        self.tries.append(time.monotonic())
        if self.broken:
            raise OSError("libcuda.so.1: cannot open shared object file")


def test_a_worker_whose_thread_cannot_be_prepared_speaks():
    streams, policy = NoCaptureMode(), Recording()
    with controller_of(StubLayer(streams=streams), policy=policy, backoff=0.05, max_backoff=0.2) as controller:
        steps_until(controller, lambda: len(policy.asked) > 0, "it balances all the same")
        assert "libcuda.so.1" in controller.health().last_error
        assert controller.metrics().abandoned == 0, "the other ranks need not give anything up"
        eventually(lambda: len(streams.tries) > 3, "it tries again")
        before_last, last = streams.tries[2:4]
        assert last - before_last > 0.1, "later each time"
        streams.broken = False
        tries = len(streams.tries)
        eventually(lambda: len(streams.tries) > tries, "until it succeeds")


# ---- closing


def test_layers_of_a_worker_that_did_not_end_are_not_handed_on():
    layer = StubLayer()
    controller = controller_of(layer, close_timeout=0.1, quiesce_timeout=0.1)
    controller.step()
    release, entered, tick = threading.Event(), threading.Event(), controller._worker.tick

    def hanging():
        entered.set()
        release.wait(20)
        tick()

    controller._worker.tick = hanging
    assert entered.wait(10)
    controller.close()
    assert controller.health().state == "closed" and "has not ended" in controller.health().reason
    with pytest.raises(ValueError, match="is closed, but whose worker has not ended"):
        EplbController().register(layer)
    with pytest.raises(TimeoutError, match="did not end within quiesce_timeout"), layer.resident.quiesced():
        pytest.fail("a tick may still copy experts")
    release.set()
    eventually(lambda: controller.is_over, "it ends")
    with layer.resident.quiesced():
        pass
    with controller_of(layer) as other:
        assert layer.resident.controller is other


def test_a_controller_that_failed_to_start_can_be_closed():
    class NoStreams(HostStreams):
        def run(self, stream, work):
            raise OSError("no device")

    layer = StubLayer()
    layer.resident.streams = NoStreams()
    controller = controller_of(layer)
    with pytest.raises(OSError, match="no device"):
        controller.step()
    controller.close()


# ---- load windows are used once


class Losing:
    """A recorder's `_download` that raises once, and then works again."""

    def __init__(self, recorder) -> None:
        self._recorder, self._download = recorder, recorder._download
        recorder._download = self

    def __call__(self, buffer):
        self._recorder._download = self._download
        raise OSError("no window")


def test_a_window_that_is_lost_counts_as_none_and_not_as_the_one_before():
    policy, layer = Recording(), StubLayer()
    controller = controller_of(layer, use_async=False, policy=policy)
    for step in range(6):
        layer.resident.load_E += 10 if step < 2 else 14
        if step == 3:
            Losing(controller._windows[Work.REBALANCE])
        controller.step()
    assert [int(load.sum()) for load in policy.asked] == [40, 0, 112]
    assert [int(load.sum()) for load in controller._worker.planning.load_trace()] == [40, 0, 112]


def test_a_window_is_sent_once():
    policy, layer = Recording(), StubLayer()
    with controller_of(layer, policy=policy) as controller:
        for number in range(1, 6):
            for _ in range(2):
                layer.resident.load_E += number
                controller.step()
            eventually(lambda: len(policy.asked) == number, "the policy is asked")  # noqa: B023
        controller._worker.planning.propose(Work.REBALANCE)  # and again, before there is another window
        controller._wake.set()
        eventually(lambda: len(policy.asked) == 6, "the policy is asked")
        assert [int(load.sum()) for load in policy.asked] == [4, 16, 24, 32, 40, 0]


@pytest.mark.parametrize("forecast_windows", [1, 3, 8])
def test_the_policy_gets_the_forecast_of_as_many_windows(forecast_windows):
    """Which swing from window to window, so that the forecast is the mean of those that are seen."""
    policy, layer = Recording(), StubLayer()
    controller = controller_of(layer, use_async=False, policy=policy, forecast_windows=forecast_windows)
    windows = [torch.tensor([10, 30, 8, 32]), torch.tensor([30, 10, 32, 8])] * 3
    for window_E in windows:
        for _ in range(2):
            layer.resident.load_E += window_E
            controller.step()
    assert len(policy.asked) == 6
    for index, asked in enumerate(policy.asked):
        seen = windows[: index + 1][-forecast_windows:]
        expected_E = torch.stack(seen).double().mean(dim=0) if len(seen) > 2 else seen[-1]
        np.testing.assert_allclose(asked[0, 0] / asked.sum(), expected_E / 80, rtol=1e-3)


# ---- two controllers of one pool


class Restless(Recording):
    """The one redundant expert is a replica of another expert each time."""

    def propose(self, load_LNE, physical_LWP, topology):
        super().propose(load_LNE, physical_LWP, topology)
        twice = len(self.asked) % 4
        physical_P = np.array(sorted([0, 1, 2, 3, twice]))
        return Proposal(physical_P.reshape(1, 1, 5), np.where(physical_P == twice, 0.5, 1.0).reshape(1, 1, 5))


def test_a_publication_that_failed_is_tried_again_after_a_delay():
    with controller_of(StubLayer(num_redundant=1), policy=Restless(), backoff=0.1) as controller:
        controller.step()
        relocation, tried = controller._worker.relocation, []
        publish = relocation.publish

        def fail_once(agreed):
            tried.append(time.monotonic())
            if len(tried) == 1:
                raise OSError("device lost")
            publish(agreed)

        relocation.publish = fail_once
        steps_until(controller, lambda: controller.metrics().waves > 0, "it is published")
        assert tried[1] - tried[0] >= 0.1 and controller.metrics().failures == 1


def test_two_controllers_take_turns_with_one_free_slot(caplog):
    pool = StubLayer.make_pool(2 * 5 + 1)
    first, second = (
        controller_of(StubLayer(pool=pool, num_redundant=1), policy=Restless(), backoff=0.05) for _ in range(2)
    )
    with caplog.at_level(logging.WARNING, logger="eplb"), first, second:
        both = (first, second)
        eventually(
            lambda: [controller.step() for controller in both] and all(c.metrics().waves > 20 for c in both),
            "both move",
        )
        for controller in both:
            assert controller.metrics().failures == 0 and controller.health().last_error is None
    assert not caplog.records


def test_a_wave_that_waits_too_long_for_a_slot_is_given_up_quietly(caplog):
    """As where another controller holds it on this rank, and waits for one that this one holds on another."""
    pool = StubLayer.make_pool(5 + 1)
    controller = controller_of(StubLayer(pool=pool, num_redundant=1), policy=Restless(), backoff=0.2)
    with caplog.at_level(logging.WARNING, logger="eplb"), controller:
        controller.step()
        taken = pool.hold()
        taken.take()
        free_slots = controller._worker.relocation._planner.free_slots
        controller._worker.relocation._planner.free_slots = lambda: [1]  # as it was when the loads were told
        steps_until(controller, lambda: controller.health().phase == "PREPARE", "a wave wants the slot")
        began = time.monotonic()
        eventually(lambda: controller.health().reason is not None, "health says so")
        assert controller.health().reason == "waits for a free slot that another controller holds"
        assert (controller.health().state, controller.metrics().waves) == ("rebalancing", 0)
        eventually(lambda: controller.metrics().abandoned > 0, "it is given up")
        assert 0.05 < time.monotonic() - began < 2.0
        taken.end()
        controller._worker.relocation._planner.free_slots = free_slots
        steps_until(controller, lambda: controller.metrics().waves > 3, "it is tried again")
        assert controller.metrics().failures == 0 and controller.health().last_error is None
    assert not caplog.records
