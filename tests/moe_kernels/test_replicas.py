from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_kernels import GOLDEN, SHARE_BITS, select_replicas
from moe_kernels.replicas import _select_replicas

ONE = 1 << SHARE_BITS


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def table_of(cumulative_by_expert, device="cpu"):
    """CSR form; the lanes are 10 * expert + replica."""
    offsets, lanes, cumulative = [0], [], []
    for expert, bounds in enumerate(cumulative_by_expert):
        lanes += [10 * expert + replica for replica in range(len(bounds))]
        cumulative += bounds
        offsets.append(len(lanes))
    return int32(offsets, device), int32(lanes, device), int32(cumulative, device)


def select(ids, table, counts, rank_start=0, device="cpu", backend="torch"):
    count_E = torch.tensor(counts, dtype=torch.int64, device=device)
    return select_replicas(int32(ids, device), *table_of(table, device), count_E, rank_start, backend=backend)


def test_golden_is_the_golden_ratio():
    assert abs(Fraction(GOLDEN, ONE) - Fraction(((5**0.5) - 1) / 2)) < Fraction(1, ONE)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_example(device, backend):
    table = int32([0, 2], device), int32([3, 5], device), int32([3 * ONE // 4, ONE], device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    lanes = select_replicas(int32([[0, 0], [0, 0]], device), *table, count, 0, backend=backend)
    assert lanes.tolist() == [[3, 3], [3, 5]]


bounds = st.lists(st.integers(0, ONE - 1), max_size=4).map(lambda inner: [*sorted(inner), ONE])


@given(
    table=st.lists(bounds, min_size=1, max_size=4),
    picks=st.lists(st.integers(-1, 3), max_size=60),
    counts=st.lists(st.integers(0, 2**62), min_size=4, max_size=4),
    rank_start=st.integers(0, ONE - 1),
)
def test_every_replica_gets_floor_or_ceil_of_its_share(table, picks, counts, rank_start):
    experts = len(table)
    ids = [pick if pick < experts else -1 for pick in picks]
    lanes = (
        select([ids] if ids else torch.zeros((1, 0)).tolist(), table, counts[:experts], rank_start).flatten().tolist()
    )
    for expert, cumulative in enumerate(table):
        total = ids.count(expert)
        for replica, (low, high) in enumerate(zip([0, *cumulative], cumulative, strict=False)):
            got = lanes.count(10 * expert + replica)
            assert abs(got - Fraction(high - low, ONE) * total) < 1
    assert [lane == -1 for lane in lanes] == [expert == -1 for expert in ids]


@given(
    table=st.lists(bounds, min_size=1, max_size=4),
    picks=st.lists(st.integers(-1, 3), min_size=1, max_size=300),
    counts=st.lists(st.integers(0, 2**62), min_size=4, max_size=4),
    rank_start=st.integers(0, ONE - 1),
)
def test_kernel_equals_reference(device, table, picks, counts, rank_start):
    ids = [[pick if pick < len(table) else -1] for pick in picks]
    arguments = (ids, table, counts[: len(table)], rank_start, device)
    assert torch.equal(select(*arguments, backend="triton"), select(*arguments, backend="torch"))


@pytest.mark.parametrize("rank_start", [0, 12345, ONE - 1])
def test_batches_of_one_honour_the_shares_over_time(rank_start):
    """A start that stood still would give .9/.1 as 1/0."""
    table, taken = [[int(0.9 * ONE), ONE]], 0
    for step in range(1, 1001):
        taken += select([[0]], table, [step - 1], rank_start).item()  # lane 1: the replica with share .1
        assert abs(taken - 0.1 * step) < 2.5
    assert 98 <= taken <= 102


def test_a_share_of_zero_gets_nothing():
    lanes = select([[0] * 500], [[0, ONE // 2, ONE // 2, ONE]], [7])
    assert sorted(set(lanes.flatten().tolist())) == [1, 3]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_edges(device, backend):
    """No tokens; ids of no expert; an expert without replicas; no entries at all."""
    assert select(torch.zeros((0, 2)).tolist() or [[]], [[ONE]], [0], 0, device, backend).numel() == 0
    assert select([[-1, 2, 1, 0]], [[ONE], []], [0, 0], 0, device, backend).tolist() == [[-1, -1, -1, 0]]
    assert select([[0, -1]], [[]], [0], 0, device, backend).tolist() == [[-1, -1]]


def test_opcheck(device):
    count = torch.tensor([3, 4], dtype=torch.int64, device=device)
    table = table_of([[ONE // 2, ONE], [ONE]], device)
    torch.library.opcheck(_select_replicas, (int32([[0, 1], [0, -1]], device), *table, count, 5, "torch"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("expert_ids_TK", {"expert_ids_TK": torch.zeros((1, 1), dtype=torch.int64)}),
        ("table_offsets_E1", {"table_offsets_E1": int32([0])}),
        ("table_lanes_P", {"table_lanes_P": torch.zeros(1)}),
        ("table_cumulative_P", {"table_cumulative_P": int32([1, ONE])}),
        ("count_E", {"count_E": int32([0])}),
        ("rank_start", {"rank_start": ONE}),
        ("rank_start", {"rank_start": -1}),
    ],
)
def test_refused(name, change):
    good = {
        "expert_ids_TK": int32([[0]]),
        "table_offsets_E1": int32([0, 1]),
        "table_lanes_P": int32([0]),
        "table_cumulative_P": int32([ONE]),
        "count_E": torch.zeros(1, dtype=torch.int64),
        "rank_start": 0,
    }
    with pytest.raises(ValueError, match=name):
        select_replicas(**(good | change))
