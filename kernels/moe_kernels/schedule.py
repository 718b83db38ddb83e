# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""Tile schedule: rows sorted by lane, cut into tiles of one lane each.

N flat rows, L lanes, M rows per tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_kernels.backend import on_device, resolve_backend
from moe_kernels.checks import check_tensor
from moe_kernels.counting import BLOCK, bin_of, count_block_ranks, count_ranks_torch


@dataclass(frozen=True)
class TileSchedule:
    """Which rows the grouped GEMMs compute together; all on the device, all of static shape.

    Attributes:
        order_N: [N] int32, sorted position → flat row. A permutation: rows by lane, in their order within a lane;
            rows with lane -1 come last and are in no tile.
        offsets_L1: [L + 1] int32, the sorted position at which each lane starts; the last is the number of rows that
            are computed.
        tile_lane: [max_tiles] int32, the lane of each tile; -1 from num_tiles on.
        tile_start: [max_tiles] int32, the first sorted position of each tile; -1 from num_tiles on.
        num_tiles: [1] int32, how many tiles there are.
        block_m: M; a tile ends after M rows, or where its lane ends.
    """

    order_N: torch.Tensor
    offsets_L1: torch.Tensor
    tile_lane: torch.Tensor
    tile_start: torch.Tensor
    num_tiles: torch.Tensor
    block_m: int


def max_tiles(num_rows: int, num_lanes: int, block_m: int) -> int:
    """Most tiles that `num_rows` rows can make: every lane that can have a row has one, and the rest fills up."""
    nonempty = min(num_rows, num_lanes)
    return nonempty + (num_rows - nonempty) // block_m


@triton.jit
def _lane_starts_kernel(
    # inputs
    counts_ptr,  # [L + 1], the last: rows of no lane
    # outputs
    offsets_ptr,
    first_tile_ptr,  # [L + 1]
    num_tiles_ptr,
    # shapes
    num_lanes,
    # constants
    BLOCK_M: tl.constexpr,
    # tunables
    BLOCK_L: tl.constexpr,
):
    """Running sums over the lanes, exclusive, of rows and of tiles; one program.

    Example (M = 16): counts [20, 0, 5 | 2] → offsets [0, 20, 20, 25], first_tile [0, 2, 2, 3], num_tiles 3.
    """
    lane = tl.arange(0, BLOCK_L)
    counts = tl.load(counts_ptr + lane, mask=lane <= num_lanes, other=0)
    tl.store(offsets_ptr + lane, tl.cumsum(counts, axis=0) - counts, mask=lane <= num_lanes)
    tiles = tl.where(lane < num_lanes, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    tl.store(first_tile_ptr + lane, tl.cumsum(tiles, axis=0) - tiles, mask=lane <= num_lanes)
    tl.store(num_tiles_ptr, tl.sum(tiles, axis=0))


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "max_tiles"])  # they change from batch to batch
def _fill_schedule_kernel(
    # inputs
    lanes_ptr,
    rank_ptr,
    block_starts_ptr,
    offsets_ptr,
    first_tile_ptr,
    # outputs
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    # shapes
    num_rows,
    num_lanes,
    num_blocks,
    max_tiles,
    # constants
    BLOCK_M: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
):
    """The first num_blocks programs place the rows; the next L write a lane's tiles, and the last the unused ones.

    Example (M = 16): lanes [1, 0, -1, 1], L = 2 → order [1, 0, 3, 2], tile_lane [0, 1], tile_start [0, 1].
    """
    program = tl.program_id(0)
    if program < num_blocks:
        row = program * BLOCK + tl.arange(0, BLOCK)
        inside = row < num_rows
        bins = bin_of(tl.load(lanes_ptr + row, mask=inside, other=-1), num_lanes)
        position = tl.load(offsets_ptr + bins, mask=inside, other=0)
        position += tl.load(block_starts_ptr + program * (num_lanes + 1) + bins, mask=inside, other=0)
        position += tl.load(rank_ptr + row, mask=inside, other=0)
        tl.store(order_ptr + position, row, mask=inside)
    else:
        lane = program - num_blocks
        is_lane = lane < num_lanes
        first = tl.load(first_tile_ptr + lane)
        last = tl.where(is_lane, tl.load(first_tile_ptr + lane + 1, mask=is_lane, other=0), max_tiles)
        start = tl.load(offsets_ptr + lane)
        for at in range(0, last - first, BLOCK):
            index = at + tl.arange(0, BLOCK)
            inside = index < last - first
            tl.store(tile_lane_ptr + first + index, tl.where(is_lane, lane, -1), mask=inside)
            tl.store(tile_start_ptr + first + index, tl.where(is_lane, start + index * BLOCK_M, -1), mask=inside)


