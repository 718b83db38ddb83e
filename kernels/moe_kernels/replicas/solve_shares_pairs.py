"""Replica choice by batch: the kernel of `solve_shares` for few ranks without costs, and its launch.

W ranks, E logical experts, P entries of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.replicas.circle import _SHARE_BITS
from moe_kernels.replicas.solve_shares_rows import count_bits, entries_of
from moe_kernels.replicas.solve_shares_steps import solve

PAIRED_RANKS = 32
"""The most ranks for which this takes less time than `solve_rows`: its steps grow with the ranks."""

_UNROLL = tl.constexpr(2)  # entries of an expert that are looked at together, so that their loads overlap
_MOST_AHEAD = 32  # ranks whose counts are loaded together
_BLOCK_F = 32  # experts that are compared with as many others
_SKIPS_FROM = 32  # pairs; with fewer, to look whether a mask is used gains nothing (docs/log.md)
_MOST_WARPS = 16  # else an expert for each thread


@triton.jit
def _parts(scratch_ptr, num_ranks, num_experts, PAIRS: tl.constexpr):
    """Where the program keeps what its threads tell each other.

    pairs [PAIRS, PAIRS]: at [m, r], what rank r has of the experts that are on the ranks r and r ^ m and no other; loads [W];
    then a record for each row: 1 + the ordinals of the ranks [W] (0: the rank has no replica), and quotas [W]. All these are
    sums, and begin as zeros. The list [3, E] has, without gaps, the pair of each expert that has one, its tokens, and those of
    the experts before it in the list that have the same pair.
    """
    loads_ptr = scratch_ptr + PAIRS * PAIRS
    list_ptr = loads_ptr + num_ranks
    return scratch_ptr, loads_ptr, list_ptr, list_ptr + 3 * num_experts


@triton.jit
def _count_tokens(counts_ptr, rank, num_ranks, num_experts, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr):
    """The tokens of each expert on all ranks, and on those before `rank`."""
    expert = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, num_ranks, BLOCK_V):
        for ahead in tl.static_range(BLOCK_V):  # so that their loads overlap
            peer = first + ahead
            counts = tl.load(
                counts_ptr + peer * num_experts + expert, mask=(peer < num_ranks) & (expert < num_experts), other=0
            )
            total += counts
            before += tl.where(peer < rank, counts, 0)
    return total, before


@triton.jit
def _ranks_of(table_lanes_ptr, first, last, num_replicas, LANES: tl.constexpr, BLOCK_E: tl.constexpr):
    """Which ranks have each expert: a bit for each, the smallest, and the xor of all."""
    ranks = tl.zeros((BLOCK_E,), dtype=tl.uint64)
    one = tl.full((BLOCK_E,), 1, dtype=tl.uint64)
    smallest = tl.full((BLOCK_E,), 64, dtype=tl.int32)
    mix = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for replica in range(0, num_replicas, _UNROLL):
        for ahead in tl.static_range(_UNROLL):
            entry = first + replica + ahead
            is_entry = entry < last
            owner = tl.load(table_lanes_ptr + entry, mask=is_entry, other=0) // LANES
            bit = tl.where(is_entry, one << owner.to(tl.uint64), 0)
            mix ^= tl.where(is_entry & ((ranks & bit) == 0), owner, 0)
            ranks |= bit
            smallest = tl.minimum(smallest, tl.where(is_entry, owner, 64))
    return ranks, smallest, mix


@triton.jit
def _begin_with_table(
    table_lanes_ptr, cumulative_ptr, first, last, num_replicas, total, ranks, mix, is_pair, row,
    pairs_ptr, loads_ptr, records_ptr, num_ranks,
    LANES: tl.constexpr, BLOCK_E: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Add up what ranks have by the shares of the table: their loads, pairs and rows."""
    one = tl.full((BLOCK_E,), 1, dtype=tl.uint64)
    begin = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for replica in range(0, num_replicas, _UNROLL):
        for ahead in tl.static_range(_UNROLL):
            entry = first + replica + ahead
            is_entry = entry < last
            owner = tl.load(table_lanes_ptr + entry, mask=is_entry, other=0) // LANES
            end = total
            if cumulative_ptr is not None:
                share = tl.load(cumulative_ptr + entry, mask=is_entry, other=0)
                end = ((total.to(tl.int64) * share) >> _SHARE_BITS).to(tl.int32)
            quota = end - begin
            begin = end
            bit = one << owner.to(tl.uint64)
            tl.atomic_add(loads_ptr + owner, quota, mask=is_entry, sem="relaxed")
            tl.atomic_add(pairs_ptr + mix * PAIRS + owner, quota, mask=is_entry & is_pair, sem="relaxed")
            record_ptr = records_ptr + row * (2 * num_ranks) + owner
            tl.store(record_ptr, 1 + count_bits(ranks & (bit - 1)), mask=is_entry & (row >= 0))
            tl.atomic_add(record_ptr + num_ranks, quota, mask=is_entry & (row >= 0), sem="relaxed")


