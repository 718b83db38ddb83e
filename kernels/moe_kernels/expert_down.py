"""Step 5 of a forward, the second grouped GEMM: rows = (hidden Wd^T) * routing weight, in flat order.

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_kernels.backend import resolve_backend
from moe_kernels.checks import FLOATS, check_rows, check_tensor, check_tma
from moe_kernels.config import GemmConfig
from moe_kernels.expert_down_triton import expert_down_triton
from moe_kernels.homes import RowHomes
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.registered import registered_op
from moe_kernels.row_blocks import elementwise, padded_rows, row_blocks, unversioned, without_autocast
from moe_kernels.tiles import TileSchedule


@without_autocast
def expert_down_torch(
    hidden_NI: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
) -> torch.Tensor:
    """Reference of `expert_down`; its bits do not depend on a `GemmConfig`. Rows of no tile become zero."""
    down_SHI, order_N = matrices.down_SHI, schedule.order_N
    columns = down_SHI.shape[1]
    rows_NH = hidden_NI.new_zeros((order_N.shape[0], columns))
    for block in row_blocks(down_SHI, lane_to_slot_L, schedule.offsets_L1):
        flat = order_N[block.rows]
        product = F.linear(padded_rows(hidden_NI[block.rows], block.matrix.shape[1]), block.matrix)
        if matrices.down_bias_SH is not None:
            product[:, :columns] += matrices.down_bias_SH[block.slot].float()
        rows = product[: flat.shape[0], :columns] * row_weights_N[flat, None]
        rows_NH[flat] = rows.to(hidden_NI.dtype)
    return rows_NH


@registered_op("moe_kernels::expert_down")
def _expert_down(
    hidden_NI: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
    backend: str,
) -> torch.Tensor:
    arguments = (hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N)
    return expert_down_triton(*arguments, config) if backend == "triton" else expert_down_torch(*arguments)


@_expert_down.register_fake
def _expert_down_fake(hidden_NI, matrices, *_):
    return hidden_NI.new_empty((hidden_NI.shape[0], matrices.down_SHI.shape[1]))


@registered_op("moe_kernels::expert_down_backward")
@without_autocast
def _expert_down_backward(
    grad_rows_NH: torch.Tensor,
    hidden_NI: torch.Tensor,
    down_SHI: torch.Tensor,
    bias_SH: torch.Tensor | None,
    lane_to_slot_L: torch.Tensor,
    row_weights_N: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, of weights and biases if asked (else empty tensors), and of the routing weights."""
    _, rows, columns = down_SHI.shape
    grad_hidden_NI = torch.zeros_like(hidden_NI)
    grad_row_weights_N = torch.zeros_like(row_weights_N)
    grad_down = down_SHI.new_zeros(down_SHI.shape if needs_weights else (0,), dtype=torch.float32)
    needs_bias = needs_weights and bias_SH is not None
    grad_bias = down_SHI.new_zeros(down_SHI.shape[:2] if needs_bias else (0,), dtype=torch.float32)
    for block in row_blocks(down_SHI, lane_to_slot_L, offsets_L1):
        flat = order_N[block.rows]
        count = flat.shape[0]
        grad = padded_rows(grad_rows_NH[flat], block.matrix.shape[0])
        hidden = padded_rows(hidden_NI[block.rows], block.matrix.shape[1])
        scale = padded_rows(row_weights_N[flat, None], 1)
        grad_product = grad @ block.matrix  # before the routing weight
        grad_hidden_NI[block.rows] = (grad_product * scale)[:count, :columns].to(hidden_NI.dtype)
        # d(out · grad)/d(weight) = (hidden Wd^T + bias) · grad = hidden · (grad Wd) + bias · grad
        grad_weight = elementwise(torch.mul, grad_product, hidden).sum(1)
        if bias_SH is not None:
            bias = padded_rows(bias_SH[block.slot].expand(len(grad), -1), grad.shape[1])
            grad_weight = grad_weight + elementwise(torch.mul, grad, bias).sum(1)
        grad_row_weights_N[flat] = grad_weight[:count]
        if needs_weights:
            grad_down[block.slot] += ((grad * scale).T @ hidden)[:rows, :columns]
        if needs_bias:
            grad_bias[block.slot] += (grad * scale)[:, :rows].sum(0)
    return grad_hidden_NI, grad_down.to(down_SHI.dtype), grad_row_weights_N, grad_bias.to(down_SHI.dtype)


