"""`WaveFill`: which slots a wave takes, holds and gives back."""

import numpy as np
import pytest
import torch

from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Move, Wave
from eplb.planning.shares import equal_shares
from eplb.relocation.communicator import Communicator, LocalCommunicator, TransferBatch
from eplb.relocation.fill import WaveFill
from eplb.relocation.pool import NoFreeSlot, SlotPool, SlotState, TensorSpec
from eplb.relocation.resident import ResidentExperts
from eplb.streams import HostStreams
from tests.eplb import by_hand


class Slow(Communicator):
    """Its transfers end when the test says so."""

    name = "slow"

    class Batch(TransferBatch):
        over = False

        def start(self):
            pass

        def poll(self):
            return self.over

        is_dead = poll

    def prepare(self, transfers):
        return self.Batch()


def make_wave(placement: Placement) -> tuple[Wave, Placement]:
    """Expert 1 moves from lane 1 to lane 2 of the only rank."""
    lanes_WS = placement.lanes_WS.copy()
    lanes_WS[0, 1], lanes_WS[0, 2] = -1, 1
    after = Placement(lanes_WS, placement.num_experts)
    return Wave((LayerUpdate(0, (Move(1, 0, 1, 0, 2),), after, equal_shares(after)),)), after


def make_layer(num_slots: int) -> ResidentExperts:
    return ResidentExperts(
        num_experts=2,
        num_redundant_experts=0,
        num_shadow_slots=2,
        rank=0,
        num_ranks=1,
        pool=SlotPool([TensorSpec("weight", (4,), torch.float32)], num_slots),
        streams=HostStreams(),
    )


def test_i1_a_wave_buried_late_leaves_the_lane_to_the_wave_that_has_taken_it():
    layer = make_layer(4)
    pool = layer.pool
    wave, after = make_wave(layer.current.placement)

    def fill(attempt: int) -> WaveFill:
        return WaveFill(wave, 1, (attempt, 0), [layer], Slow(), layer.streams)

    abandoned = fill(1)
    assert pool.state(2) is SlotState.FILLING
    abandoned.agree_to_start()
    abandoned.start()
    abandoned.abandon()
    assert layer.newest.slots_S == (0, 1, -1, -1) and pool.state(2) is SlotState.QUARANTINED
    assert not abandoned.bury()

    newer = fill(2)
    newer.start()
    newer._batch.over = True
    assert newer.poll()
    handoff = newer.hand_over()
    newer.publish()
    assert (layer.current.number, layer.newest.number) == (0, 1)
    assert layer.newest.slots_S == (0, -1, 3, -1)
    assert pool.states() == [SlotState.LIVE, SlotState.RETIRING, SlotState.QUARANTINED, SlotState.LIVE]

    abandoned._batch.over = True
    assert abandoned.bury()
    assert layer.table.lane_to_slot_S.tolist() == [0, 1, 3, -1]
    assert pool.state(2) is SlotState.FREE and pool.state(3) is SlotState.LIVE
    handoff.flip(layer.streams)
    assert layer.current is layer.newest and layer.retiring_slots() == {1: 1}
    newer.release()
    assert pool.state(1) is SlotState.FREE and len(layer.versions.ungraced) == 1
    assert np.array_equal(after.lanes_WS, [[0, -1, 1, -1]])


def test_a_wave_is_filled_only_when_its_tables_are_on_the_device():
    """A flip asks nothing of its stream, so by then they must be there."""
    layer = by_hand.make_layer(by_hand.sim_streams())
    handoff = by_hand.filled(layer, 0).hand_over()
    handoff.flip(layer.streams)
    while layer.streams.current().advance():
        pass
    assert layer.table.lanes_P.tolist() == [2, 1]


def test_a_wave_that_finds_no_free_slot_says_so_and_holds_none():
    layer = make_layer(2)
    wave, _ = make_wave(layer.current.placement)
    with pytest.raises(NoFreeSlot, match=r"no free slot among 2: \{'live': 2\}"):
        WaveFill(wave, 1, (1, 0), [layer], Slow(), layer.streams)
    assert layer.pool._holds == []


def test_a_communicator_that_fails_to_prepare_leaves_everything_as_it_was():
    class Broken(Slow):
        def prepare(self, transfers):
            raise OSError("no memory")

    layer = make_layer(4)
    wave, _ = make_wave(layer.current.placement)
    with pytest.raises(OSError, match="no memory"):
        WaveFill(wave, 1, (1, 0), [layer], Broken(), layer.streams)
    assert layer.pool.count(SlotState.FREE) == 2 and layer.table.lane_to_slot_S.tolist() == [0, 1, -1, -1]


def test_i1_a_lane_that_an_ungraced_version_names_is_not_filled():
    layer = make_layer(4)
    wave, after = make_wave(layer.current.placement)
    first = WaveFill(wave, 1, (1, 0), [layer], LocalCommunicator(layer.streams), layer.streams)
    first.start()
    assert first.poll()
    first.hand_over()
    first.publish()
    lanes_WS = after.lanes_WS.copy()
    lanes_WS[0, 2], lanes_WS[0, 1] = -1, 1  # back into the lane that version 0 names
    back = Placement(lanes_WS, after.num_experts)
    wave = Wave((LayerUpdate(0, (Move(1, 0, 2, 0, 1),), back, equal_shares(back)),))
    with pytest.raises(ValueError, match="writes a lane that a table names"):
        WaveFill(wave, 2, (2, 0), [layer], LocalCommunicator(layer.streams), layer.streams)


def test_saving_keeps_the_slots_that_it_reads():
    """Of all versions in use: between two ranks' flips an expert may be in an old one alone."""
    layer = make_layer(3)
    wave, _ = make_wave(layer.current.placement)
    fill = WaveFill(wave, 1, (1, 0), [layer], LocalCommunicator(layer.streams), layer.streams)
    fill.start()
    assert fill.poll()
    handoff = fill.hand_over()
    fill.publish()
    handoff.flip(layer.streams)
    with layer.reading() as (live, retiring):
        assert live == {0: [0], 1: [2]} and retiring == {1: 1}
        fill.release()
        assert layer.pool.state(1) is SlotState.QUARANTINED
        with pytest.raises(NoFreeSlot):
            layer.pool.hold().take()
    assert layer.pool.state(1) is SlotState.FREE
