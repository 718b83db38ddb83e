"""Step 5 of a forward, with quantised experts, for any GPU and size: `expert_down` of fp8_block, mxfp4 and int4.

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.operands.schemes import BLOCK
from moe_kernels.quantised.experts_fp8 import expert_down_fp8
from moe_kernels.quantised.fp8 import e4m3_argument, operand
from moe_kernels.quantised.quantise_rows import QuantisedRows, Rows, values_of
from moe_kernels.quantised.weight_tiles import add_product, load_weights, new_accumulator
from moe_kernels.tiles.homes import RowHomes
from moe_kernels.tiles.store_rows import store_rows
from moe_kernels.tiles.tile_order import load_own_tile
from moe_kernels.tiles.tiles import TileSchedule


@Launcher
@triton.jit(do_not_specialize=["rows_per_home"])
def _expert_down_quantised_kernel(
    # inputs
    hidden_ptr,
    hidden_scale_ptr,  # None: not fp8_block
    down_ptr,
    scale_ptr,
    zero_ptr,  # None: no zeros
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
    width,
    num_groups,
    stride_row,
    stride_slot,
    stride_scale,
    stride_zero,
    stride_bias,
    # constants
    PDL: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of the output. `width`, `num_groups`: see `load_weights`.

    fp8_block: BLOCK_K is a block's, and BLOCK_N divides it, so that a tile of weights has one scale.
    Rows and columns past the end: see `_expert_up_kernel`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column_block, lane, start, end = load_own_tile(
        tl.cdiv(hidden_size, BLOCK_N), tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if lane < 0:
        return
    FP8: tl.constexpr = SCHEME == "fp8_block"
    DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
    slot = tl.load(lane_to_slot_ptr + lane).to(tl.int64)
    position = start + tl.arange(0, BLOCK_M)
    source = tl.minimum(position, end - 1).to(tl.int64)

    first_column = column_block * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    row = tl.minimum(column, hidden_size - 1) - first_column
    down_at = down_ptr + slot * stride_slot + tl.cast(first_column, tl.int64) * width
    # Scales of blocks lie along the columns; those of a row's groups each beside the next row's.
    scale_from = first_column // GROUP * num_groups if FP8 else first_column
    scale_at = scale_ptr + slot * stride_scale + scale_from
    zero_at = None
    if zero_ptr is not None:
        zero_at = zero_ptr + slot * stride_zero + scale_from

    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden_ptr + source[:, None] * stride_row + k[None, :]
    product = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
    for step in range(0, tl.cdiv(intermediate, BLOCK_K)):
        left = intermediate - step * BLOCK_K
        if EVEN_K:
            hidden = operand(tl.load(hidden_at + step * BLOCK_K))
        else:
            hidden = operand(tl.load(hidden_at + step * BLOCK_K, mask=k[None, :] < left, other=0.0))
        hidden_scale = None
        block_scale = None
        if FP8:
            hidden_scale = tl.load(hidden_scale_ptr + source * num_groups + step)
            block_scale = tl.load(scale_at + step)
        weights = load_weights(
            down_at, scale_at, zero_at, row, step, width, num_groups, hidden_size, left,
            SCHEME, GROUP, EVEN_K, BLOCK_K, DTYPE,
        )  # fmt: skip
        product = add_product(product, hidden, weights, hidden_scale, block_scale, SWAP)

    if SWAP:
        product = tl.trans(product)
    bias_at = None
    if bias_ptr is not None:
        bias_at = bias_ptr + slot * stride_bias
    store_rows(
        product, position, end, column, bias_at, order_ptr, row_weights_ptr, rows_ptr, hidden_size, homes_ptr, rows_per_home
    )  # fmt: skip


def expert_down_quantised(
    hidden_NI: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
    homes: RowHomes | None = None,
) -> torch.Tensor:
    bias_SH, scale, zero = matrices.down_bias_SH, matrices.down_scale, matrices.down_zero
    assert scale is not None
    values, hidden_scale, weights, num_groups = values_of(hidden_NI), None, matrices.down_SHI, scale.shape[1]
    if isinstance(hidden_NI, QuantisedRows):
        values, hidden_scale, weights = e4m3_argument(values), hidden_NI.scale_RG, e4m3_argument(weights)
        num_groups = scale.shape[2]
    else:
        weights = weights.view(torch.int32)
    hidden_size, intermediate = matrices.hidden_size, values.shape[1]
    shape, dtype = (schedule.order_N.shape[0], hidden_size), hidden_NI.dtype
    rows_NH = values.new_empty(shape, dtype=dtype) if homes is None else homes.own
    if config.tma:
        assert isinstance(hidden_NI, QuantisedRows)
        expert_down_fp8(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config, homes, rows_NH)
        return rows_NH
    grid = (schedule.tile_lane.shape[0] * cdiv(hidden_size, config.block_n),)
    if grid[0]:
        _expert_down_quantised_kernel[grid](
            values,
            hidden_scale,
            weights,
            scale,
            zero,
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
            weights.shape[2],
            num_groups,
            values.stride(0),
            weights.stride(0),
            scale.stride(0),
            0 if zero is None else zero.stride(0),
            0 if bias_SH is None else bias_SH.stride(0),
            SCHEME=matrices.scheme,
            GROUP=BLOCK if hidden_scale is not None else intermediate // num_groups,
            EVEN_K=intermediate % config.block_k == 0,
            SWAP=config.swap,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return rows_NH