@_expert_down_backward.register_fake
def _expert_down_backward_fake(grad_rows_NH, hidden_NI, down_SHI, bias_SH, lane_to_slot_L, row_weights_N, *rest):
    needs_weights = rest[-1]
    return (
        torch.empty_like(hidden_NI),
        down_SHI.new_empty(down_SHI.shape if needs_weights else (0,)),
        torch.empty_like(row_weights_N),
        down_SHI.new_empty(down_SHI.shape[:2] if needs_weights and bias_SH is not None else (0,)),
    )


def _setup_context(ctx, inputs, output):
    hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, *_ = inputs
    bias_SH = None if matrices.down_bias_SH is None else unversioned(matrices.down_bias_SH)
    slots = (unversioned(matrices.down_SHI), bias_SH, unversioned(lane_to_slot_L))
    ctx.save_for_backward(hidden_NI, *slots, row_weights_N, schedule.order_N, schedule.offsets_L1)


def _backward(ctx, needs, grad_rows_NH):
    needs_weights = bool(needs & {"matrices_down_SHI", "matrices_down_bias_SH"})
    if not needs_weights and not needs & {"hidden_NI", "row_weights_N"}:
        return {}  # it was asked for that of the up projection, which comes along unused
    grads = _expert_down_backward(grad_rows_NH, *ctx.saved_tensors, needs_weights)
    names = ("hidden_NI", "matrices_down_SHI", "row_weights_N", "matrices_down_bias_SH")
    return dict(zip(names, grads, strict=True))


_expert_down.register_autograd(_backward, setup_context=_setup_context)


def _check(
    hidden_NI: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
) -> None:
    device = hidden_NI.device
    check_tensor("hidden_NI", hidden_NI, (None, None), FLOATS, contiguous=False)
    check_rows("hidden_NI", hidden_NI)
    matrices.check_down(hidden_NI.shape[1], hidden_NI.dtype, device)
    check_tensor("lane_to_slot_L", lane_to_slot_L, (schedule.offsets_L1.shape[0] - 1,), torch.int32, device)
    check_tensor("schedule.order_N", schedule.order_N, (hidden_NI.shape[0],), torch.int32, device)
    check_tensor("row_weights_N", row_weights_N, (hidden_NI.shape[0],), torch.float32, device)
    schedule.check_config(config)
    if config.tma:
        check_tma("matrices.down_SHI", matrices.down_SHI)


def expert_down(
    hidden_NI: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    *,
    config: GemmConfig,
    backend: str = "auto",
) -> torch.Tensor:
    """Down projection of every scheduled row with its bias, times its routing weight, scattered to flat order.

    The product and the scaling are in float32; the result is rounded once. Differentiable with respect to
    `hidden_NI`, `matrices.down_SHI` and its bias (whose gradients are dense, of their shapes) and `row_weights_N`; until the
    backward the slots and lanes that have rows must keep what they hold, others may change. Not differentiable twice.

    Args:
        hidden_NI: [N, I] float32, float16 or bfloat16, in the schedule's sorted order: what `expert_up` returns.
        matrices: of the same dtype; the down projection is used.
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
    _check(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config)
    arguments = (hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config)
    return _expert_down(*arguments, resolve_backend(backend, hidden_NI.device))


def expert_down_home(
    hidden_NI: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    homes: RowHomes,
    *,
    config: GemmConfig,
) -> None:
    """`expert_down` by Triton that writes each row where it is wanted, on this device or a peer's. Not differentiable.

    Args:
        homes: flat row n goes to row ``n % homes.rows_per_home`` of rank ``n // homes.rows_per_home``.

    Raises:
        ValueError: as `expert_down`.
    """
    _check(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config)
    resolve_backend("triton", hidden_NI.device)
    expert_down_triton(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config, homes)
