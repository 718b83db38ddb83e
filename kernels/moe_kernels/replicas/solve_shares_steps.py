"""Replica choice by batch: the steps in which `solve_shares` levels the ranks' loads.

What takes the time are steps that need the step before. So experts that have the same two ranks are one *pair*: what they have
together is split in one step, as a sum, and pairs without a common rank are split in the same step: rank r with rank r ^ 1,
then with r ^ 2, and so on. Other experts with replicas on several ranks are *rows*, one after the other.

W ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.replicas.solve_shares_rows import level_pair

ROUNDS = 6
"""Rounds over all pairs and rows, at most. Simulated with 256 experts and 32 redundant ones on 4 and 8 ranks, the largest load
is then within 0.1 % of the exact optimum in the mean."""

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _split_pairs(load, quota, rank, mask):
    """Split what rank r and rank r ^ mask have together of a pair, so that the larger of the two loads becomes least."""
    rest = load - quota
    both = quota + tl.gather(quota, rank ^ mask, axis=0)
    rounded = both + (rank < (rank ^ mask)).to(tl.int32)
    # In this order only the last sum waits for other threads.
    new = ((rounded - rest) + tl.gather(rest, rank ^ mask, axis=0)) >> 1
    new = tl.minimum(tl.maximum(new, 0), both)
    return rest + new, new


@triton.jit
def _load_pairs(pairs_ptr, rank, num_ranks, PAIRS: tl.constexpr):
    """What each rank r has of the pairs with the ranks r ^ 1, r ^ 2, and so on, each in registers; of no pair: nothing."""
    quotas = ()
    for mask in tl.static_range(1, PAIRS):
        quotas = quotas + (tl.load(pairs_ptr + mask * PAIRS + rank, mask=rank < num_ranks, other=0),)  # type: ignore  # noqa: RUF005
    return quotas


@triton.jit
def _used_masks(quotas, PAIRS: tl.constexpr):
    """A bit for each mask: whether a pair of ranks r, r ^ mask has anything."""
    used = tl.zeros_like(quotas[0])
    for mask in tl.static_range(1, PAIRS):
        used |= (quotas[mask - 1] != 0).to(tl.int32) << mask
    return tl.reduce_or(used, axis=0)


@triton.jit
def _split_all_pairs(load, quotas, used, rank, PAIRS: tl.constexpr, SKIPS: tl.constexpr):
    """A step for each mask that is used by a pair; also what has moved."""
    moved = tl.zeros_like(load)
    new = ()
    for mask in tl.static_range(1, PAIRS):
        quota = quotas[mask - 1]
        if SKIPS:
            if (used >> mask) & 1 != 0:
                load, quota = _split_pairs(load, quota, rank, mask)
        else:
            load, quota = _split_pairs(load, quota, rank, mask)
        moved |= quota ^ quotas[mask - 1]
        new = new + (quota,)  # type: ignore  # noqa: RUF005
    return load, new, moved


@triton.jit
def _load_record(records_ptr, row, num_rows, rank, num_ranks):
    """Of a row: ordinals, quotas; of one past the last: none."""
    at = records_ptr + row * (2 * num_ranks) + rank
    exists = (rank < num_ranks) & (row < num_rows)
    ordinal = tl.load(at, mask=exists, other=0) - 1
    return ordinal, tl.load(at + num_ranks, mask=exists, other=0)


@triton.jit
def _split_row(
    load, records_ptr, row, num_rows, ordinal, quota, moved, rank, num_ranks, round
):  # fmt: skip
    """Around the circle of its replicas, in another stride in each round: in the end each meets each."""
    old = quota
    num = tl.max(ordinal, axis=0) + 1
    stride = tl.where(round + 1 < num, round + 1, 1)
    for a in range(0, tl.where(num > 2, num, num >> 1)):
        b = a + stride
        b -= tl.where(b < num, 0, num)
        load, quota = level_pair(load, quota, ordinal, a, b, 0, False, 0)
    at = records_ptr + row * (2 * num_ranks) + num_ranks + rank
    tl.store(at, quota, mask=(rank < num_ranks) & (row < num_rows))
    return load, moved | (quota ^ old)


@triton.jit
def solve(
    loads_ptr, pairs_ptr, records_ptr, num_pairs, num_rows, num_ranks, bound,
    BLOCK_W: tl.constexpr, PAIRS: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Rounds of steps until none could help. All warps do the same; one of them stores.

    What the ranks have of pairs stays in registers. Of rows, what a step needs is loaded four steps ahead, as a load takes as
    long as some steps.
    """
    rank = tl.arange(0, BLOCK_W)
    load = tl.load(loads_ptr + rank, mask=rank < num_ranks, other=0)
    quotas = _load_pairs(pairs_ptr, rank, num_ranks, PAIRS)
    used = _used_masks(quotas, PAIRS)
    round = 0
    goes_on = (num_pairs + num_rows > 0) & (tl.max(load, axis=0) > bound)
    while goes_on:
        load, quotas, moved = _split_all_pairs(load, quotas, used, rank, PAIRS, SKIPS)
        ordinal0, quota0 = _load_record(records_ptr, 0, num_rows, rank, num_ranks)
        ordinal1, quota1 = _load_record(records_ptr, 1, num_rows, rank, num_ranks)
        ordinal2, quota2 = _load_record(records_ptr, 2, num_rows, rank, num_ranks)
        ordinal3, quota3 = _load_record(records_ptr, 3, num_rows, rank, num_ranks)
        for row in range(0, num_rows, 4):
            next_ordinal0, next_quota0 = _load_record(records_ptr, row + 4, num_rows, rank, num_ranks)
            next_ordinal1, next_quota1 = _load_record(records_ptr, row + 5, num_rows, rank, num_ranks)
            next_ordinal2, next_quota2 = _load_record(records_ptr, row + 6, num_rows, rank, num_ranks)
            next_ordinal3, next_quota3 = _load_record(records_ptr, row + 7, num_rows, rank, num_ranks)
            load, moved = _split_row(
                load, records_ptr, row, num_rows, ordinal0, quota0, moved, rank, num_ranks, round
            )  # fmt: skip
            load, moved = _split_row(
                load, records_ptr, row + 1, num_rows, ordinal1, quota1, moved, rank, num_ranks, round
            )  # fmt: skip
            load, moved = _split_row(
                load, records_ptr, row + 2, num_rows, ordinal2, quota2, moved, rank, num_ranks, round
            )  # fmt: skip
            load, moved = _split_row(
                load, records_ptr, row + 3, num_rows, ordinal3, quota3, moved, rank, num_ranks, round
            )  # fmt: skip
            ordinal0, quota0 = next_ordinal0, next_quota0
            ordinal1, quota1 = next_ordinal1, next_quota1
            ordinal2, quota2 = next_ordinal2, next_quota2
            ordinal3, quota3 = next_ordinal3, next_quota3
        round += 1
        has_moved = tl.max((moved != 0).to(tl.int32), axis=0) > 0
        goes_on = (round < _ROUNDS) & has_moved & (tl.max(load, axis=0) > bound)
        if goes_on & (num_rows > 0):
            tl.debug_barrier()  # what was stored in this round is there
    for mask in tl.static_range(1, PAIRS):
        tl.store(pairs_ptr + mask * PAIRS + rank, quotas[mask - 1], mask=rank < num_ranks)
    tl.debug_barrier()
