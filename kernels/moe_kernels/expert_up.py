"""Step 4 of a forward, the first grouped GEMM: hidden = act(x Wg^T) * (x Wu^T), each row with its lane's weights.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_kernels.activation import gated, ungated
from moe_kernels.backend import resolve_backend
from moe_kernels.checks import FLOATS, check_rows, check_tensor, check_tma
from moe_kernels.config import GemmConfig
from moe_kernels.expert_up_triton import expert_up_triton
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.registered import registered_op
from moe_kernels.row_blocks import RowBlock, elementwise, padded_rows, row_blocks, without_autocast
from moe_kernels.tiles import TileSchedule


def _product(x: torch.Tensor, block: RowBlock, bias_SN: torch.Tensor | None) -> torch.Tensor:
    """The block's rows times its weights, plus the bias; padded, in float32 (or float64)."""
    product = F.linear(x, block.matrix)
    if bias_SN is not None:
        product[:, : bias_SN.shape[1]] += bias_SN[block.slot].to(product.dtype)
    return product


@without_autocast
def expert_up_torch(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    *,
    fanout: int,
    pre_NJ: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `expert_up`; its bits do not depend on a `GemmConfig`. Rows of no tile become zero.

    Into `pre_NJ`, if given, it writes what the activation gets: gate and up with their biases.
    """
    gate_up_SNH, order_N, activation = matrices.gate_up_SNH, schedule.order_N, matrices.activation
    intermediate = matrices.down_SHI.shape[2]
    hidden_NI = x_RH.new_zeros((order_N.shape[0], intermediate))
    for block in row_blocks(gate_up_SNH, lane_to_slot_L, schedule.offsets_L1):
        source = order_N[block.rows] // fanout
        product = _product(padded_rows(x_RH[source], block.matrix.shape[1]), block, matrices.gate_up_bias_SN)
        if pre_NJ is not None:
            pre_NJ[block.rows] = product[: source.shape[0], : pre_NJ.shape[1]].to(pre_NJ.dtype)
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

    Products and activation are in float32; the result is rounded once. Not differentiable: see `expert_rows`.

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
