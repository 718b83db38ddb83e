"""Step 5 of a forward with 4-bit experts, on Hopper: `expert_down` loads words of weights, and rows, by TMA.

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.backend import INTERPRETED
from moe_kernels.checks import check_tma_address
from moe_kernels.config import GemmConfig
from moe_kernels.four_bit import described, loaded_weights
from moe_kernels.homes import RowHomes
from moe_kernels.integers import cdiv
from moe_kernels.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.numerics import dot
from moe_kernels.store_rows import store_rows
from moe_kernels.tile_order import load_own_tile
from moe_kernels.tiles import TileSchedule


@triton.jit
def _tile(
    hidden,
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
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights on the M side, whose operand may be in registers. Rows past the tile's end are read (the next lane's, of no
    lane, or zero past the tensor's end) and not stored."""
    first_column = column_block * BLOCK_N
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, (INTERMEDIATE + BLOCK_K - 1) // BLOCK_K):
        rows = hidden.load([start, step * BLOCK_K])
        weights = loaded_weights(
            down, scale, zero, slot, first_column, step, SCHEME, GROUP, BLOCK_N, BLOCK_K, rows.dtype, ASSEMBLY
        )
        product = dot(weights, rows.T, product)
    position = start + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    store_rows(
        product.T, position, end, column, bias_ptr, order_ptr, row_weights_ptr, rows_ptr, HIDDEN_SIZE, homes_ptr, rows_per_home
    )  # fmt: skip


@Launcher
@triton.jit(do_not_specialize=["rows_per_home"])
def _expert_down_four_bit_kernel(
    # inputs
    hidden,
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
    stride_bias,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    # constants
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    TAIL_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of the output. TAIL_M: see `_expert_up_four_bit_kernel`."""
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
            start, end, slot, column_block, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ASSEMBLY,
            TAIL_M if TAIL_M > 0 else BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _tile(
            hidden, down, scale, zero, bias_ptr, order_ptr, row_weights_ptr, rows_ptr, homes_ptr, rows_per_home,
            start, end, slot, column_block, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ASSEMBLY, BLOCK_M, BLOCK_N, BLOCK_K,
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

    def rows_of(block_m: int) -> TensorDescriptor:
        stride = hidden_NI.stride(0) if len(hidden_NI) > 1 else intermediate
        return TensorDescriptor(hidden_NI, list(hidden_NI.shape), [stride, 1], [block_m, config.block_k])

    hidden = rows_of(config.block_m)
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
        0 if bias_SH is None else bias_SH.stride(0),
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=intermediate,
        SCHEME=matrices.scheme,
        GROUP=group,
        ASSEMBLY=not INTERPRETED and hidden_NI.dtype == torch.bfloat16,
        TAIL_M=config.tail_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return rows_NH
