"""Step 4 of a forward with 4-bit experts, on Hopper: `expert_up` loads words of weights by TMA and unpacks them in registers.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.backend import INTERPRETED
from moe_kernels.config import GemmConfig
from moe_kernels.four_bit import described, loaded_weights
from moe_kernels.integers import cdiv
from moe_kernels.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.numerics import dot, is_gated
from moe_kernels.store_hidden import store_activated
from moe_kernels.tile_order import load_own_tile
from moe_kernels.tiles import TileSchedule


@triton.jit
def _tile(
    x_ptr,
    gate_up,
    scale,
    zero,
    bias_ptr,  # the slot's, or None
    order_ptr,
    hidden_ptr,
    start,
    end,
    slot,
    column_block,
    fanout,
    stride_row,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights on the M side, whose operand may be in registers; x on the N side.

    Rows that are not the tile's are zeros: to read any others instead would take as much of the L2's bandwidth. Weights past
    the end of a row are zeros too.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    source = tl.load(order_ptr + position, mask=inside, other=0) // fanout
    row_at = x_ptr + source.to(tl.int64)[:, None] * stride_row
    first_column = column_block * BLOCK_I
    UP_ROWS: tl.constexpr = INTERMEDIATE if is_gated(ACTIVATION) else 0  # where they begin
    gate = tl.zeros((BLOCK_I, BLOCK_M), dtype=tl.float32)
    up = tl.zeros((BLOCK_I, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, (HIDDEN_SIZE + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        exists = inside[:, None]
        if HIDDEN_SIZE % BLOCK_K != 0:
            exists &= k < HIDDEN_SIZE
        x = tl.load(row_at + k, mask=exists, other=0.0).T
        if is_gated(ACTIVATION):
            weights = loaded_weights(
                gate_up, scale, zero, slot, first_column, step, SCHEME, GROUP, BLOCK_I, BLOCK_K, DTYPE, ASSEMBLY
            )
            gate = dot(weights, x, gate)
        weights = loaded_weights(
            gate_up, scale, zero, slot, UP_ROWS + first_column, step, SCHEME, GROUP, BLOCK_I, BLOCK_K, DTYPE, ASSEMBLY
        )
        up = dot(weights, x, up)
    store_activated(
        gate.T, up.T, bias_ptr, hidden_ptr, None, position, end, first_column,
        INTERMEDIATE, ACTIVATION, EVICTION, BLOCK_I,
    )  # fmt: skip


@Launcher
@triton.jit
def _expert_up_four_bit_kernel(
    # inputs
    x_ptr,
    gate_up,  # descriptor [S, 2I, H / 8] of words, or [S, I, H / 8] without a gate
    scale,  # descriptor [S, H / GROUP, 2I]
    zero,  # likewise; None: no zeros
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs
    hidden_ptr,
    # shapes and strides, in elements
    fanout,
    stride_row,
    stride_bias,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    # constants
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    TAIL_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_I columns of gate (if there is one) and of up. A tile of at most TAIL_M rows is computed as one
    of TAIL_M."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_column_blocks: tl.constexpr = (INTERMEDIATE + BLOCK_I - 1) // BLOCK_I
    column_block, lane, start, end = load_own_tile(
        num_column_blocks, tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if lane < 0:
        return
    slot = tl.load(lane_to_slot_ptr + lane)
    if bias_ptr is not None:
        bias_ptr += slot.to(tl.int64) * stride_bias
    if (TAIL_M > 0) & (end - start <= TAIL_M):  # not `and`: without tails the compiler drops the branch
        _tile(
            x_ptr, gate_up, scale, zero, bias_ptr, order_ptr, hidden_ptr, start, end, slot, column_block, fanout, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ASSEMBLY, ACTIVATION, EVICTION,
            TAIL_M if TAIL_M > 0 else BLOCK_M, BLOCK_I, BLOCK_K,
        )  # fmt: skip
    else:
        _tile(
            x_ptr, gate_up, scale, zero, bias_ptr, order_ptr, hidden_ptr, start, end, slot, column_block, fanout, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ASSEMBLY, ACTIVATION, EVICTION, BLOCK_M, BLOCK_I, BLOCK_K,
        )  # fmt: skip


def expert_up_four_bit(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
) -> torch.Tensor:
    """hidden_NI; arguments as `expert_up`'s."""
    hidden_size, intermediate, block_i = x_RH.shape[1], matrices.intermediate_size, config.block_n // 2
    hidden_NI = x_RH.new_empty((schedule.order_N.shape[0], intermediate))
    grid = (schedule.tile_lane.shape[0] * cdiv(intermediate, block_i),)
    if not grid[0]:
        return hidden_NI
    bias_SN = matrices.gate_up_bias_SN
    *descriptors, group = described(
        "gate_up",
        matrices.gate_up_SNH,
        matrices.gate_up_scale,
        matrices.gate_up_zero,
        matrices.scheme,
        block_i,
        config.block_k,
    )
    _expert_up_four_bit_kernel[grid](
        x_RH,
        *descriptors,
        bias_SN,
        lane_to_slot_L,
        schedule.order_N,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        hidden_NI,
        fanout,
        x_RH.stride(0),
        0 if bias_SN is None else bias_SN.stride(0),
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=intermediate,
        SCHEME=matrices.scheme,
        GROUP=group,
        ASSEMBLY=not INTERPRETED and x_RH.dtype == torch.bfloat16,
        ACTIVATION=matrices.activation,
        EVICTION="evict_last" if config.keep else "",
        TAIL_M=config.tail_m,
        BLOCK_M=config.block_m,
        BLOCK_I=block_i,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return hidden_NI
