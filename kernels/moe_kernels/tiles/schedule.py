"""Step 3 of a forward, tile schedule: rows sorted by lane, cut into tiles of one lane each.

N flat rows, L lanes, M rows per tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_integer, check_tensor
from moe_kernels.base.registered import registered_op
from moe_kernels.tiles.schedule_triton import build_schedule_triton
from moe_kernels.tiles.tiles import TileSchedule, max_tiles


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
        block_m: M, a power of two, at least 8; the `GemmConfig.block_m` of the GEMMs that use the schedule.
        extra_m: in [0, M]; their `GemmConfig.schedule_extra_m`.
        backend: see `resolve_backend`.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("lanes_N", lanes_N, (None,), torch.int32)
    check_tensor("counts_L", counts_L, (None,), torch.int32, lanes_N.device)
    if counts_L.shape[0] < 1:
        raise ValueError(f"counts_L has shape {tuple(counts_L.shape)}: there must be at least 1 lane")
    block_m, extra_m = check_integer("block_m", block_m), check_integer("extra_m", extra_m)
    if block_m < 8 or block_m & (block_m - 1):
        raise ValueError(f"block_m={block_m}: must be a power of two and at least 8")
    if not 0 <= extra_m <= block_m:
        raise ValueError(f"extra_m={extra_m}: must be in [0, {block_m}], block_m")
    order_N, offsets_L1, tile_lane, tile_start, tile_end, num_tiles = _build_schedule(
        lanes_N, counts_L, block_m, extra_m, resolve_backend(backend, lanes_N.device)
    )
    return TileSchedule(order_N, offsets_L1, tile_lane, tile_start, tile_end, num_tiles, block_m, extra_m)
