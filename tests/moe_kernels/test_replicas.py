from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from moe_kernels import GOLDEN, SHARE_BITS, LoadCounter, ReplicaTable, select_replicas
from moe_kernels.base.scan import MANY_KEYS
from moe_kernels.replicas.circle import ranks_below
from moe_kernels.replicas.replicas import _select_replicas
from tests.moe_kernels.conftest import few_if_interpreted

ONE = 1 << SHARE_BITS


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


SPREAD = 10  # the lanes of expert e are SPREAD * e + replica: most lanes hold none


def table_of(cumulative_by_expert, device="cpu"):
    """CSR form. The lanes' slots are not used."""
    offsets, lanes, cumulative = [0], [], []
    for expert, bounds in enumerate(cumulative_by_expert):
        lanes += [SPREAD * expert + replica for replica in range(len(bounds))]
        cumulative += bounds
        offsets.append(len(lanes))
    lanes_P = int32(lanes, device)
    return ReplicaTable(lanes_P, lanes_P, int32(offsets, device), int32(cumulative, device))


def select(ids, table, load, rank_start=0, device="cpu", backend="torch", increment=None):
    """lanes, counts and the load counter after the call."""
    load_E = torch.tensor(load, dtype=torch.int64, device=device)
    increment_1 = None if increment is None else torch.tensor([increment], dtype=torch.int64, device=device)
    lanes_TK, counts_L = select_replicas(
        int32(ids, device).view(len(ids), len(ids[0]) if ids else 2),
        table_of(table, device),
        LoadCounter(load_E, increment_1),
        rank_start,
        num_lanes=SPREAD * len(table),
        backend=backend,
    )
    assert lanes_TK.dtype == counts_L.dtype == torch.int32
    return lanes_TK, counts_L, load_E


def test_golden_is_the_golden_ratio():
    assert abs(Fraction(GOLDEN, ONE) - Fraction(((5**0.5) - 1) / 2)) < Fraction(1, ONE)


@pytest.fixture(params=["torch", "triton", "triton in chunks"])
def backend(request):
    if request.param == "triton in chunks":
        request.getfixturevalue("small_chunks")
    return request.param.split()[0]


