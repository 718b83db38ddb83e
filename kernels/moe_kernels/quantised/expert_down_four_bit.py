"""Step 5 of a forward with 4-bit experts, on Hopper: `expert_down` loads words of weights, and rows, by TMA.

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.base.backend import INTERPRETED
from moe_kernels.base.checks import check_tma_address
from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import dot
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.four_bit import MOST_HALVED, described, halves, load_groups, weights_of_words
from moe_kernels.tiles.homes import RowHomes
from moe_kernels.tiles.store_rows import store_rows
from moe_kernels.tiles.tile_order import load_own_tile
from moe_kernels.tiles.tiles import TileSchedule


@triton.jit
def _load_rows(row_at, inside, step, INTERMEDIATE: tl.constexpr, BLOCK_K: tl.constexpr, STEP_K: tl.constexpr):
    """Zeros past the end. STEP_K: that of the weights, whose last one may end a whole BLOCK_K later."""
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    if INTERMEDIATE % STEP_K != 0:
        inside &= k < INTERMEDIATE
    return tl.load(row_at + k, mask=inside, other=0.0).T


@triton.jit
def _tile(
    hidden,  # descriptor [N, I]; with HALVES a pointer
    down,
    scale,
    zero,
    bias_ptr,  # the slot's, or None
    order_ptr,
    row_weights_ptr,
    rows_ptr,
    homes_ptr,
    rows_per_home,
    start,
    end,
    slot,
    column_block,
    stride_row,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights on the M side, whose operand may be in registers. HALVES: see `halves`.

    Rows past the tile's end are not stored; by a descriptor they are read (the next lane's, of no lane, or zero at last).
    """
    position = start + tl.arange(0, BLOCK_M)
    DTYPE: tl.constexpr = hidden.dtype.element_ty if HALVES else hidden.dtype
    if HALVES:
        inside, row_at = (position < end)[:, None], hidden + position.to(tl.int64)[:, None] * stride_row
    first_column = column_block * BLOCK_N
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, (INTERMEDIATE + BLOCK_K - 1) // BLOCK_K):
        words = down.load([slot, first_column, step * (BLOCK_K // 8)]).reshape(BLOCK_N, BLOCK_K // 8)
        scales = load_groups(scale, slot, first_column, step, GROUP, BLOCK_N, BLOCK_K)
        zeros = None
        if zero is not None:
            zeros = load_groups(zero, slot, first_column, step, GROUP, BLOCK_N, BLOCK_K)
        weights = weights_of_words(words, scales, zeros, SCHEME, GROUP, DTYPE, ASSEMBLY)
        if HALVES:
            left, right = halves(weights)
            product = dot(left, _load_rows(row_at, inside, 2 * step, INTERMEDIATE, BLOCK_K // 2, BLOCK_K), product)
            product = dot(right, _load_rows(row_at, inside, 2 * step + 1, INTERMEDIATE, BLOCK_K // 2, BLOCK_K), product)
        else:
            product = dot(weights, hidden.load([start, step * BLOCK_K]).T, product)
    column = first_column + tl.arange(0, BLOCK_N)
    store_rows(
        product.T, position, end, column, bias_ptr, order_ptr, row_weights_ptr, rows_ptr, HIDDEN_SIZE, homes_ptr, rows_per_home
    )  # fmt: skip


@Launcher
@triton.jit(do_not_specialize=["rows_per_home"])
def _expert_down_four_bit_kernel(
    # inputs
    hidden,  # descriptor [N, I]; with HALVES a tensor
    hidden_tail,  # with boxes of TAIL_M rows
    down,  # descriptor [S, H, I / 8] of words
    scale,  # descriptor [S, I / GROUP, H]
    zero,  # likewise; None: no zeros
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
    # shapes
    rows_per_home,
    stride_row,
    stride_bias,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    # constants
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    HALVES: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of the output. TAIL_M: see `_expert_up_tma_kernel`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_column_blocks: tl.constexpr = (HIDDEN_SIZE + BLOCK_N - 1) // BLOCK_N
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
            hidden_tail, down, scale, zero, bias_ptr, order_ptr, row_weights_ptr, rows_ptr, homes_ptr, rows_per_home,
            start, end, slot, column_block, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ASSEMBLY, HALVES,
            TAIL_M if TAIL_M > 0 else BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _tile(
            hidden, down, scale, zero, bias_ptr, order_ptr, row_weights_ptr, rows_ptr, homes_ptr, rows_per_home,
            start, end, slot, column_block, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ASSEMBLY, HALVES,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def expert_down_four_bit(
    hidden_NI: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
    homes: RowHomes | None = None,
) -> torch.Tensor:
    """Launches the kernel; arguments as `expert_down`'s and `expert_down_home`'s."""
    bias_SH = matrices.down_bias_SH
    check_tma_address("hidden_NI", hidden_NI)
    hidden_size, intermediate = matrices.hidden_size, hidden_NI.shape[1]
    rows_NH = hidden_NI.new_empty((schedule.order_N.shape[0], hidden_size)) if homes is None else homes.own
    grid = (schedule.tile_lane.shape[0] * cdiv(hidden_size, config.block_n),)
    if not grid[0]:
        return rows_NH

    is_halved = config.block_m <= MOST_HALVED

    def rows_of(block_m: int) -> TensorDescriptor:
        stride = hidden_NI.stride(0) if len(hidden_NI) > 1 else intermediate
        return TensorDescriptor(
            hidden_NI, list(hidden_NI.shape), [stride, 1], [block_m, config.block_k // (2 if is_halved else 1)]
        )

    hidden = hidden_NI if is_halved else rows_of(config.block_m)
    *descriptors, group = described(
        "down",
        matrices.down_SHI,
        matrices.down_scale,
        matrices.down_zero,
        matrices.scheme,
        config.block_n,
        config.block_k,
    )
    _expert_down_four_bit_kernel[grid](
        hidden,
        rows_of(config.tail_m) if config.tail_m else hidden,
        *descriptors,
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
        hidden_NI.stride(0),
        0 if bias_SH is None else bias_SH.stride(0),
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=intermediate,
        SCHEME=matrices.scheme,
        GROUP=group,
        ASSEMBLY=not INTERPRETED and hidden_NI.dtype == torch.bfloat16,
        HALVES=is_halved,
        TAIL_M=config.tail_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return rows_NH
