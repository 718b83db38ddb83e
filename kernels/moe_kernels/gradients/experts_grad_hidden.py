"""Backward of the experts, first GEMM: the gradient of hidden, and by it those of the pre-activation and the row weights.

N flat rows, H hidden, I intermediate, J = 2I (gate, up; I without a gate), S slots, L lanes, C blocks of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated_backward, dot, is_gated, narrow, widen
from moe_kernels.gradients.gradient_tiles import GradientTiles, weights_descriptor
from moe_kernels.operands.config import GemmConfig
from moe_kernels.tiles.tile_order import load_own_tile


@triton.jit
def _finish_part(
    product,
    pre_ptr,
    grad_pre_ptr,
    weighted_ptr,
    position,
    inside,
    row_weight,
    first_column,
    intermediate,
    ACTIVATION: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Of some columns of ``grad Wd``: stores what is wanted, and returns their part of the row weights' gradient."""
    GATED: tl.constexpr = is_gated(ACTIVATION)
    column = first_column + tl.arange(0, product.shape[1])[None, :]
    stored = inside[:, None]
    if not EVEN_N:
        stored &= column < intermediate
    at = position.to(tl.int64)[:, None] * intermediate + column
    gate_at = at  # in a matrix of J columns
    up_at = at
    if GATED:
        gate_at += position.to(tl.int64)[:, None] * intermediate
        up_at = gate_at + intermediate
    up = widen(tl.load(pre_ptr + up_at, mask=stored, other=0.0))
    gate = up
    if GATED:
        gate = widen(tl.load(pre_ptr + gate_at, mask=stored, other=0.0))
    hidden, grad_gate, grad_up = activated_backward(product * row_weight[:, None], gate, up, ACTIVATION)
    if weighted_ptr is not None:
        weighted = narrow(hidden * row_weight[:, None], weighted_ptr.dtype.element_ty)
        tl.store(weighted_ptr + at, weighted, mask=stored)
    if grad_pre_ptr is not None:
        tl.debug_barrier()  # in place, no thread stores before all have loaded
        tl.store(grad_pre_ptr + up_at, narrow(grad_up, grad_pre_ptr.dtype.element_ty), mask=stored)
        if GATED:
            tl.store(grad_pre_ptr + gate_at, narrow(grad_gate, grad_pre_ptr.dtype.element_ty), mask=stored)
    return tl.sum(product * hidden if EVEN_N else tl.where(stored, product * hidden, 0.0), 1)


