"""Backward of the experts, first step: cuts the sorted rows into tiles, and finds the lanes of each slot.

N flat rows, L lanes, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.base.checks import check_tma_address, slot_stride
from moe_kernels.base.integers import next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.operands.config import GemmConfig
from moe_kernels.tiles.tiles import max_tiles


@dataclass(frozen=True)
class GradientTiles:
    """What the kernels of the backward compute. (The tiles of the forward have its sizes, and know no slots.)

    Attributes:
        tile_lane: [most] int32, the lane of each tile, in order; L for rows of no lane, -1 where there are no more tiles.
        tile_start, tile_end: [most] int32, sorted positions of its first row and after its last one.
        num_tiles: [1] int32, how many of these have a lane.
        first_lane_S: [S] int32, the lowest lane with rows that leads to a slot; -1: none.
        next_lane_L: [L] int32, of a lane with rows: the next such lane of the same slot; -1: none.
        blocks_S: [S] int32, blocks of `block_k` rows of a slot, none of which spans lanes; 1 of a slot without rows.
    """

    tile_lane: torch.Tensor
    tile_start: torch.Tensor
    tile_end: torch.Tensor
    num_tiles: torch.Tensor
    first_lane_S: torch.Tensor
    next_lane_L: torch.Tensor
    blocks_S: torch.Tensor


@Launcher
@triton.jit(do_not_specialize=["num_rows", "most_tiles"])
def _cut_tiles_kernel(
    # inputs
    offsets_ptr,
    lane_to_slot_ptr,
    # outputs
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    first_lane_ptr,
    next_lane_ptr,
    blocks_ptr,
    # shapes
    num_rows,
    num_lanes,
    num_slots,
    most_tiles,
    # constants
    PDL: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One lane's tiles and the lane after it; one slot's first lane. Rows of no lane count as lane L.

    Example (TILE_M = 2, N = 6, offsets [0, 3, 3, 5]): lanes 0, 0, 2, 3, -1; starts 0, 2, 3, 5; ends 2, 3, 5, 6.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = tl.program_id(0)
    lane = tl.arange(0, BLOCK_L)
    start = tl.load(offsets_ptr + lane, mask=lane <= num_lanes, other=num_rows)
    end = tl.load(offsets_ptr + lane + 1, mask=lane < num_lanes, other=num_rows)
    slot = tl.load(lane_to_slot_ptr + lane, mask=(lane < num_lanes) & (end > start), other=-1)
    step = tl.arange(0, BLOCK_T)
    tiles = tl.cdiv(end - start, TILE_M)
    if own <= num_lanes:
        first_tile = tl.sum(tl.where(lane < own, tiles, 0), 0)
        own_tiles = tl.sum(tl.where(lane == own, tiles, 0), 0)
        own_start = tl.sum(tl.where(lane == own, start, 0), 0)
        own_end = tl.sum(tl.where(lane == own, end, 0), 0)
        for first in range(0, own_tiles, BLOCK_T):
            tile = first + step
            is_own = tile < own_tiles
            tl.store(tile_lane_ptr + first_tile + tile, own, mask=is_own)
            tl.store(tile_start_ptr + first_tile + tile, own_start + tile * TILE_M, mask=is_own)
            after = tl.minimum(own_start + (tile + 1) * TILE_M, own_end)
            tl.store(tile_end_ptr + first_tile + tile, after, mask=is_own)
        if own == num_lanes:
            tl.store(num_tiles_ptr, first_tile)
            for first in range(first_tile + own_tiles, most_tiles, BLOCK_T):
                tl.store(tile_lane_ptr + first + step, -1, mask=first + step < most_tiles)
        else:
            own_slot = tl.max(tl.where(lane == own, slot, -1), 0)
            later = (lane > own) & (slot == own_slot) & (slot >= 0)
            following = tl.min(tl.where(later, lane, BLOCK_L), 0)
            tl.store(next_lane_ptr + own, tl.where(following == BLOCK_L, -1, following))
    if own < num_slots:
        first_lane = tl.min(tl.where(slot == own, lane, BLOCK_L), 0)
        tl.store(first_lane_ptr + own, tl.where(first_lane == BLOCK_L, -1, first_lane))
        blocks = tl.sum(tl.where(slot == own, tl.cdiv(end - start, BLOCK_K), 0), 0)
        tl.store(blocks_ptr + own, tl.maximum(blocks, 1))


def cut_tiles(
    offsets_L1: torch.Tensor, lane_to_slot_L: torch.Tensor, num_rows: int, num_slots: int, *, tile_m: int, block_k: int
) -> GradientTiles:
    """Tiles of `tile_m` rows that never span lanes; rows of no lane have their own. No host sync.

    `block_k`: rows of a block in `blocks_S`.
    """
    num_lanes = lane_to_slot_L.shape[0]
    most = max_tiles(num_rows, num_lanes + 1, tile_m)
    tile_lane, tile_start, tile_end, num_tiles, first_lane_S, next_lane_L, blocks_S = (
        offsets_L1.new_empty(size) for size in (most, most, most, 1, num_slots, num_lanes, num_slots)
    )
    _cut_tiles_kernel[(max(num_lanes + 1, num_slots),)](
        offsets_L1,
        lane_to_slot_L,
        tile_lane,
        tile_start,
        tile_end,
        num_tiles,
        first_lane_S,
        next_lane_L,
        blocks_S,
        num_rows,
        num_lanes,
        num_slots,
        most,
        TILE_M=tile_m,
        BLOCK_K=block_k,
        BLOCK_L=next_power_of_2(num_lanes + 1),
        BLOCK_T=64,
    )
    return GradientTiles(tile_lane, tile_start, tile_end, num_tiles, first_lane_S, next_lane_L, blocks_S)


def weights_descriptor(name: str, weights_SKN: torch.Tensor, config: GemmConfig) -> TensorDescriptor | None:
    """Of slots whose matrices are multiplied from the right, in boxes ``[block_k, block_n]``; None without `config.tma`."""
    if not config.tma:
        return None
    check_tma_address(f"matrices.{name}", weights_SKN)
    strides = [slot_stride(weights_SKN), weights_SKN.shape[2], 1]
    return TensorDescriptor(weights_SKN, list(weights_SKN.shape), strides, [1, config.block_k, config.block_n])