def _build_schedule_triton(lanes_N: torch.Tensor, num_lanes: int, *, block_m: int) -> TileSchedule:
    num_rows = lanes_N.numel()
    most = max_tiles(num_rows, num_lanes, block_m)
    order_N = torch.empty_like(lanes_N)
    offsets_L1, first_tile_L1 = lanes_N.new_empty(num_lanes + 1), lanes_N.new_empty(num_lanes + 1)
    tile_lane, tile_start = lanes_N.new_empty(most), lanes_N.new_empty(most)
    num_tiles = lanes_N.new_empty(1)
    with on_device(lanes_N):
        ranks = count_block_ranks(lanes_N, num_lanes)
        _lane_starts_kernel[(1,)](
            ranks.counts_P,
            offsets_L1,
            first_tile_L1,
            num_tiles,
            num_lanes,
            BLOCK_M=block_m,
            BLOCK_L=triton.next_power_of_2(num_lanes + 1),
        )
        _fill_schedule_kernel[(ranks.num_blocks + num_lanes + 1,)](
            lanes_N,
            ranks.rank_N,
            ranks.block_starts_BP,
            offsets_L1,
            first_tile_L1,
            order_N,
            tile_lane,
            tile_start,
            num_rows,
            num_lanes,
            ranks.num_blocks,
            most,
            BLOCK_M=block_m,
            BLOCK=BLOCK,
        )
    return TileSchedule(order_N, offsets_L1, tile_lane, tile_start, num_tiles, block_m)


def build_schedule_torch(lanes_N: torch.Tensor, num_lanes: int, *, block_m: int) -> TileSchedule:
    """Reference of `build_schedule`."""
    _, counts_L1, order_N = count_ranks_torch(lanes_N, num_lanes)
    offsets_L1 = counts_L1.cumsum(0) - counts_L1
    tiles_L = (counts_L1[:-1] + block_m - 1) // block_m
    last_L = tiles_L.cumsum(0)
    num_tiles = tiles_L.sum()
    tile = torch.arange(max_tiles(lanes_N.numel(), num_lanes, block_m), device=lanes_N.device)
    lane = torch.searchsorted(last_L, tile, right=True).clamp(max=num_lanes - 1)
    start = offsets_L1[lane] + (tile - (last_L - tiles_L)[lane]) * block_m
    used = tile < num_tiles
    return TileSchedule(
        order_N=order_N.to(torch.int32),
        offsets_L1=offsets_L1.to(torch.int32),
        tile_lane=torch.where(used, lane, -1).to(torch.int32),
        tile_start=torch.where(used, start, -1).to(torch.int32),
        num_tiles=num_tiles.to(torch.int32).view(1),
        block_m=block_m,
    )


@torch.library.custom_op("moe_kernels::build_schedule", mutates_args=())
def _build_schedule(
    lanes_N: torch.Tensor, num_lanes: int, block_m: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    build = _build_schedule_triton if backend == "triton" else build_schedule_torch
    built = build(lanes_N, num_lanes, block_m=block_m)
    return built.order_N, built.offsets_L1, built.tile_lane, built.tile_start, built.num_tiles


@_build_schedule.register_fake
def _build_schedule_fake(lanes_N, num_lanes, block_m, backend):
    num_rows = lanes_N.shape[0]
    sizes = (num_rows, num_lanes + 1, *(2 * (max_tiles(num_rows, num_lanes, block_m),)), 1)
    return tuple(lanes_N.new_empty(size, dtype=torch.int32) for size in sizes)


def build_schedule(lanes_N: torch.Tensor, num_lanes: int, *, block_m: int, backend: str = "auto") -> TileSchedule:
    """Sort the rows by lane (stable) and cut them into tiles that never span lanes. No host sync.

    Args:
        lanes_N: [N] int32, contiguous; the lane of each flat row, -1 for a row that is not computed.
        num_lanes: L, at least 1.
        block_m: M, a power of two, at least 16; the `GemmConfig.block_m` of the GEMMs that use the schedule.
        backend: see `resolve_backend`.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("lanes_N", lanes_N, (None,), torch.int32)
    if num_lanes < 1:
        raise ValueError(f"num_lanes={num_lanes}: must be at least 1")
    if block_m < 16 or block_m & (block_m - 1):
        raise ValueError(f"block_m={block_m}: must be a power of two and at least 16")
    order_N, offsets_L1, tile_lane, tile_start, num_tiles = _build_schedule(
        lanes_N, num_lanes, block_m, resolve_backend(backend, lanes_N.device)
    )
    return TileSchedule(order_N, offsets_L1, tile_lane, tile_start, num_tiles, block_m)
