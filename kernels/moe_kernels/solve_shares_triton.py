"""Replica choice by batch: the kernel of `solve_shares` and its launch.

W ranks, E logical experts, P entries of the table.

What takes the time are steps that need the step before. So experts that have the same two ranks are one *pair*: what they have
together is split in one step, as a sum, and pairs without a common rank are split in the same step: rank r with rank r ^ 1, then with
r ^ 2, and so on. Other experts with replicas on several ranks are *rows*, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.circle import _SHARE_BITS
from moe_kernels.integers import cdiv, next_power_of_2
from moe_kernels.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.table import ReplicaTable

ROUNDS = 4
"""Rounds over all split experts, at most. Simulated with 256 experts and 32 redundant ones on 4 to 32 ranks, the largest load
is then within 0.4 % of the exact optimum in the mean; one round leaves up to 1.4 %."""

_ROUNDS = tl.constexpr(ROUNDS)
_UNROLL = tl.constexpr(2)  # entries of an expert that are looked at together, so that their loads overlap
_AHEAD = tl.constexpr(4)  # steps whose numbers are loaded together, ahead of those before
_NUM_WARPS = 8
_TILE = 8192  # numbers that are held at once


@triton.jit
def _count_bits(bits):
    """How many bits of a uint64 are 1."""
    bits = (bits & 0x5555555555555555) + ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits & 0x0F0F0F0F0F0F0F0F) + ((bits >> 4) & 0x0F0F0F0F0F0F0F0F)
    bits = (bits & 0x00FF00FF00FF00FF) + ((bits >> 8) & 0x00FF00FF00FF00FF)
    bits = (bits & 0x0000FFFF0000FFFF) + ((bits >> 16) & 0x0000FFFF0000FFFF)
    return ((bits + (bits >> 32)) & 127).to(tl.int32)


@triton.jit
def _entries_of(offsets_ptr, expert, num_experts):
    """First and last entry of each expert; none of what is past the last expert."""
    exists = expert < num_experts
    if offsets_ptr is None:
        first, last = expert, tl.where(exists, expert + 1, expert)
    else:
        first = tl.load(offsets_ptr + expert, mask=exists, other=0)
        last = tl.load(offsets_ptr + expert + 1, mask=exists, other=0)
    return first, last


@triton.jit
def _parts(scratch_ptr, num_ranks, num_experts, PAIRS: tl.constexpr):
    """Where the program keeps what its threads tell each other.

    pairs [PAIRS, PAIRS]: at [r, m], what rank r has of the experts that are on the ranks r and r ^ m and no other; loads [W];
    the pairs of such experts [E], and their totals [E], both without gaps; then a record for each row: W ordinals of the
    ranks (-1: the rank has no replica), W quotas, and how many replicas.
    """
    loads_ptr = scratch_ptr + PAIRS * PAIRS
    return scratch_ptr, loads_ptr, loads_ptr + num_ranks, loads_ptr + num_ranks + 2 * num_experts


@triton.jit
def _count_tokens(counts_ptr, rank, num_ranks, num_experts, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr):
    """The tokens of each expert on all ranks, and on those before `rank`."""
    expert = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, num_ranks, BLOCK_V):
        peer = start + tl.arange(0, BLOCK_V)[:, None]
        at = counts_ptr + peer * num_experts + expert[None, :]
        counts = tl.load(at, mask=(peer < num_ranks) & (expert < num_experts)[None, :], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(peer < rank, counts, 0), axis=0)
    return total, before


@triton.jit
def _split_by_table(
    table_lanes_ptr, cumulative_ptr, first, last, total, here, LANES: tl.constexpr, BLOCK_E: tl.constexpr
):
    """By the shares of the table: which ranks have each expert (bits; their smallest; the xor of all), and what the ranks
    `here` have of it."""
    ranks = tl.zeros((BLOCK_E,), dtype=tl.uint64)
    one = tl.full((BLOCK_E,), 1, dtype=tl.uint64)
    smallest = tl.full((BLOCK_E,), 64, dtype=tl.int32)
    mix = tl.zeros((BLOCK_E,), dtype=tl.int32)
    begin = tl.zeros((BLOCK_E,), dtype=tl.int32)
    quota = tl.zeros((BLOCK_E, here.shape[0]), dtype=tl.int32)
    for replica in range(0, tl.max(last - first, axis=0), _UNROLL):
        for ahead in tl.static_range(_UNROLL):
            entry = first + replica + ahead
            is_entry = entry < last
            owner = tl.load(table_lanes_ptr + entry, mask=is_entry, other=0) // LANES
            bit = tl.where(is_entry, one << owner.to(tl.uint64), 0)
            mix ^= tl.where((ranks & bit) == 0, tl.where(is_entry, owner, 0), 0)
            ranks |= bit
            smallest = tl.minimum(smallest, tl.where(is_entry, owner, 64))
            end = total
            if cumulative_ptr is not None:
                share = tl.load(cumulative_ptr + entry, mask=is_entry, other=0)
                end = ((total.to(tl.int64) * share) >> _SHARE_BITS).to(tl.int32)
            own = tl.where(is_entry, end - begin, 0)
            quota += tl.where(owner[:, None] == here[None, :], own[:, None], 0)
            begin = end
    return ranks, smallest, mix, quota


@triton.jit
def _level_pair(load, quota, ordinal, a, b, bound, gathers, EXPERT_COST: tl.constexpr):
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


@triton.jit
def _split_pairs(load, quota, rank, mask):
    """Split what rank r and rank r ^ mask have together of a pair, so that the larger of the two loads becomes least."""
    rest = load - quota
    both = quota + tl.gather(quota, rank ^ mask, axis=0)
    new = (both + tl.gather(rest, rank ^ mask, axis=0) - rest + (rank < (rank ^ mask)).to(tl.int32)) >> 1
    new = tl.minimum(tl.maximum(new, 0), both)
    return rest + new, new


@triton.jit
def _load_record(records_ptr, row, num_rows, rank, num_ranks):
    """Of a row: how many replicas, ordinals, quotas; of one past the last: none."""
    at = records_ptr + row * (1 + 2 * num_ranks)
    exists = (rank < num_ranks) & (row < num_rows)
    num = tl.load(at + 2 * num_ranks, mask=row < num_rows, other=0)
    ordinal = tl.load(at + rank, mask=exists, other=-1)
    return num, ordinal, tl.load(at + num_ranks + rank, mask=exists, other=0)


@triton.jit
def _split_row(load, num, ordinal, quota, round, bound, gathers, EXPERT_COST: tl.constexpr):
    """Around the circle of its replicas, in another stride in each round: in the end each meets each."""
    stride = tl.where(round + 1 < num, round + 1, 1)
    for a in range(0, tl.where(num > 2, num, num >> 1)):
        b = a + stride
        b -= tl.where(b < num, 0, num)
        load, quota = _level_pair(load, quota, ordinal, a, b, bound, gathers, EXPERT_COST)
    return load, quota


@triton.jit
def _solve(
    load, pairs_ptr, records_ptr, num_pairs, num_rows, num_ranks, bound,
    EXPERT_COST: tl.constexpr, BLOCK_W: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rounds of steps until none could help. Each thread block of 32 threads does the same; one of them stores."""
    rank = tl.arange(0, BLOCK_W)
    is_rank = rank < num_ranks
    round = 0
    gathers = EXPERT_COST > 0
    goes_on = (num_pairs + num_rows > 0) & (gathers | (tl.max(load, axis=0) > bound))
    while goes_on:
        tl.debug_barrier()  # what was stored in the round before is there
        moved = tl.zeros((BLOCK_W,), dtype=tl.int32)
        if EXPERT_COST == 0:
            at = pairs_ptr + rank * PAIRS
            for first in range(0, tl.where(num_pairs > 0, PAIRS, 0), _AHEAD):
                quota0 = tl.load(at + first, mask=is_rank, other=0)
                quota1 = tl.load(at + first + 1, mask=is_rank, other=0)
                quota2 = tl.load(at + first + 2, mask=is_rank, other=0)
                quota3 = tl.load(at + first + 3, mask=is_rank, other=0)
                load, new0 = _split_pairs(load, quota0, rank, first)
                load, new1 = _split_pairs(load, quota1, rank, first + 1)
                load, new2 = _split_pairs(load, quota2, rank, first + 2)
                load, new3 = _split_pairs(load, quota3, rank, first + 3)
                tl.store(at + first, new0, mask=is_rank)
                tl.store(at + first + 1, new1, mask=is_rank)
                tl.store(at + first + 2, new2, mask=is_rank)
                tl.store(at + first + 3, new3, mask=is_rank)
                moved |= (new0 ^ quota0) | (new1 ^ quota1) | (new2 ^ quota2) | (new3 ^ quota3)
        for row in range(0, num_rows):
            num, ordinal, quota = _load_record(records_ptr, row, num_rows, rank, num_ranks)
            load, new = _split_row(load, num, ordinal, quota, round, bound, gathers, EXPERT_COST)
            tl.store(records_ptr + row * (1 + 2 * num_ranks) + num_ranks + rank, new, mask=is_rank)
            moved |= new ^ quota
        round += 1
        has_moved = gathers | (tl.max((moved != 0).to(tl.int32), axis=0) > 0)
        goes_on = (round < _ROUNDS) & has_moved & (tl.max(load, axis=0) > bound)
        gathers = False
    tl.debug_barrier()


