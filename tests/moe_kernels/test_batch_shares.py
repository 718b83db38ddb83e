"""Replica choice by the counts of this batch: `count_experts`, `solve_shares`, `select_by_quota`."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from moe_kernels import (
    LoadCounter,
    ReplicaTable,
    count_experts,
    count_experts_torch,
    select_by_quota,
    select_by_quota_torch,
    solve_shares,
    solve_shares_torch,
)
from moe_kernels.base.scan import MANY_KEYS
from moe_kernels.replicas.circle import SHARE_ONE


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def table_of(lanes_by_expert, device="cpu", shares=None):
    """Of these lanes for each expert, with equal shares, or with `shares` in units of 2**-30. The slots are not used."""
    offsets = np.cumsum([0, *map(len, lanes_by_expert)]).tolist()
    lanes = int32([lane for lanes in lanes_by_expert for lane in lanes], device)
    equal = [SHARE_ONE * (i + 1) // len(lanes) for lanes in lanes_by_expert for i in range(len(lanes))]
    return ReplicaTable(lanes, lanes, int32(offsets, device), int32(shares or equal, device))


def random_table(rng, num_experts, num_ranks, redundant, lanes_per_rank, device="cpu"):
    """Lanes are drawn: two replicas of an expert may share a rank, and experts may lack any."""
    lanes = rng.permutation(num_ranks * lanes_per_rank)[: num_experts + redundant]
    owner = np.concatenate([np.arange(num_experts), rng.choice(num_experts, redundant)])[: len(lanes)]
    owner = rng.permutation(owner) if rng.random() < 0.2 else owner
    lanes_of = [lanes[owner == expert].tolist() for expert in range(num_experts)]
    shares = [[*sorted(rng.integers(0, SHARE_ONE, len(of) - 1).tolist()), SHARE_ONE] for of in lanes_of if of]
    return table_of(lanes_of, device, [share for of in shares for share in of])


def rank_loads(quotas_P, table, num_ranks, lanes_per_rank, expert_cost=0):
    loads, offsets, lanes = [0] * num_ranks, table.offsets_E1.tolist(), table.lanes_P.tolist()
    ends = quotas_P.tolist()
    for first, last in itertools.pairwise(offsets):
        for entry in range(first, last):
            tokens = ends[entry] - (ends[entry - 1] if entry > first else 0)
            assert tokens >= 0
            loads[lanes[entry] // lanes_per_rank] += tokens + expert_cost * (tokens > 0)
    return loads


def optimum(totals, table, num_ranks, lanes_per_rank, expert_cost=0):
    """The least largest load of a rank, by integer programming: tokens and whether there are any, of each replica."""
    offsets, lanes = table.offsets_E1.tolist(), table.lanes_P.tolist()
    owner = [expert for expert, (a, b) in enumerate(itertools.pairwise(offsets)) for _ in range(a, b)]
    num = len(lanes)
    rank_rows = np.zeros((num_ranks, 2 * num + 1))
    rank_rows[:, -1] = -1
    sums, uses = np.zeros((len(totals), 2 * num + 1)), np.zeros((num, 2 * num + 1))
    for entry, (expert, lane) in enumerate(zip(owner, lanes, strict=True)):
        rank_rows[lane // lanes_per_rank, [entry, num + entry]] = 1, expert_cost
        sums[expert, entry] = 1
        uses[entry, [entry, num + entry]] = 1, -totals[expert]
    found = milp(
        np.eye(2 * num + 1)[-1],
        constraints=[
            LinearConstraint(rank_rows, -np.inf, 0),
            LinearConstraint(sums, totals, totals),
            LinearConstraint(uses, -np.inf, 0),
        ],
        integrality=np.concatenate([np.ones(2 * num), [0]]),
        bounds=Bounds(0, np.concatenate([np.full(num, np.inf), np.ones(num), [np.inf]])),
        options={"mip_rel_gap": 1e-3},
    )
    assert found.success, found.message
    return found.fun


# ---- count_experts


@pytest.fixture(params=["torch", "triton", "triton in blocks", "triton in chunks"])
def backend(request):
    backend, _, size = request.param.partition(" in ")
    if size:
        request.getfixturevalue(f"small_{size}")
    return backend


@pytest.mark.parametrize("ids", [[], [1, 0, -1, 1], [7, 2, -5, 2**31 - 1], [*range(4), 2] * 23])
def test_counts(device, backend, ids):
    counts = count_experts(int32(ids, device).view(-1, 1), 4, backend=backend)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [ids.count(expert) for expert in range(4)]


@pytest.mark.gpu
def test_many_are_counted(device):
    """As many as one launch no longer serves."""
    ids = torch.randint(-1, 6, (MANY_KEYS // 4 + 3, 4), dtype=torch.int32, device=device)
    assert torch.equal(count_experts(ids, 5, backend="triton"), count_experts_torch(ids, 5))


# ---- solve_shares


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_solve_example(device, backend):
    """The kernels' docstrings: expert 0 on both ranks, expert 1 on rank 0."""
    counts, table = int32([[3, 1], [2, 0]], device), table_of([[0, 2], [1]], device)
    quotas, before = solve_shares(counts, table, 2, 1, backend=backend)
    assert quotas.tolist() == [2, 5, 1]
    assert before.tolist() == [3, 1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("cost", "ends"),
    [
        (0, [5, 10]),  # half each
        (9, [5, 10]),  # 10 + 9 on one rank, or 5 + 9 on both
        (4000, [5, 10]),
    ],
)
def test_the_larger_rank_decides(device, backend, cost, ends):
    quotas, _ = solve_shares(
        int32([[4], [6]], device), table_of([[0, 1]], device), 1, 0, expert_cost=cost, backend=backend
    )
    assert quotas.tolist() == ends


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("cost", "ends"), [(0, [5, 10, 100]), (1, [10, 10, 100])])
def test_a_split_must_pay(device, backend, cost, ends):
    """Rank 2 has the most and nothing changes that: reading expert 0 once is enough."""
    table = table_of([[0, 1], [2]], device)
    quotas, _ = solve_shares(int32([[10, 100], [0, 0], [0, 0]], device), table, 1, 0, expert_cost=cost, backend=backend)
    assert quotas.tolist() == ends


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_of_one_replica_each_the_quotas_are_totals(device, backend):
    lanes = int32([2, 0, 1], device)
    quotas, before = solve_shares(
        int32([[1, 2, 3], [4, 5, 6], [7, 8, 9]], device), ReplicaTable(lanes, lanes), 1, 2, backend=backend
    )
    assert quotas.tolist() == [12, 15, 18]
    assert before.tolist() == [5, 7, 9]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_of_two_replicas_on_a_rank_the_first_has_all(device, backend):
    """Lanes 0 and 1 are on rank 0; entries past the last expert are 0."""
    lanes = int32([1, 0, 2, 3], device)
    table = ReplicaTable(lanes, lanes, int32([0, 3], device), int32([2**28, 2**29, SHARE_ONE, 0], device))
    quotas, _ = solve_shares(int32([[3], [3]], device), table, 2, 0, backend=backend)
    assert quotas.tolist() == [3, 3, 6, 0]


