"""Step 3 of a forward: the kernels of `build_schedule` and their launches.

N flat rows, L lanes, M rows per tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.scan import (
    chunk_options,
    count_chunks,
    count_hits,
    first_index,
    load_bins,
    load_chunk,
    num_steps,
    rank_hits,
    rank_in_bins,
    row_ends,
    scan_options,
    start_chunks,
)
from moe_kernels.tiles.tiles import TileSchedule, new_schedule


@triton.jit
def _num_tiles(counts, BLOCK_M: tl.constexpr, EXTRA_M: tl.constexpr):
    return tl.maximum((counts - EXTRA_M + BLOCK_M - 1) // BLOCK_M, tl.minimum(counts, 1))


@triton.jit
def _has_extra(counts, BLOCK_M: tl.constexpr, EXTRA_M: tl.constexpr):
    """1 for a lane whose last tile has extra rows, else 0."""
    return (_num_tiles(counts, BLOCK_M, EXTRA_M) * BLOCK_M < counts).to(tl.int32)


@triton.jit
def write_tiles(
    counts,
    lanes,
    count,
    lane,
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
    """Write the tiles of one lane (the unused ones, if it is `num_lanes`); returns the sorted position where it starts.

    counts are those of `lanes`, which are all that have rows, in any order; `count` is the lane's own, 0 for `num_lanes`.
    """
    is_lane = lane < num_lanes
    tiles = _num_tiles(counts, BLOCK_M, EXTRA_M)
    earlier = lanes < lane
    longer, own_longer = _has_extra(counts, BLOCK_M, EXTRA_M), _has_extra(count, BLOCK_M, EXTRA_M)
    first_tiles = (longer > own_longer) | ((longer == own_longer) & earlier)
    # Two sums for the price of one.
    both = tl.sum(tl.where(earlier, counts, 0) + (tl.where(first_tiles, tiles, 0).to(tl.int64) << 32), axis=0)
    start, first_tile = both.to(tl.int32), (both >> 32).to(tl.int32)
    tl.store(offsets_ptr + lane, start)
    tl.store(num_tiles_ptr, first_tile, mask=is_lane == 0)
    # The masks keep a wrong count from a write out of bounds, here and below.
    last_tile = tl.where(is_lane, tl.minimum(first_tile + _num_tiles(count, BLOCK_M, EXTRA_M), max_tiles), max_tiles)
    TILES: tl.constexpr = min(BLOCK, 512)  # that are written at once
    for first in range(first_tile, last_tile, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile >= 0) & (tile < last_tile)
        tl.store(tile_lane_ptr + tile, tl.where(is_lane, lane, -1), mask=inside)
        tile_start = start + (tile - first_tile) * BLOCK_M
        tile_end = tl.where(tile + 1 == last_tile, start + count, tile_start + BLOCK_M)
        tl.store(tile_start_ptr + tile, tl.where(is_lane, tile_start, -1), mask=inside)
        tl.store(tile_end_ptr + tile, tl.where(is_lane, tile_end, -1), mask=inside)
    return start


# Unspecialized, or serving would compile when one is a multiple of 16.
@Launcher
@triton.jit(do_not_specialize=["num_rows", "num_chunks", "max_tiles"])
def _build_schedule_kernel(
    # inputs
    lanes_ptr,
    counts_ptr,
    # input and output
    chunks_ptr,  # of many rows, which `_place_rows_kernel` places; else None
    # outputs
    order_ptr,
    places_ptr,  # None: not wanted
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    # shapes
    num_rows,
    num_chunks,
    num_lanes,
    max_tiles,
    # constants
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """A program writes the rows and tiles of one lane. The last program writes the rows of no lane and the unused tiles.

    Example (M = 16, no extra rows): lanes [1, 0, -1, 1], counts [1, 2] → order [1, 0, 3, 2], offsets [0, 1, 3],
    tile_lane [0, 1], tile_start [0, 1], tile_end [1, 3], num_tiles 2.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    lane = tl.program_id(0)
    is_lane = lane < num_lanes
    lanes = tl.arange(0, BLOCK_L)
    counts = tl.load(counts_ptr + lanes, mask=lanes < num_lanes, other=0)
    count = tl.load(counts_ptr + lane, mask=is_lane, other=0)
    if chunks_ptr is None:
        steps = num_steps(num_rows, BLOCK)
        index = first_index(num_rows, BLOCK, ROWS)
        bins = load_bins(lanes_ptr, index, 0, num_rows, num_lanes, BLOCK, ROWS)
    else:
        start_chunks(chunks_ptr, lane, num_chunks, BLOCK)

    start = write_tiles(
        counts, lanes, count, lane, num_lanes, max_tiles, offsets_ptr, tile_lane_ptr, tile_start_ptr, tile_end_ptr,
        num_tiles_ptr, BLOCK_M, EXTRA_M, BLOCK,
    )  # fmt: skip
    if chunks_ptr is None:
        hits = count_hits(bins == lane)
        for step in range(1, steps):
            bins = load_bins(lanes_ptr, index, step, num_rows, num_lanes, BLOCK, ROWS)
            hits += count_hits(bins == lane)
        ends = row_ends(hits, start)
        for back in range(steps):
            step = steps - 1 - back
            mine = bins == lane
            # Ahead of time; after the last step, in vain.
            bins = load_bins(lanes_ptr, index, tl.maximum(step - 1, 0), num_rows, num_lanes, BLOCK, ROWS)
            position, ends = rank_hits(mine, ends)
            inside = position.to(tl.uint32) < num_rows  # unsigned, a negative one is past the end
            row = index + step * (BLOCK // ROWS)
            tl.store(order_ptr + position, row, mask=mine & inside)
            if places_ptr is not None:
                tl.store(places_ptr + row, position, mask=mine & (row < num_rows))


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # as above
def _place_rows_kernel(
    # inputs
    lanes_ptr,
    offsets_ptr,
    starts_ptr,
    # outputs
    order_ptr,
    places_ptr,  # None: not wanted
    # shapes
    num_rows,
    num_lanes,
    # constants
    PDL: tl.constexpr,
    # tunables
    CHUNK: tl.constexpr,
):
    """The rows of one chunk.

    Example: lanes [1, 0, -1, 1], offsets [0, 1, 3], starts [[0], [0], [0]] → order [1, 0, 3, 2].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    row, bins = load_chunk(lanes_ptr, tl.program_id(0), num_rows, num_lanes, CHUNK)
    position = tl.load(offsets_ptr + bins) + rank_in_bins(bins, starts_ptr, CHUNK)
    inside = position.to(tl.uint32) < num_rows  # as above
    tl.store(order_ptr + position, row, mask=inside)
    if places_ptr is not None:
        tl.store(places_ptr + row, position, mask=row < num_rows)


def build_schedule_triton(
    lanes_N: torch.Tensor, counts_L: torch.Tensor, *, block_m: int, extra_m: int, with_places: bool = False
) -> TileSchedule:
    num_rows, num_lanes = lanes_N.numel(), counts_L.numel()
    schedule = new_schedule(lanes_N, num_rows, num_lanes, block_m, extra_m, with_places)
    chunks_BC = count_chunks(lanes_N, num_lanes)
    num_chunks = 0 if chunks_BC is None else chunks_BC.shape[1]
    _build_schedule_kernel[(num_lanes + 1,)](
        lanes_N,
        counts_L,
        chunks_BC,
        schedule.order_N,
        schedule.places_N,
        schedule.offsets_L1,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        schedule.num_tiles,
        num_rows,
        num_chunks,
        num_lanes,
        schedule.tile_lane.shape[0],
        BLOCK_M=block_m,
        EXTRA_M=extra_m,
        BLOCK_L=next_power_of_2(num_lanes),
        **scan_options(num_rows),
    )
    if chunks_BC is not None:
        _place_rows_kernel[(num_chunks,)](
            lanes_N,
            schedule.offsets_L1,
            chunks_BC,
            schedule.order_N,
            schedule.places_N,
            num_rows,
            num_lanes,
            **chunk_options(),
        )
    return schedule
