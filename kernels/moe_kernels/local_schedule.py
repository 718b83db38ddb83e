"""Steps 2 and 3 of a forward in one, where each expert has one replica: `select_replicas` and `build_schedule`.

The choice is a look at the table then. So few rows take one launch and many take three, where the two ops take two and six.
N flat rows (T tokens, K experts of each), E logical experts, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base import scan
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.scan import (
    chunk_options,
    count_hits,
    first_index,
    load_bins,
    load_chunk,
    rank_hits,
    row_ends,
    scan_options,
    sort_chunk,
    start_chunks,
)
from moe_kernels.operands.load import LoadCounter
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.replicas.replicas_triton import select_replicas_triton
from moe_kernels.tiles.schedule_triton import build_schedule_triton, write_tiles
from moe_kernels.tiles.tiles import TileSchedule, new_schedule

FEW_ROWS = 512
"""N, at most: every program counts the rows of all experts, in one step. With 2,048 it took 0.8 µs more than two launches."""
MANY_ROWS = 8192
MOST_LANES = 8191  # with many rows: where they start is looked up in 32 KiB of shared memory
"""N, at least: three launches take less time than two, as measured on an H200 (docs/log.md)."""


@triton.jit
def _write_lanes(
    counts,
    table_lanes,
    expert,
    num_experts,
    num_lanes,
    max_tiles,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the tiles of an expert (the unused ones, if it is `num_experts`), and some of the offsets of lanes without expert.

    counts, table_lanes [BLOCK_E]: of all experts; 0 and `num_lanes` from `num_experts` on. Returns the expert's lane, and the
    sorted position where it starts.
    """
    own = tl.arange(0, counts.shape[0]) == expert
    is_expert = expert < num_experts
    count = tl.sum(tl.where(own, counts, 0), axis=0)
    lane = tl.where(is_expert, tl.sum(tl.where(own, table_lanes, 0), axis=0), num_lanes)
    start = write_tiles(
        counts, table_lanes, count, lane, num_lanes, max_tiles, offsets_ptr, tile_lane_ptr, tile_start_ptr, tile_end_ptr,
        num_tiles_ptr, BLOCK_M, EXTRA_M, BLOCK,
    )  # fmt: skip
    if num_experts < num_lanes:
        for other in range(expert, num_lanes, num_experts + 1):
            is_named = tl.sum((table_lanes == other).to(tl.int32), axis=0) > 0
            before = tl.sum(tl.where(table_lanes < other, counts, 0), axis=0)
            tl.store(offsets_ptr + other, before, mask=is_named == 0)
    return lane, start


@triton.jit
def _record(load_ptr, increment_ptr, expert, num_experts, count):
    """Add to the counter. An atomic, because another stream may add at the same time; nobody reads its result."""
    if increment_ptr is not None:
        tl.atomic_add(load_ptr + expert, count * tl.load(increment_ptr), mask=expert < num_experts, sem="relaxed")


