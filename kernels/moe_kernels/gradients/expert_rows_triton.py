"""Steps 4 to 6 of a forward that is to have a backward, and that backward, by the kernels.

R source rows, N = R * fanout flat rows, H hidden, J = 2I (gate, up; I without a gate), S slots, L lanes.
"""

from __future__ import annotations

import torch

from moe_kernels.gemms.combine import combine_triton
from moe_kernels.gemms.expert_mlp_triton import expert_mlp_triton
from moe_kernels.gradients.expert_rows_torch import Gradients, Wanted
from moe_kernels.gradients.experts_grad_hidden import experts_grad_hidden
from moe_kernels.gradients.experts_grad_weights import experts_grad_bias, experts_grad_weights
from moe_kernels.gradients.experts_grad_x import experts_grad_x
from moe_kernels.gradients.gradient_configs import GradientConfigs
from moe_kernels.gradients.gradient_tiles import cut_tiles
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.tiles.tiles import TileSchedule


def expert_rows_triton(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    lanes_TK: torch.Tensor | None,
    fanout: int,
    up: GemmConfig,
    down: GemmConfig,
    pre_NJ: torch.Tensor | None = None,
) -> torch.Tensor:
    rows_NH = expert_mlp_triton(
        x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, fanout, up, down, pre_NJ=pre_NJ
    )
    return rows_NH if lanes_TK is None else combine_triton(rows_NH, lanes_TK)


def expert_rows_backward_triton(
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
    configs: GradientConfigs,
    *,
    overwrites_pre: bool = False,
    main_grads: Gradients | None = None,
) -> Gradients:
    """As `expert_rows_backward_torch`.

    Args:
        overwrites_pre: the gradient of the pre-activation takes its place, and its memory is given back at the end.
        main_grads: float32 tensors that gradients of matrices and biases are added to; what has one is returned as None.
    """
    down_SHI, gate_up_SNH = matrices.down_SHI, matrices.gate_up_SNH
    tiles = cut_tiles(
        offsets_L1,
        lane_to_slot_L,
        order_N.shape[0],
        down_SHI.shape[0],
        tile_m=configs.hidden.block_m,
        block_k=configs.weights.block_k,
    )
    wants_pre = wanted.x or wanted.gate_up or wanted.gate_up_bias
    grad_pre_NJ = weighted_NI = grad_row_weights_N = grad_x_RH = None
    if wants_pre:
        grad_pre_NJ = pre_NJ if overwrites_pre else torch.empty_like(pre_NJ)
    if wanted.down:
        weighted_NI = pre_NJ.new_empty((pre_NJ.shape[0], down_SHI.shape[2]))
    if wanted.row_weights:
        grad_row_weights_N = torch.empty_like(row_weights_N)
    experts_grad_hidden(
        grad_GH,
        down_SHI,
        matrices.down_bias_SH,
        pre_NJ,
        row_weights_N,
        lane_to_slot_L,
        order_N,
        tiles,
        grad_fanout,
        matrices.activation,
        configs.hidden,
        grad_pre_NJ=grad_pre_NJ,
        weighted_NI=weighted_NI,
        grad_row_weights_N=grad_row_weights_N,
    )
    if wanted.x:  # first, as its rows are given back before the gradients of weights need memory
        assert grad_pre_NJ is not None
        grad_x_RH = experts_grad_x(
            grad_pre_NJ, gate_up_SNH, lane_to_slot_L, order_N, offsets_L1, tiles, fanout, configs.x
        )

    returned: dict[str, torch.Tensor] = {}

    def target(name: str, like: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Where a gradient goes, and whether it is added."""
        main_grad = None if main_grads is None else getattr(main_grads, name)
        if main_grad is not None:
            return main_grad, True
        returned[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return returned[name], False

    sums = (order_N, offsets_L1, tiles)
    if wanted.gate_up:
        assert grad_pre_NJ is not None and x_RH is not None
        out, adds = target("gate_up_SNH", gate_up_SNH)
        experts_grad_weights(grad_pre_NJ, x_RH, *sums, None, fanout, configs.weights, out_SPQ=out, adds=adds)
    if wanted.gate_up_bias and matrices.gate_up_bias_SN is not None:
        assert grad_pre_NJ is not None
        out, adds = target("gate_up_bias_SN", matrices.gate_up_bias_SN)
        experts_grad_bias(grad_pre_NJ, None, *sums, None, out_SP=out, adds=adds)
    del grad_pre_NJ
    if overwrites_pre:  # given back, although the graph of autograd still holds it
        pre_NJ.untyped_storage().resize_(0)
    # Last: beside the gradients of all weights, rows of H and I need less memory than rows of J and H.
    if wanted.down:
        assert weighted_NI is not None
        out, adds = target("down_SHI", down_SHI)
        experts_grad_weights(grad_GH, weighted_NI, *sums, grad_fanout, None, configs.weights, out_SPQ=out, adds=adds)
    if wanted.down_bias and matrices.down_bias_SH is not None:
        out, adds = target("down_bias_SH", matrices.down_bias_SH)
        experts_grad_bias(grad_GH, row_weights_N, *sums, grad_fanout, out_SP=out, adds=adds)
    empty = Gradients(grad_x_RH, grad_row_weights_N, None, None, None, None)
    return empty._replace(**returned)
