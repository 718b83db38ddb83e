"""Backward of the experts: the gradients of a slot's matrices and biases, each a sum over the rows of its lane.

N flat rows, S slots, L lanes; a matrix of a slot is [P, Q].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import dot, narrow, widen
from moe_kernels.gradients.experts_grad_weights_tma import experts_grad_weights_tma
from moe_kernels.gradients.gradient_tiles import GradientTiles
from moe_kernels.operands.config import GemmConfig
from moe_kernels.tiles.tile_order import tile_and_column_block


@triton.jit
def _rows_at(order_ptr, position, inside, fanout, stride_row):
    """Where the rows of these sorted positions begin; flat row n is row n // fanout, or with None, rows are sorted."""
    row = position if fanout is None else tl.load(order_ptr + position, mask=inside, other=0) // fanout
    return row.to(tl.int64) * stride_row


@Launcher
@triton.jit
def _experts_grad_weights_kernel(
    # inputs
    left_ptr,
    right_ptr,
    order_ptr,
    offsets_ptr,
    first_lane_ptr,
    next_lane_ptr,
    # outputs
    grad_ptr,
    # shapes and strides, in elements
    height,
    width,
    left_fanout,  # None: `left_ptr` is in sorted order
    right_fanout,
    stride_left,
    stride_right,
    stride_slot,
    # constants
    PDL: tl.constexpr,
    ADDS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One slot, [BLOCK_M, BLOCK_N] of its matrix: the sum over rows of left[row, :, None] * right[row, None, :], BLOCK_K
    rows at once. Without rows: zeros. ADDS: to what `grad_ptr` holds."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_row_blocks, num_column_blocks = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    per_slot = num_row_blocks * num_column_blocks
    slot = tl.program_id(0) // per_slot
    row_block, column_block = tile_and_column_block(
        tl.program_id(0) % per_slot, num_row_blocks, num_column_blocks, GROUP_M
    )
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    lane = tl.load(first_lane_ptr + slot)
    while lane >= 0:  # as a rule one
        start, end = tl.load(offsets_ptr + lane), tl.load(offsets_ptr + lane + 1)
        left_rows = _rows_at(order_ptr, start + k, start + k < end, left_fanout, stride_left)
        right_rows = _rows_at(order_ptr, start + k, start + k < end, right_fanout, stride_right)
        for first in range(start, end, BLOCK_K):
            inside = first + k < end
            left_at = left_ptr + left_rows[:, None] + m[None, :]
            right_at = right_ptr + right_rows[:, None] + n[None, :]
            # The next rows' numbers are loaded here, so that no load of an iteration waits for another one of it: for such
            # chains Triton's pipeline keeps two buffers, however many stages it has.
            position = first + BLOCK_K + k
            left_rows = _rows_at(order_ptr, position, position < end, left_fanout, stride_left)
            right_rows = _rows_at(order_ptr, position, position < end, right_fanout, stride_right)
            left_exists, right_exists = inside[:, None], inside[:, None]
            if not EVEN_M:
                left_exists &= m[None, :] < height
            if not EVEN_N:
                right_exists &= n[None, :] < width
            left = tl.load(left_at, mask=left_exists, other=0.0)
            right = tl.load(right_at, mask=right_exists, other=0.0)
            product = dot(left.T, right, product)
        lane = tl.load(next_lane_ptr + lane)
    at = grad_ptr + tl.cast(slot, tl.int64) * stride_slot + m[:, None].to(tl.int64) * width + n[None, :]
    stored = (m[:, None] < height) & (n[None, :] < width)
    if ADDS:
        product += widen(tl.load(at, mask=stored, other=0.0))
    tl.store(at, narrow(product, grad_ptr.dtype.element_ty), mask=stored)


@Launcher
@triton.jit
def _experts_grad_bias_kernel(
    # inputs
    rows_ptr,
    row_weights_ptr,  # None: all are 1
    order_ptr,
    offsets_ptr,
    first_lane_ptr,
    next_lane_ptr,
    # outputs
    grad_ptr,
    # shapes and strides, in elements
    width,
    fanout,  # None: `rows_ptr` is in sorted order
    stride_slot,
    # constants
    PDL: tl.constexpr,
    ADDS: tl.constexpr,
    # tunables
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One slot, BLOCK_N columns: the sum of its rows, BLOCK_K at once."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    lane = tl.load(first_lane_ptr + slot)
    while lane >= 0:
        start, end = tl.load(offsets_ptr + lane), tl.load(offsets_ptr + lane + 1)
        for first in range(start, end, BLOCK_K):
            position = first + k
            inside = position < end
            at = rows_ptr + _rows_at(order_ptr, position, inside, fanout, width)[:, None] + n[None, :]
            rows = widen(tl.load(at, mask=inside[:, None] & (n[None, :] < width), other=0.0))
            if row_weights_ptr is not None:
                flat = tl.load(order_ptr + position, mask=inside, other=0)
                rows *= tl.load(row_weights_ptr + flat, mask=inside, other=0.0)[:, None]
            total += rows
        lane = tl.load(next_lane_ptr + lane)
    grad_at = grad_ptr + tl.cast(slot, tl.int64) * stride_slot + n
    grad = tl.sum(total, 0)
    if ADDS:
        grad += widen(tl.load(grad_at, mask=n < width, other=0.0))
    tl.store(grad_at, narrow(grad, grad_ptr.dtype.element_ty), mask=n < width)


def experts_grad_weights(
    left_NP: torch.Tensor,
    right_NQ: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    tiles: GradientTiles,
    left_fanout: int | None,
    right_fanout: int | None,
    config: GemmConfig,
    *,
    out_SPQ: torch.Tensor,
    adds: bool = False,
) -> None:
    """Write into (or add to) ``out_SPQ[s]`` the sum over the rows of s's lanes of ``left[row, :, None] * right[row, None, :]``.

    A fanout of None: that operand is in sorted order; else flat row n is its row ``n // fanout``. Slots without rows get
    zeros. Slots are contiguous, any distance apart.
    """
    slots, height, width = out_SPQ.shape
    if config.tma:
        sums = (order_N, offsets_L1, tiles, left_fanout, right_fanout)
        experts_grad_weights_tma(left_NP, right_NQ, *sums, config, out_SPQ=out_SPQ, adds=adds)
        return
    grid = (slots * cdiv(height, config.block_m) * cdiv(width, config.block_n),)
    if grid[0]:
        _experts_grad_weights_kernel[grid](
            left_NP,
            right_NQ,
            order_N,
            offsets_L1,
            tiles.first_lane_S,
            tiles.next_lane_L,
            out_SPQ,
            height,
            width,
            left_fanout,
            right_fanout,
            left_NP.stride(0),
            right_NQ.stride(0),
            out_SPQ.stride(0),
            ADDS=adds,
            EVEN_M=height % config.block_m == 0,
            EVEN_N=width % config.block_n == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def experts_grad_bias(
    rows_NP: torch.Tensor,
    row_weights_N: torch.Tensor | None,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    tiles: GradientTiles,
    fanout: int | None,
    *,
    out_SP: torch.Tensor,
    adds: bool = False,
) -> None:
    """As `experts_grad_weights`: ``out_SP[s]`` becomes the sum of the rows of s's lanes, times their weights if given."""
    slots, width = out_SP.shape
    if slots:
        block_n = min(64, next_power_of_2(width))
        _experts_grad_bias_kernel[(slots, cdiv(width, block_n))](
            rows_NP,
            row_weights_N,
            order_N,
            offsets_L1,
            tiles.first_lane_S,
            tiles.next_lane_L,
            out_SP,
            width,
            fanout,
            out_SP.stride(0),
            ADDS=adds,
            BLOCK_K=32,
            BLOCK_N=block_n,
        )
