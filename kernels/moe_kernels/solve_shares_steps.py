"""Replica choice by batch: the steps in which `solve_shares` levels the ranks' loads.

What takes the time are steps that need the step before. So experts that have the same two ranks are one *pair*: what they have
together is split in one step, as a sum, and pairs without a common rank are split in the same step: rank r with rank r ^ 1,
then with r ^ 2, and so on. Other experts with replicas on several ranks are *rows*, one after the other.

W ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.solve_shares_rows import level_pair

ROUNDS = 6
"""Rounds over all pairs and rows, at most. Simulated with 256 experts and 32 redundant ones on 4 and 8 ranks, the largest load
is then within 0.1 % of the exact optimum in the mean."""

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _split_pairs(load, quota, rank, mask):
    """Split what rank r and rank r ^ mask have together of a pair, so that the larger of the two loads becomes least."""
    rest = load - quota
    both = quota + tl.gather(quota, rank ^ mask, axis=0)
    new = (both + tl.gather(rest, rank ^ mask, axis=0) - rest + (rank < (rank ^ mask)).to(tl.int32)) >> 1
    new = tl.minimum(tl.maximum(new, 0), both)
    return rest + new, new


@triton.jit
def _load_pairs(pairs_ptr, rank, mask, num_ranks, PAIRS: tl.constexpr):
    """What each rank has of the pairs with the ranks r ^ mask, r ^ (mask + 1), and so on; of pairs that are none: nothing."""
    at = pairs_ptr + mask * PAIRS + rank
    exists = (rank < num_ranks) & (mask < PAIRS)
    quota0, quota1 = tl.load(at, mask=exists, other=0), tl.load(at + PAIRS, mask=exists, other=0)
    return quota0, quota1, tl.load(at + 2 * PAIRS, mask=exists, other=0), tl.load(at + 3 * PAIRS, mask=exists, other=0)


@triton.jit
def _store_pairs(pairs_ptr, rank, mask, num_ranks, quota0, quota1, quota2, quota3, PAIRS: tl.constexpr):
    at = pairs_ptr + mask * PAIRS + rank
    tl.store(at, quota0, mask=rank < num_ranks)
    tl.store(at + PAIRS, quota1, mask=rank < num_ranks)
    tl.store(at + 2 * PAIRS, quota2, mask=rank < num_ranks)
    tl.store(at + 3 * PAIRS, quota3, mask=rank < num_ranks)


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
    BLOCK_W: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rounds of steps until none could help. All warps do the same; one of them stores.

    What a step needs is loaded four steps ahead, as a load takes as long as some steps.
    """
    rank = tl.arange(0, BLOCK_W)
    load = tl.load(loads_ptr + rank, mask=rank < num_ranks, other=0)
    round = 0
    goes_on = (num_pairs + num_rows > 0) & (tl.max(load, axis=0) > bound)
    pair0, pair1, pair2, pair3 = _load_pairs(pairs_ptr, rank, 0, num_ranks, PAIRS)
    while goes_on:
        moved = tl.zeros((BLOCK_W,), dtype=tl.int32)
        for first in range(0, tl.where(num_pairs > 0, PAIRS, 0), 4):
            next0, next1, next2, next3 = pair0, pair1, pair2, pair3
            if PAIRS > 4:
                next0, next1, next2, next3 = _load_pairs(pairs_ptr, rank, first + 4, num_ranks, PAIRS)
            load, new0 = _split_pairs(load, pair0, rank, first)
            load, new1 = _split_pairs(load, pair1, rank, first + 1)
            load, new2 = _split_pairs(load, pair2, rank, first + 2)
            load, new3 = _split_pairs(load, pair3, rank, first + 3)
            moved |= (new0 ^ pair0) | (new1 ^ pair1) | (new2 ^ pair2) | (new3 ^ pair3)
            if PAIRS > 4:
                _store_pairs(pairs_ptr, rank, first, num_ranks, new0, new1, new2, new3, PAIRS)
                pair0, pair1, pair2, pair3 = next0, next1, next2, next3
            else:  # they stay in registers
                pair0, pair1, pair2, pair3 = new0, new1, new2, new3
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
        if goes_on & ((PAIRS > 4) | (num_rows > 0)):
            tl.debug_barrier()  # what was stored in this round is there
            if PAIRS > 4:
                pair0, pair1, pair2, pair3 = _load_pairs(pairs_ptr, rank, 0, num_ranks, PAIRS)
    if PAIRS == 4:
        _store_pairs(pairs_ptr, rank, 0, num_ranks, pair0, pair1, pair2, pair3, PAIRS)
    tl.debug_barrier()
