# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""What the ops share in which each program scans all keys and places those of its own bin, in their order.

That reads N keys per bin, all but once from the cache; in return an op is one launch, without atomics, zeroed memory or
anything else that programs would have to tell each other.

The keys are cut into ROWS consecutive rows, one for each warp, which are walked in `num_steps` steps. A first walk counts
the hits of each row; one scan over the rows then says where each begins; a second walk ranks the hits. So warps wait for
each other once, however many keys there are. The second walk goes backwards: of the step that it begins with the keys
are still in registers (so few keys are read only once), and of those next to it in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST_BLOCK, LARGEST_BLOCK = 512, 8192  # of keys that a program looks at in a step


def scan_options(num_keys: int) -> dict[str, int]:
    """Launch options; few different ones, as each is compiled. One step up to the largest block."""
    block = SMALLEST_BLOCK
    while block < min(num_keys, LARGEST_BLOCK):
        block *= 4
    warps = max(4, block // 512)
    return {"BLOCK": block, "ROWS": warps, "num_warps": warps}


@triton.jit
def num_steps(num_keys, BLOCK: tl.constexpr):
    return tl.maximum(tl.cdiv(num_keys, BLOCK), 1)


@triton.jit
def first_index(num_keys, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Where the keys of step 0 stand, [LANES, ROWS, PARTS, 4]; those of step i are i * (BLOCK // ROWS) further on.

    A warp has a row, of which its threads read 16 bytes each, side by side, PARTS times.

    Example (BLOCK 16, ROWS 2): 24 keys make 2 steps; the rows are keys 0 … 15 and 16 … 31, of which step 0 has 0 … 7 and
    16 … 23, step 1 has 8 … 15 and 24 … 31.
    """
    WIDTH: tl.constexpr = min(BLOCK // ROWS, 128)  # of a part's row: 4 keys for each of 32 threads
    PARTS: tl.constexpr = BLOCK // (ROWS * WIDTH)
    # Triton hands out the threads of a warp, then the warps, in the order of these dimensions, both for loads and for
    # stores at any place; in another order keys would change threads, through shared memory, in each step.
    lane = tl.arange(0, WIDTH // 4)[:, None, None, None]
    row = tl.arange(0, ROWS)[None, :, None, None]
    part = tl.arange(0, PARTS)[None, None, :, None]
    key = tl.arange(0, 4)[None, None, None, :]
    return (row * num_steps(num_keys, BLOCK) * PARTS + part) * WIDTH + lane * 4 + key


@triton.jit
def load_bins(keys_ptr, first, step, num_keys, num_bins, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The bins of the keys of a step: the key, or `num_bins` if it is outside [0, num_bins); there also what is past the end.

    That comes last in its bin, so it only matters to who uses the last bin: it must not be stored. `first`: `first_index`.
    """
    # The step moves the pointer and the end, so that one index, with its constant differences, serves all steps.
    keys_ptr += step * (BLOCK // ROWS)
    end = num_keys - step * (BLOCK // ROWS)
    step_of_end = num_keys // (BLOCK // ROWS) % num_steps(num_keys, BLOCK)
    # 4 keys are read at once only if the mask is the same for all 4: not where the keys end amid 4.
    if (num_keys % 4 != 0) & (step == step_of_end):
        key = tl.load(keys_ptr + first, mask=first < end, other=-1)
    else:
        key = tl.load(keys_ptr + first, mask=first // 4 * 4 < end, other=-1)
    return tl.minimum(key.to(tl.uint32), num_bins).to(tl.int32)  # unsigned, -1 is the largest


@triton.jit
def count_hits(mine):
    """Hits of each thread in a step, [ROWS, LANES]; to be added up over the steps."""
    return tl.trans(tl.sum(tl.sum(mine.to(tl.int32), axis=3), axis=2))


@triton.jit
def row_ends(hits, start):
    """The rank after the last of each row, if the first of all is `start`: [ROWS, LANES], the same for all of a row."""
    return (start + tl.cumsum(tl.sum(hits, axis=1), axis=0))[:, None] + tl.zeros_like(hits)


@triton.jit
def rank_hits(mine, ends):
    """Ranks of the hits of a step, and the `ends` for the step before; `ends`: the rank after the last hit of each row."""
    PARTS: tl.constexpr = mine.shape[2]
    counts = tl.sum(mine.to(tl.int32), axis=3)
    # One scan for all parts, a byte for each: none has more than 128 hits in a row.
    part = tl.arange(0, PARTS)[None, None, :]
    packed = tl.trans(tl.sum(counts << (8 * part), axis=2))
    before = tl.cumsum(packed, axis=1) - packed
    hits = tl.sum(packed, axis=1)[:, None] + tl.zeros_like(packed)
    first = tl.zeros_like(counts)
    for earlier in tl.static_range(PARTS):
        byte = 8 * (PARTS - 1 - earlier)
        ends -= (hits >> byte) & 255
        first = tl.where(8 * part == byte, tl.trans(ends + ((before >> byte) & 255))[:, :, None], first)
    return first[:, :, :, None] + tl.cumsum(mine.to(tl.int32), axis=3) - 1, ends
