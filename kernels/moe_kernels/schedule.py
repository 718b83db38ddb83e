"""Tile schedule: rows sorted by lane, cut into tiles of one lane each.

N flat rows, L lanes, M rows per tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from moe_kernels.backend import resolve_backend
from moe_kernels.checks import check_tensor
from moe_kernels.config import GemmConfig
from moe_kernels.integers import next_power_of_2
from moe_kernels.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.registered import registered_op
from moe_kernels.scan import (
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


@dataclass(frozen=True)
class TileSchedule:
    """Which rows the grouped GEMMs compute together; all on the device, all of static shape.

    Attributes:
        order_N: [N] int32, sorted position → flat row. A permutation: rows by lane, in their order within a lane;
            rows with lane -1 come last and are in no tile.
        offsets_L1: [L + 1] int32, the sorted position at which each lane starts; the last is the number of rows that
            are computed.
        tile_lane: [max_tiles] int32, the lane of each tile, those of a lane in order; -1 from num_tiles on.
        tile_start, tile_end: [max_tiles] int32, the sorted positions of each tile: the first, and the one after the last;
            -1 from num_tiles on.
        num_tiles: [1] int32, how many tiles there are.
        block_m: M; a tile ends after M rows, or where its lane ends.
        extra_m: if after M rows at most so many are left of the lane, they belong to the tile too. Lanes with such a longer
            tile come first, as what begins last should be short.
    """

    order_N: torch.Tensor
    offsets_L1: torch.Tensor
    tile_lane: torch.Tensor
    tile_start: torch.Tensor
    tile_end: torch.Tensor
    num_tiles: torch.Tensor
    block_m: int
    extra_m: int = 0

    def check_config(self, config: GemmConfig) -> None:
        """Raises ValueError unless the schedule was built for `config`."""
        for name in ("block_m", "extra_m"):
            value, own = getattr(config, name), getattr(self, name)
            if value != own:
                raise ValueError(f"config.{name}={value}: must be the schedule's, {own}")


def max_tiles(num_rows: int, num_lanes: int, block_m: int) -> int:
    """Most tiles that `num_rows` rows can make: every lane that can have a row has one, and the rest fills up.

    (With `extra_m` there are fewer.)
    """
    nonempty = min(num_rows, num_lanes)
    return nonempty + (num_rows - nonempty) // block_m


@triton.jit
def _num_tiles(counts, BLOCK_M: tl.constexpr, EXTRA_M: tl.constexpr):
    return tl.maximum((counts - EXTRA_M + BLOCK_M - 1) // BLOCK_M, tl.minimum(counts, 1))


@triton.jit
def _has_extra(counts, BLOCK_M: tl.constexpr, EXTRA_M: tl.constexpr):
    """1 for a lane whose last tile has extra rows, else 0."""
    return (_num_tiles(counts, BLOCK_M, EXTRA_M) * BLOCK_M < counts).to(tl.int32)


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
    """Rows and tiles of one lane; the last program those of no lane: rows at the end, unused tiles.

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
            tl.store(order_ptr + position, index + step * (BLOCK // ROWS), mask=mine & inside)


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # as above
def _place_rows_kernel(
    # inputs
    lanes_ptr,
    offsets_ptr,
    starts_ptr,
    # outputs
    order_ptr,
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
    row, bins = load_chunk(lanes_ptr, num_rows, num_lanes, CHUNK)
    position = tl.load(offsets_ptr + bins) + rank_in_bins(bins, starts_ptr, CHUNK)
    inside = position.to(tl.uint32) < num_rows  # as above
    tl.store(order_ptr + position, row, mask=inside)


def build_schedule_triton(lanes_N: torch.Tensor, counts_L: torch.Tensor, *, block_m: int, extra_m: int) -> TileSchedule:
    num_rows, num_lanes = lanes_N.numel(), counts_L.numel()
    most = max_tiles(num_rows, num_lanes, block_m)
    schedule = TileSchedule(
        order_N=torch.empty_like(lanes_N),
        offsets_L1=lanes_N.new_empty(num_lanes + 1),
        tile_lane=lanes_N.new_empty(most),
        tile_start=lanes_N.new_empty(most),
        tile_end=lanes_N.new_empty(most),
        num_tiles=lanes_N.new_empty(1),
        block_m=block_m,
        extra_m=extra_m,
    )
    chunks_BC = count_chunks(lanes_N, num_lanes)
    num_chunks = 0 if chunks_BC is None else chunks_BC.shape[1]
    _build_schedule_kernel[(num_lanes + 1,)](
        lanes_N,
        counts_L,
        chunks_BC,
        schedule.order_N,
        schedule.offsets_L1,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        schedule.num_tiles,
        num_rows,
        num_chunks,
        num_lanes,
        most,
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
            num_rows,
            num_lanes,
            **chunk_options(),
        )
    return schedule


def build_schedule_torch(
    lanes_N: torch.Tensor, counts_L: torch.Tensor, *, block_m: int, extra_m: int = 0
) -> TileSchedule:
    """Reference of `build_schedule`."""
    num_lanes = counts_L.numel()
    bins = torch.where((lanes_N >= 0) & (lanes_N < num_lanes), lanes_N, num_lanes)
    counts_L = counts_L.long()
    offsets_L1 = F.pad(counts_L.cumsum(0), (1, 0))
    tiles_L = torch.maximum((counts_L - extra_m + block_m - 1) // block_m, counts_L.clamp(max=1))
    order_L = torch.argsort((tiles_L * block_m >= counts_L).int(), stable=True)
    last_L = tiles_L[order_L].cumsum(0)
    num_tiles = tiles_L.sum()
    tile = torch.arange(max_tiles(lanes_N.numel(), num_lanes, block_m), device=lanes_N.device)
    place = torch.searchsorted(last_L, tile, right=True).clamp(max=num_lanes - 1)
    lane = order_L[place]
    start = offsets_L1[lane] + (tile - (last_L[place] - tiles_L[lane])) * block_m
    end = torch.where(tile + 1 == last_L[place], offsets_L1[lane + 1], start + block_m)
    used = tile < num_tiles
    return TileSchedule(
        order_N=torch.argsort(bins, stable=True).to(torch.int32),
        offsets_L1=offsets_L1.to(torch.int32),
        tile_lane=torch.where(used, lane, -1).to(torch.int32),
        tile_start=torch.where(used, start, -1).to(torch.int32),
        tile_end=torch.where(used, end, -1).to(torch.int32),
        num_tiles=num_tiles.to(torch.int32).view(1),
        block_m=block_m,
        extra_m=extra_m,
    )


@registered_op("moe_kernels::build_schedule")
def _build_schedule(
    lanes_N: torch.Tensor, counts_L: torch.Tensor, block_m: int, extra_m: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    build = build_schedule_triton if backend == "triton" else build_schedule_torch
    built = build(lanes_N, counts_L, block_m=block_m, extra_m=extra_m)
    return built.order_N, built.offsets_L1, built.tile_lane, built.tile_start, built.tile_end, built.num_tiles


@_build_schedule.register_fake
def _build_schedule_fake(lanes_N, counts_L, block_m, extra_m, backend):
    num_rows, num_lanes = lanes_N.shape[0], counts_L.shape[0]
    sizes = (num_rows, num_lanes + 1, *(3 * (max_tiles(num_rows, num_lanes, block_m),)), 1)
    return tuple(lanes_N.new_empty(size, dtype=torch.int32) for size in sizes)


def build_schedule(
    lanes_N: torch.Tensor, counts_L: torch.Tensor, *, block_m: int, extra_m: int = 0, backend: str = "auto"
) -> TileSchedule:
    """Sort the rows by lane (stable) and cut them into tiles that never span lanes. No host sync.

    Args:
        lanes_N: [N] int32, contiguous; the lane of each flat row, -1 for a row that is not computed.
        counts_L: [L] int32, contiguous, L at least 1; how many rows each lane has. With wrong counts the schedule is
            undefined.
        block_m: M, a power of two, at least 16; the `GemmConfig.block_m` of the GEMMs that use the schedule.
        extra_m: in [0, M]; their `GemmConfig.extra_m`.
        backend: see `resolve_backend`.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("lanes_N", lanes_N, (None,), torch.int32)
    check_tensor("counts_L", counts_L, (None,), torch.int32, lanes_N.device)
    if counts_L.shape[0] < 1:
        raise ValueError(f"counts_L has shape {tuple(counts_L.shape)}: there must be at least 1 lane")
    if block_m < 16 or block_m & (block_m - 1):
        raise ValueError(f"block_m={block_m}: must be a power of two and at least 16")
    if not 0 <= extra_m <= block_m:
        raise ValueError(f"extra_m={extra_m}: must be in [0, {block_m}], block_m")
    order_N, offsets_L1, tile_lane, tile_start, tile_end, num_tiles = _build_schedule(
        lanes_N, counts_L, block_m, extra_m, resolve_backend(backend, lanes_N.device)
    )
    return TileSchedule(order_N, offsets_L1, tile_lane, tile_start, tile_end, num_tiles, block_m, extra_m)
