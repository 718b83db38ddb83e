"""Steps 2 and 3 of a forward: ranks keys within their bins, in their order, without global atomics.

Few keys: one launch. Each program scans all keys and ranks those of its own bin. So each bin reads N keys, from the cache
except the first time; in return, programs need not communicate.

The keys are cut into ROWS consecutive rows, one for each warp, which are walked in `num_steps` steps. A first walk counts
the hits of each row; one scan over the rows then says where each begins; a second walk ranks the hits. So warps wait for
each other once, however many keys there are. The second walk goes backwards: of the step that it begins with the keys
are still in registers (so few keys are read only once), and of those next to it in the cache.

Many keys: three launches, which read each key twice, however many bins there are. The keys are cut into chunks of CHUNK.
First `count_chunks`, or the op, counts the keys of each chunk in each bin; then the op's program of a bin adds up what the
chunks have of it (`start_chunks`); last, a program for each chunk ranks its keys (`load_chunk`, `rank_in_bins`), or sorts
them (`sort_chunk`): of larger chunks, so that there are fewer counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait

SMALLEST_BLOCK, LARGEST_BLOCK = 512, 8192  # of keys that a program looks at in a step
MANY_KEYS = 65536  # from here on three launches take less time than one (H200, docs/log.md)
# Keys are compared with all of their chunk, so smaller chunks are placed faster; but there are more of them to count.
CHUNK = 64
SORTED_CHUNK = 256  # at most 32,768: keys are sorted by bin and place, and counted in a bin, in 32 bits
LARGEST_BLOCK_B = 512  # of bins that a program counts
BLOCK_C = 2048  # of chunks that a program adds up in a step


def scan_options(num_keys: int) -> dict[str, int]:
    """Launch options. There are few different ones, because each is compiled. Few keys are one step."""
    if num_keys >= MANY_KEYS:
        warps = max(1, BLOCK_C // 256)  # at least 8 counts for each thread
        return {"BLOCK": BLOCK_C, "ROWS": warps, "num_warps": warps}
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
def _bin_of(key, num_bins):
    return tl.minimum(key.to(tl.uint32), num_bins).to(tl.int32)  # unsigned, -1 is the largest


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
    return _bin_of(key, num_bins)


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


def chunk_options(is_sorted: bool = False) -> dict[str, int]:
    """Launch options of a program for each chunk: a key for each thread."""
    chunk = SORTED_CHUNK if is_sorted else CHUNK
    return {"CHUNK": chunk, "num_warps": max(1, chunk // 32)}


def count_chunks(keys: torch.Tensor, num_bins: int) -> torch.Tensor | None:
    """How many keys of each chunk are in each bin (see `load_bins`), int32 [num_bins + 1, chunks]; None for few keys."""
    options = chunk_options()
    if keys.numel() < MANY_KEYS:
        return None
    counts_BC = keys.new_empty((num_bins + 1, cdiv(keys.numel(), options["CHUNK"])))
    block = min(next_power_of_2(num_bins + 1), LARGEST_BLOCK_B)
    _count_chunks_kernel[(counts_BC.shape[1], cdiv(num_bins + 1, block))](
        keys,
        counts_BC,
        keys.numel(),
        num_bins,
        BLOCK_B=block,
        **options,
    )
    return counts_BC


@Launcher
@triton.jit(do_not_specialize=["num_keys"])  # or serving would compile when it is a multiple of 16
def _count_chunks_kernel(
    # inputs
    keys_ptr,
    # outputs
    counts_ptr,
    # shapes
    num_keys,
    num_bins,
    # constants
    PDL: tl.constexpr,
    # tunables
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One chunk, BLOCK_B bins.

    Example (CHUNK 16): keys [1, 0, -1, 1], 2 bins → counts [[1], [2], [13]], in the last also what is past the end.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    first = tl.program_id(1) * BLOCK_B
    _, bins = load_chunk(keys_ptr, tl.program_id(0), num_keys, num_bins, CHUNK)
    counts = tl.histogram(bins - first, BLOCK_B, mask=(bins >= first) & (bins < first + BLOCK_B))
    bin = first + tl.arange(0, BLOCK_B)
    tl.store(counts_ptr + bin.to(tl.int64) * tl.num_programs(0) + tl.program_id(0), counts, mask=bin <= num_bins)


@triton.jit
def load_chunk(keys_ptr, chunk, num_keys, num_bins, CHUNK: tl.constexpr):
    """Where the keys of the chunk stand, and their bins as in `load_bins`."""
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    return index, _bin_of(tl.load(keys_ptr + index, mask=index < num_keys, other=-1), num_bins)


@triton.jit
def start_chunks(counts_ptr, bin, num_chunks, BLOCK: tl.constexpr):
    """Replace the counts of a bin by the rank of its first key in each chunk; returns how many keys it has."""
    counts_ptr += bin.to(tl.int64) * num_chunks
    total = 0
    for first in range(0, num_chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + chunk, mask=chunk < num_chunks, other=0)
        tl.store(counts_ptr + chunk, total + tl.cumsum(counts, axis=0) - counts, mask=chunk < num_chunks)
        total += tl.sum(counts, axis=0)
    return total


@triton.jit
def rank_in_bins(bins, starts_ptr, CHUNK: tl.constexpr):
    """Ranks of the keys of the program's chunk; `starts_ptr`: what `start_chunks` has left."""
    starts = tl.load(starts_ptr + bins.to(tl.int64) * tl.num_programs(0) + tl.program_id(0))
    place = tl.arange(0, CHUNK)
    # In one number, those before a key in its bin are its next smaller ones, one for each place before it at most.
    order = bins * CHUNK + place
    between = (order[None, :] - 1 - order[:, None]).to(tl.uint32)  # unsigned, a later one is far off
    return starts + tl.sum((between < place[None, :]).to(tl.int32), axis=0)


@triton.jit
def _count_in_bin(left, right):
    """Of keys in order, each the bin in the upper 16 bits and a count below: an inclusive scan by this counts within bins."""
    is_same = (left & 0xFFFF0000) == (right & 0xFFFF0000)
    return tl.where(is_same, left + (right & 0xFFFF), right)


@triton.jit
def sort_chunk(bins, CHUNK: tl.constexpr):
    """Bins of at most 16 bits [CHUNK] → the same in order, their places in the chunk, and their ranks within the bin.

    Example: [2, 0, 2, 2] → [0, 2, 2, 2], [1, 0, 2, 3], [0, 0, 1, 2].
    """
    both = tl.sort((bins.to(tl.uint32) << 16) | tl.arange(0, CHUNK).to(tl.uint32))
    counted = tl.associative_scan((both & 0xFFFF0000) | 1, 0, _count_in_bin)
    return (both >> 16).to(tl.int32), (both & 0xFFFF).to(tl.int32), (counted & 0xFFFF).to(tl.int32) - 1