@Launcher
@triton.jit(do_not_specialize=["rank"])
def _solve_shares_kernel(
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
    EXPERT_COST: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program.

    Example (2 ranks of 2 lanes, cost 0): counts [[3, 1], [2, 0]], expert 0 half in lane 0, half in lane 2, expert 1 in lane 1
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
    first, last = _entries_of(offsets_ptr, expert, num_experts)
    place = tl.arange(0, PAIRS * PAIRS)
    tl.store(pairs_ptr + place, tl.zeros_like(place))
    total, before = _count_tokens(counts_ptr, rank, num_ranks, num_experts, BLOCK_E, BLOCK_V)
    tl.store(before_ptr + expert, before, mask=exists)
    tl.debug_barrier()

    for tile in tl.static_range(TILES):
        here = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        ranks, smallest, mix, quota = _split_by_table(
            table_lanes_ptr, cumulative_ptr, first, last, total, here, LANES, BLOCK_E
        )  # fmt: skip
        cost = quota + EXPERT_COST * (quota > 0).to(tl.int32)
        tl.store(loads_ptr + here, tl.sum(cost, axis=0), mask=here < num_ranks)
        num = _count_bits(ranks)
        is_pair = (num == 2) & (EXPERT_COST == 0)
        is_row = (num > 1) & (is_pair == 0)
        # One sum for both: how many pairs and rows there are up to each expert.
        both = tl.cumsum(is_pair.to(tl.int32) + (is_row.to(tl.int32) << 16), axis=0)
        both_all = tl.max(both, axis=0)
        num_pairs, num_rows = both_all & 0xFFFF, both_all >> 16
        pair, row = (both & 0xFFFF) - 1, (both >> 16) - 1
        bit = tl.full((BLOCK_R,), 1, dtype=tl.uint64) << here.to(tl.uint64)
        is_here = (ranks[:, None] & bit[None, :]) != 0
        at = pairs_ptr + here[None, :] * PAIRS + mix[:, None]
        tl.atomic_add(at, quota, mask=is_here & is_pair[:, None], sem="relaxed")
        if num_rows > 0:
            at = records_ptr + (row * (1 + 2 * num_ranks))[:, None] + here[None, :]
            is_part = is_row[:, None] & (here < num_ranks)[None, :]
            ordinal = tl.where(is_here, _count_bits(ranks[:, None] & (bit - 1)[None, :]), -1)
            tl.store(at, ordinal, mask=is_part)
            tl.store(at + num_ranks, quota, mask=is_part)
            tl.store(records_ptr + row * (1 + 2 * num_ranks) + 2 * num_ranks, num, mask=is_row)
    key = smallest * 64 + mix
    tl.store(list_ptr + pair, key, mask=is_pair)
    tl.store(list_ptr + num_experts + pair, total, mask=is_pair)
    least = tl.sum(tl.where(num > 0, total + EXPERT_COST * (total > 0).to(tl.int32), 0), axis=0)
    tl.debug_barrier()

    of_rank = tl.arange(0, BLOCK_W)
    load = tl.load(loads_ptr + of_rank, mask=of_rank < num_ranks, other=0)
    # What the experts before it have of the same pair.
    earlier = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, num_pairs, BLOCK_F):
        other = start + tl.arange(0, BLOCK_F)
        keys = tl.load(list_ptr + other, mask=other < num_pairs, other=-1)
        totals = tl.load(list_ptr + num_experts + other, mask=other < num_pairs, other=0)
        is_earlier = (keys[None, :] == key[:, None]) & (other[None, :] < pair[:, None])
        earlier += tl.sum(tl.where(is_earlier, totals[None, :], 0), axis=1)
    _solve(
        load, pairs_ptr, records_ptr, num_pairs, num_rows, num_ranks, tl.cdiv(least, num_ranks), EXPERT_COST, BLOCK_W, PAIRS
    )  # fmt: skip

    # Of a pair's tokens, expert by expert, the smaller rank has the first, the other one the rest.
    of_smallest = tl.load(pairs_ptr + smallest * PAIRS + mix, mask=is_pair, other=0)
    of_smallest = tl.minimum(tl.maximum(of_smallest - earlier, 0), total)
    row_ptr = records_ptr + row * (1 + 2 * num_ranks) + num_ranks
    end = tl.where(is_pair | is_row, 0, total)
    seen = tl.zeros((BLOCK_E,), dtype=tl.uint64)
    one = tl.full((BLOCK_E,), 1, dtype=tl.uint64)
    for replica in range(0, tl.max(last - first, axis=0), _UNROLL):
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


