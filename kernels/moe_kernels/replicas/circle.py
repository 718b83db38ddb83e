"""Step 2 of a forward: the circle, 2**30 integers, on which the replicas of an expert divide its tokens.

Example: a replica with the share 3/4 has [0, 3/4) of the circle, the other one [3/4, 1). Of four tokens, at 0, 1/4, 1/2 and
3/4 from where the batch starts, the first replica gets three.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHARE_BITS = 30
SHARE_ONE = 1 << SHARE_BITS
# round(2**30 / golden ratio): the most even sequence of starts (three-gap theorem), so that a run of small batches
# honours the shares too.
GOLDEN = 663608942

_SHARE_BITS = tl.constexpr(SHARE_BITS)
_SHARE_MASK = tl.constexpr(SHARE_ONE - 1)
_GOLDEN = tl.constexpr(GOLDEN)


@triton.jit
def circle_start(rank_start, load):
    """int64: the place on its circle where an expert with this load begins."""
    return (rank_start + load * _GOLDEN) & _SHARE_MASK  # wraps modulo 2**64, which the mask makes exact


@triton.jit
def ranks_below(position, count):
    """How many of the ranks 0 … count - 1 have a step below `position`: ceil(position * count / 2**30).

    floor(rank * 2**30 / count) < position is the same as rank < position * count / 2**30, so no element is divided.
    """
    position = tl.minimum(tl.maximum(position, 0), _SHARE_MASK + 1)
    return ((position.to(tl.int64) * count + _SHARE_MASK) >> _SHARE_BITS).to(tl.int32)


@triton.jit
def ranks_between(begin, end, start, count):
    """The ranks of the replica that has [begin, end) of the circle: [low, high), and below `around` if it has the start."""
    low = (begin - start) & _SHARE_MASK
    high = low + (end - begin)
    return ranks_below(low, count), ranks_below(high, count), ranks_below(high - _SHARE_MASK - 1, count)


@triton.jit
def start_of(starts, expert, is_expert, load, BY_QUOTA: tl.constexpr):
    """Where this rank's elements of an expert begin. `starts`: `rank_start`, or by quota the address of before_E."""
    start = tl.load(starts + expert, mask=is_expert, other=0) if BY_QUOTA else circle_start(starts, load).to(tl.int32)
    return start


@triton.jit
def ranks_of(begin, end, start, count, BY_QUOTA: tl.constexpr):
    """As `ranks_between`; by quota (see `replicas_triton`), nothing goes around the end of the circle."""
    if BY_QUOTA:
        low = tl.minimum(tl.maximum(begin - start, 0), count)
        high = tl.minimum(tl.maximum(end - start, 0), count)
        around = 0
    else:
        low, high, around = ranks_between(begin, end, start, count)
    return low, high, around