@triton.jit
def _add_up_list(list_ptr, num_pairs, num_experts, BLOCK_F: tl.constexpr):
    """Of each expert in the list: what those before it have that are of the same pair."""
    for start in range(0, num_pairs, BLOCK_F):
        here = start + tl.arange(0, BLOCK_F)
        key = tl.load(list_ptr + here, mask=here < num_pairs, other=-1)
        earlier = tl.zeros((BLOCK_F,), dtype=tl.int32)
        for other in range(0, start + 1, BLOCK_F):
            there = other + tl.arange(0, BLOCK_F)
            keys = tl.load(list_ptr + there, mask=there < num_pairs, other=-2)
            tokens = tl.load(list_ptr + num_experts + there, mask=there < num_pairs, other=0)
            is_earlier = (keys[None, :] == key[:, None]) & (there[None, :] < here[:, None])
            earlier += tl.sum(tl.where(is_earlier, tokens[None, :], 0), axis=1)
        tl.store(list_ptr + 2 * num_experts + here, earlier, mask=here < num_pairs)


@Launcher
@triton.jit(do_not_specialize=["rank"])
def _solve_pairs_kernel(
    # inputs
    counts_ptr,
    offsets_ptr,  # None: each expert has one replica
    table_lanes_ptr,
    cumulative_ptr,  # None: likewise
    rank,
    # outputs
    before_ptr,
    quotas_ptr,
    scratch_ptr,
    # shapes
    num_ranks,
    num_experts,
    num_entries,
    # constants
    LANES: tl.constexpr,  # of a rank; a constant, as division by any number takes long
    PDL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PAIRS: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """One program.

    Example (2 ranks of 2 lanes): counts [[3, 1], [2, 0]], expert 0 half in lane 0, half in lane 2, expert 1 in lane 1
    → by the table's shares ranks 0 and 1 have 2 and 3 of expert 0, and loads 3 and 3, which is the bound: quotas (ends)
    [2, 5, 1] of the entries 0, 1 (expert 0) and 2.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    pairs_ptr, loads_ptr, list_ptr, records_ptr = _parts(scratch_ptr, num_ranks, num_experts, PAIRS)
    expert = tl.arange(0, BLOCK_E)
    exists = expert < num_experts
    for start in range(0, num_entries, BLOCK_E):  # so that they are in the cache when it is known which ones are meant
        tl.load(table_lanes_ptr + start + expert, mask=start + expert < num_entries, volatile=True)
        if cumulative_ptr is not None:
            tl.load(cumulative_ptr + start + expert, mask=start + expert < num_entries, volatile=True)
    first, last = entries_of(offsets_ptr, expert, num_experts)
    total, before = _count_tokens(counts_ptr, rank, num_ranks, num_experts, BLOCK_E, BLOCK_V)
    for start in range(0, PAIRS * PAIRS + num_ranks, BLOCK_E):
        tl.store(pairs_ptr + start + expert, 0, mask=start + expert < PAIRS * PAIRS + num_ranks)
    num_replicas = tl.max(last - first, axis=0)
    ranks, smallest, mix = _ranks_of(table_lanes_ptr, first, last, num_replicas, LANES, BLOCK_E)
    num = count_bits(ranks)
    is_pair = num == 2
    is_row = num > 2
    # One sum for both: how many pairs and rows there are up to each expert.
    both = tl.cumsum(is_pair.to(tl.int32) + (is_row.to(tl.int32) << 16), axis=0)
    both_all = tl.max(both, axis=0)
    num_pairs, num_rows = both_all & 0xFFFF, both_all >> 16
    pair, row = (both & 0xFFFF) - 1, tl.where(is_row, (both >> 16) - 1, -1)
    for start in range(0, num_rows * 2 * num_ranks, BLOCK_E):
        tl.store(records_ptr + start + expert, 0, mask=start + expert < num_rows * 2 * num_ranks)
    tl.debug_barrier()
    _begin_with_table(
        table_lanes_ptr, cumulative_ptr, first, last, num_replicas, total, ranks, mix, is_pair, row,
        pairs_ptr, loads_ptr, records_ptr, num_ranks, LANES, BLOCK_E, PAIRS,
    )  # fmt: skip
    tl.store(list_ptr + pair, smallest * 64 + mix, mask=is_pair)
    tl.store(list_ptr + num_experts + pair, total, mask=is_pair)
    tl.store(before_ptr + expert, before, mask=exists)
    least = tl.sum(tl.where(num > 0, total, 0), axis=0)
    tl.debug_barrier()

    _add_up_list(list_ptr, num_pairs, num_experts, BLOCK_F)
    solve(
        loads_ptr, pairs_ptr, records_ptr, num_pairs, num_rows, num_ranks, tl.cdiv(least, num_ranks), BLOCK_W, PAIRS, SKIPS,
    )  # fmt: skip

    # Of a pair's tokens, expert by expert, the smaller rank has the first, the other one the rest.
    earlier = tl.load(list_ptr + 2 * num_experts + pair, mask=is_pair, other=0)
    of_smallest = tl.load(pairs_ptr + mix * PAIRS + smallest, mask=is_pair, other=0)
    of_smallest = tl.minimum(tl.maximum(of_smallest - earlier, 0), total)
    row_ptr = records_ptr + row * (2 * num_ranks) + num_ranks
    end = tl.where(is_pair | is_row, 0, total)
    seen = tl.zeros((BLOCK_E,), dtype=tl.uint64)
    one = tl.full((BLOCK_E,), 1, dtype=tl.uint64)
    for replica in range(0, num_replicas, _UNROLL):
        for ahead in tl.static_range(_UNROLL):
            entry = first + replica + ahead
            is_entry = entry < last
            owner = tl.load(table_lanes_ptr + entry, mask=is_entry, other=0) // LANES
            own = one << owner.to(tl.uint64)
            # Of two replicas on one rank, the first has all: to split between them would gain nothing.
            is_new = is_entry & ((seen & own) == 0)
            end += tl.load(row_ptr + owner, mask=is_new & is_row, other=0)
            end += tl.where(is_new & is_pair, tl.where(owner == smallest, of_smallest, total - of_smallest), 0)
            seen |= own
            tl.store(quotas_ptr + entry, end, mask=is_entry)
    if offsets_ptr is not None:
        for start in range(tl.load(offsets_ptr + num_experts), num_entries, BLOCK_E):  # entries of no expert
            tl.store(quotas_ptr + start + expert, 0, mask=start + expert < num_entries)


def solve_pairs(
    counts_WE: torch.Tensor, table: ReplicaTable, lanes_per_rank: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_ranks, num_experts = counts_WE.shape
    num_entries = table.lanes_P.numel()
    quotas_P, before_E = counts_WE.new_empty(num_entries), counts_WE.new_empty(num_experts)
    rows = min(num_experts, num_entries // 2)
    pairs = max(4, next_power_of_2(num_ranks))
    scratch = counts_WE.new_empty(pairs * pairs + num_ranks + 3 * num_experts + rows * 2 * num_ranks)
    block_e = next_power_of_2(num_experts)
    _solve_pairs_kernel[(1,)](
        *(counts_WE, table.offsets_E1, table.lanes_P, table.cumulative_P, rank),
        *(before_E, quotas_P, scratch),
        *(num_ranks, num_experts, num_entries),
        LANES=lanes_per_rank,
        BLOCK_W=max(32, pairs),
        BLOCK_E=block_e,
        BLOCK_V=min(pairs, _MOST_AHEAD),
        BLOCK_F=_BLOCK_F,
        PAIRS=pairs,
        SKIPS=pairs >= _SKIPS_FROM,
        num_warps=max(4, min(_MOST_WARPS, block_e // 32)),
    )
    return quotas_P, before_E
