"""Step 5 of a forward, for any GPU, size and dtype: `expert_down` by pointers and masks. With `config.tma`
it hands over, and for quantised experts.

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import dot
from moe_kernels.gemms.expert_down_tma import expert_down_tma
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.expert_down_four_bit_ring import expert_down_four_bit_ring
from moe_kernels.quantised.expert_down_quantised import expert_down_quantised
from moe_kernels.quantised.quantise_rows import Rows
from moe_kernels.tiles.homes import RowHomes
from moe_kernels.tiles.store_rows import store_rows
from moe_kernels.tiles.tile_order import load_own_tile
from moe_kernels.tiles.tiles import TileSchedule


@Launcher
@triton.jit(do_not_specialize=["rows_per_home"])
def _expert_down_kernel(
    # inputs
    hidden_ptr,
    down_ptr,
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    row_weights_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    homes_ptr,  # None: all rows go to `rows_ptr`
    # outputs
    rows_ptr,
    # shapes and strides, in elements
    rows_per_home,
    hidden_size,
    intermediate,
    stride_row,
    stride_slot,
    stride_bias,
    # constants
    PDL: tl.constexpr,
    EVEN_K: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of the output. Rows and columns past the end: see `_expert_up_kernel`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column_block, lane, start, end = load_own_tile(
        tl.cdiv(hidden_size, BLOCK_N), tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if lane < 0:
        return
    slot = tl.load(lane_to_slot_ptr + lane).to(tl.int64)
    position = start + tl.arange(0, BLOCK_M)

    first_column = column_block * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    weight_row = tl.minimum(column, hidden_size - 1) - first_column
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden_ptr + tl.minimum(position, end - 1).to(tl.int64)[:, None] * stride_row + k[None, :]
    down_block = down_ptr + slot * stride_slot + tl.cast(first_column, tl.int64) * intermediate
    down_at = down_block + weight_row[None, :] * intermediate + k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, intermediate, BLOCK_K):
        if EVEN_K:
            product = dot(tl.load(hidden_at), tl.load(down_at), product)
        else:
            left = intermediate - first
            hidden = tl.load(hidden_at, mask=k[None, :] < left, other=0.0)
            product = dot(hidden, tl.load(down_at, mask=k[:, None] < left, other=0.0), product)
        hidden_at += BLOCK_K
        down_at += BLOCK_K

    bias_at = None
    if bias_ptr is not None:
        bias_at = bias_ptr + slot * stride_bias
    store_rows(
        product, position, end, column, bias_at, order_ptr, row_weights_ptr, rows_ptr, hidden_size, homes_ptr, rows_per_home
    )  # fmt: skip


def expert_down_triton(
    hidden_NI: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
    homes: RowHomes | None = None,
) -> torch.Tensor:
    if matrices.scheme not in ("plain", "fp8_block") and config.tma:
        assert isinstance(hidden_NI, torch.Tensor)
        return expert_down_four_bit_ring(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config, homes)
    if matrices.scheme != "plain":
        return expert_down_quantised(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config, homes)
    assert isinstance(hidden_NI, torch.Tensor)
    if config.tma:
        return expert_down_tma(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config, homes)
    down_SHI, bias_SH = matrices.down_SHI, matrices.down_bias_SH
    block_n, block_k = config.block_n, config.block_k
    _, hidden_size, intermediate = down_SHI.shape
    rows_NH = hidden_NI.new_empty((schedule.order_N.shape[0], hidden_size)) if homes is None else homes.own
    grid = (schedule.tile_lane.shape[0] * cdiv(hidden_size, block_n),)
    if grid[0]:
        _expert_down_kernel[grid](
            hidden_NI,
            down_SHI,
            bias_SH,
            lane_to_slot_L,
            row_weights_N,
            schedule.order_N,
            schedule.tile_lane,
            schedule.tile_start,
            schedule.tile_end,
            None if homes is None else homes.addresses_W,
            rows_NH,
            1 if homes is None else homes.rows_per_home,
            hidden_size,
            intermediate,
            hidden_NI.stride(0),
            down_SHI.stride(0),
            0 if bias_SH is None else bias_SH.stride(0),
            EVEN_K=intermediate % block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return rows_NH
