"""The controller on one rank, with a stub in place of a layer; several ranks are in `test_simulation.py`."""

import logging
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from eplb import EplbConfig, EplbController, step_eplb_after
from eplb.connect import Connected, TorchTransport
from eplb.planning.policy import Proposal
from eplb.relocation.communicator import LocalCommunicator
from eplb.rounds.exchange import LocalAgreement
from eplb.rounds.protocol import Record, Work
from eplb.streams import HostStreams
from tests.eplb.stub import QUICK, Recording, StubLayer, controller_of
from tests.eplb.test_worker import eventually

# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks_per_node": 2}, "ranks_per_node=2.* must divide num_ranks=1"),
        ({"policy": "nonsense"}, "policy='nonsense'.* known policies: "),
        ({"policy": "static", "policy_options": {"speed": 3}}, "policy_options.*speed"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        EplbController(EplbConfig(**options))


def test_groups_that_do_not_divide_the_experts_of_a_layer():
    layer = StubLayer()
    with pytest.raises(ValueError, match=r"num_groups=3.* must divide .*num_experts=4"):
        EplbController(EplbConfig(num_groups=3)).register(layer)
    assert layer.resident.controller is None


@pytest.mark.parametrize("model", [None, [StubLayer()]])
def test_what_is_no_module_is_not_registered(model):
    with pytest.raises(ValueError, match="model must be a module, got"):
        EplbController().register(model)


def test_a_layer_over_other_ranks() -> None:
    with pytest.raises(ValueError, match=r"process_group has .*\[\], but a layer .* \[0, 1\]"):
        EplbController().register(StubLayer(expert_ranks=(0, 1)))


def test_a_layer_inside_a_wrapper_that_answers_for_it_is_one_layer():
    layer = StubLayer()
    controller = EplbController()
    assert controller.register(nn.Sequential(torch.compile(layer, backend="eager"), layer)) == 1
    assert layer.resident.controller is controller


def test_register_comes_before_the_first_step_and_before_close():
    controller = controller_of()
    controller.step()
    with pytest.raises(RuntimeError, match="before the first step"):
        controller.register(StubLayer())
    controller.close()
    closed = EplbController()
    closed.close()
    with pytest.raises(RuntimeError, match="before close"):
        closed.register(StubLayer())


def test_step_without_a_layer():
    controller = EplbController()
    controller.register(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"step\(\) without any MoE layer: register\(\) a model that has one first"):
        controller.step()
    assert controller.health().state == "idle" and controller.metrics().rounds == 0


def test_the_default_policy_is_given_min_gain():
    assert EplbConfig(min_gain=0.07).make_policy().min_gain == 0.07
    assert EplbConfig(policy_options={"min_gain": 0.5}).make_policy().min_gain == 0.5
    assert EplbController(EplbConfig(min_gain=0.07))._policy.min_gain == 0.07


# ---- windows, health, metrics


def test_the_policy_sees_the_load_of_each_window():
    policy, layer = Recording(), StubLayer()
    controller = controller_of(layer, step_interval=4, window_size=2, window_samples=2, use_async=False, policy=policy)
    for step in range(8):
        layer.resident.load_E += torch.tensor([1, 10, 100, 1000]) * (step + 1)  # what a forward would count
        controller.step()
    weights = np.array([1, 10, 100, 1000])
    assert [load.tolist() for load in policy.asked] == [
        [[(3 * weights).tolist(), (4 * weights).tolist()]],
        [[(7 * weights).tolist(), (8 * weights).tolist()]],
    ]
    metrics = controller.metrics()
    assert (metrics.windows, metrics.proposals, metrics.plans, metrics.failures) == (2, 2, 0, 0)
    assert metrics.balancedness == 1.0


def test_a_policy_that_fails_is_state_and_nothing_else(caplog):
    class Failing(Recording):
        def propose(self, load_LNE, physical_LWP, topology):
            raise ZeroDivisionError("no policy")

    controller = controller_of(use_async=False, policy=Failing())
    for _ in range(6):
        controller.step()
    health, metrics = controller.health(), controller.metrics()
    assert health.state == "idle" and health.last_error == "ZeroDivisionError: no policy" and health.version == 0
    assert metrics.failures == metrics.abandoned == 3
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1, "the same error is logged once, with its traceback"


def test_shares_of_a_policy_that_do_not_sum_to_one_are_given_up_before_anything_moves():
    class Halves(Recording):
        def propose(self, load_LNE, physical_LWP, topology):
            shares = super().propose(load_LNE, physical_LWP, topology).shares_LWP
            return Proposal(physical_LWP, shares / 2 if len(self.asked) == 1 else shares)

    policy = Halves()
    controller = controller_of(use_async=False, policy=policy)
    for _ in range(6):
        controller.step()
    health, metrics = controller.health(), controller.metrics()
    assert (health.state, health.version, metrics.abandoned, len(policy.asked)) == ("idle", 0, 1, 3)
    assert "proposal.shares_LWP[0]: shares_WS: the shares of expert 0 sum to 0.5" in health.last_error


def test_another_controller_begins_with_the_shares_that_are_there():
    class Uneven(Recording):
        def propose(self, load_LNE, physical_LWP, topology):
            physical_WP = super().propose(load_LNE, physical_LWP, topology).physical_LWP[0]
            first = [physical_WP[0].tolist().index(expert) for expert in range(4)]
            shares = np.full(physical_LWP.shape, 0.125)
            shares[0, 0, first] = 0.875
            return Proposal(physical_LWP, shares)

    layer = StubLayer(num_redundant=4)
    for policy, plans in ((Uneven(), 1), (Uneven(), 0), ("static", 1)):
        with controller_of(layer, use_async=False, policy=policy) as controller:
            for _ in range(2):
                controller.step()
        assert controller.metrics().plans == plans
    assert set(layer.resident.table.cumulative_P.tolist()) == {1 << 29, 1 << 30}


def test_a_pool_without_a_free_slot_is_degraded():
    controller = controller_of(StubLayer(num_shadow_slots=0), use_async=False)
    for _ in range(2):
        controller.step()
    assert controller.health().state == "degraded"


def test_a_dispatch_that_failed_is_shown_until_close():
    """Whatever the rebalancer does; also before the first step."""
    layer = StubLayer(num_shadow_slots=0)
    controller = controller_of(layer, use_async=False)
    assert controller.health().state == "idle"
    layer.dispatch_failure = lambda: "rank 3 did not come"
    assert (controller.health().state, controller.health().reason) == ("dispatch_failed", "rank 3 did not come")
    for _ in range(2):
        controller.step()
    assert (controller.health().state, controller.health().reason) == ("dispatch_failed", "rank 3 did not come")
    layer.dispatch_failure = lambda: None
    assert controller.health().state == "degraded"
    layer.dispatch_failure = lambda: "rank 3 did not come"
    controller.close()
    assert controller.health().state == "closed"


def test_balancedness_is_logged_at_its_interval(caplog):
    with caplog.at_level(logging.INFO, logger="eplb"):
        controller = controller_of(
            step_interval=50, use_async=False, log_balancedness=True, log_balancedness_interval=3
        )
        for _ in range(10):
            controller.step()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["balancedness 1.0000 (mean/max of the ranks' loads, averaged over 1 layers)"] * 3


def test_nothing_happens_while_the_stream_is_captured():
    layer = StubLayer()
    controller = controller_of(layer, use_async=False)

    def step(times: int, captured: bool) -> None:
        layer.resident.streams.is_capturing = lambda: captured
        for _ in range(times):
            controller.step()

    step(6, captured=True)
    assert controller.metrics().rounds == 0
    step(2, captured=False)
    assert controller.metrics().windows == 1
    step(6, captured=True)  # also once it is under way
    assert controller.metrics().windows == 1
    step(2, captured=False)
    assert controller.metrics().windows == 2


def test_a_captured_step_counts_but_what_is_due_waits_for_the_next_one():
    layer = StubLayer()
    with controller_of(layer, step_interval=4, window_size=2, window_samples=1) as controller:
        controller.step()
        layer.resident.streams.is_capturing = lambda: True
        for _ in range(5):
            controller.step()
        assert controller._steps == 1, "a window begins with the second step"
        layer.resident.streams.is_capturing = lambda: False
        controller.step()
        layer.resident.streams.is_capturing = lambda: True
        controller.step()
        assert controller._steps == 3, "nothing is due"
        layer.resident.streams.is_capturing = lambda: False
        controller.step()
        eventually(lambda: controller.metrics().windows == 1, "the window is complete")


def test_close_joins_the_thread_and_may_be_called_again():
    controller = controller_of()
    controller.step()
    threads = [thread for thread in threading.enumerate() if thread.name == "eplb-worker"]
    assert len(threads) == 1
    controller.close()
    controller.close()
    assert not threads[0].is_alive()
    assert controller.health().state == "closed"
    controller.step()


def test_close_is_bounded_when_the_worker_hangs():
    controller = controller_of(close_timeout=0.2)
    controller.step()
    release = threading.Event()
    controller._worker.tick = lambda: release.wait(20)
    assert finishes(controller.close, 5.0)
    release.set()


def test_a_context_manager_closes():
    with controller_of() as controller:
        controller.step()
    assert controller.health().state == "closed"


# ---- use_async=False: every wait has a deadline (DESIGN §4)


def finishes(action: Callable[[], object], seconds: float) -> bool:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_a_step_returns_although_its_load_window_is_lost():
    controller = controller_of(use_async=False, backoff=0.01)
    controller.step()
    recorder = controller._windows[Work.REBALANCE]
    download, failures = recorder._download, [OSError("no window")]

    def failing(buffer):
        if failures:
            raise failures.pop()
        return download(buffer)

    recorder._download = failing
    assert finishes(controller.step, 3.0), "step() waits for a proposal that nobody will make"
    assert "no window" in controller.health().last_error
    assert finishes(lambda: [controller.step() for _ in range(4)], 3.0)
    assert controller.metrics().windows >= 1, "it does not recover"


def test_a_step_returns_although_its_load_window_never_comes():
    class Never:
        def query(self) -> bool:
            raise OSError("no answer")

    layer = StubLayer()
    controller = controller_of(layer, use_async=False, transfer_timeout=0.1)
    controller.step()
    controller._streams.current().record_event = Never
    assert finishes(controller.step, 3.0), "step() waits for ever"
    assert "no answer" in controller.health().last_error


def test_errors_on_the_main_thread_are_counted_and_shown_before_older_ones_of_the_worker():
    controller = controller_of(use_async=False, policy=Recording())
    controller.step()
    worker, recorder = controller._worker, controller._windows[Work.REBALANCE]
    worker.fail(OSError("older"))

    def failing(step: int) -> None:
        raise OSError("newer")

    recorder.step = failing
    controller.step()
    assert controller.health().last_error == "OSError: newer" and controller.metrics().failures == 2


class OtherModels(TorchTransport):
    """Another rank that registered something else."""

    class Two(LocalAgreement):
        def all_gather(self, message, notify):
            said = super().all_gather(message, notify)
            said.result().append(Record(models=1).encode())
            return said

    def connect(self, config, streams, dispatch_backends, pools, notify):
        return Connected(self.Two(), LocalCommunicator(streams))


def test_a_step_returns_although_the_ranks_registered_different_models():
    controller = EplbController(EplbConfig(**QUICK, use_async=False), transport=OtherModels(None))
    controller.register(StubLayer())
    assert finishes(lambda: [controller.step() for _ in range(4)], 3.0), "step() waits for ever"
    health = controller.health()
    assert health.state == "models_differ" and "the ranks differ in the models they registered" in health.last_error


def test_a_step_ends_after_several_that_were_due_could_not():
    layer = StubLayer()
    layer.resident.is_pinned_before = lambda version: True  # a backward to come, under an older version
    controller = controller_of(layer, use_async=False, policy="static", grace_timeout=0.01)
    for _ in range(8):
        controller.step()
    assert controller.health().state == "grace_stalled" and controller.metrics().proposals == 0
    layer.resident.is_pinned_before = lambda version: False
    assert finishes(lambda: [controller.step() for _ in range(2)], 3.0), "step() waits for proposals that nobody makes"
    before = controller.metrics().proposals
    assert before in (1, 2), "what was due several times is done once"
    for _ in range(4):
        controller.step()
    assert controller.metrics().proposals == before + 2


class SilentPeers(TorchTransport):
    """Others that take part in no round."""

    class Never(LocalAgreement):
        def all_gather(self, message, notify):
            return self

        def done(self) -> bool:
            return False

    def connect(self, config, streams, dispatch_backends, pools, notify):
        return Connected(self.Never(), LocalCommunicator(streams))


def test_a_step_returns_although_a_peer_is_silent():
    config = EplbConfig(**QUICK, use_async=False, peer_timeout=0.1, close_timeout=0.1)
    controller = EplbController(config, transport=SilentPeers(None))
    controller.register(StubLayer())
    assert finishes(lambda: [controller.step() for _ in range(40)], 3.0), "each step waits as long as the first"
    assert controller.health().state == "peer_unreachable" and "takes part in no round" in controller.health().reason
    controller.close()


def test_loading_waits_no_longer_than_its_timeout_for_a_silent_peer():
    layer = StubLayer()
    config = EplbConfig(**QUICK, quiesce_timeout=0.1, close_timeout=0.1)
    controller = EplbController(config, transport=SilentPeers(None))
    controller.register(layer)
    controller.step()
    eventually(lambda: controller._worker.rounds.is_under_way, "the others may think that this rank holds nothing")
    with pytest.raises(TimeoutError, match=r"quiesce_timeout=0.1 s"), layer.resident.quiesced():
        pytest.fail("nothing may be written now")
    assert controller._worker._record().holds_completed == 0, "another try would be one too many"
    controller.close()


class LoggedEvent:
    def __init__(self, num_writes: int) -> None:
        self.num_writes = num_writes
        self.seen_by_host = False

    def query(self) -> bool:
        self.seen_by_host = True
        return True


class LoggedStream:
    """Notes what it waits for, and how many writes lay before each of its events."""

    def __init__(self) -> None:
        self.num_writes = 0
        self.recorded: list[LoggedEvent] = []
        self.waited: list[LoggedEvent] = []

    def record_event(self) -> LoggedEvent:
        self.recorded.append(LoggedEvent(self.num_writes))
        return self.recorded[-1]

    def wait_event(self, event: LoggedEvent) -> None:
        self.waited.append(event)


class TwoStreams(HostStreams):
    def __init__(self) -> None:
        super().__init__()
        self.side, self.compute = LoggedStream(), LoggedStream()

    def current(self) -> LoggedStream:
        return self.compute


def test_fills_come_after_the_weights_that_were_loaded():
    """On a GPU a load only enqueues its writes; the next fill reads the same slots on the side stream."""
    layer = StubLayer()
    streams = layer.resident.streams = TwoStreams()
    with controller_of(layer) as controller:
        controller.step()
        with layer.resident.quiesced():
            streams.compute.num_writes += 1
        behind = [event for event in streams.compute.recorded if event.num_writes]
        ordered = [event for event in behind if event in streams.side.waited or event.seen_by_host]
    assert ordered, "nothing orders the side stream behind the writes"


# ---- the decorator


class Runner:
    def __init__(self, controller: EplbController) -> None:
        self.eplb = controller

    @step_eplb_after
    def run(self) -> None: ...


def test_decorator_counts_the_steps_of_a_controller():
    runner = Runner(controller_of(use_async=False))
    for _ in range(6):
        runner.run()
    assert runner.eplb.metrics().windows == 3  # of two steps each


# ---- the config


def test_a_controller_takes_a_config_or_what_it_is_made_of():
    config = EplbConfig(step_interval=7)
    assert EplbController(config).config is config
    assert EplbController({"step_interval": 7}).config == config and EplbController().config == EplbConfig()


@pytest.mark.parametrize("config", ["async", {"step_interval": 0}, {"stepinterval": 7}, 3, 0, "", False])
def test_a_controller_refuses_what_is_no_config(config):
    with pytest.raises(ValueError, match="EplbConfig"):
        EplbController(config)
