"""Step 4 of a forward with 4-bit experts, on Hopper: `expert_up` loads words of weights by TMA and unpacks them in registers.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.backend import INTERPRETED
from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import dot, is_gated
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.four_bit import MOST_HALVED, described, halves, load_groups, weights_of_words
from moe_kernels.tiles.store_hidden import store_activated
from moe_kernels.tiles.tile_order import load_own_tile
from moe_kernels.tiles.tiles import TileSchedule


@triton.jit
def _rows_of_tile(x_ptr, order_ptr, start, end, fanout, stride_row, BLOCK_M: tl.constexpr):
    """Sorted positions of the tile's rows, which of them exist, and where their source rows begin."""
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    source = tl.load(order_ptr + position, mask=inside, other=0) // fanout
    return position, inside[:, None], x_ptr + source.to(tl.int64)[:, None] * stride_row


@triton.jit
def _load_x(row_at, inside, step, HIDDEN_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, STEP_K: tl.constexpr):
    """Zeros for rows that are not `inside`: to read any others instead would take as much of the L2's bandwidth.

    STEP_K: columns of a step of the weights, whose last one may end a whole BLOCK_K behind the row.
    """
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    if HIDDEN_SIZE % STEP_K != 0:
        inside &= k < HIDDEN_SIZE
    return tl.load(row_at + k, mask=inside, other=0.0).T


@triton.jit
def _store_product(
    product, bias_ptr, hidden_ptr, position, end, first_column, INTERMEDIATE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Of a product [2 * BLOCK_I, BLOCK_M] whose rows are gate and up, interleaved by eight; or up alone."""
    gate = product
    up = product
    if is_gated(ACTIVATION):
        gate, up = product.reshape(BLOCK_I // 8, 2, 8, BLOCK_M).permute(0, 2, 3, 1).split()
        gate, up = gate.reshape(BLOCK_I, BLOCK_M), up.reshape(BLOCK_I, BLOCK_M)
    store_activated(
        gate.T, up.T, bias_ptr, hidden_ptr, None, position, end, first_column,
        INTERMEDIATE, ACTIVATION, EVICTION, BLOCK_I,
    )  # fmt: skip


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
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights on the M side, whose operand may be in registers; x on the N side. Weights past the end of a row are zeros.

    Gate and up rows are interleaved by eight, as a thread of the tensor core's layout has two rows that are eight apart: so the
    activation stays within registers. HALVES: see `halves`.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    GATED: tl.constexpr = is_gated(ACTIVATION)
    ROWS: tl.constexpr = 2 * BLOCK_I if GATED else BLOCK_I
    position, inside, row_at = _rows_of_tile(x_ptr, order_ptr, start, end, fanout, stride_row, BLOCK_M)
    product = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
    first_column = column_block * BLOCK_I
    for step in tl.range(0, (HIDDEN_SIZE + BLOCK_K - 1) // BLOCK_K):
        if GATED:
            words = gate_up.load([slot, column_block * (BLOCK_I // 8), 0, 0, step * (BLOCK_K // 8)])
            words = words.reshape(ROWS, BLOCK_K // 8)
        else:
            words = gate_up.load([slot, first_column, step * (BLOCK_K // 8)]).reshape(ROWS, BLOCK_K // 8)
        scales = _of_rows(scale, slot, first_column, step, INTERMEDIATE, GATED, GROUP, BLOCK_I, BLOCK_K)
        zeros = None
        if zero is not None:
            zeros = _of_rows(zero, slot, first_column, step, INTERMEDIATE, GATED, GROUP, BLOCK_I, BLOCK_K)
        weights = weights_of_words(words, scales, zeros, SCHEME, GROUP, DTYPE, ASSEMBLY)
        if HALVES:
            left, right = halves(weights)
            product = dot(left, _load_x(row_at, inside, 2 * step, HIDDEN_SIZE, BLOCK_K // 2, BLOCK_K), product)
            product = dot(right, _load_x(row_at, inside, 2 * step + 1, HIDDEN_SIZE, BLOCK_K // 2, BLOCK_K), product)
        else:
            product = dot(weights, _load_x(row_at, inside, step, HIDDEN_SIZE, BLOCK_K, BLOCK_K), product)
    _store_product(
        product, bias_ptr, hidden_ptr, position, end, first_column, INTERMEDIATE, ACTIVATION, EVICTION, BLOCK_M, BLOCK_I
    )


@triton.jit
def _of_rows(
    of_groups, slot, first_column, step, INTERMEDIATE: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The scales or zeros [rows, groups] of a tile's rows: gate and up interleaved by eight, or up alone."""
    up = load_groups(of_groups, slot, (INTERMEDIATE if GATED else 0) + first_column, step, GROUP, BLOCK_I, BLOCK_K)
    if GATED:
        gate = load_groups(of_groups, slot, first_column, step, GROUP, BLOCK_I, BLOCK_K)
        GROUPS: tl.constexpr = gate.shape[1]
        both = tl.join(gate, up).reshape(BLOCK_I // 8, 8, GROUPS, 2)
        return both.permute(0, 3, 1, 2).reshape(2 * BLOCK_I, GROUPS)
    else:
        return up


@Launcher
@triton.jit
def _expert_up_four_bit_kernel(
    # inputs
    x_ptr,
    gate_up,  # descriptor [S, I / 8, 2, 8, H / 8] of words, or [S, I, H / 8] without a gate
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
    HALVES: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_I columns of gate (if there is one) and of up. TAIL_M: see `_expert_up_tma_kernel`."""
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
            HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ASSEMBLY, ACTIVATION, EVICTION, HALVES,
            TAIL_M if TAIL_M > 0 else BLOCK_M, BLOCK_I, BLOCK_K,
        )  # fmt: skip
    else:
        _tile(
            x_ptr, gate_up, scale, zero, bias_ptr, order_ptr, hidden_ptr, start, end, slot, column_block, fanout, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ASSEMBLY, ACTIVATION, EVICTION, HALVES,
            BLOCK_M, BLOCK_I, BLOCK_K,
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
        "gate_up", matrices.gate_up_SNH, matrices.gate_up_scale, matrices.gate_up_zero, matrices.scheme,
        block_i, config.block_k, interleaved=matrices.is_gated,
    )  # fmt: skip
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
        HALVES=config.block_m <= MOST_HALVED,
        TAIL_M=config.tail_m,
        BLOCK_M=config.block_m,
        BLOCK_I=block_i,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return hidden_NI
