"""Step 4 of a forward, with quantised experts, for any GPU and size: `expert_up` of fp8_block, mxfp4 and int4.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated, is_gated, narrow, widen
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.operands.schemes import BLOCK
from moe_kernels.quantised.experts_fp8 import expert_up_fp8
from moe_kernels.quantised.fp8 import as_e4m3, e4m3_argument, operand, quantised
from moe_kernels.quantised.quantise_rows import QuantisedRows, Rows, new_quantised_rows, quantise_rows_triton
from moe_kernels.quantised.weight_tiles import add_product, load_weights, new_accumulator
from moe_kernels.tiles.tile_order import load_own_tile
from moe_kernels.tiles.tiles import TileSchedule


@Launcher
@triton.jit
def _expert_up_quantised_kernel(
    # inputs
    x_ptr,
    x_scale_ptr,  # None: not fp8_block
    gate_up_ptr,
    scale_ptr,
    zero_ptr,  # None: no zeros
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs
    hidden_ptr,
    hidden_scale_ptr,  # None: not fp8_block
    # shapes and strides, in elements
    hidden_size,
    intermediate,
    width,
    num_groups,
    fanout,
    stride_row,
    stride_slot,
    stride_scale,
    stride_zero,
    stride_bias,
    # constants
    PDL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_I columns of gate (if there is one) and of up. `width`, `num_groups`: see `load_weights`.

    fp8_block: BLOCK_K is a block's, and so is BLOCK_I, so that a program has all hidden channels that share a scale.
    Rows and columns past the end: see `_expert_up_kernel`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column_block, lane, start, end = load_own_tile(
        tl.cdiv(intermediate, BLOCK_I), tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if lane < 0:
        return
    GATED: tl.constexpr = is_gated(ACTIVATION)
    FP8: tl.constexpr = SCHEME == "fp8_block"
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    slot = tl.load(lane_to_slot_ptr + lane).to(tl.int64)
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    source = (tl.load(order_ptr + position, mask=inside, other=0) // fanout).to(tl.int64)

    first_column = column_block * BLOCK_I
    column = first_column + tl.arange(0, BLOCK_I)
    row = tl.minimum(column, intermediate - 1) - first_column
    gate_at = gate_up_ptr + slot * stride_slot + tl.cast(first_column, tl.int64) * width
    up_at = gate_at + (tl.cast(intermediate, tl.int64) * width if GATED else 0)
    # Scales of blocks lie along the columns; those of a row's groups each beside the next row's.
    up_rows = intermediate if GATED else 0
    scale_at = column_block * num_groups if FP8 else first_column
    up_scale_from = (tl.cdiv(intermediate, BLOCK_I) * num_groups if GATED else 0) if FP8 else up_rows
    gate_scale_at = scale_ptr + slot * stride_scale + scale_at
    up_scale_at = gate_scale_at + up_scale_from
    gate_zero_at = None
    up_zero_at = None
    if zero_ptr is not None:
        gate_zero_at = zero_ptr + slot * stride_zero + scale_at
        up_zero_at = gate_zero_at + up_rows

    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + source[:, None] * stride_row + k[None, :]
    gate = new_accumulator(BLOCK_M, BLOCK_I, SWAP)
    up = new_accumulator(BLOCK_M, BLOCK_I, SWAP)
    for step in range(0, tl.cdiv(hidden_size, BLOCK_K)):
        left = hidden_size - step * BLOCK_K
        if EVEN_K:
            x = operand(tl.load(x_at + step * BLOCK_K))
        else:
            x = operand(tl.load(x_at + step * BLOCK_K, mask=k[None, :] < left, other=0.0))
        x_scale = None
        gate_scale = None
        up_scale = None
        if FP8:
            x_scale = tl.load(x_scale_ptr + source * num_groups + step)
            gate_scale = tl.load(gate_scale_at + step)
            up_scale = tl.load(up_scale_at + step)
        if GATED:
            weights = load_weights(
                gate_at, gate_scale_at, gate_zero_at, row, step, width, num_groups, intermediate + up_rows, left,
                SCHEME, GROUP, EVEN_K, BLOCK_K, DTYPE,
            )  # fmt: skip
            gate = add_product(gate, x, weights, x_scale, gate_scale, SWAP)
        weights = load_weights(
            up_at, up_scale_at, up_zero_at, row, step, width, num_groups, intermediate + up_rows, left,
            SCHEME, GROUP, EVEN_K, BLOCK_K, DTYPE,
        )  # fmt: skip
        up = add_product(up, x, weights, x_scale, up_scale, SWAP)

    if SWAP:
        gate, up = tl.trans(gate), tl.trans(up)
    if bias_ptr is not None:
        bias_at = bias_ptr + slot * stride_bias + tl.minimum(column, intermediate - 1)
        if GATED:
            gate += widen(tl.load(bias_at))[None, :]
            bias_at += intermediate
        up += widen(tl.load(bias_at))[None, :]
    hidden = activated(gate, up, ACTIVATION)
    exists = column < intermediate
    stored = inside[:, None] & exists[None, :]
    at = hidden_ptr + position.to(tl.int64)[:, None] * intermediate + column[None, :]
    if FP8:
        values, hidden_scale = quantised(tl.where(exists[None, :], hidden, 0.0))
        tl.store(at, as_e4m3(values, hidden_ptr), mask=stored)
        hidden_scale_at = hidden_scale_ptr + position.to(tl.int64) * tl.cdiv(intermediate, BLOCK_I) + column_block
        tl.store(hidden_scale_at, hidden_scale, mask=inside)
    else:
        tl.store(at, narrow(hidden, hidden_ptr.dtype.element_ty), mask=stored)


def expert_up_quantised(
    x_RH: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
) -> Rows:
    """hidden_NI, quantised for fp8_block; plain rows of that scheme are quantised first."""
    gate_up_SNH, bias_SN = matrices.gate_up_SNH, matrices.gate_up_bias_SN
    scale, zero = matrices.gate_up_scale, matrices.gate_up_zero
    assert scale is not None
    num_rows, intermediate = schedule.order_N.shape[0], matrices.intermediate_size
    hidden: Rows
    outputs: tuple[torch.Tensor, torch.Tensor | None]
    if matrices.scheme == "fp8_block":
        x = x_RH if isinstance(x_RH, QuantisedRows) else QuantisedRows(*quantise_rows_triton(x_RH), x_RH.dtype)
        values, x_scale, weights = e4m3_argument(x.values_RH), x.scale_RG, e4m3_argument(gate_up_SNH)
        hidden = new_quantised_rows(values, num_rows, intermediate, x.dtype)
        if config.tma:
            expert_up_fp8(x, matrices, lane_to_slot_L, schedule, fanout, config, hidden)
            return hidden
        outputs = e4m3_argument(hidden.values_RH), hidden.scale_RG
    else:
        assert isinstance(x_RH, torch.Tensor)
        values, x_scale, weights = x_RH, None, gate_up_SNH.view(torch.int32)
        hidden = x_RH.new_empty((num_rows, intermediate))
        outputs = hidden, None
    hidden_size, num_groups = values.shape[1], scale.shape[2 if x_scale is not None else 1]
    grid = (schedule.tile_lane.shape[0] * cdiv(intermediate, config.block_n // 2),)
    if grid[0]:
        _expert_up_quantised_kernel[grid](
            values,
            x_scale,
            weights,
            scale,
            zero,
            bias_SN,
            lane_to_slot_L,
            schedule.order_N,
            schedule.tile_lane,
            schedule.tile_start,
            schedule.tile_end,
            *outputs,
            hidden_size,
            intermediate,
            weights.shape[2],
            num_groups,
            fanout,
            values.stride(0),
            weights.stride(0),
            scale.stride(0),
            0 if zero is None else zero.stride(0),
            0 if bias_SN is None else bias_SN.stride(0),
            ACTIVATION=matrices.activation,
            SCHEME=matrices.scheme,
            GROUP=BLOCK if x_scale is not None else hidden_size // num_groups,
            EVEN_K=hidden_size % config.block_k == 0,
            SWAP=config.swap,
            BLOCK_M=config.block_m,
            BLOCK_I=config.block_n // 2,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return hidden