@triton.jit
def _halves(product):
    """The left and the right columns."""
    return product.reshape(product.shape[0], 2, product.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _finish_columns(
    product,
    pre_ptr,
    grad_pre_ptr,
    weighted_ptr,
    position,
    inside,
    row_weight,
    first_column,
    intermediate,
    ACTIVATION: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """`_finish_part` of 64 columns after another, or the registers would not hold all that it computes."""
    rest = (pre_ptr, grad_pre_ptr, weighted_ptr, position, inside, row_weight)
    QUARTER: tl.constexpr = product.shape[1] // 4
    if product.shape[1] > 128:
        left, right = _halves(product)
        first, second = _halves(left)
        third, fourth = _halves(right)
        parts = _finish_part(first, *rest, first_column, intermediate, ACTIVATION, EVEN_N)
        parts += _finish_part(second, *rest, first_column + QUARTER, intermediate, ACTIVATION, EVEN_N)
        parts += _finish_part(third, *rest, first_column + 2 * QUARTER, intermediate, ACTIVATION, EVEN_N)
        parts += _finish_part(fourth, *rest, first_column + 3 * QUARTER, intermediate, ACTIVATION, EVEN_N)
    elif product.shape[1] > 64:
        left, right = _halves(product)
        parts = _finish_part(left, *rest, first_column, intermediate, ACTIVATION, EVEN_N)
        parts += _finish_part(right, *rest, first_column + 2 * QUARTER, intermediate, ACTIVATION, EVEN_N)
    else:
        parts = _finish_part(product, *rest, first_column, intermediate, ACTIVATION, EVEN_N)
    return parts


@Launcher
@triton.jit(do_not_specialize=["num_rows"])
def _experts_grad_hidden_kernel(
    # inputs
    grad_ptr,
    down_ptr,
    down,  # descriptor [S, H, I], or None: by `down_ptr`
    pre_ptr,
    row_weights_ptr,
    lane_to_slot_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs, each None if it is not wanted
    grad_pre_ptr,  # may be `pre_ptr`
    weighted_ptr,
    partials_ptr,
    # shapes and strides, in elements
    num_rows,
    num_lanes,
    hidden_size,
    intermediate,
    grad_fanout,
    stride_slot,
    # constants
    PDL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of I.

    The gradient of a row is that of an output it was summed to: flat row n has number n // grad_fanout. With
    ``d = grad Wd`` the gradient of the row weight is ``d · hidden``, of which each block of columns stores its part.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column_block, lane, start, end = load_own_tile(
        tl.cdiv(intermediate, BLOCK_N), tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if (lane < 0) | (lane >= num_lanes):
        return
    slot = tl.load(lane_to_slot_ptr + lane).to(tl.int64)
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    flat = tl.load(order_ptr + position, mask=inside, other=0)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    grad_at = grad_ptr + (flat // grad_fanout).to(tl.int64)[:, None] * hidden_size + k[None, :]
    down_at = down_ptr + slot * stride_slot + k[:, None].to(tl.int64) * intermediate + column[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, hidden_size, BLOCK_K):
        grad = tl.load(grad_at) if EVEN_K else tl.load(grad_at, mask=k[None, :] < hidden_size - first, other=0.0)
        if down is not None:
            weights = down.load([slot.to(tl.int32), first, column_block * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
        elif EVEN_N and EVEN_K:
            weights = tl.load(down_at)
        else:
            exists = (column[None, :] < intermediate) & (k[:, None] < hidden_size - first)
            weights = tl.load(down_at, mask=exists, other=0.0)
        product = dot(grad, weights, product)
        grad_at += BLOCK_K
        down_at += BLOCK_K * intermediate

    row_weight = tl.load(row_weights_ptr + flat, mask=inside, other=0.0)
    parts = _finish_columns(
        product, pre_ptr, grad_pre_ptr, weighted_ptr, position, inside, row_weight, column_block * BLOCK_N, intermediate,
        ACTIVATION, EVEN_N,
    )  # fmt: skip
    if partials_ptr is not None:
        tl.store(partials_ptr + tl.cast(column_block, tl.int64) * num_rows + position, parts, mask=inside)


@Launcher
@triton.jit(do_not_specialize=["num_rows"])
def _row_weights_kernel(
    # inputs
    grad_ptr,
    bias_ptr,  # None: no biases
    partials_ptr,
    lane_to_slot_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs
    grad_row_weights_ptr,
    # shapes and strides, in elements
    num_rows,
    num_lanes,
    num_parts,
    hidden_size,
    grad_fanout,
    stride_bias,
    # constants
    PDL: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile of rows: the parts in their order, then what the bias adds, ``grad · bias``. Rows of no lane get 0."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    lane, start, end = tl.load(tile_lane_ptr + tile), tl.load(tile_start_ptr + tile), tl.load(tile_end_ptr + tile)
    if lane < 0:
        return
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    flat = tl.load(order_ptr + position, mask=inside, other=0)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if lane < num_lanes:
        partials_at = partials_ptr + position
        for _ in range(0, num_parts):
            total += tl.load(partials_at, mask=inside, other=0.0)
            partials_at += num_rows
        if bias_ptr is not None:
            slot = tl.load(lane_to_slot_ptr + lane).to(tl.int64)
            column = tl.arange(0, BLOCK_H)
            grad_at = grad_ptr + (flat // grad_fanout).to(tl.int64)[:, None] * hidden_size + column[None, :]
            for first in range(0, hidden_size, BLOCK_H):
                exists = column < hidden_size - first
                bias = widen(tl.load(bias_ptr + slot * stride_bias + first + column, mask=exists, other=0.0))
                grad = widen(tl.load(grad_at + first, mask=inside[:, None] & exists[None, :], other=0.0))
                total += tl.sum(grad * bias[None, :], 1)
    tl.store(grad_row_weights_ptr + flat, total, mask=inside)


def experts_grad_hidden(
    grad_GH: torch.Tensor,
    down_SHI: torch.Tensor,
    bias_SH: torch.Tensor | None,
    pre_NJ: torch.Tensor,
    row_weights_N: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    tiles: GradientTiles,
    grad_fanout: int,
    activation: str,
    config: GemmConfig,
    *,
    grad_pre_NJ: torch.Tensor | None,
    weighted_NI: torch.Tensor | None,
    grad_row_weights_N: torch.Tensor | None,
) -> None:
    """Write what is wanted of: the gradient of the pre-activation (perhaps in its place), hidden times row weight, both in
    sorted order, and the gradient of the row weights in flat order.

    Rows of no lane get no gradient of the pre-activation, and the row weight's is 0. `config.block_m` is the tiles'.
    """
    (num_rows,), (_, hidden_size, intermediate) = order_N.shape, down_SHI.shape
    num_parts, num_lanes, num_tiles = cdiv(intermediate, config.block_n), lane_to_slot_L.shape[0], len(tiles.tile_lane)
    if not num_tiles:
        return
    partials_CN = None
    if grad_row_weights_N is not None:
        partials_CN = row_weights_N.new_empty((num_parts, num_rows))
    _experts_grad_hidden_kernel[(num_tiles * num_parts,)](
        grad_GH,
        down_SHI,
        weights_descriptor("down_SHI", down_SHI, config),
        pre_NJ,
        row_weights_N,
        lane_to_slot_L,
        order_N,
        tiles.tile_lane,
        tiles.tile_start,
        tiles.tile_end,
        grad_pre_NJ,
        weighted_NI,
        partials_CN,
        num_rows,
        num_lanes,
        hidden_size,
        intermediate,
        grad_fanout,
        down_SHI.stride(0),
        ACTIVATION=activation,
        EVEN_N=intermediate % config.block_n == 0,
        EVEN_K=hidden_size % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if grad_row_weights_N is not None:
        _row_weights_kernel[(num_tiles,)](
            grad_GH,
            bias_SH,
            partials_CN,
            lane_to_slot_L,
            order_N,
            tiles.tile_lane,
            tiles.tile_start,
            tiles.tile_end,
            grad_row_weights_N,
            num_rows,
            num_lanes,
            num_parts,
            hidden_size,
            grad_fanout,
            0 if bias_SH is None else bias_SH.stride(0),
            BLOCK_M=config.block_m,
            BLOCK_H=64,
        )
