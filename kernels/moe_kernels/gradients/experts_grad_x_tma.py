"""Backward of the experts, last GEMM, on Hopper: the rows of the gradient of x; rows and weights come by TMA.

N flat rows, H hidden, J rows of gate and up, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.base.checks import check_tma_address
from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait, num_multiprocessors
from moe_kernels.base.numerics import dot, narrow
from moe_kernels.gradients.gradient_tiles import GradientTiles, weights_descriptor
from moe_kernels.operands.config import GemmConfig
from moe_kernels.tiles.tile_order import load_own_tile, load_tile


@triton.jit
def _store_columns(rows_ptr, flat, inside, product, first_column, HIDDEN_SIZE: tl.constexpr):
    column = first_column + tl.arange(0, product.shape[1])[None, :]
    at = rows_ptr + flat.to(tl.int64)[:, None] * HIDDEN_SIZE + column
    tl.store(at, narrow(product, rows_ptr.dtype.element_ty), mask=inside[:, None] & (column < HIDDEN_SIZE))


@triton.jit
def _x_tile(
    grad_pre,
    gate_up,
    order_ptr,
    rows_ptr,
    slot,
    start,
    end,
    column_block,
    HIDDEN_SIZE: tl.constexpr,
    INNER: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M rows. Those from `end` on are read (the next lane's, of no lane, or zero past the tensor's end) and not
    stored."""
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in tl.range(0, INNER, BLOCK_K):
        grad = grad_pre.load([start, first])
        weights = gate_up.load([slot, first, column_block * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
        product = dot(grad, weights, product)
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    flat = tl.load(order_ptr + position, mask=inside, other=0)
    if HALVES:  # half the shared memory to bring rows into the order of memory
        left, right = product.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        _store_columns(rows_ptr, flat, inside, left, column_block * BLOCK_N, HIDDEN_SIZE)
        _store_columns(rows_ptr, flat, inside, right, column_block * BLOCK_N + BLOCK_N // 2, HIDDEN_SIZE)
    else:
        _store_columns(rows_ptr, flat, inside, product, column_block * BLOCK_N, HIDDEN_SIZE)


@Launcher
@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _experts_grad_x_tma_kernel(
    # inputs
    grad_pre,  # descriptor [N, J]
    grad_tail,  # with boxes of TAIL_M rows
    gate_up,  # descriptor [S, J, H]
    lane_to_slot_ptr,
    order_ptr,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    # outputs
    rows_ptr,
    # shapes
    num_rows,
    num_lanes,
    num_programs,
    HIDDEN_SIZE: tl.constexpr,
    INNER: tl.constexpr,
    # constants
    PDL: tl.constexpr,
    # tunables
    PERSISTENT: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of H, written in flat order; if PERSISTENT, every num_programs-th such, and the loads
    of the next begin before the last is stored. TAIL_M: tiles of at most so many rows are computed as ones of TAIL_M.

    Rows of no lane get zeros, shared by all programs.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_column_blocks: tl.constexpr = (HIDDEN_SIZE + BLOCK_N - 1) // BLOCK_N
    first_free = tl.load(offsets_ptr + num_lanes)
    for position in range(first_free + tl.program_id(0), num_rows, tl.num_programs(0)):
        row_at = rows_ptr + tl.load(order_ptr + position).to(tl.int64) * HIDDEN_SIZE
        for first in range(0, HIDDEN_SIZE, 1024):
            column = first + tl.arange(0, 1024)
            zeros = tl.zeros((1024,), dtype=rows_ptr.dtype.element_ty)
            tl.store(row_at + column, zeros, mask=column < HIDDEN_SIZE)
    if PERSISTENT:
        num_tiles = tl.load(num_tiles_ptr)
        for program in tl.range(tl.program_id(0), num_tiles * num_column_blocks, num_programs, flatten=True):
            column_block, lane, start, end = load_tile(
                program, num_tiles, num_column_blocks, tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
            )
            _x_tile(
                grad_pre, gate_up, order_ptr, rows_ptr, tl.load(lane_to_slot_ptr + lane), start, end, column_block,
                HIDDEN_SIZE, INNER, True, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        return
    column_block, lane, start, end = load_own_tile(
        num_column_blocks, tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if (lane < 0) | (lane >= num_lanes):
        return
    slot = tl.load(lane_to_slot_ptr + lane)
    if (TAIL_M > 0) & (end - start <= TAIL_M):  # not `and`: without tails the compiler drops the branch
        _x_tile(
            grad_tail, gate_up, order_ptr, rows_ptr, slot, start, end, column_block,
            HIDDEN_SIZE, INNER, False, TAIL_M if TAIL_M > 0 else BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _x_tile(
            grad_pre, gate_up, order_ptr, rows_ptr, slot, start, end, column_block,
            HIDDEN_SIZE, INNER, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def grad_x_rows_tma(
    grad_pre_NJ: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    tiles: GradientTiles,
    config: GemmConfig,
) -> torch.Tensor:
    """rows_NH, the gradient of each flat row's copy of its source row. Without a lane: zeros."""
    check_tma_address("grad_pre_NJ", grad_pre_NJ)
    num_rows, inner = grad_pre_NJ.shape
    hidden_size = gate_up_SNH.shape[2]
    rows_NH = grad_pre_NJ.new_empty((num_rows, hidden_size))
    num_programs = len(tiles.tile_lane) * cdiv(hidden_size, config.block_n)
    if not num_programs:
        return rows_NH
    if config.programs_per_sm:
        num_programs = min(num_programs, config.programs_per_sm * num_multiprocessors(grad_pre_NJ.device))
    rows, tail = (
        TensorDescriptor(grad_pre_NJ, [num_rows, inner], [inner, 1], [block_m, config.block_k])
        for block_m in (config.block_m, config.tail_m or config.block_m)
    )
    _experts_grad_x_tma_kernel[(num_programs,)](
        rows,
        tail,
        weights_descriptor("gate_up_SNH", gate_up_SNH, config),
        lane_to_slot_L,
        order_N,
        offsets_L1,
        tiles.tile_lane,
        tiles.tile_start,
        tiles.tile_end,
        tiles.num_tiles,
        rows_NH,
        num_rows,
        lane_to_slot_L.shape[0],
        num_programs,
        HIDDEN_SIZE=hidden_size,
        INNER=inner,
        PERSISTENT=config.programs_per_sm > 0,
        TAIL_M=config.tail_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return rows_NH
