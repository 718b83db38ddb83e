"""Step 4 of a forward, the first grouped GEMM: hidden = act(x Wg^T) * (x Wu^T), each row with its lane's weights.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_kernels.activation import (
    gated,
    gated_backward_gate,
    gated_backward_up,
    parse_activation,
    ungated,
    ungated_backward,
)
from moe_kernels.backend import resolve_backend
from moe_kernels.checks import FLOATS, check_rows, check_tensor, check_tma
from moe_kernels.config import GemmConfig
from moe_kernels.expert_up_triton import expert_up_triton
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.registered import registered_op
from moe_kernels.row_blocks import RowBlock, elementwise, padded_rows, row_blocks, unversioned, without_autocast
from moe_kernels.tiles import TileSchedule


def _product(x: torch.Tensor, block: RowBlock, bias_SN: torch.Tensor | None) -> torch.Tensor:
    """The block's rows times its weights, plus the bias; padded, in float32."""
    product = F.linear(x, block.matrix)
    if bias_SN is not None:
        product[:, : bias_SN.shape[1]] += bias_SN[block.slot].float()
    return product


@without_autocast
def expert_up_torch(
    x_RH: torch.Tensor, matrices: ExpertMatrices, lane_to_slot_L: torch.Tensor, schedule: TileSchedule, *, fanout: int
) -> torch.Tensor:
    """Reference of `expert_up`; its bits do not depend on a `GemmConfig`. Rows of no tile become zero."""
    gate_up_SNH, order_N, activation = matrices.gate_up_SNH, schedule.order_N, matrices.activation
    intermediate = matrices.down_SHI.shape[2]
    hidden_NI = x_RH.new_zeros((order_N.shape[0], intermediate))
    for block in row_blocks(gate_up_SNH, lane_to_slot_L, schedule.offsets_L1):
        source = order_N[block.rows] // fanout
        product = _product(padded_rows(x_RH[source], block.matrix.shape[1]), block, matrices.gate_up_bias_SN)
        first, second = product[:, :intermediate], product[:, intermediate : 2 * intermediate]
        if matrices.is_gated:
            hidden = elementwise(lambda gate, up: gated(activation, gate, up), first, second)
        else:
            hidden = elementwise(lambda up: ungated(activation, up), first)
        hidden_NI[block.rows] = hidden[: source.shape[0]].to(x_RH.dtype)
    return hidden_NI


@registered_op("moe_kernels::expert_up")
def _expert_up(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
    backend: str,
) -> torch.Tensor:
    if backend == "triton":
        return expert_up_triton(x_RH, matrices, lane_to_slot_L, schedule, fanout, config)
    return expert_up_torch(x_RH, matrices, lane_to_slot_L, schedule, fanout=fanout)


@_expert_up.register_fake
def _expert_up_fake(x_RH, matrices, lane_to_slot_L, schedule, *_):
    return x_RH.new_empty((schedule.order_N.shape[0], matrices.down_SHI.shape[2]))