def solve_shares_triton(
    counts_WE: torch.Tensor, table: ReplicaTable, lanes_per_rank: int, rank: int, expert_cost: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_ranks, num_experts = counts_WE.shape
    num_entries = table.lanes_P.numel()
    quotas_P, before_E = counts_WE.new_empty(num_entries), counts_WE.new_empty(num_experts)
    rows = min(num_experts, num_entries // 2)
    pairs = max(4, next_power_of_2(num_ranks))
    scratch = counts_WE.new_empty(pairs * pairs + num_ranks + 2 * num_experts + rows * (1 + 2 * num_ranks))
    block_e = next_power_of_2(num_experts)
    most = max(1, _TILE // block_e)
    block_r = min(next_power_of_2(num_ranks), most)
    _solve_shares_kernel[(1,)](
        *(counts_WE, table.offsets_E1, table.lanes_P, table.cumulative_P, rank),
        *(before_E, quotas_P, scratch),
        *(num_ranks, num_experts, num_entries),
        LANES=lanes_per_rank,
        EXPERT_COST=expert_cost,
        BLOCK_W=max(32, pairs),
        BLOCK_E=block_e,
        BLOCK_V=min(next_power_of_2(num_ranks), most),
        BLOCK_R=block_r,
        TILES=cdiv(num_ranks, block_r),
        BLOCK_F=min(32, most),
        PAIRS=pairs,
        num_warps=_NUM_WARPS,
    )
    return quotas_P, before_E