@pytest.mark.parametrize("cost", [0, 40])
@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8, 16, 32, 33, 64])  # 33: more than a warp
def test_kernels_equal_the_reference(device, num_ranks, cost):
    for seed in range(3 if num_ranks <= 8 else 1):
        rng = np.random.default_rng(seed)
        num_experts, lanes_per_rank = int(rng.integers(1, 50)), int(rng.integers(1, 4)) + 50 // num_ranks
        redundant = int(rng.integers(0, max(1, num_ranks * lanes_per_rank - num_experts)))
        table = random_table(rng, num_experts, num_ranks, redundant, lanes_per_rank, device)
        skew = rng.lognormal(0, 1.5, num_experts) * rng.choice([0.2, 3, 900])
        counts = int32(rng.poisson(skew, (num_ranks, num_experts)).tolist(), device)
        rank = int(rng.integers(num_ranks))
        expected = solve_shares_torch(counts, table, lanes_per_rank, rank, cost)
        got = solve_shares(counts, table, lanes_per_rank, rank, expert_cost=cost, backend="triton")
        for name, one, other in zip(("quotas", "before"), got, expected, strict=True):
            assert torch.equal(one, other), (name, seed)
            assert one.dtype == torch.int32


def test_huge_batches_do_not_overflow(device):
    """2**29 tokens."""
    counts = int32([[2**28 - 5, 1], [2**28 - 2, 6]], device)
    table = table_of([[0, 1], [2]], device)
    expected = solve_shares_torch(counts, table, 2, 1)[0].tolist()
    assert solve_shares(counts, table, 2, 1, backend="triton")[0].tolist() == expected
    assert expected[1] == 2**29 - 7


