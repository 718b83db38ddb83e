"""Step 4 of a forward, for any GPU, size and dtype: `expert_up` by pointers and masks. With `config.tma` it
hands over, and for quantised experts.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated, dot, is_gated, narrow, widen
from moe_kernels.gemms.expert_up_tma import expert_up_tma
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.expert_up_four_bit_ring import expert_up_four_bit_ring
from moe_kernels.quantised.expert_up_quantised import expert_up_quantised
from moe_kernels.quantised.quantise_rows import Rows
from moe_kernels.tiles.tile_order import load_own_tile
from moe_kernels.tiles.tiles import TileSchedule


@Launcher
@triton.jit
def _expert_up_kernel(
    # inputs
    x_ptr,
    gate_up_ptr,
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs
    hidden_ptr,  # None: not wanted
    pre_ptr,  # None: not wanted
    # shapes and strides, in elements
    hidden_size,
    intermediate,
    fanout,
    stride_row,
    stride_slot,
    stride_bias,
    # constants
    PDL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_I columns of gate (if there is one) and of up.

    Rows and columns past the end read some valid row instead (a row of the product depends on no other one) and are
    not stored, so that the loop needs no mask unless BLOCK_K does not divide H.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column_block, lane, start, end = load_own_tile(
        tl.cdiv(intermediate, BLOCK_I), tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if lane < 0:
        return
    slot = tl.load(lane_to_slot_ptr + lane).to(tl.int64)
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    source = tl.load(order_ptr + position, mask=inside, other=0) // fanout

    first_column = column_block * BLOCK_I
    column = first_column + tl.arange(0, BLOCK_I)
    weight_row = tl.minimum(column, intermediate - 1) - first_column
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + source.to(tl.int64)[:, None] * stride_row + k[None, :]
    gate_block = gate_up_ptr + slot * stride_slot + tl.cast(first_column, tl.int64) * hidden_size
    gate_at = gate_block + weight_row[None, :] * hidden_size + k[:, None]
    GATED: tl.constexpr = is_gated(ACTIVATION)
    up_at = gate_at
    if GATED:
        up_at += tl.cast(intermediate, tl.int64) * hidden_size
    gate = tl.zeros((BLOCK_M, BLOCK_I), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_I), dtype=tl.float32)
    for first in range(0, hidden_size, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            if GATED:
                gate = dot(x, tl.load(gate_at), gate)
            up = dot(x, tl.load(up_at), up)
        else:
            left = hidden_size - first
            x = tl.load(x_at, mask=k[None, :] < left, other=0.0)
            if GATED:
                gate = dot(x, tl.load(gate_at, mask=k[:, None] < left, other=0.0), gate)
            up = dot(x, tl.load(up_at, mask=k[:, None] < left, other=0.0), up)
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K

    if bias_ptr is not None:
        bias_at = bias_ptr + slot * stride_bias + tl.minimum(column, intermediate - 1)
        if GATED:
            gate += widen(tl.load(bias_at))[None, :]
            bias_at += intermediate
        up += widen(tl.load(bias_at))[None, :]
    stored = inside[:, None] & (column[None, :] < intermediate)
    at = position.to(tl.int64)[:, None] * intermediate + column[None, :]
    if pre_ptr is not None:
        pre_at = pre_ptr + at
        if GATED:
            pre_at += position.to(tl.int64)[:, None] * intermediate
            tl.store(pre_at, narrow(gate, pre_ptr.dtype.element_ty), mask=stored)
            pre_at += intermediate
        tl.store(pre_at, narrow(up, pre_ptr.dtype.element_ty), mask=stored)
    if hidden_ptr is not None:
        hidden = narrow(activated(gate, up, ACTIVATION), hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + at, hidden, mask=stored)


def expert_up_triton(
    x_RH: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
    pre_NJ: torch.Tensor | None = None,
) -> Rows:
    """hidden_NI. Into `pre_NJ`, if given, it writes what the activation gets: gate and up with their biases."""
    if matrices.scheme != "plain":
        assert pre_NJ is None, "quantised experts have no gradient"
        if config.tma and matrices.scheme != "fp8_block":
            assert isinstance(x_RH, torch.Tensor)
            return expert_up_four_bit_ring(x_RH, matrices, lane_to_slot_L, schedule, fanout, config)
        return expert_up_quantised(x_RH, matrices, lane_to_slot_L, schedule, fanout, config)
    assert isinstance(x_RH, torch.Tensor)
    hidden_NI = x_RH.new_empty((schedule.order_N.shape[0], matrices.intermediate_size))
    _launch(x_RH, matrices, lane_to_slot_L, schedule, fanout, config, hidden_NI, pre_NJ)
    return hidden_NI


def pre_activation_triton(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
) -> torch.Tensor:
    """pre_NJ as `expert_up_triton` writes it, bit for bit, and nothing else."""
    pre_NJ = x_RH.new_empty((schedule.order_N.shape[0], matrices.gate_up_SNH.shape[1]))
    _launch(x_RH, matrices, lane_to_slot_L, schedule, fanout, config, None, pre_NJ)
    return pre_NJ


def _launch(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
    hidden_NI: torch.Tensor | None,
    pre_NJ: torch.Tensor | None,
) -> None:
    if config.tma:
        expert_up_tma(x_RH, matrices, lane_to_slot_L, schedule, fanout, config, hidden_NI, pre_NJ)
        return
    gate_up_SNH, bias_SN = matrices.gate_up_SNH, matrices.gate_up_bias_SN
    block_n, block_k = config.block_n, config.block_k
    hidden_size, intermediate = x_RH.shape[1], matrices.intermediate_size
    grid = (schedule.tile_lane.shape[0] * cdiv(intermediate, block_n // 2),)
    if grid[0]:
        _expert_up_kernel[grid](
            x_RH,
            gate_up_SNH,
            bias_SN,
            lane_to_slot_L,
            schedule.order_N,
            schedule.tile_lane,
            schedule.tile_start,
            schedule.tile_end,
            hidden_NI,
            pre_NJ,
            hidden_size,
            intermediate,
            fanout,
            x_RH.stride(0),
            gate_up_SNH.stride(0),
            0 if bias_SN is None else bias_SN.stride(0),
            ACTIVATION=matrices.activation,
            EVEN_K=hidden_size % block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_I=block_n // 2,
            BLOCK_K=block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
