"""Replica choice by batch: how many tokens of *this* batch each replica gets, from the counts of all ranks.

W ranks, E logical experts, P replicas of all experts together (entries of the table).
"""

from __future__ import annotations

import itertools
from copy import deepcopy

import torch

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_integer, check_kind, check_tensor
from moe_kernels.base.registered import registered_op
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.replicas.circle import SHARE_BITS, SHARE_ONE
from moe_kernels.replicas.solve_shares_pairs import PAIRED_RANKS, solve_pairs
from moe_kernels.replicas.solve_shares_rows import ROW_ROUNDS, solve_rows
from moe_kernels.replicas.solve_shares_steps import ROUNDS

MOST_RANKS = 64  # a bit for each in an integer of the kernels
MOST_EXPERTS = 1024  # a program holds them all
MOST_COST = 1 << 20  # so that the sum of two ranks' loads stays below 2**31


def solve_shares_torch(
    counts_WE: torch.Tensor, table: ReplicaTable, lanes_per_rank: int, rank: int, expert_cost: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `solve_shares`. Takes host syncs on a GPU."""
    num_ranks, num_experts = counts_WE.shape
    totals = counts_WE.sum(dim=0).tolist()
    lanes = table.lanes_P.tolist()
    offsets = list(range(num_experts + 1)) if table.offsets_E1 is None else table.offsets_E1.tolist()
    ranks_of = [
        sorted({lane // lanes_per_rank for lane in lanes[first:last]}) for first, last in itertools.pairwise(offsets)
    ]
    cumulative = [SHARE_ONE] * num_experts if table.cumulative_P is None else table.cumulative_P.tolist()
    quotas = [[0] * len(ranks) for ranks in ranks_of]
    for expert, (ranks, total) in enumerate(zip(ranks_of, totals, strict=True)):
        begin = 0
        for entry in range(offsets[expert], offsets[expert + 1]):
            end = (total * cumulative[entry]) >> SHARE_BITS
            quotas[expert][ranks.index(lanes[entry] // lanes_per_rank)] += end - begin
            begin = end
    loads = [0] * num_ranks
    for ranks, mine in zip(ranks_of, quotas, strict=True):
        for owner, quota in zip(ranks, mine, strict=True):
            loads[owner] += _cost(quota, expert_cost)
    least = sum(_cost(total, expert_cost) for ranks, total in zip(ranks_of, totals, strict=True) if ranks)
    bound = -(-least // num_ranks)
    is_paired = _is_paired(num_ranks, expert_cost)
    is_pair = [is_paired and len(ranks) == 2 for ranks in ranks_of]
    pairs = {tuple(ranks): [0, 0] for ranks, is_one in zip(ranks_of, is_pair, strict=True) if is_one}
    for expert, ranks in enumerate(ranks_of):
        if is_pair[expert]:
            pairs[tuple(ranks)] = [
                have + quota for have, quota in zip(pairs[tuple(ranks)], quotas[expert], strict=True)
            ]
    for round in range(ROUNDS if is_paired else ROW_ROUNDS):
        gathers = round == 0 and expert_cost > 0
        if max(loads) <= bound and not gathers:
            break
        old = deepcopy((pairs, quotas))
        for a, b in sorted(pairs, key=lambda pair: pair[0] ^ pair[1]):
            _level_pair(loads, pairs[a, b], [a, b], 0, 1, 0, bound, False)
        for expert, ranks in enumerate(ranks_of):
            num = len(ranks)
            stride = round + 1 if round + 1 < num else 1
            for a in range(0 if num < 2 or is_pair[expert] else num if num > 2 else 1):
                _level_pair(loads, quotas[expert], ranks, a, (a + stride) % num, expert_cost, bound, gathers)
        if old == (pairs, quotas) and not gathers:
            break
    for expert, ranks in enumerate(ranks_of):
        if is_pair[expert]:  # of what is left of the pair's tokens, the smaller rank has the first
            of_pair = pairs[tuple(ranks)]
            first = min(of_pair[0], totals[expert])
            quotas[expert] = [first, totals[expert] - first]
            of_pair[0] -= first
    ends = [0] * len(lanes)
    for expert, ranks in enumerate(ranks_of):
        left, end = dict(zip(ranks, quotas[expert], strict=True)), 0
        for entry in range(offsets[expert], offsets[expert + 1]):
            end += left.pop(lanes[entry] // lanes_per_rank, 0)  # of two replicas on one rank, the first has all
            ends[entry] = end
    return counts_WE.new_tensor(ends), counts_WE[:rank].sum(dim=0, dtype=torch.int32)


def _is_paired(num_ranks: int, expert_cost: int) -> bool:
    """Whether experts of the same two ranks are divided together."""
    return num_ranks <= PAIRED_RANKS and not expert_cost


def _cost(quota: int, expert_cost: int) -> int:
    return quota + expert_cost * (quota > 0)


def _level_pair(
    loads: list[int], quotas: list[int], ranks: list[int], a: int, b: int, expert_cost: int, bound: int, gathers: bool
) -> None:
    """Split what two replicas have together, so that the larger of their ranks' loads becomes least."""
    both = quotas[a] + quotas[b]
    rest_a = loads[ranks[a]] - _cost(quotas[a], expert_cost)
    rest_b = loads[ranks[b]] - _cost(quotas[b], expert_cost)
    quotas[a] = min(max((both + rest_b - rest_a + 1) // 2, 0), both)
    if expert_cost:
        whole = max(min(rest_a, rest_b) + _cost(both, expert_cost), rest_a, rest_b)
        halves = (both + rest_a + rest_b + 1) // 2 + expert_cost
        if gathers or whole <= max(bound, halves):
            quotas[a] = both if rest_a <= rest_b else 0
    quotas[b] = both - quotas[a]
    loads[ranks[a]] = rest_a + _cost(quotas[a], expert_cost)
    loads[ranks[b]] = rest_b + _cost(quotas[b], expert_cost)


@registered_op("moe_kernels::solve_shares")
def _solve_shares(
    counts_WE: torch.Tensor, table: ReplicaTable, lanes_per_rank: int, rank: int, expert_cost: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend != "triton":
        return solve_shares_torch(counts_WE, table, lanes_per_rank, rank, expert_cost)
    if _is_paired(counts_WE.shape[0], expert_cost):
        return solve_pairs(counts_WE, table, lanes_per_rank, rank)
    return solve_rows(counts_WE, table, lanes_per_rank, rank, expert_cost)


@_solve_shares.register_fake
def _solve_shares_fake(counts_WE, table, *_):
    return counts_WE.new_empty(table.lanes_P.shape), counts_WE.new_empty(counts_WE.shape[1])


def solve_shares(
    counts_WE: torch.Tensor,
    table: ReplicaTable,
    lanes_per_rank: int,
    rank: int,
    *,
    expert_cost: int = 0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the tokens of each expert among its replicas, so that the most loaded rank has as little as can be.

    The load of a rank is its tokens, and `expert_cost` for each expert of which it has any. All ranks that have the same
    counts and table get the same bits: it is all integers, in a fixed order.

    Each expert begins with the table's shares. On at most `PAIRED_RANKS` ranks without an `expert_cost`, experts that have the
    same two ranks are divided as one, the first of them to the smaller rank: each pair of ranks levels what these experts have,
    then each other expert its ranks by pairs. Else each expert levels its ranks by pairs. That is done up to `ROUNDS` (or
    `ROW_ROUNDS`) times, until nothing moves or no division could be better. With an `expert_cost` the first round gives each
    expert to one rank whole; a later one splits it only where the larger of the two ranks gains and would else be above the
    mean.

    Args:
        counts_WE: [W, E] int32, contiguous: the tokens that each rank has for each expert. At most 64 ranks, 1024
            experts, and 2**29 in all; more is undefined behaviour.
        table: the replicas of each expert; their shares are where it begins. Rank r has the lanes from r · lanes_per_rank.
        lanes_per_rank: S.
        rank: in [0, W), for `before_E`.
        expert_cost: in tokens, in [0, 2**20]. 0 where computing takes the time (many tokens for each expert); where reading
            weights does (few tokens), how many tokens take as long as reading an expert.

    Returns:
        quotas_P: [P] int32; the running sum of the tokens of an expert's replicas; the last is its total. 0 at entries of no
            expert.
        before_E: [E] int32; tokens of each expert on the ranks before `rank`.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("counts_WE", counts_WE, (None, None), torch.int32)
    num_ranks, num_experts = counts_WE.shape
    if not 1 <= num_ranks <= MOST_RANKS or not 1 <= num_experts <= MOST_EXPERTS:
        raise ValueError(
            f"counts_WE has shape {(num_ranks, num_experts)}: must have 1 to {MOST_RANKS} ranks and 1 to {MOST_EXPERTS} experts"
        )
    check_kind("table", table, ReplicaTable)
    table.check(num_experts, counts_WE.device)
    lanes_per_rank, rank = check_integer("lanes_per_rank", lanes_per_rank), check_integer("rank", rank)
    expert_cost = check_integer("expert_cost", expert_cost)
    if lanes_per_rank < 1:
        raise ValueError(f"lanes_per_rank={lanes_per_rank}: must be at least 1")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank={rank}: must be in [0, {num_ranks})")
    if not 0 <= expert_cost <= MOST_COST:
        raise ValueError(f"expert_cost={expert_cost}: must be in [0, {MOST_COST}]")
    return _solve_shares(
        counts_WE, table, lanes_per_rank, rank, expert_cost, resolve_backend(backend, counts_WE.device)
    )
