"""The worker's pieces on their own, without rounds and threads: what each does in one place of the protocol."""

from typing import Any

import numpy as np
import pytest
import torch

from eplb import EplbConfig
from eplb.planner import Planner
from eplb.planning.balance import layer_balancedness
from eplb.planning.policy import Topology
from eplb.relocation.fill import WaveFill
from eplb.relocation.pool import SlotPool, TensorSpec
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.messages import Loads
from eplb.rounds.protocol import Agreed, Phase, Record, Work
from eplb.worker.planning import Planning
from eplb.worker.relocation import Relocation
from eplb.worker.rounds import Heard, Rounds
from tests.eplb.by_hand import filled, make_layer, sim_streams


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def nobody() -> Any:
    """In place of a part that is not asked."""
    return None


def relocation_of(layer: ResidentExperts, clock: Clock) -> Relocation:
    config = EplbConfig(transfer_timeout=5.0)
    return Relocation([layer], nobody(), layer.streams, [], config, layer.newest.number, clock)


def ready(layer: ResidentExperts, clock: Clock) -> tuple[Relocation, WaveFill, Agreed]:
    """A wave whose transfers are over, and what the ranks agree on while they vote for it."""
    relocation = relocation_of(layer, clock)
    agreed = Agreed(phase=Phase.FILL, proposal=7, num_waves=2, version=layer.newest.number)
    for phase in (Phase.GRACE, Phase.FILL):  # of the versions that it found: nothing uses them
        relocation.collect_grace(Agreed(phase=phase), models_differ=False)
    fill = filled(layer, 0)
    fill.attempt = (agreed.proposal, agreed.wave)
    relocation.fill = fill
    return relocation, fill, agreed


@pytest.mark.parametrize(("proposal", "wave"), [(7, 0), (7, 1), (8, 0)])
def test_i7_a_wave_votes_in_its_own_place_only(proposal, wave):
    """Its version comes again, in the next attempt, with other moves."""
    relocation, fill, _ = ready(make_layer(sim_streams()), Clock())
    votes = relocation.votes(Agreed(phase=Phase.FILL, proposal=proposal, wave=wave, num_waves=2))
    assert votes == ((fill.version, fill.version) if (proposal, wave) == (7, 0) else (0, 0))


def test_transfers_have_a_deadline():
    clock, streams = Clock(), sim_streams()
    relocation, fill, _ = ready(make_layer(streams), clock)
    fill.is_filled, fill._started, fill._finished = False, False, None
    fill._batch = Unending()
    relocation.push()
    clock.now = 5.0
    relocation.push()
    clock.now = 5.1
    with pytest.raises(TimeoutError, match=r"transfers of version 1 took more than transfer_timeout=5\.0 s"):
        relocation.push()


class Unending:
    def start(self) -> None:
        pass

    def poll(self) -> bool:
        return False

    def is_dead(self) -> bool:
        return False


def published_by_the_worker(layer: ResidentExperts) -> tuple[Relocation, Agreed]:
    relocation, fill, agreed = ready(layer, Clock())
    agreed = Agreed(phase=Phase.GRACE, proposal=agreed.proposal, num_waves=2, version=fill.version)
    relocation.publish(agreed)
    while layer.streams.side.advance():  # the upload
        pass
    return relocation, agreed


def test_i3_grace_waits_for_the_device_to_come_to_the_flip():
    streams = sim_streams()
    layer = make_layer(streams)
    relocation, agreed = published_by_the_worker(layer)
    relocation.collect_grace(agreed, models_differ=False)
    assert relocation.graced == 0 and "calls no step()" in relocation.what_holds_up_grace()
    relocation.handoff.flip(streams)
    relocation.collect_grace(agreed, models_differ=False)
    assert relocation.graced == 0 and "the device has not come to the flip" in relocation.what_holds_up_grace()
    streams.drain()
    relocation.collect_grace(agreed, models_differ=False)
    assert relocation.graced == 1 and relocation.handoff is None


def test_i3_grace_waits_for_pins_of_older_versions():
    streams = sim_streams()
    layer = make_layer(streams)
    with layer.choice() as pin:
        pass
    relocation, agreed = published_by_the_worker(layer)
    relocation.handoff.flip(streams)
    streams.drain()
    for _ in range(2):
        relocation.collect_grace(agreed, models_differ=False)
        assert relocation.graced == 0 and "1 forwards or backwards hold version 0" in relocation.what_holds_up_grace()
    pin.release()
    for _ in range(2):  # the first look may record an event
        streams.drain()
        relocation.collect_grace(agreed, models_differ=False)
    assert relocation.graced == 1


