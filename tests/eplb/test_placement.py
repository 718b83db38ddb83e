import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.planning.placement import Placement, count_experts


@st.composite
def initial_sizes(draw):
    ranks = draw(st.integers(1, 9))
    per_rank = draw(st.integers(1, 7))
    experts = draw(st.integers(1, ranks * per_rank))
    return experts, ranks * per_rank - experts, ranks, per_rank + draw(st.integers(0, 2))


@given(initial_sizes())
def test_initial_is_valid_and_has_no_twins_while_avoidable(sizes):
    experts, redundant, ranks, lanes = sizes
    placement = Placement.initial(*sizes)
    placement.validate()
    assert placement.num_ranks == ranks and placement.num_lanes == lanes
    counts = placement.replica_counts()
    assert counts.sum() == experts + redundant and counts.max() - counts.min() <= 1
    if (experts + redundant) // ranks <= experts:
        assert placement.holds_WE().max() <= 1


@given(initial_sizes(), st.randoms(use_true_random=False))
def test_logical_to_lanes_is_the_inverse(sizes, random):
    lanes = Placement.initial(*sizes).lanes_WS.copy()
    for row in lanes:
        order = list(range(row.size))
        random.shuffle(order)
        row[:] = row[order]
    placement = Placement(lanes, sizes[0])
    offsets, ids = placement.logical_to_lanes()
    assert offsets.dtype == ids.dtype == np.int64 and offsets[-1] == ids.size
    for expert in range(sizes[0]):
        mine = ids[offsets[expert] : offsets[expert + 1]]
        assert (np.diff(mine) > 0).all()
        np.testing.assert_array_equal(mine, np.flatnonzero(lanes.ravel() == expert))


def test_compact_sorts_and_leaves_empty_lanes_out():
    placement = Placement(np.array([[2, -1, 0], [-1, 3, 1]]), 4)
    np.testing.assert_array_equal(placement.compact(), [[0, 2], [1, 3]])
    with pytest.raises(ValueError, match="same number on each rank"):
        Placement(np.array([[2, -1, 0], [-1, -1, 1]]), 3).compact()


def test_count_experts_ignores_empty_lanes():
    np.testing.assert_array_equal(count_experts(np.array([[0, 0, -1], [1, -1, -1]]), 3), [[2, 0, 0], [0, 1, 0]])


def test_equality_hash_and_immutability():
    a = Placement(np.array([[0, 1], [1, -1]], dtype=np.int32), 2)
    b = Placement(np.array([[0, 1], [1, -1]]), 2)
    assert a == b and hash(a) == hash(b) and a.digest() == b.digest()
    assert a != Placement(np.array([[1, 0], [1, -1]]), 2)
    assert a != Placement(np.array([[0, 1], [1, -1]]), 3)
    assert a != Placement(np.array([[0, 1, 1, -1]]), 2)
    with pytest.raises(ValueError):
        a.lanes_WS[0, 0] = 1


def test_a_later_write_to_the_callers_array_is_not_seen():
    lanes = np.array([[0, 1]])
    placement = Placement(lanes, 2)
    lanes[0, 0] = 1
    assert placement.lanes_WS[0, 0] == 0


def test_digest_is_the_same_in_another_process():
    code = "from eplb.planning.placement import Placement; print(Placement.initial(12, 4, 8, 3).digest())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(other) == Placement.initial(12, 4, 8, 3).digest() == 5061197235227420271
    assert 0 <= int(other) < 2**63


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((0, 0, 1, 1), "num_experts=0"),
        ((4, -1, 1, 4), "num_redundant_experts=-1"),
        ((4, 0, 0, 4), "num_ranks=0"),
        ((4, 1, 2, 4), "num_redundant_experts=1.*divisible"),
        ((4, 0, 2, 1), "num_lanes=1"),
        ((None, 0, 1, 1), "num_experts=None: must be an integer of at least 1"),
        ((4, 0, 1, 4.0), r"num_lanes=4\.0: must be an integer of at least 1"),
    ],
)
def test_initial_refuses(sizes, name):
    with pytest.raises(ValueError, match=name):
        Placement.initial(*sizes)


def test_bad_lanes_are_refused():
    with pytest.raises(ValueError, match="lanes_WS"):
        Placement(np.zeros(3, dtype=int), 3)
    with pytest.raises(ValueError, match="lanes_WS"):
        Placement(np.zeros((2, 2)), 3)
    with pytest.raises(ValueError, match="num_experts=0"):
        Placement(np.zeros((1, 1), dtype=int), 0)
    for wrong in (None, 1.5, "1", True):
        with pytest.raises(ValueError, match=f"num_experts={wrong!r}: must be an integer of at least 1"):
            Placement(np.zeros((1, 1), dtype=int), wrong)
    with pytest.raises(ValueError, match="holds 5"):
        Placement(np.array([[5, 0]]), 1).validate()
    with pytest.raises(ValueError, match="holds -2"):
        Placement(np.array([[-2, 0]]), 1).validate()
    with pytest.raises(ValueError, match="expert 1 has no replica"):
        Placement(np.array([[0, 2]]), 3).validate()
