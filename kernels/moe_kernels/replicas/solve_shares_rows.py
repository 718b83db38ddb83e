"""Replica choice by batch: the kernels of `solve_shares` for costs and for many ranks, and their launches.

W ranks, E logical experts, P entries of the table, F experts with replicas on several ranks ("split" experts, a row each).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.replicas.circle import _SHARE_BITS

ROW_ROUNDS = 4
"""Rounds over all split experts, at most. Simulated with 256 experts and 32 redundant ones on 4 to 32 ranks, the largest load
is then within 0.4 % of the exact optimum in the mean; one round leaves up to 1.4 %."""

_ROUNDS = tl.constexpr(ROW_ROUNDS)
_UNROLL = tl.constexpr(4)  # entries of an expert that are looked at together, so that their loads overlap
_TILE = 8192  # counts that a program adds up in a step


@triton.jit
def count_bits(bits):
    """How many bits of a uint64 are 1."""
    bits = (bits & 0x5555555555555555) + ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits & 0x0F0F0F0F0F0F0F0F) + ((bits >> 4) & 0x0F0F0F0F0F0F0F0F)
    bits = (bits & 0x00FF00FF00FF00FF) + ((bits >> 8) & 0x00FF00FF00FF00FF)
    bits = (bits & 0x0000FFFF0000FFFF) + ((bits >> 16) & 0x0000FFFF0000FFFF)
    return ((bits + (bits >> 32)) & 127).to(tl.int32)


@triton.jit
def entries_of(offsets_ptr, expert, num_experts):
    """First and last entry of each expert; none of what is past the last expert."""
    exists = expert < num_experts
    if offsets_ptr is None:
        first, last = expert, tl.where(exists, expert + 1, expert)
    else:
        first = tl.load(offsets_ptr + expert, mask=exists, other=0)
        last = tl.load(offsets_ptr + expert + 1, mask=exists, other=0)
    return first, last


@triton.jit
def _parts(scratch_ptr, num_ranks, num_experts):
    """What the first kernel leaves to the second: totals_E, rows_E, loads_W, [rows, bound], then a record for each row.

    A record: replicas' ranks, then W ordinals (-1: the rank has no replica), then W quotas.
    """
    loads_ptr = scratch_ptr + 2 * num_experts
    sizes_ptr = loads_ptr + num_ranks
    return scratch_ptr, scratch_ptr + num_experts, loads_ptr, sizes_ptr, sizes_ptr + 2


@Launcher
@triton.jit(do_not_specialize=["rank"])
def _start_kernel(
    # inputs
    counts_ptr,
    offsets_ptr,  # None: each expert has one replica
    table_lanes_ptr,
    cumulative_ptr,  # None: likewise
    rank,
    # outputs
    before_ptr,
    scratch_ptr,
    # shapes
    num_ranks,
    num_experts,
    # constants
    LANES: tl.constexpr,  # of a rank; a constant, as division by any number takes long
    EXPERT_COST: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program finds what its rank has by the shares of the table: its load, and its part of rows.

    Example (2 ranks of 2 lanes, cost 0): counts [[3, 1], [2, 0]], expert 0 half in lane 0, half in lane 2, expert 1 in lane 1
    → totals [5, 1], rows [0, -1], loads [3, 3], 1 row, bound 3; the row: 2 ranks, ordinals [0, 1], quotas [2, 3].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    here = tl.program_id(0)
    totals_ptr, rows_ptr, loads_ptr, sizes_ptr, records_ptr = _parts(scratch_ptr, num_ranks, num_experts)
    expert = tl.arange(0, BLOCK_E)
    exists = expert < num_experts
    first, last = entries_of(offsets_ptr, expert, num_experts)
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, num_ranks, BLOCK_V):
        peer = start + tl.arange(0, BLOCK_V)[:, None]
        at = counts_ptr + peer * num_experts + expert[None, :]
        counts = tl.load(at, mask=(peer < num_ranks) & exists[None, :], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(peer < rank, counts, 0), axis=0)

    ranks = tl.zeros((BLOCK_E,), dtype=tl.uint64)  # a bit for each that has a replica
    one = tl.full((BLOCK_E,), 1, dtype=tl.uint64)
    quota = tl.zeros((BLOCK_E,), dtype=tl.int32)
    begin = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for replica in range(0, tl.max(last - first, axis=0), _UNROLL):
        for ahead in tl.static_range(_UNROLL):
            entry = first + replica + ahead
            is_entry = entry < last
            owner = tl.load(table_lanes_ptr + entry, mask=is_entry, other=0) // LANES
            ranks |= tl.where(is_entry, one << owner.to(tl.uint64), 0)
            end = total
            if cumulative_ptr is not None:
                share = tl.load(cumulative_ptr + entry, mask=is_entry, other=0)
                end = ((total.to(tl.int64) * share) >> _SHARE_BITS).to(tl.int32)
            quota += tl.where(is_entry & (owner == here), end - begin, 0)
            begin = end
    num = count_bits(ranks)
    bit = one << here.to(tl.uint64)
    ordinal = count_bits(ranks & (bit - 1))
    is_here = (ranks & bit) != 0
    cost = quota + EXPERT_COST * (quota > 0).to(tl.int32)
    tl.store(loads_ptr + here, tl.sum(cost, axis=0))

    is_split = num > 1
    row = tl.where(is_split, tl.cumsum(is_split.to(tl.int32), axis=0) - 1, -1)
    record_ptr = records_ptr + row * (1 + 2 * num_ranks)
    tl.store(record_ptr + 1 + here, tl.where(is_here, ordinal, -1), mask=is_split)
    tl.store(record_ptr + 1 + num_ranks + here, quota, mask=is_split)
    if here == 0:
        tl.store(before_ptr + expert, before, mask=exists)
        tl.store(totals_ptr + expert, total, mask=exists)
        tl.store(rows_ptr + expert, row, mask=exists)
        tl.store(record_ptr, num, mask=is_split)
        least = tl.sum(tl.where(num > 0, total + EXPERT_COST * (total > 0).to(tl.int32), 0), axis=0)
        tl.store(sizes_ptr, tl.sum(is_split.to(tl.int32), axis=0))
        tl.store(sizes_ptr + 1, tl.cdiv(least, num_ranks))


@triton.jit
def level_pair(load, quota, ordinal, a, b, bound, gathers, EXPERT_COST: tl.constexpr):
    """Split what the ordinals a and b of an expert have together, so that the larger of the two loads becomes least.

    One expression serves both ranks, each in its place of the vectors over ranks; so the only thing that waits for other
    threads is the sum of the two loads.
    """
    is_a = ordinal == a
    is_pair = is_a | (ordinal == b)
    both = tl.sum(tl.where(is_pair, quota, 0), axis=0)
    rest = load - quota  # the loads without this expert
    if EXPERT_COST:
        rest -= tl.where(quota > 0, EXPERT_COST, 0)
    sum_rest = tl.sum(tl.where(is_pair, rest, 0), axis=0)
    new = (both + sum_rest - 2 * rest + is_a.to(tl.int32)) >> 1
    new = tl.minimum(tl.maximum(new, 0), both)
    if EXPERT_COST:
        least = tl.min(tl.where(is_pair, rest, 0x7FFFFFFF), axis=0)
        whole = tl.maximum(least + both + tl.where(both > 0, EXPERT_COST, 0), sum_rest - least)
        is_whole = gathers | (whole <= tl.maximum(bound, ((both + sum_rest + 1) >> 1) + EXPERT_COST))
        is_taker = (rest == least) & (is_a | (sum_rest != 2 * least))
        new = tl.where(is_whole, tl.where(is_taker, both, 0), new)
    after = rest + new
    if EXPERT_COST:
        after += tl.where(new > 0, EXPERT_COST, 0)
    return tl.where(is_pair, after, load), tl.where(is_pair, new, quota)


@Launcher
@triton.jit
def _solve_shares_kernel(
    # input and output
    scratch_ptr,
    # inputs
    offsets_ptr,
    table_lanes_ptr,
    # outputs
    quotas_ptr,
    # shapes
    num_ranks,
    num_experts,
    num_entries,
    # constants
    LANES: tl.constexpr,
    EXPERT_COST: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program of one warp: each step needs the step before, and within a warp a sum over ranks is one instruction.

    Example: what `_start_kernel` has left in its example → quotas (ends) [2, 5, 1] of the entries 0, 1 (expert 0) and 2; both
    ranks have 3 tokens.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    totals_ptr, rows_ptr, loads_ptr, sizes_ptr, records_ptr = _parts(scratch_ptr, num_ranks, num_experts)
    size = 1 + 2 * num_ranks
    rank = tl.arange(0, BLOCK_W)
    is_rank = rank < num_ranks
    load = tl.load(loads_ptr + rank, mask=is_rank, other=0)
    num_rows, bound = tl.load(sizes_ptr), tl.load(sizes_ptr + 1)
    round = 0
    gathers = EXPERT_COST > 0
    goes_on = (num_rows > 0) & (gathers | (tl.max(load, axis=0) > bound))
    while goes_on:
        tl.debug_barrier()  # the quotas of the round before are there
        moved = tl.zeros((BLOCK_W,), dtype=tl.int32)
        at = records_ptr
        next_num = tl.load(at)
        next_ordinal = tl.load(at + 1 + rank, mask=is_rank, other=-1)
        next_quota = tl.load(at + 1 + num_ranks + rank, mask=is_rank, other=0)
        for row in range(num_rows):
            num, ordinal, quota = next_num, next_ordinal, next_quota
            mine = at
            at = records_ptr + tl.minimum(row + 1, num_rows - 1) * size  # ahead of time; after the last row, in vain
            next_num = tl.load(at)
            next_ordinal = tl.load(at + 1 + rank, mask=is_rank, other=-1)
            next_quota = tl.load(at + 1 + num_ranks + rank, mask=is_rank, other=0)
            old = quota
            # Around the circle of its replicas, in another stride in each round: in the end each meets each.
            stride = tl.where(round + 1 < num, round + 1, 1)
            for a in range(0, tl.where(num > 2, num, 1)):
                b = a + stride
                b -= tl.where(b < num, 0, num)
                load, quota = level_pair(load, quota, ordinal, a, b, bound, gathers, EXPERT_COST)
            moved |= (quota != old).to(tl.int32)
            tl.store(mine + 1 + num_ranks + rank, quota, mask=is_rank)
        round += 1
        has_moved = gathers | (tl.max(moved, axis=0) > 0)
        goes_on = (round < _ROUNDS) & has_moved & (tl.max(load, axis=0) > bound)
        gathers = False

    tl.debug_barrier()
    expert = tl.arange(0, BLOCK_E)
    exists = expert < num_experts
    first, last = entries_of(offsets_ptr, expert, num_experts)
    total = tl.load(totals_ptr + expert, mask=exists, other=0)
    row = tl.load(rows_ptr + expert, mask=exists, other=-1)
    row_ptr = records_ptr + row * size + 1 + num_ranks
    end = tl.where(row < 0, total, 0)
    seen = tl.zeros((BLOCK_E,), dtype=tl.uint64)
    one = tl.full((BLOCK_E,), 1, dtype=tl.uint64)
    for replica in range(0, tl.max(last - first, axis=0), _UNROLL):
        for ahead in tl.static_range(_UNROLL):
            entry = first + replica + ahead
            is_entry = entry < last
            owner = tl.load(table_lanes_ptr + entry, mask=is_entry, other=0) // LANES
            bit = one << owner.to(tl.uint64)
            # Of two replicas on one rank, the first has all: to split between them would gain nothing.
            counts = is_entry & (row >= 0) & ((seen & bit) == 0)
            end += tl.load(row_ptr + owner, mask=counts, other=0)
            seen |= bit
            tl.store(quotas_ptr + entry, end, mask=is_entry)
    if offsets_ptr is not None:
        for start in range(tl.load(offsets_ptr + num_experts), num_entries, BLOCK_E):  # entries of no expert
            tl.store(quotas_ptr + start + expert, 0, mask=start + expert < num_entries)


def solve_rows(
    counts_WE: torch.Tensor, table: ReplicaTable, lanes_per_rank: int, rank: int, expert_cost: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_ranks, num_experts = counts_WE.shape
    num_entries = table.lanes_P.numel()
    quotas_P, before_E = counts_WE.new_empty(num_entries), counts_WE.new_empty(num_experts)
    rows = min(num_experts, num_entries // 2)
    scratch = counts_WE.new_empty(2 * num_experts + num_ranks + 2 + rows * (1 + 2 * num_ranks))
    block_e = next_power_of_2(num_experts)
    block_v = max(1, min(next_power_of_2(num_ranks), _TILE // block_e))
    _start_kernel[(num_ranks,)](
        *(counts_WE, table.offsets_E1, table.lanes_P, table.cumulative_P, rank),
        *(before_E, scratch),
        *(num_ranks, num_experts),
        LANES=lanes_per_rank,
        EXPERT_COST=expert_cost,
        BLOCK_E=block_e,
        BLOCK_V=block_v,
        num_warps=max(4, min(8, cdiv(block_e * block_v, 1024))),
    )
    _solve_shares_kernel[(1,)](
        *(scratch, table.offsets_E1, table.lanes_P, quotas_P),
        *(num_ranks, num_experts, num_entries),
        LANES=lanes_per_rank,
        EXPERT_COST=expert_cost,
        BLOCK_W=max(32, next_power_of_2(num_ranks)),
        BLOCK_E=block_e,
        num_warps=1,
    )
    return quotas_P, before_E
