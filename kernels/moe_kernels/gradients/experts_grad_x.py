"""Backward of the experts, last GEMM: the gradient of x from that of the pre-activation.

R source rows, N = R * fanout flat rows, H hidden, J rows of gate and up, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import dot, narrow
from moe_kernels.gemms.combine import sum_rows_triton
from moe_kernels.gradients.experts_grad_x_tma import grad_x_rows_tma
from moe_kernels.gradients.gradient_tiles import GradientTiles
from moe_kernels.operands.config import GemmConfig
from moe_kernels.tiles.tile_order import load_own_tile


@Launcher
@triton.jit
def _experts_grad_x_kernel(
    # inputs
    grad_pre_ptr,
    gate_up_ptr,
    lane_to_slot_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs
    rows_ptr,
    # shapes and strides, in elements
    num_lanes,
    hidden_size,
    inner,
    stride_slot,
    # constants
    PDL: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of H, written in flat order. Rows of no lane get zeros."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column_block, lane, start, end = load_own_tile(
        tl.cdiv(hidden_size, BLOCK_N), tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if lane < 0:
        return
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    slot = tl.load(lane_to_slot_ptr + lane, mask=lane < num_lanes, other=0).to(tl.int64)
    grad_at = grad_pre_ptr + tl.minimum(position, end - 1).to(tl.int64)[:, None] * inner + k[None, :]
    weights_at = gate_up_ptr + slot * stride_slot + k[:, None].to(tl.int64) * hidden_size + column[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, tl.where(lane < num_lanes, inner, 0), BLOCK_K):
        grad = tl.load(grad_at) if EVEN_K else tl.load(grad_at, mask=k[None, :] < inner - first, other=0.0)
        if EVEN_N and EVEN_K:
            weights = tl.load(weights_at)
        else:
            exists = (column[None, :] < hidden_size) & (k[:, None] < inner - first)
            weights = tl.load(weights_at, mask=exists, other=0.0)
        product = dot(grad, weights, product)
        grad_at += BLOCK_K
        weights_at += BLOCK_K * hidden_size
    flat = tl.load(order_ptr + position, mask=inside, other=0)
    stored = inside[:, None]
    if not EVEN_N:
        stored &= column[None, :] < hidden_size
    at = rows_ptr + flat.to(tl.int64)[:, None] * hidden_size + column[None, :]
    tl.store(at, narrow(product, rows_ptr.dtype.element_ty), mask=stored)


def experts_grad_x(
    grad_pre_NJ: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    tiles: GradientTiles,
    fanout: int,
    config: GemmConfig,
) -> torch.Tensor:
    """grad_x_RH: those of a source row's copies, each rounded, summed in their order in float32. Without a lane: zeros.

    `config.block_m` is the tiles'.
    """
    arguments = (grad_pre_NJ, gate_up_SNH, lane_to_slot_L, order_N)
    by_tma = config.tma
    rows_NH = (
        grad_x_rows_tma(*arguments, offsets_L1, tiles, config) if by_tma else _grad_x_rows(*arguments, tiles, config)
    )
    return rows_NH if fanout == 1 else sum_rows_triton(rows_NH, fanout)


def _grad_x_rows(
    grad_pre_NJ: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    tiles: GradientTiles,
    config: GemmConfig,
) -> torch.Tensor:
    num_rows, inner = grad_pre_NJ.shape
    hidden_size = gate_up_SNH.shape[2]
    rows_NH = grad_pre_NJ.new_empty((num_rows, hidden_size))
    grid = (len(tiles.tile_lane) * cdiv(hidden_size, config.block_n),)
    if grid[0]:
        _experts_grad_x_kernel[grid](
            grad_pre_NJ,
            gate_up_SNH,
            lane_to_slot_L,
            order_N,
            tiles.tile_lane,
            tiles.tile_start,
            tiles.tile_end,
            rows_NH,
            lane_to_slot_L.shape[0],
            hidden_size,
            inner,
            gate_up_SNH.stride(0),
            EVEN_N=hidden_size % config.block_n == 0,
            EVEN_K=inner % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return rows_NH
