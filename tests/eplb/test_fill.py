"""`WaveFill`: what a wave that was given up leaves behind."""

import numpy as np
import torch

from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Move, Wave
from eplb.planning.shares import equal_shares
from eplb.relocation.communicator import Communicator, TransferBatch
from eplb.relocation.fill import WaveFill
from eplb.relocation.pool import SlotPool, SlotState, TensorSpec
from eplb.relocation.resident import ResidentExperts
from eplb.streams import HostStreams


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


def test_i1_a_wave_buried_late_leaves_the_lane_to_the_wave_that_has_taken_it():
    pool = SlotPool([TensorSpec("weight", (4,), torch.float32)], 4)
    layer = ResidentExperts(
        num_experts=2,
        num_redundant_experts=0,
        num_shadow_slots=2,
        rank=0,
        num_ranks=1,
        pool=pool,
        streams=HostStreams(),
    )
    placement = layer.table.placement
    wave, after = make_wave(placement)

    def fill(attempt: int) -> WaveFill:
        return WaveFill(wave, 1, (attempt, 0), [layer], [placement], Slow(), layer.streams)

    abandoned = fill(1)
    abandoned.agree_to_start()
    abandoned.start()
    abandoned.abandon()
    assert layer.lane_slots == [0, 1, -1, -1] and pool.state(2) is SlotState.QUARANTINED
    assert not abandoned.bury()

    newer = fill(2)
    newer.start()
    newer._batch.over = True
    assert newer.poll()
    newer.stage()
    newer.publish()
    assert layer.lane_slots == [0, 1, 3, -1]

    abandoned._batch.over = True
    assert abandoned.bury()
    assert layer.lane_slots == [0, 1, 3, -1] and layer.table.lane_to_slot_S.tolist() == [0, 1, 3, -1]
    assert pool.state(2) is SlotState.FREE and pool.state(3) is SlotState.LIVE
    newer.release()
    assert layer.lane_slots == [0, -1, 3, -1] and pool.state(1) is SlotState.FREE
    assert np.array_equal(after.lanes_WS, [[0, -1, 1, -1]])