@registered_op("moe_kernels::expert_up_backward")
@without_autocast
def _expert_up_backward(
    grad_hidden_NI: torch.Tensor,
    x_RH: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    bias_SN: torch.Tensor | None,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    fanout: int,
    activation: str,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x and, if asked (else empty tensors), of weights and biases; recomputes the products, in row blocks."""
    (_, num_rows, columns), is_gated = gate_up_SNH.shape, parse_activation(activation).is_gated
    intermediate = num_rows // 2 if is_gated else num_rows
    grad_flat_NH = x_RH.new_zeros((order_N.shape[0], columns), dtype=torch.float32)
    grad_gate_up = gate_up_SNH.new_zeros(gate_up_SNH.shape if needs_weights else (0,), dtype=torch.float32)
    needs_bias = needs_weights and bias_SN is not None
    grad_bias = gate_up_SNH.new_zeros(gate_up_SNH.shape[:2] if needs_bias else (0,), dtype=torch.float32)
    for block in row_blocks(gate_up_SNH, lane_to_slot_L, offsets_L1):
        flat = order_N[block.rows]
        x = padded_rows(x_RH[flat // fanout], block.matrix.shape[1])
        product = _product(x, block, bias_SN)
        grad = padded_rows(grad_hidden_NI[block.rows], intermediate)
        grad_product = torch.zeros_like(product)
        if is_gated:
            inputs = grad, product[:, :intermediate], product[:, intermediate:num_rows]
            for part, function in ((0, gated_backward_gate), (1, gated_backward_up)):
                grad_product[:, part * intermediate : (part + 1) * intermediate] = elementwise(
                    lambda grad, gate, up, function=function: function(activation, grad, gate, up), *inputs
                )
        else:
            grad_product[:, :intermediate] = elementwise(
                lambda grad, up: ungated_backward(activation, grad, up), grad, product[:, :intermediate]
            )
        grad_flat_NH[flat] = (grad_product @ block.matrix)[: flat.shape[0], :columns]
        if needs_weights:
            grad_gate_up[block.slot] += (grad_product.T @ x)[:num_rows, :columns]
        if needs_bias:
            grad_bias[block.slot] += grad_product[:, :num_rows].sum(0)
    grad_x = x_RH.new_zeros(x_RH.shape, dtype=torch.float32)
    for copy in range(fanout):  # a fixed order
        grad_x += grad_flat_NH[copy::fanout]
    return grad_x.to(x_RH.dtype), grad_gate_up.to(gate_up_SNH.dtype), grad_bias.to(gate_up_SNH.dtype)


@_expert_up_backward.register_fake
def _expert_up_backward_fake(grad_hidden_NI, x_RH, gate_up_SNH, bias_SN, *rest):
    needs_weights = rest[-1]
    return (
        x_RH.new_empty(x_RH.shape),
        gate_up_SNH.new_empty(gate_up_SNH.shape if needs_weights else (0,)),
        gate_up_SNH.new_empty(gate_up_SNH.shape[:2] if needs_weights and bias_SN is not None else (0,)),
    )


def _setup_context(ctx, inputs, output):
    x_RH, matrices, lane_to_slot_L, schedule, ctx.fanout, *_ = inputs
    ctx.activation, bias_SN = matrices.activation, matrices.gate_up_bias_SN
    bias_SN = None if bias_SN is None else unversioned(bias_SN)
    slots = (unversioned(matrices.gate_up_SNH), bias_SN, unversioned(lane_to_slot_L))
    ctx.save_for_backward(x_RH, *slots, schedule.order_N, schedule.offsets_L1)


def _backward(ctx, needs, grad_hidden_NI):
    needs_weights = bool(needs & {"matrices_gate_up_SNH", "matrices_gate_up_bias_SN"})
    if not needs_weights and "x_RH" not in needs:
        return {}  # it was asked for that of the down projection, which comes along unused
    grad_x, grad_weights, grad_bias = _expert_up_backward(
        grad_hidden_NI, *ctx.saved_tensors, ctx.fanout, ctx.activation, needs_weights
    )
    return {"x_RH": grad_x, "matrices_gate_up_SNH": grad_weights, "matrices_gate_up_bias_SN": grad_bias}


_expert_up.register_autograd(_backward, setup_context=_setup_context)


def expert_up(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    *,
    fanout: int,
    config: GemmConfig,
    backend: str = "auto",
) -> torch.Tensor:
    """Gate and up projection of every scheduled row with their biases, and the activation.

    Products and activation are in float32; the result is rounded once. Differentiable with respect to `x_RH` and
    `matrices.gate_up_SNH` and its bias (whose gradients are dense, of their shapes); until the backward the slots and lanes
    that have rows must keep what they hold, others may change. Not differentiable twice.

    Args:
        x_RH: [R, H] float32, float16 or bfloat16; the flat row n reads the row n // fanout. Rows may be padded.
        matrices: of the same dtype; the gate and up projection and the activation are used.
        lane_to_slot_L: [L] int32, contiguous; read on the device. Entries of lanes without rows are not used.
        schedule: of the R * fanout flat rows.
        fanout: flat rows per source row: K before a dispatch, 1 after it.
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
    matrices.check_up(x_RH.shape[1], x_RH.dtype, device)
    check_tensor("lane_to_slot_L", lane_to_slot_L, (schedule.offsets_L1.shape[0] - 1,), torch.int32, device)
    if fanout < 1:
        raise ValueError(f"fanout={fanout}: must be at least 1")
    check_tensor("schedule.order_N", schedule.order_N, (x_RH.shape[0] * fanout,), torch.int32, device)
    schedule.check_config(config)
    if config.tma:
        check_tma("matrices.gate_up_SNH", matrices.gate_up_SNH, columns=matrices.down_SHI.shape[2])
    return _expert_up(x_RH, matrices, lane_to_slot_L, schedule, fanout, config, resolve_backend(backend, device))