def test_i1_a_wave_given_up_keeps_its_slots_until_it_is_buried():
    layer = make_layer(sim_streams())
    relocation, fill, agreed = ready(layer, Clock())
    fill.agree_to_start()
    batch, fill._batch = fill._batch, Unending()
    relocation.drop_finished(Agreed(phase=Phase.IDLE, proposal=agreed.proposal, version=0))
    relocation.bury()
    assert relocation.zombies == [fill] and relocation.fill is None
    assert not relocation.is_at_rest and layer.pool.num_slots == 3 and not layer.pool._free()
    fill._batch = batch
    layer.streams.drain()
    relocation.bury()
    assert relocation.is_at_rest and len(layer.pool._free()) == 1


def test_the_next_proposal_comes_after_a_delay_that_doubles():
    clock = Clock()
    config = EplbConfig(backoff=1.0, max_backoff=3.0)
    planning = Planning(0, nobody(), {}, config, clock, lambda: None)
    agreed = Agreed()
    for delay in (1.0, 2.0, 3.0, 3.0):
        given_up = Agreed(abandoned=agreed.abandoned + 1, proposal=planning.proposal)
        planning.heard(Heard(agreed, given_up, Record(), []))
        agreed, before = given_up, planning.proposal
        planning.propose(Work.REBALANCE)
        clock.now += delay - 0.1
        planning.act(agreed)
        assert planning.proposal == before
        clock.now += 0.2
        planning.act(agreed)
        assert planning.proposal == before + 1


class Failed:
    def done(self) -> bool:
        return True

    def result(self):
        raise ConnectionError("closed by peer")


def rounds_of(clock: Clock) -> Rounds:
    return Rounds(nobody(), EplbConfig(heartbeat_interval=10.0), 0, clock, lambda: None)


def test_i6_rounds_that_failed_are_over():
    rounds = rounds_of(Clock())
    rounds._exchange = Failed()
    with pytest.raises(ConnectionError):
        rounds.hear()
    assert rounds.is_lost and rounds.is_over and not rounds.is_my_turn and rounds.hear() is None


def test_an_idle_rank_says_what_is_new_and_is_silent_between_heartbeats():
    clock = Clock()
    rounds = rounds_of(clock)
    rounds.agreed = Agreed(phase=Phase.IDLE)
    assert rounds.is_worth_saying(Record(graced=1))
    assert not rounds.is_worth_saying(Record())
    clock.now = 10.0
    assert rounds.is_worth_saying(Record())


def test_what_connects_the_ranks_is_closed_with_the_rounds():
    closed = []

    class Made:
        def close(self) -> None:
            closed.append(self)

    rounds = rounds_of(Clock())
    rounds._agreement, rounds.communicator = Made(), Made()
    both = [rounds._agreement, rounds.communicator]
    rounds.close()
    assert closed == both and rounds.communicator is None


def test_balancedness_is_the_mean_over_layers_also_of_different_sizes():
    streams = sim_streams()
    made = [
        ResidentExperts(
            num_experts=number,
            num_redundant_experts=0,
            num_shadow_slots=1,
            rank=0,
            num_ranks=2,
            streams=streams,
            pool=SlotPool([TensorSpec("weight", (4,), torch.int32)], number),
        )
        for number in (4, 6, 4)
    ]
    loads = [np.array([4, 2, 1, 1]), np.array([0, 0, 0, 5, 1, 2]), np.array([0, 0, 0, 0])]
    planner = Planner(made, nobody(), Topology(2), None)
    load_NA = np.stack([np.concatenate(loads), np.concatenate(loads)])  # two sub-windows
    each = [
        layer_balancedness(2 * load, one.newest.placement, one.newest.shares_WS)
        for load, one in zip(loads, made, strict=True)
    ]
    assert each == [pytest.approx(4 / 6), 0.5, 1.0]
    assert planner.balancedness(Loads(load_NA, np.zeros((1, 2), dtype=np.int64))) == pytest.approx(np.mean(each))
