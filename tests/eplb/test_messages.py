"""The words of the long rounds: load windows and plans."""

from __future__ import annotations

import numpy as np
import pytest

from eplb.planning.plan import Plan, PlanSummary
from eplb.rounds.messages import decode_loads, decode_plan, encode_loads, encode_plan


def test_loads_of_ranks_are_summed():
    """Two sub-windows of three experts in two pools; each rank counted what it routed itself."""
    first = encode_loads([4, 1], np.array([[5, 0, 2], [1, 1, 1]]))
    second = encode_loads([0, 3], np.array([[3, 7, 2], [0, 2, 9]]))
    loads = decode_loads([first, second], num_pools=2, num_columns=3)
    assert loads.load_NA.tolist() == [[8, 7, 4], [1, 3, 10]]
    assert loads.free_slots_GW.tolist() == [[4, 0], [1, 3]]


def test_a_plan_arrives_as_it_was_sent():
    plan = Plan((), PlanSummary(num_moves=3, max_over_mean_after=(1.25, 1.0)))
    words = encode_plan(plan)
    assert words.dtype == np.int64 and words[0] == 0
    decoded, number = decode_plan(words)
    assert decoded == plan and number == words[1]


def test_a_plan_that_changed_on_its_way_is_refused():
    words = encode_plan(Plan((), PlanSummary(num_moves=3)))
    at = words.astype("<i8").tobytes().index(b'"num_moves":3') + len('"num_moves":')
    damaged = bytearray(words.astype("<i8").tobytes())
    damaged[at : at + 1] = b"4"  # still a plan, but another one
    with pytest.raises(ValueError, match="hash"):
        decode_plan(np.frombuffer(bytes(damaged), dtype="<i8").astype(np.int64))
