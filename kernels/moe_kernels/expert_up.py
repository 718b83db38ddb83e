# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""First grouped GEMM with the gated activation: hidden = act(x Wg^T) * (x Wu^T), every row with its lane's weights.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from moe_kernels.activation import check_activation, gated, gated_backward_gate, gated_backward_up
from moe_kernels.backend import registered_op, resolve_backend
from moe_kernels.checks import FLOATS, check_gate_up, check_rows, check_tensor, check_tma
from moe_kernels.config import GemmConfig
from moe_kernels.expert_up_tma import expert_up_tma
from moe_kernels.integers import cdiv
from moe_kernels.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.numerics import dot, narrow
from moe_kernels.numerics import gated as gated_in_kernel
from moe_kernels.row_blocks import elementwise, padded_rows, row_blocks, unversioned, without_autocast
from moe_kernels.schedule import TileSchedule
from moe_kernels.tile_order import load_own_tile


@Launcher
@triton.jit
def _expert_up_kernel(
    # inputs
    x_ptr,
    gate_up_ptr,
    lane_to_slot_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs
    hidden_ptr,
    # shapes and strides, in elements
    hidden_size,
    intermediate,
    fanout,
    stride_row,
    stride_slot,
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
    """One tile of rows, BLOCK_I columns of gate and of up.

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
    up_at = gate_at + tl.cast(intermediate, tl.int64) * hidden_size
    gate = tl.zeros((BLOCK_M, BLOCK_I), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_I), dtype=tl.float32)
    for first in range(0, hidden_size, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            gate = dot(x, tl.load(gate_at), gate)
            up = dot(x, tl.load(up_at), up)
        else:
            left = hidden_size - first
            x = tl.load(x_at, mask=k[None, :] < left, other=0.0)
            gate = dot(x, tl.load(gate_at, mask=k[:, None] < left, other=0.0), gate)
            up = dot(x, tl.load(up_at, mask=k[:, None] < left, other=0.0), up)
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K

    hidden = narrow(gated_in_kernel(gate, up, ACTIVATION), hidden_ptr.dtype.element_ty)
    hidden_at = hidden_ptr + position.to(tl.int64)[:, None] * intermediate + column[None, :]
    tl.store(hidden_at, hidden, mask=inside[:, None] & (column[None, :] < intermediate))


def expert_up_triton(
    x_RH: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    tile_lane: torch.Tensor,
    tile_start: torch.Tensor,
    tile_end: torch.Tensor,
    fanout: int,
    activation: str,
    config: GemmConfig,
) -> torch.Tensor:
    if config.tma:
        tiles = (order_N, tile_lane, tile_start, tile_end)
        return expert_up_tma(x_RH, gate_up_SNH, lane_to_slot_L, *tiles, fanout, activation, config)
    block_n, block_k = config.block_n, config.block_k
    hidden_size, intermediate = x_RH.shape[1], gate_up_SNH.shape[1] // 2
    hidden_NI = x_RH.new_empty((order_N.shape[0], intermediate))
    grid = (tile_lane.shape[0] * cdiv(intermediate, block_n // 2),)
    if grid[0]:
        _expert_up_kernel[grid](
            x_RH,
            gate_up_SNH,
            lane_to_slot_L,
            order_N,
            tile_lane,
            tile_start,
            tile_end,
            hidden_NI,
            hidden_size,
            intermediate,
            fanout,
            x_RH.stride(0),
            gate_up_SNH.stride(0),
            ACTIVATION=activation,
            EVEN_K=hidden_size % block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_I=block_n // 2,
            BLOCK_K=block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return hidden_NI


def expert_up_torch(
    x_RH: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    *,
    fanout: int,
    activation: str = "silu",
) -> torch.Tensor:
    """Reference of `expert_up`; its bits do not depend on a `GemmConfig`. Rows of no tile become zero."""
    return _expert_up_torch(
        x_RH, gate_up_SNH, lane_to_slot_L, schedule.order_N, schedule.offsets_L1, fanout, activation
    )


@without_autocast
def _expert_up_torch(x_RH, gate_up_SNH, lane_to_slot_L, order_N, offsets_L1, fanout, activation):
    intermediate = gate_up_SNH.shape[1] // 2
    hidden_NI = x_RH.new_zeros((order_N.shape[0], intermediate))
    for block in row_blocks(gate_up_SNH, lane_to_slot_L, offsets_L1):
        source = order_N[block.rows] // fanout
        product = F.linear(padded_rows(x_RH[source], block.matrix.shape[1]), block.matrix)
        gate, up = product[:, :intermediate], product[:, intermediate : 2 * intermediate]
        hidden = elementwise(lambda gate, up: gated(activation, gate, up), gate, up)
        hidden_NI[block.rows] = hidden[: source.shape[0]].to(x_RH.dtype)
    return hidden_NI


@registered_op("moe_kernels::expert_up")
def _expert_up(
    x_RH: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    tile_lane: torch.Tensor,
    tile_start: torch.Tensor,
    tile_end: torch.Tensor,
    fanout: int,
    activation: str,
    tiling: list[int],
    backend: str,
) -> torch.Tensor:
    if backend == "triton":
        tiles = (order_N, tile_lane, tile_start, tile_end)
        config = GemmConfig.from_list(tiling)
        return expert_up_triton(x_RH, gate_up_SNH, lane_to_slot_L, *tiles, fanout, activation, config)
    return _expert_up_torch(x_RH, gate_up_SNH, lane_to_slot_L, order_N, offsets_L1, fanout, activation)


@_expert_up.register_fake
def _expert_up_fake(x_RH, gate_up_SNH, lane_to_slot_L, order_N, *_):
    return x_RH.new_empty((order_N.shape[0], gate_up_SNH.shape[1] // 2))


@registered_op("moe_kernels::expert_up_backward")
@without_autocast
def _expert_up_backward(
    grad_hidden_NI: torch.Tensor,
    x_RH: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    fanout: int,
    activation: str,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and, if asked (else an empty tensor), of the weights; recomputes the products, in row blocks."""
    (_, double, columns), intermediate = gate_up_SNH.shape, gate_up_SNH.shape[1] // 2
    grad_flat_NH = x_RH.new_zeros((order_N.shape[0], columns), dtype=torch.float32)
    shape = gate_up_SNH.shape if needs_weights else (0,)
    grad_gate_up = gate_up_SNH.new_zeros(shape, dtype=torch.float32)
    for block in row_blocks(gate_up_SNH, lane_to_slot_L, offsets_L1):
        flat = order_N[block.rows]
        x = padded_rows(x_RH[flat // fanout], block.matrix.shape[1])
        product = F.linear(x, block.matrix)
        gate, up = product[:, :intermediate], product[:, intermediate:double]
        grad = padded_rows(grad_hidden_NI[block.rows], intermediate)
        grad_product = torch.zeros_like(product)
        grad_product[:, :intermediate] = elementwise(
            lambda grad, gate, up: gated_backward_gate(activation, grad, gate, up), grad, gate, up
        )
        grad_product[:, intermediate:double] = elementwise(
            lambda grad, gate: gated_backward_up(activation, grad, gate), grad, gate
        )
        grad_flat_NH[flat] = (grad_product @ block.matrix)[: flat.shape[0], :columns]
        if needs_weights:
            grad_gate_up[block.slot] += (grad_product.T @ x)[:double, :columns]
    grad_x = x_RH.new_zeros(x_RH.shape, dtype=torch.float32)
    for copy in range(fanout):  # a fixed order
        grad_x += grad_flat_NH[copy::fanout]
    return grad_x.to(x_RH.dtype), grad_gate_up.to(gate_up_SNH.dtype)


@_expert_up_backward.register_fake
def _expert_up_backward_fake(grad_hidden_NI, x_RH, gate_up_SNH, lane_to_slot_L, order_N, offsets_L1, *rest):
    needs_weights = rest[-1]
    return x_RH.new_empty(x_RH.shape), gate_up_SNH.new_empty(gate_up_SNH.shape if needs_weights else (0,))


def _setup_context(ctx, inputs, output):
    x_RH, gate_up_SNH, lane_to_slot_L, order_N, offsets_L1, *_tiles, ctx.fanout, ctx.activation, _, _ = inputs
    ctx.save_for_backward(x_RH, unversioned(gate_up_SNH), unversioned(lane_to_slot_L), order_N, offsets_L1)


def _backward(ctx, grad_hidden_NI):
    needs_x, needs_weights, *_ = ctx.needs_input_grad
    grad_x, grad_weights = _expert_up_backward(
        grad_hidden_NI, *ctx.saved_tensors, ctx.fanout, ctx.activation, needs_weights
    )
    return grad_x if needs_x else None, grad_weights if needs_weights else None, *(10 * (None,))


_expert_up.register_autograd(_backward, setup_context=_setup_context)


def expert_up(
    x_RH: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    *,
    fanout: int,
    activation: str = "silu",
    config: GemmConfig,
    backend: str = "auto",
) -> torch.Tensor:
    """Gate and up projection of every scheduled row, and the gated activation.

    Products and activation are in float32; the result is rounded once. Differentiable with respect to `x_RH` and
    `gate_up_SNH` (whose gradient is dense, of the weights' shape); until the backward the slots and lanes that have
    rows must keep what they hold, others may change. Not differentiable twice.

    Args:
        x_RH: [R, H] float32, float16 or bfloat16; the flat row n reads the row n // fanout. Rows may be padded.
        gate_up_SNH: [S, 2I, H] of the same dtype: gate rows, then up rows. The matrix of a slot is contiguous, slots
            may be any distance apart.
        lane_to_slot_L: [L] int32, contiguous; read on the device. Entries of lanes without rows are not used.
        schedule: of the R * fanout flat rows.
        fanout: flat rows per source row: K before a dispatch, 1 after it.
        activation: "silu", or "gelu" (the exact one).
        config: tile sizes; `config.block_m` and `config.extra_m` must be the schedule's.
        backend: see `resolve_backend`.

    Returns:
        hidden_NI [N, I] of the dtype of x, in the schedule's sorted order. Rows after the last scheduled one are
        undefined.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    device = x_RH.device
    check_tensor("x_RH", x_RH, (None, None), FLOATS, contiguous=False)
    check_rows("x_RH", x_RH)
    check_gate_up(gate_up_SNH, x_RH.shape[1], x_RH.dtype, device)
    check_tensor("lane_to_slot_L", lane_to_slot_L, (schedule.offsets_L1.shape[0] - 1,), torch.int32, device)
    if fanout < 1:
        raise ValueError(f"fanout={fanout}: must be at least 1")
    check_activation(activation)
    check_tensor("schedule.order_N", schedule.order_N, (x_RH.shape[0] * fanout,), torch.int32, device)
    schedule.check_config(config)
    if config.tma:
        check_tma("gate_up_SNH", gate_up_SNH, columns=gate_up_SNH.shape[1] // 2)
    return _expert_up(
        x_RH,
        gate_up_SNH,
        lane_to_slot_L,
        schedule.order_N,
        schedule.offsets_L1,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        fanout,
        activation,
        config.as_list(),
        resolve_backend(backend, device),
    )