# Unspecialized, or serving would compile when one is a multiple of 16.
@Launcher
@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def _schedule_few_kernel(
    # inputs
    ids_ptr,
    table_lanes_ptr,
    increment_ptr,  # None: nothing is recorded
    # outputs
    load_ptr,  # added to
    lanes_ptr,
    order_ptr,
    places_ptr,  # None: not wanted
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    # shapes
    num_rows,
    num_experts,
    num_lanes,
    max_tiles,
    # constants
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program writes the rows and tiles of one expert. The last program: the rows of no expert, and the unused tiles.

    Example (M = 16, no extra rows): ids [0, 1, 7, 0], lanes of experts [1, 0] → lanes [1, 0, -1, 1], order [1, 0, 3, 2],
    offsets [0, 1, 3], tile_lane [0, 1], tile_start [0, 1], tile_end [1, 3], num_tiles 2.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    table_lanes = tl.load(table_lanes_ptr + experts, mask=experts < num_experts, other=num_lanes)
    index = first_index(num_rows, BLOCK, ROWS)
    bins = load_bins(ids_ptr, index, 0, num_rows, num_experts, BLOCK, ROWS)
    row = tl.arange(0, BLOCK)  # once more, in the order that suits a histogram
    ids = tl.load(ids_ptr + row, mask=row < num_rows, other=-1)
    counts = tl.histogram(ids, BLOCK_E, mask=(ids >= 0) & (ids < num_experts))
    lane, start = _write_lanes(
        counts, table_lanes, expert, num_experts, num_lanes, max_tiles, offsets_ptr, tile_lane_ptr, tile_start_ptr,
        tile_end_ptr, num_tiles_ptr, BLOCK_M, EXTRA_M, BLOCK,
    )  # fmt: skip
    mine = bins == expert
    hits = count_hits(mine)
    _record(load_ptr, increment_ptr, expert, num_experts, tl.sum(hits))
    position, _ = rank_hits(mine, row_ends(hits, start))
    inside = mine & (index < num_rows)
    tl.store(lanes_ptr + index, tl.where(expert < num_experts, lane, -1), mask=inside)
    tl.store(order_ptr + position, index, mask=inside)
    if places_ptr is not None:
        tl.store(places_ptr + index, position, mask=inside)


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # as above
def _count_lanes_kernel(
    # inputs
    ids_ptr,
    table_lanes_ptr,
    # outputs
    lanes_ptr,
    chunks_ptr,
    # shapes
    num_rows,
    num_experts,
    num_lanes,
    # constants
    PDL: tl.constexpr,
    # tunables
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The lanes of a chunk's rows, and how many of them are in each lane (and in none, which is the last).

    Example (CHUNK 4): ids [0, 1, 7, 0], lanes of experts [1, 0] → lanes [1, 0, -1, 1], chunks [[1], [2], [1]].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    row, ids = load_chunk(ids_ptr, chunk, num_rows, num_experts, CHUNK)
    lanes = tl.load(table_lanes_ptr + ids, mask=ids < num_experts, other=num_lanes)
    tl.store(lanes_ptr + row, tl.where(lanes < num_lanes, lanes, -1), mask=row < num_rows)
    for first in range(0, num_lanes + 1, BLOCK_B):
        counts = tl.histogram(lanes - first, BLOCK_B, mask=(lanes >= first) & (lanes < first + BLOCK_B))
        lane = first + tl.arange(0, BLOCK_B)
        tl.store(chunks_ptr + lane.to(tl.int64) * num_chunks + chunk, counts, mask=lane <= num_lanes)


@Launcher
@triton.jit(do_not_specialize=["num_chunks"])  # as above
def _add_up_chunks_kernel(
    # input and output
    chunks_ptr,  # of `_count_lanes_kernel`, and what `start_chunks` makes of it
    # outputs
    counts_ptr,
    # shapes
    num_chunks,
    # constants
    PDL: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
):
    """The rows of one lane; the last program: of none.

    Example: two lanes, chunks [[1, 1], [1, 0], [0, 1]] → chunks [[0, 1], [0, 1], [0, 0]], counts [2, 1, 1].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    lane = tl.program_id(0)
    tl.store(counts_ptr + lane, start_chunks(chunks_ptr, lane, num_chunks, BLOCK))


@Launcher
@triton.jit(do_not_specialize=["num_rows", "max_tiles"])  # as above
def _schedule_many_kernel(
    # inputs
    lanes_ptr,
    table_lanes_ptr,
    increment_ptr,  # None: nothing is recorded
    counts_ptr,
    starts_ptr,
    # outputs
    load_ptr,  # added to
    order_ptr,
    places_ptr,  # None: not wanted
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    # shapes
    num_rows,
    num_experts,
    num_lanes,
    max_tiles,
    # constants
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The rows of one chunk; the first programs instead: the tiles of one lane and the load of one expert, the last of them
    the unused tiles.

    Example: as of `_schedule_few_kernel`, with lanes as they are there, counts [1, 2] and starts [[0], [0], [0]].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    lane, num_programs = tl.program_id(0), num_lanes + 1
    lanes = tl.arange(0, BLOCK_L)
    counts = tl.load(counts_ptr + lanes, mask=lanes < num_lanes, other=0)
    if lane < num_programs:
        count = tl.load(counts_ptr + lane, mask=lane < num_lanes, other=0)
        write_tiles(
            counts, lanes, count, lane, num_lanes, max_tiles, offsets_ptr, tile_lane_ptr, tile_start_ptr, tile_end_ptr,
            num_tiles_ptr, BLOCK_M, EXTRA_M, BLOCK,
        )  # fmt: skip
        expert = lane  # there are at least as many lanes
        own = tl.load(table_lanes_ptr + expert, mask=expert < num_experts, other=num_lanes)
        _record(load_ptr, increment_ptr, expert, num_experts, tl.load(counts_ptr + own))
        return
    chunk, num_chunks = lane - num_programs, tl.num_programs(0) - num_programs
    _, bins = load_chunk(lanes_ptr, chunk, num_rows, num_lanes, CHUNK)
    bins, place, rank = sort_chunk(bins, CHUNK)
    start = tl.load(starts_ptr + bins.to(tl.int64) * num_chunks + chunk)
    position = tl.gather(tl.cumsum(counts, axis=0) - counts, bins, axis=0) + start + rank
    row = chunk * CHUNK + place
    inside = row < num_rows
    tl.store(order_ptr + position, row, mask=inside)
    if places_ptr is not None:
        tl.store(places_ptr + row, position, mask=inside)


def add_up_options() -> dict[str, int]:
    """Launch options. A step are as many chunks as 131,072 rows have."""
    return {"BLOCK": min(scan.BLOCK_C, 512), "num_warps": 2}


def local_schedule_triton(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    load: LoadCounter,
    *,
    num_lanes: int,
    block_m: int,
    extra_m: int,
    with_places: bool = False,
) -> tuple[torch.Tensor, TileSchedule]:
    """lanes_TK and the schedule, as `select_replicas` and `build_schedule` make them. `table`: one replica an expert."""
    num_rows, num_experts = expert_ids_TK.numel(), load.load_E.numel()
    is_many = num_rows >= min(MANY_ROWS, scan.MANY_KEYS) and num_lanes <= MOST_LANES
    if not is_many and num_rows > FEW_ROWS:  # each of the two scans the rows with a program for each expert
        lanes_TK, counts_L = select_replicas_triton(expert_ids_TK, table, load, 0, num_lanes=num_lanes)
        return lanes_TK, build_schedule_triton(
            lanes_TK.view(-1), counts_L, block_m=block_m, extra_m=extra_m, with_places=with_places
        )
    lanes_TK = torch.empty_like(expert_ids_TK)
    schedule = new_schedule(lanes_TK, num_rows, num_lanes, block_m, extra_m, with_places)
    written = (
        *(schedule.order_N, schedule.places_N, schedule.offsets_L1),
        *(schedule.tile_lane, schedule.tile_start, schedule.tile_end, schedule.num_tiles),
    )
    sizes = (num_rows, num_experts, num_lanes, schedule.tile_lane.shape[0])
    tunables = {"BLOCK_M": block_m, "EXTRA_M": extra_m}
    if not is_many:
        _schedule_few_kernel[(num_experts + 1,)](
            *(expert_ids_TK, table.lanes_P, load.increment_1, load.load_E, lanes_TK),
            *written,
            *sizes,
            **tunables,
            **scan_options(num_rows),
            BLOCK_E=max(16, next_power_of_2(num_experts)),
        )
        return lanes_TK, schedule
    options = chunk_options(is_sorted=True)
    counts_B, num_chunks = expert_ids_TK.new_empty(num_lanes + 1), cdiv(num_rows, options["CHUNK"])
    chunks_BC, block = counts_B.new_empty((num_lanes + 1, num_chunks)), next_power_of_2(num_lanes + 1)
    _count_lanes_kernel[(num_chunks,)](
        *(expert_ids_TK, table.lanes_P, lanes_TK, chunks_BC, *sizes[:3]),
        BLOCK_B=min(block, scan.LARGEST_BLOCK_B),
        **options,
    )
    _add_up_chunks_kernel[(num_lanes + 1,)](chunks_BC, counts_B, num_chunks, **add_up_options())
    _schedule_many_kernel[(num_lanes + 1 + num_chunks,)](
        *(lanes_TK, table.lanes_P, load.increment_1, counts_B, chunks_BC, load.load_E),
        *written,
        *sizes,
        **tunables,
        **options,
        BLOCK=512,
        BLOCK_L=max(16, block),
    )
    return lanes_TK, schedule
