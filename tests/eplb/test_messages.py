"""What the long rounds carry, and back."""

import numpy as np
import pytest

from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Move, Moves, Plan, Wave
from eplb.planning.shares import equal_shares, table_words
from eplb.rounds.messages import PlanReader, decode_loads, encode_loads, encode_plan


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
    """Two waves; in the first two layers of different sizes, of which one only gets shares."""
    one, two = Placement(np.array([[0, 1], [1, -1]]), 2), Placement(np.array([[0, 2, -1], [1, 0, -1]]), 3)
    after = Placement(np.array([[0, -1], [1, 1]]), 2)
    shares = np.array([[0.3, 1.0, 0.0], [1.0, 0.7, 0.0]])
    first = (
        LayerUpdate(0, (Move(1, 0, 1, 1, 0), Move(0, 0, 0, 1, 1)), one, equal_shares(one)),
        LayerUpdate(4, (), two, shares),
    )
    return Plan((Wave(first), Wave((LayerUpdate(0, (Move(1, 1, 0, 1, 1),), after, equal_shares(after)),))))


def test_a_plan_arrives_as_it_was_sent():
    plan = make_plan()
    words = encode_plan(plan)
    reader = PlanReader(words)
    assert words.dtype == np.int64 and words[0] == reader.num_waves == 2 and words[1] == reader.plan_hash
    for number in (1, 0, 1):  # in any order
        wave, expected = reader.wave(number), plan.waves[number]
        assert wave == expected
        for update, sent in zip(wave.updates, expected.updates, strict=True):
            assert sent.table is None and update.table.dtype == np.int32
            assert update.table.tolist() == table_words(sent.placement, sent.shares_WS).tolist()
            assert update.shares_WS.dtype == np.float64


def test_moves_that_arrive_are_equal_to_those_that_were_sent_and_to_no_others():
    sent = make_plan().waves[0].updates[0].moves
    heard = PlanReader(encode_plan(make_plan())).wave(0).updates[0].moves
    assert isinstance(heard, Moves) and Moves.of(heard) is heard
    assert heard == sent and sent == heard and heard == Moves.of(sent) and list(heard) == list(sent)
    assert heard[1] == heard[-1] == sent[1] and heard[:1] == sent[:1] and len(heard[1:]) == 1
    assert heard.columns_5M.tolist() == [[1, 0], [0, 0], [1, 0], [1, 1], [0, 1]]
    assert heard != sent[:1] and heard != sent[::-1] and not Moves.of(())
    with pytest.raises(IndexError):
        heard[2]


def test_a_plan_without_waves():
    assert PlanReader(encode_plan(Plan(()))).num_waves == 0


def test_other_threads_get_a_turn_between_the_layers_of_a_wave():
    breaths = []
    PlanReader(encode_plan(make_plan())).wave(0, lambda: breaths.append(1))
    assert len(breaths) == 2


@pytest.mark.parametrize("at", [1, 5, -1])
def test_a_plan_that_is_torn_is_refused(at):
    words = encode_plan(make_plan())
    words[at] ^= 1
    with pytest.raises(ValueError, match="does not have the hash"):
        PlanReader(words)


def test_shares_that_make_no_table_are_refused_where_the_plan_is_made():
    placement = Placement(np.array([[0], [0]]), 1)
    with pytest.raises(ValueError, match="must sum to 1"):
        encode_plan(Plan((Wave((LayerUpdate(0, (), placement, np.array([[0.5], [0.4]])),)),)))
