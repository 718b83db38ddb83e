"""Steps 4 to 6 of a forward and their backward, references: in blocks of rows (see `row_blocks`), in float32 or float64.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, J = 2I (I without a gate), S slots, L lanes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from moe_kernels.gemms.combine import combine_torch
from moe_kernels.gemms.expert_mlp import expert_mlp_torch
from moe_kernels.operands.activation import (
    gated,
    gated_backward_gate,
    gated_backward_up,
    ungated,
    ungated_backward,
)
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.tiles.row_blocks import elementwise, padded_rows, row_blocks, row_sums, without_autocast
from moe_kernels.tiles.tiles import TileSchedule


class Wanted(NamedTuple):
    """Which gradients a backward computes; the others are None."""

    x: bool
    row_weights: bool
    gate_up: bool
    gate_up_bias: bool
    down: bool
    down_bias: bool


class Gradients(NamedTuple):
    """Of `expert_rows`: each of its tensor's shape and dtype, or None."""

    x_RH: torch.Tensor | None
    row_weights_N: torch.Tensor | None
    gate_up_SNH: torch.Tensor | None
    gate_up_bias_SN: torch.Tensor | None
    down_SHI: torch.Tensor | None
    down_bias_SH: torch.Tensor | None


def expert_rows_torch(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    lanes_TK: torch.Tensor | None,
    fanout: int,
    pre_NJ: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `expert_rows`: those of the separate ops. Writes the pre-activation into `pre_NJ`, if given."""
    rows_NH = expert_mlp_torch(x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, fanout, pre_NJ)
    return rows_NH if lanes_TK is None else combine_torch(rows_NH, lanes_TK)


@without_autocast
def expert_rows_backward_torch(
    grad_GH: torch.Tensor,
    x_RH: torch.Tensor | None,
    pre_NJ: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    row_weights_N: torch.Tensor,
    fanout: int,
    grad_fanout: int,
    wanted: Wanted,
    *,
    main_grads: Gradients | None = None,
) -> Gradients:
    """Reference of the backward.

    Args:
        grad_GH: of the output; flat row n has the gradient of its row ``n // grad_fanout``.
        x_RH: None if no gradient of the up projection is wanted.
        pre_NJ: gate and up with their biases, in sorted order.
        main_grads: float32 tensors to which gradients of matrices and biases are added; what has one is returned as None.
    """
    down_SHI, activation = matrices.down_SHI, matrices.activation
    _, hidden_size, intermediate = down_SHI.shape
    width = pre_NJ.shape[1]
    exact = torch.promote_types(down_SHI.dtype, torch.float32)
    num_rows = order_N.shape[0]

    def zeros(like: torch.Tensor | None, is_wanted: bool, dtype: torch.dtype = exact) -> torch.Tensor | None:
        return torch.zeros(like.shape, dtype=dtype, device=like.device) if is_wanted and like is not None else None

    grad_row_weights = zeros(row_weights_N, wanted.row_weights, row_weights_N.dtype)
    grad_down, grad_down_bias = zeros(down_SHI, wanted.down), zeros(matrices.down_bias_SH, wanted.down_bias)
    grad_gate_up = zeros(matrices.gate_up_SNH, wanted.gate_up)
    grad_gate_up_bias = zeros(matrices.gate_up_bias_SN, wanted.gate_up_bias)
    grad_flat_NH = pre_NJ.new_zeros((num_rows if wanted.x else 0, hidden_size), dtype=exact)
    ups = row_blocks(matrices.gate_up_SNH.__getitem__, lane_to_slot_L, offsets_L1)
    for block, up_block in zip(row_blocks(down_SHI.__getitem__, lane_to_slot_L, offsets_L1), ups, strict=True):
        flat = order_N[block.rows]
        count = flat.shape[0]
        grad = padded_rows(grad_GH[flat // grad_fanout], block.matrix.shape[0])
        scale = padded_rows(row_weights_N[flat, None], 1).to(exact)
        pre = padded_rows(pre_NJ[block.rows], width)
        grad_product = (grad @ block.matrix)[:, :intermediate]  # before the routing weight
        grad_hidden = elementwise(torch.mul, grad_product, scale.expand_as(grad_product))
        if matrices.is_gated:
            parts = pre[:, :intermediate], pre[:, intermediate:]
            hidden = elementwise(lambda gate, up: gated(activation, gate, up), *parts)
            grads = [
                elementwise(lambda one, gate, up, of=of: of(activation, one, gate, up), grad_hidden, *parts)
                for of in (gated_backward_gate, gated_backward_up)
            ]
            grad_pre = torch.cat(grads, dim=1)
        else:
            hidden = elementwise(lambda up: ungated(activation, up), pre)
            grad_pre = elementwise(lambda one, up: ungated_backward(activation, one, up), grad_hidden, pre)
        if grad_row_weights is not None:
            # d(out · grad)/d(weight) = (hidden Wd^T + bias) · grad = hidden · (grad Wd) + bias · grad
            of_weight = row_sums(elementwise(torch.mul, grad_product, hidden))
            if matrices.down_bias_SH is not None:
                bias = padded_rows(matrices.down_bias_SH[block.slot].expand(len(grad), -1), grad.shape[1])
                of_weight = of_weight + row_sums(elementwise(torch.mul, grad, bias))
            grad_row_weights[flat] = of_weight[:count].to(grad_row_weights.dtype)
        if grad_down is not None:
            grad_down[block.slot] += ((grad * scale).T @ hidden)[:hidden_size]
        if grad_down_bias is not None:
            grad_down_bias[block.slot] += (grad * scale)[:, :hidden_size].sum(0)
        if grad_gate_up_bias is not None:
            grad_gate_up_bias[block.slot] += grad_pre.sum(0)
        if grad_gate_up is not None:
            assert x_RH is not None
            x = padded_rows(x_RH[flat // fanout], hidden_size)
            grad_gate_up[block.slot] += grad_pre.T @ x
        if wanted.x:
            padded = F.pad(grad_pre, (0, up_block.matrix.shape[0] - width))
            grad_flat_NH[flat] = (padded @ up_block.matrix)[:count, :hidden_size]
    grad_x = None
    if wanted.x:
        grad_x = grad_flat_NH.new_zeros((num_rows // fanout, hidden_size))
        for copy in range(fanout):  # a fixed order
            grad_x += grad_flat_NH[copy::fanout]
        grad_x = grad_x.to(pre_NJ.dtype)

    main = main_grads or Gradients(*6 * (None,))

    def returned(grad: torch.Tensor | None, main_grad: torch.Tensor | None) -> torch.Tensor | None:
        if grad is not None and main_grad is not None:
            main_grad += grad
            return None
        return None if grad is None else grad.to(down_SHI.dtype)

    return Gradients(
        grad_x,
        grad_row_weights,
        returned(grad_gate_up, main.gate_up_SNH),
        returned(grad_gate_up_bias, main.gate_up_bias_SN),
        returned(grad_down, main.down_SHI),
        returned(grad_down_bias, main.down_bias_SH),
    )