def test_example(device, backend):
    """The kernels' docstrings."""
    lanes = int32([3, 5], device)
    table = ReplicaTable(lanes, lanes, int32([0, 2], device), int32([3 * ONE // 4, ONE], device))
    load, one = (torch.full((1,), value, dtype=torch.int64, device=device) for value in (0, 1))
    ids = int32([[0, 0], [0, 0]], device)
    lanes, counts = select_replicas(ids, table, LoadCounter(load, one), 0, num_lanes=6, backend=backend)
    assert lanes.tolist() == [[3, 3], [3, 5]]
    assert counts.tolist() == [0, 0, 0, 3, 0, 1]
    assert load.tolist() == [4]


@pytest.mark.parametrize("picks", [[], [3], [0, 2, -1, 2, 4, 1, 0, 0], 40 * [1, 3]])
@pytest.mark.parametrize("increment", [None, 2])
def test_of_one_replica_each_the_lanes_say_all(device, backend, picks, increment):
    """Expert 4 does not exist; lanes 1 and 5 have no expert."""
    table_lanes, ids = int32([4, 0, 3, 2], device), int32(picks, device).view(-1, 1)
    lanes_of = [4, 0, 3, 2, -1, -1]
    load = torch.arange(4, device=device)
    increment_1 = None if increment is None else torch.tensor([increment], device=device)
    table, counter = ReplicaTable(table_lanes, table_lanes), LoadCounter(load, increment_1)
    lanes, counts = select_replicas(ids, table, counter, 5, num_lanes=6, backend=backend)
    assert lanes.flatten().tolist() == [lanes_of[pick] for pick in picks]
    assert counts.tolist() == [lanes.flatten().tolist().count(lane) for lane in range(6)]
    assert load.tolist() == [expert + (increment or 0) * picks.count(expert) for expert in range(4)]


bounds = st.lists(st.integers(0, ONE - 1), max_size=4).map(lambda inner: [*sorted(inner), ONE])
cases = {
    "table": st.lists(bounds | st.just([]), min_size=1, max_size=4),
    "picks": st.lists(st.integers(-1, 4), max_size=60),  # 4 names no expert
    "load": st.lists(st.integers(0, 2**62), min_size=4, max_size=4),
    "rank_start": st.integers(0, ONE - 1),
}


@given(**cases)
def test_every_replica_gets_floor_or_ceil_of_its_share(table, picks, load, rank_start):
    lanes, counts, _ = select([[pick] for pick in picks], table, load[: len(table)], rank_start)
    lanes = lanes.flatten().tolist()
    for expert, cumulative in enumerate(table):
        total = picks.count(expert)
        for replica, (low, high) in enumerate(zip([0, *cumulative], cumulative, strict=False)):
            got = lanes.count(SPREAD * expert + replica)
            assert abs(got - Fraction(high - low, ONE) * total) < 1
    has_replica = [0 <= pick < len(table) and table[pick] != [] for pick in picks]
    assert [lane >= 0 for lane in lanes] == has_replica
    assert all(lane // SPREAD == pick for lane, pick in zip(lanes, picks, strict=True) if lane >= 0)
    assert counts.tolist() == [lanes.count(lane) for lane in range(SPREAD * len(table))]


@given(**cases, increment=st.sampled_from([None, 0, 1, 3]))
def test_load(table, picks, load, rank_start, increment):
    """What is recorded, also of experts without replicas; the choice reads the counter as it was before."""
    ids, load = [[pick] for pick in picks], load[: len(table)]
    lanes, counts, after = select(ids, table, load, rank_start, increment=increment)
    assert after.tolist() == [before + (increment or 0) * picks.count(e) for e, before in enumerate(load)]
    unrecorded, same_counts, _ = select(ids, table, load, rank_start)
    assert torch.equal(lanes, unrecorded) and torch.equal(counts, same_counts)


def assert_kernel_equals_reference(*arguments, **options):
    expected = select(*arguments, **options, backend="torch")
    for got, wanted in zip(select(*arguments, **options, backend="triton"), expected, strict=True):
        assert torch.equal(got, wanted)


@few_if_interpreted
@given(**cases, increment=st.sampled_from([None, 0, 1]))
def test_kernel_equals_reference(device, table, picks, load, rank_start, increment):
    ids = [[pick] for pick in picks]
    assert_kernel_equals_reference(ids, table, load[: len(table)], rank_start, device, increment=increment)


@few_if_interpreted
@given(**cases, increment=st.sampled_from([None, 1]))
def test_kernel_equals_reference_over_several_blocks(small_blocks, device, table, picks, load, rank_start, increment):
    ids = [[pick, 0] for pick in picks]
    assert_kernel_equals_reference(ids, table, load[: len(table)], rank_start, device, increment=increment)


@few_if_interpreted
@given(**cases, increment=st.sampled_from([None, 1]))
def test_kernel_equals_reference_over_several_chunks(small_chunks, device, table, picks, load, rank_start, increment):
    ids = [[pick, 0] for pick in picks]
    assert_kernel_equals_reference(ids, table, load[: len(table)], rank_start, device, increment=increment)


# Up to one full block of each size, two; in chunks.
@pytest.mark.parametrize(
    ("tokens", "low"),
    [
        *product([600, 2047, 8192, 8193, MANY_KEYS - 1], [-1, 2]),
        pytest.param(MANY_KEYS, -1, marks=pytest.mark.gpu),  # slow, where interpreted
        pytest.param(MANY_KEYS + 1234, 2, marks=pytest.mark.gpu),
    ],
)
def test_kernel_equals_reference_for_many_tokens(device, tokens, low):
    """Of all experts, and all of one."""
    ids = torch.randint(low, 3, (tokens, 1), generator=torch.Generator().manual_seed(0)).tolist()
    table = [[ONE], [ONE // 5, ONE // 5, ONE], [ONE // 3, ONE // 2, ONE]]
    assert_kernel_equals_reference(ids, table, [1, 2, 3], ONE - 1, device, increment=1)


@triton.jit
def _ranks_below_kernel(positions_ptr, count_ptr, ranks_ptr):
    at = tl.arange(0, 8)
    tl.store(ranks_ptr + at, ranks_below(tl.load(positions_ptr + at), tl.load(count_ptr)))


@pytest.mark.parametrize("count", [0, 1, 12345, 2**31 - 1])
def test_ranks_below_a_position_are_what_division_gives(device, count):
    """Up to the largest count, where a narrower product would overflow."""
    positions = [-5, 0, 1, ONE // 3, ONE // 2 + 1, ONE - 1, ONE, ONE + 5]
    ranks = torch.empty(8, dtype=torch.int32, device=device)
    _ranks_below_kernel[(1,)](torch.tensor(positions, device=device), int32([count], device), ranks)
    for position, below in zip(positions, ranks.tolist(), strict=True):
        assert below == 0 or ((below - 1) << SHARE_BITS) // count < position
        assert below == count or (below << SHARE_BITS) // count >= position


@pytest.mark.parametrize("rank_start", [0, 12345, ONE - 1])
def test_batches_of_one_honour_the_shares_over_time(rank_start):
    """A start that stood still would give .9/.1 as 1/0."""
    table, taken = [[int(0.9 * ONE), ONE]], 0
    for step in range(1, 1001):
        taken += select([[0]], table, [step - 1], rank_start)[0].item()  # lane 1: the replica with share .1
        assert abs(taken - 0.1 * step) < 2.5
    assert 98 <= taken <= 102


def test_a_share_of_zero_gets_nothing():
    lanes, counts, _ = select([[0] * 500], [[0, ONE // 2, ONE // 2, ONE]], [7])
    assert sorted(set(lanes.flatten().tolist())) == [1, 3]
    assert counts.tolist()[:4] == [0, 250, 0, 250]


def test_edges(device, backend):
    """No tokens; ids of no expert; an expert without replicas; no entries at all."""
    lanes, counts, load = select([], [[ONE]], [5], 0, device, backend, increment=1)
    assert lanes.numel() == 0 and counts.tolist() == [0] * SPREAD and load.tolist() == [5]
    lanes, counts, load = select([[-1, 2, 1, 0, -7]], [[ONE], []], [0, 0], 0, device, backend, increment=1)
    assert lanes.tolist() == [[-1, -1, -1, 0, -1]]
    assert counts.tolist() == [1] + [0] * (2 * SPREAD - 1) and load.tolist() == [1, 1]
    lanes, counts, _ = select([[0, -1]], [[]], [0], 0, device, backend)
    assert lanes.tolist() == [[-1, -1]] and counts.tolist() == [0] * SPREAD


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(device, backend):
    load, one = (torch.tensor(values, dtype=torch.int64, device=device) for values in ([3, 4], [1]))
    table = table_of([[ONE // 2, ONE], [ONE]], device)
    for increment in (None, one):
        arguments = (int32([[0, 1], [0, -1]], device), table, LoadCounter(load.clone(), increment), 5, 2 * SPREAD)
        torch.library.opcheck(_select_replicas.registered, _select_replicas.flatten(*arguments, backend))


TABLE = ReplicaTable(int32([0]), int32([0]), int32([0, 1]), int32([ONE]))
LOAD = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("expert_ids_TK", {"expert_ids_TK": torch.zeros((1, 1), dtype=torch.int64)}),
        ("table.offsets_E1", {"table": replace(TABLE, offsets_E1=int32([0]))}),
        ("must both be None", {"table": replace(TABLE, offsets_E1=None)}),
        ("table.lanes_P", {"table": ReplicaTable(int32([0, 1]), int32([0]))}),
        ("table.lanes_P", {"table": replace(TABLE, lanes_P=torch.zeros(1))}),
        ("table.cumulative_P", {"table": replace(TABLE, cumulative_P=int32([1, ONE]))}),
        ("load.load_E", {"load": LoadCounter(int32([0]))}),
        ("load.increment_1", {"load": LoadCounter(LOAD, torch.ones(2, dtype=torch.int64))}),
        ("rank_start", {"rank_start": ONE}),
        ("rank_start", {"rank_start": -1}),
        ("num_lanes", {"num_lanes": 0}),
    ],
)
def test_refused(name, change):
    good = {"expert_ids_TK": int32([[0]]), "table": TABLE, "load": LoadCounter(LOAD), "rank_start": 0, "num_lanes": 1}
    with pytest.raises(ValueError, match=name):
        select_replicas(**(good | change))
