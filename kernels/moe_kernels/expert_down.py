# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""Second grouped GEMM: rows = (hidden Wd^T) * routing weight, every row with its lane's weights, in flat order.

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from moe_kernels.backend import registered_op, resolve_backend
from moe_kernels.checks import FLOATS, check_rows, check_slots, check_tensor, check_tma
from moe_kernels.config import GemmConfig
from moe_kernels.expert_down_tma import expert_down_tma
from moe_kernels.integers import cdiv
from moe_kernels.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.numerics import dot, narrow
from moe_kernels.row_blocks import elementwise, padded_rows, row_blocks, unversioned, without_autocast
from moe_kernels.schedule import TileSchedule
from moe_kernels.tile_order import load_own_tile


@Launcher
@triton.jit
def _expert_down_kernel(
    # inputs
    hidden_ptr,
    down_ptr,
    lane_to_slot_ptr,
    row_weights_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs
    rows_ptr,
    # shapes and strides, in elements
    hidden_size,
    intermediate,
    stride_row,
    stride_slot,
    # constants
    PDL: tl.constexpr,
    EVEN_K: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of the output. Rows and columns past the end: see `_expert_up_kernel`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column_block, lane, start, end = load_own_tile(
        tl.cdiv(hidden_size, BLOCK_N), tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )
    if lane < 0:
        return
    slot = tl.load(lane_to_slot_ptr + lane).to(tl.int64)
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end

    first_column = column_block * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    weight_row = tl.minimum(column, hidden_size - 1) - first_column
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden_ptr + tl.minimum(position, end - 1).to(tl.int64)[:, None] * stride_row + k[None, :]
    down_block = down_ptr + slot * stride_slot + tl.cast(first_column, tl.int64) * intermediate
    down_at = down_block + weight_row[None, :] * intermediate + k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, intermediate, BLOCK_K):
        if EVEN_K:
            product = dot(tl.load(hidden_at), tl.load(down_at), product)
        else:
            left = intermediate - first
            hidden = tl.load(hidden_at, mask=k[None, :] < left, other=0.0)
            product = dot(hidden, tl.load(down_at, mask=k[:, None] < left, other=0.0), product)
        hidden_at += BLOCK_K
        down_at += BLOCK_K

    flat = tl.load(order_ptr + position, mask=inside, other=0)
    row_weight = tl.load(row_weights_ptr + flat, mask=inside, other=0.0)
    rows = narrow(product * row_weight[:, None], rows_ptr.dtype.element_ty)
    rows_at = rows_ptr + flat.to(tl.int64)[:, None] * hidden_size + column[None, :]
    tl.store(rows_at, rows, mask=inside[:, None] & (column[None, :] < hidden_size))