@given(
    picks=st.lists(st.lists(st.integers(0, 40), min_size=5, max_size=5), min_size=1, max_size=4),
    lanes=st.permutations(range(8)),
    owners=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    cost=st.sampled_from([0, 3, 100]),
)
def test_quotas_sum_up(picks, lanes, owners, cost):
    """Of each expert that has a replica: no end below the one before, and the last is the total."""
    table = table_of([[lane for lane, own in zip(lanes, owners, strict=True) if own == expert] for expert in range(5)])
    quotas, before = solve_shares_torch(int32(picks), table, -(-8 // len(picks)), len(picks) - 1, cost)
    rank_loads(quotas, table, len(picks), -(-8 // len(picks)))
    totals, offsets = np.sum(picks, axis=0), table.offsets_E1.tolist()
    for expert in range(5):
        if offsets[expert + 1] > offsets[expert]:
            assert quotas[offsets[expert + 1] - 1] == totals[expert]
    assert before.tolist() == np.array(picks)[:-1].sum(axis=0).tolist()


def served(rng, num_experts, num_ranks, redundant):
    """A table as a planner makes it: replicas for the most loaded experts, each on the least loaded rank; and popularity."""
    popularity = rng.lognormal(0, 0.8, num_experts)
    popularity /= popularity.sum()
    num = np.ones(num_experts, dtype=int)
    for _ in range(redundant):
        num[np.argmax(np.where(num < num_ranks, popularity / num, -1))] += 1
    lanes_per_rank = -(-(num_experts + redundant) // num_ranks) + 1
    used, loads = np.zeros(num_ranks, dtype=int), np.zeros(num_ranks)
    lanes_of = [[] for _ in range(num_experts)]
    for expert in np.argsort(-popularity / num):
        for _ in range(num[expert]):
            taken = {lane // lanes_per_rank for lane in lanes_of[expert]}
            free = [rank for rank in range(num_ranks) if rank not in taken and used[rank] < lanes_per_rank]
            rank = min(free, key=lambda rank: loads[rank])
            lanes_of[expert].append(rank * lanes_per_rank + int(used[rank]))
            used[rank] += 1
            loads[rank] += popularity[expert] / num[expert]
    return table_of(lanes_of), lanes_per_rank, popularity


@pytest.mark.parametrize("num_ranks", [4, 8, 32])
@pytest.mark.parametrize("tokens", [64, 512])
def test_the_largest_load_is_near_the_optimum(num_ranks, tokens):
    """Within 1 % of the exact optimum in the mean over batches, whose load jitters by 20 % around what the table is for."""
    excess = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        table, lanes_per_rank, popularity = served(rng, 64, num_ranks, 16)
        jittered = popularity * rng.lognormal(0, 0.2, 64)
        counts = rng.multinomial(tokens * 8, jittered / jittered.sum(), num_ranks)
        quotas, _ = solve_shares_torch(int32(counts.tolist()), table, lanes_per_rank, 0)
        best = optimum(counts.sum(axis=0), table, num_ranks, lanes_per_rank)
        excess.append(max(rank_loads(quotas, table, num_ranks, lanes_per_rank)) / best - 1)
        assert excess[-1] > -2e-3  # else it is not the optimum that this is compared with
    assert np.mean(excess) <= 0.01, excess


@pytest.mark.parametrize("tokens", [1, 16])
def test_the_largest_cost_is_near_the_optimum(tokens):
    """Where an expert costs as much as 40 tokens."""
    excess = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        table, lanes_per_rank, popularity = served(rng, 64, 4, 8)
        counts = rng.multinomial(tokens * 4, popularity, 4)
        quotas, _ = solve_shares_torch(int32(counts.tolist()), table, lanes_per_rank, 0, 40)
        best = optimum(counts.sum(axis=0), table, 4, lanes_per_rank, 40)
        excess.append(max(rank_loads(quotas, table, 4, lanes_per_rank, 40)) / best - 1)
    assert np.mean(excess) <= 0.04, excess


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, r"rank=2: must be in \[0, 2\)"),
        ({"rank": -1}, "rank=-1"),
        ({"expert_cost": -1}, "expert_cost=-1"),
        ({"expert_cost": 2**21}, "expert_cost=2097152"),
        ({"lanes_per_rank": 0}, "lanes_per_rank=0"),
        ({"counts_WE": int32([[1]] * 65)}, "1 to 64 ranks"),
        ({"counts_WE": torch.ones(2, 1)}, "counts_WE has dtype"),
        ({"counts_WE": int32([[1, 2]])}, "table.offsets_E1 has shape"),
    ],
)
def test_what_solve_shares_refuses(change, message):
    arguments = {"counts_WE": int32([[1], [1]]), "table": table_of([[0, 1]]), "lanes_per_rank": 1, "rank": 0}
    with pytest.raises(ValueError, match=message):
        solve_shares(**(arguments | change))


# ---- select_by_quota


def batch(seed, num_ranks=3, num_experts=7, num_tokens=40, device="cpu"):
    """Ids of each rank, a table and what is solved for them."""
    rng = np.random.default_rng(seed)
    table = random_table(rng, num_experts, num_ranks, 6, 6, device)
    ids = [
        int32(rng.integers(-1, num_experts + 1, (int(rng.integers(num_tokens + 1)), 2)).tolist(), device).view(-1, 2)
        for _ in range(num_ranks)
    ]
    counts_WE = torch.stack([count_experts_torch(one, num_experts) for one in ids])
    return ids, table, counts_WE


@pytest.mark.parametrize("seed", range(4))
def test_each_replica_gets_its_quota(device, backend, seed):
    ids, table, counts_WE = batch(seed, device=device)
    num_experts, got = counts_WE.shape[1], torch.zeros(18, dtype=torch.int32, device=device)
    offsets, lanes_P = table.offsets_E1.tolist(), table.lanes_P.tolist()
    lanes_of = [set(lanes_P[a:b]) for a, b in itertools.pairwise(offsets)]
    for rank, mine in enumerate(ids):
        quotas, before = solve_shares(counts_WE, table, 6, rank, backend=backend)
        load = torch.arange(num_experts, device=device) * 2**40
        one = torch.ones(1, dtype=torch.int64, device=device)
        lanes, counts = select_by_quota(
            mine, table, quotas, before, LoadCounter(load, one), num_lanes=18, backend=backend
        )
        expected = select_by_quota_torch(mine, table, quotas, before, LoadCounter(torch.zeros_like(load)), num_lanes=18)
        assert torch.equal(lanes, expected[0])
        assert torch.equal(counts, expected[1])
        for expert, lane in zip(mine.flatten().tolist(), lanes.flatten().tolist(), strict=True):
            assert lane in lanes_of[expert] if 0 <= expert < num_experts and lanes_of[expert] else lane == -1
        assert (load - torch.arange(num_experts, device=device) * 2**40).tolist() == counts_WE[rank].tolist()
        got += counts
    ends = quotas.tolist()
    for first, last in itertools.pairwise(offsets):
        for entry in range(first, last):
            assert got[lanes_P[entry]] == ends[entry] - (ends[entry - 1] if entry > first else 0)


def test_select_example(device, backend):
    """Two ranks with three and two tokens of expert 0; the quota of the first replica ends at 4."""
    table, quotas = table_of([[5, 3]], device), int32([4, 5], device)
    counter = LoadCounter(torch.zeros(1, dtype=torch.int64, device=device))
    for tokens, before, expected in ((3, 0, [5, 5, 5]), (2, 3, [5, 3])):
        ids = int32([[0]] * tokens, device)
        lanes, counts = select_by_quota(
            ids, table, quotas, int32([before], device), counter, num_lanes=6, backend=backend
        )
        assert lanes.flatten().tolist() == expected
        assert counts.tolist() == [expected.count(lane) for lane in range(6)]


def test_of_one_replica_each_nothing_is_chosen(device, backend):
    lanes = int32([2, 0, 1], device)
    table, ids = ReplicaTable(lanes, lanes), int32([[0, -1], [2, 2]], device)
    counter = LoadCounter(torch.zeros(3, dtype=torch.int64, device=device))
    zeros = int32([0, 0, 0], device)
    got, counts = select_by_quota(ids, table, zeros, zeros, counter, num_lanes=4, backend=backend)
    assert got.tolist() == [[2, -1], [1, 1]]
    assert counts.tolist() == [0, 2, 1, 0]


def test_in_a_backward_nothing_is_counted(device, backend):
    """The backward that repeats the forward."""
    ids, table, counts_WE = batch(0, device=device)
    quotas, before = solve_shares(counts_WE, table, 6, 0, backend=backend)
    load = torch.zeros(7, dtype=torch.int64, device=device)
    counter = LoadCounter(load, torch.ones(1, dtype=torch.int64, device=device))
    x = torch.ones(1, requires_grad=True, device=device)
    y = x * 2
    y.register_hook(
        lambda grad: (select_by_quota(ids[0], table, quotas, before, counter, num_lanes=18, backend=backend), grad)[1]
    )
    y.backward()
    assert load.sum() == 0


def test_what_select_by_quota_refuses():
    ids, table, counts_WE = batch(0)
    quotas, before = solve_shares(counts_WE, table, 6, 0)
    counter = LoadCounter(torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match="quotas_P has shape"):
        select_by_quota(ids[0], table, quotas[1:], before, counter, num_lanes=18)
    with pytest.raises(ValueError, match="before_E has dtype"):
        select_by_quota(ids[0], table, quotas, before.long(), counter, num_lanes=18)
    with pytest.raises(ValueError, match="num_lanes=0"):
        select_by_quota(ids[0], table, quotas, before, counter, num_lanes=0)


@pytest.mark.gpu
def test_a_graph_captures_all(device):
    """Counts → shares → lanes, replayed for other ids."""
    if device != "cuda":
        pytest.skip("needs a GPU that compiles kernels")
    rng = np.random.default_rng(3)
    table = random_table(rng, 7, 1, 3, 12, device)
    ids = int32(rng.integers(-1, 7, (50, 2)).tolist(), device)
    counter = LoadCounter(torch.zeros(7, dtype=torch.int64, device=device))

    def choose():
        counts = count_experts(ids, 7)
        quotas, before = solve_shares(counts[None], table, 12, 0)
        return select_by_quota(ids, table, quotas, before, counter, num_lanes=12)[0]

    choose()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lanes = choose()
    ids.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(lanes, choose())
