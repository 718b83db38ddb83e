"""What the long rounds carry, and back."""

import numpy as np
import pytest

from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Move, Plan, Wave
from eplb.planning.shares import equal_shares
from eplb.rounds.messages import decode_loads, decode_plan, encode_loads, encode_plan


def test_loads_are_summed_over_ranks_and_free_slots_kept_apart():
    """Two sub-windows of three experts; two pools; three ranks, the last of which has no window."""
    windows = [[[1, 2, 3], [4, 5, 6]], [[10, 20, 30], [40, 50, 60]], [[0, 0, 0], [0, 0, 0]]]
    free_slots = [[1, 0], [2, 3], [5, 7]]
    messages = [encode_loads(free, np.array(window)) for free, window in zip(free_slots, windows, strict=True)]
    assert all(message.dtype == np.int64 and len(message) == 2 + 6 for message in messages)
    loads = decode_loads(messages, num_pools=2, num_columns=3)
    assert loads.load_NA.tolist() == [[11, 22, 33], [44, 55, 66]]
    assert loads.free_slots_GW.tolist() == [[1, 2, 5], [0, 3, 7]]


def test_counts_beyond_32_bits():
    windows = [np.array([[2**40, 1]]), np.array([[2**40, 2]])]
    loads = decode_loads([encode_loads([], window) for window in windows], num_pools=0, num_columns=2)
    assert loads.load_NA.tolist() == [[2**41, 3]]


def make_plan() -> Plan:
    placement = Placement(np.array([[0, 1], [1, -1]]), 2)
    return Plan((Wave((LayerUpdate(0, (Move(1, 0, 1, 1, 0),), placement, equal_shares(placement)),)),))


def test_a_plan_arrives_as_it_was_sent():
    plan = make_plan()
    words = encode_plan(plan)
    decoded, plan_hash = decode_plan(words)
    assert decoded.to_json() == plan.to_json() and words[0] == 1 and words[1] == plan_hash


def test_a_plan_that_is_torn_is_refused():
    words = encode_plan(make_plan())
    words[5] ^= 1
    with pytest.raises(ValueError, match="does not have the hash"):
        decode_plan(words)