def expert_down_triton(
    hidden_NI: torch.Tensor,
    down_SHI: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    row_weights_N: torch.Tensor,
    order_N: torch.Tensor,
    tile_lane: torch.Tensor,
    tile_start: torch.Tensor,
    tile_end: torch.Tensor,
    num_tiles: torch.Tensor,
    config: GemmConfig,
) -> torch.Tensor:
    if config.tma:
        tiles = (order_N, tile_lane, tile_start, tile_end, num_tiles)
        return expert_down_tma(hidden_NI, down_SHI, lane_to_slot_L, row_weights_N, *tiles, config)
    block_n, block_k = config.block_n, config.block_k
    _, hidden_size, intermediate = down_SHI.shape
    rows_NH = hidden_NI.new_empty((order_N.shape[0], hidden_size))
    grid = (tile_lane.shape[0] * cdiv(hidden_size, block_n),)
    if grid[0]:
        _expert_down_kernel[grid](
            hidden_NI,
            down_SHI,
            lane_to_slot_L,
            row_weights_N,
            order_N,
            tile_lane,
            tile_start,
            tile_end,
            rows_NH,
            hidden_size,
            intermediate,
            hidden_NI.stride(0),
            down_SHI.stride(0),
            EVEN_K=intermediate % block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return rows_NH


def expert_down_torch(
    hidden_NI: torch.Tensor,
    down_SHI: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
) -> torch.Tensor:
    """Reference of `expert_down`; its bits do not depend on a `GemmConfig`. Rows of no tile become zero."""
    return _expert_down_torch(hidden_NI, down_SHI, lane_to_slot_L, row_weights_N, schedule.order_N, schedule.offsets_L1)


@without_autocast
def _expert_down_torch(hidden_NI, down_SHI, lane_to_slot_L, row_weights_N, order_N, offsets_L1):
    columns = down_SHI.shape[1]
    rows_NH = hidden_NI.new_zeros((order_N.shape[0], columns))
    for block in row_blocks(down_SHI, lane_to_slot_L, offsets_L1):
        flat = order_N[block.rows]
        product = F.linear(padded_rows(hidden_NI[block.rows], block.matrix.shape[1]), block.matrix)
        rows = product[: flat.shape[0], :columns] * row_weights_N[flat, None]
        rows_NH[flat] = rows.to(hidden_NI.dtype)
    return rows_NH


@registered_op("moe_kernels::expert_down")
def _expert_down(
    hidden_NI: torch.Tensor,
    down_SHI: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    row_weights_N: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    tile_lane: torch.Tensor,
    tile_start: torch.Tensor,
    tile_end: torch.Tensor,
    num_tiles: torch.Tensor,
    tiling: list[int],
    backend: str,
) -> torch.Tensor:
    if backend == "triton":
        tiles = (order_N, tile_lane, tile_start, tile_end, num_tiles)
        config = GemmConfig.from_list(tiling)
        return expert_down_triton(hidden_NI, down_SHI, lane_to_slot_L, row_weights_N, *tiles, config)
    return _expert_down_torch(hidden_NI, down_SHI, lane_to_slot_L, row_weights_N, order_N, offsets_L1)


@_expert_down.register_fake
def _expert_down_fake(hidden_NI, down_SHI, *_):
    return hidden_NI.new_empty((hidden_NI.shape[0], down_SHI.shape[1]))


@registered_op("moe_kernels::expert_down_backward")
@without_autocast
def _expert_down_backward(
    grad_rows_NH: torch.Tensor,
    hidden_NI: torch.Tensor,
    down_SHI: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    row_weights_N: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, of the weights if asked (else an empty tensor), and of the routing weights."""
    _, rows, columns = down_SHI.shape
    grad_hidden_NI = torch.zeros_like(hidden_NI)
    grad_row_weights_N = torch.zeros_like(row_weights_N)
    grad_down = down_SHI.new_zeros(down_SHI.shape if needs_weights else (0,), dtype=torch.float32)
    for block in row_blocks(down_SHI, lane_to_slot_L, offsets_L1):
        flat = order_N[block.rows]
        count = flat.shape[0]
        grad = padded_rows(grad_rows_NH[flat], block.matrix.shape[0])
        hidden = padded_rows(hidden_NI[block.rows], block.matrix.shape[1])
        scale = padded_rows(row_weights_N[flat, None], 1)
        grad_product = grad @ block.matrix  # before the routing weight
        grad_hidden_NI[block.rows] = (grad_product * scale)[:count, :columns].to(hidden_NI.dtype)
        # d(out · grad)/d(weight) = (hidden Wd^T) · grad = hidden · (grad Wd)
        grad_row_weights_N[flat] = elementwise(torch.mul, grad_product, hidden).sum(1)[:count]
        if needs_weights:
            grad_down[block.slot] += ((grad * scale).T @ hidden)[:rows, :columns]
    return grad_hidden_NI, grad_down.to(down_SHI.dtype), grad_row_weights_N


@_expert_down_backward.register_fake
def _expert_down_backward_fake(grad_rows_NH, hidden_NI, down_SHI, lane_to_slot_L, row_weights_N, *rest):
    needs_weights = rest[-1]
    return (
        torch.empty_like(hidden_NI),
        down_SHI.new_empty(down_SHI.shape if needs_weights else (0,)),
        torch.empty_like(row_weights_N),
    )


def _setup_context(ctx, inputs, output):
    hidden_NI, down_SHI, lane_to_slot_L, *rest = inputs[:6]
    ctx.save_for_backward(hidden_NI, unversioned(down_SHI), unversioned(lane_to_slot_L), *rest)


def _backward(ctx, grad_rows_NH):
    needs_hidden, needs_weights, _, needs_row_weights, *_ = ctx.needs_input_grad
    grad_hidden, grad_down, grad_row_weights = _expert_down_backward(grad_rows_NH, *ctx.saved_tensors, needs_weights)
    return (
        grad_hidden if needs_hidden else None,
        grad_down if needs_weights else None,
        None,
        grad_row_weights if needs_row_weights else None,
        *(8 * (None,)),
    )


_expert_down.register_autograd(_backward, setup_context=_setup_context)


def expert_down(
    hidden_NI: torch.Tensor,
    down_SHI: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    *,
    config: GemmConfig,
    backend: str = "auto",
) -> torch.Tensor:
    """Down projection of every scheduled row, times its routing weight, scattered to flat order.

    The product and the scaling are in float32; the result is rounded once. Differentiable with respect to
    `hidden_NI`, `down_SHI` (whose gradient is dense, of the weights' shape) and `row_weights_N`; until the backward
    the slots and lanes that have rows must keep what they hold, others may change. Not differentiable twice.

    Args:
        hidden_NI: [N, I] float32, float16 or bfloat16, in the schedule's sorted order: what `expert_up` returns.
        down_SHI: [S, H, I] of the same dtype. The matrix of a slot is contiguous, slots may be any distance apart.
        lane_to_slot_L: [L] int32, contiguous; read on the device. Entries of lanes without rows are not used.
        schedule: of the N flat rows.
        row_weights_N: [N] float32, contiguous, in flat order.
        config: tile sizes; `config.block_m` and `config.extra_m` must be the schedule's.
        backend: see `resolve_backend`.

    Returns:
        rows_NH [N, H] of the dtype of hidden, in flat order. Rows with lane -1 are undefined: `combine` skips them.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    device = hidden_NI.device
    check_tensor("hidden_NI", hidden_NI, (None, None), FLOATS, contiguous=False)
    check_rows("hidden_NI", hidden_NI)
    check_tensor("down_SHI", down_SHI, (None, None, hidden_NI.shape[1]), hidden_NI.dtype, device, contiguous=False)
    check_slots("down_SHI", down_SHI)
    check_tensor("lane_to_slot_L", lane_to_slot_L, (schedule.offsets_L1.shape[0] - 1,), torch.int32, device)
    check_tensor("schedule.order_N", schedule.order_N, (hidden_NI.shape[0],), torch.int32, device)
    check_tensor("row_weights_N", row_weights_N, (hidden_NI.shape[0],), torch.float32, device)
    schedule.check_config(config)
    if config.tma:
        check_tma("down_SHI", down_SHI)
    return _expert_down(
        hidden_NI,
        down_SHI,
        lane_to_slot_L,
        row_weights_N,
        schedule.order_N,
        schedule.offsets_L1,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        schedule.num_tiles,
        config.as_list(),
        resolve_backend(backend, device),
    )
