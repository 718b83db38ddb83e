"""Step 4 of a forward, the first grouped GEMM: hidden = act(x Wg^T) * (x Wu^T), each row with its lane's weights.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_integer, check_kind, check_tensor, check_tma
from moe_kernels.base.registered import registered_op
from moe_kernels.gemms.expert_up_triton import expert_up_triton
from moe_kernels.operands.activation import gated, ungated
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.quantise_rows import (
    QuantisedRows,
    Rows,
    as_rows,
    check_values,
    new_quantised_rows,
    quantise_rows,
    quantise_rows_torch,
    values_of,
)
from moe_kernels.tiles.row_blocks import RowBlock, elementwise, padded_rows, row_blocks, without_autocast
from moe_kernels.tiles.tiles import TileSchedule


def _product(x: torch.Tensor, block: RowBlock, bias_SN: torch.Tensor | None) -> torch.Tensor:
    """The block's rows times its weights, plus the bias; padded, in float32 (or float64)."""
    product = F.linear(x, block.matrix)
    if bias_SN is not None:
        product[:, : bias_SN.shape[1]] += bias_SN[block.slot].to(product.dtype)
    return product


@without_autocast
def expert_up_torch(
    x_RH: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    *,
    fanout: int,
    pre_NJ: torch.Tensor | None = None,
) -> Rows:
    """Reference of `expert_up`; its bits do not depend on a `GemmConfig`. Rows of no tile become zero.

    Into `pre_NJ`, if given, it writes what the activation gets: gate and up with their biases.
    """
    order_N, activation, intermediate = schedule.order_N, matrices.activation, matrices.intermediate_size
    is_fp8, dtype = matrices.scheme == "fp8_block", x_RH.dtype
    if is_fp8 and isinstance(x_RH, torch.Tensor):
        x_RH = QuantisedRows(*quantise_rows_torch(x_RH), dtype)
    x = x_RH.dequantised() if isinstance(x_RH, QuantisedRows) else x_RH
    hidden_NI = x.new_zeros((order_N.shape[0], intermediate), dtype=x.dtype if is_fp8 else dtype)
    matrix_of = partial(matrices.gate_up_of, dtype=dtype)
    for block in row_blocks(matrix_of, lane_to_slot_L, schedule.offsets_L1):
        source = order_N[block.rows] // fanout
        product = _product(padded_rows(x[source], block.matrix.shape[1]), block, matrices.gate_up_bias_SN)
        if pre_NJ is not None:
            pre_NJ[block.rows] = product[: source.shape[0], : pre_NJ.shape[1]].to(pre_NJ.dtype)
        first, second = product[:, :intermediate], product[:, intermediate : 2 * intermediate]
        if matrices.is_gated:
            hidden = elementwise(lambda gate, up: gated(activation, gate, up), first, second)
        else:
            hidden = elementwise(lambda up: ungated(activation, up), first)
        hidden_NI[block.rows] = hidden[: source.shape[0]].to(hidden_NI.dtype)
    return QuantisedRows(*quantise_rows_torch(hidden_NI), dtype) if is_fp8 else hidden_NI


@registered_op("moe_kernels::expert_up")
def _expert_up(
    x_RH: torch.Tensor,
    x_scale_RG: torch.Tensor | None,
    dtype: torch.dtype,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
    backend: str,
) -> list[torch.Tensor]:
    """Hidden; of fp8_block its values and its scale."""
    rows = as_rows(x_RH, x_scale_RG, dtype)
    if backend == "triton":
        hidden = expert_up_triton(rows, matrices, lane_to_slot_L, schedule, fanout, config)
    else:
        hidden = expert_up_torch(rows, matrices, lane_to_slot_L, schedule, fanout=fanout)
    return [*hidden[:2]] if isinstance(hidden, QuantisedRows) else [hidden]


@_expert_up.register_fake
def _expert_up_fake(x_RH, x_scale_RG, dtype, matrices, lane_to_slot_L, schedule, *_):
    num_rows, intermediate = schedule.order_N.shape[0], matrices.intermediate_size
    if matrices.scheme == "fp8_block":
        return [*new_quantised_rows(x_RH, num_rows, intermediate, dtype)[:2]]
    return [x_RH.new_empty((num_rows, intermediate))]


def check_up(
    x_RH: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
) -> int:
    """`fanout`; raises ValueError unless the arguments are `expert_up`'s."""
    check_kind("matrices", matrices, ExpertMatrices)
    check_kind("schedule", schedule, TileSchedule)
    check_kind("config", config, GemmConfig)
    fanout = check_integer("fanout", fanout)
    values = check_values("x_RH", x_RH)
    device, num_rows = values.device, values.shape[0]
    if isinstance(x_RH, QuantisedRows) and matrices.scheme != "fp8_block":
        raise ValueError(f"x_RH is quantised: matrices.scheme must be 'fp8_block', not {matrices.scheme!r}")
    matrices.check_up(values.shape[1], x_RH.dtype, device)
    check_tensor("lane_to_slot_L", lane_to_slot_L, (schedule.offsets_L1.shape[0] - 1,), torch.int32, device)
    if fanout < 1:
        raise ValueError(f"fanout={fanout}: must be at least 1")
    check_tensor("schedule.order_N", schedule.order_N, (num_rows * fanout,), torch.int32, device)
    schedule.check_config(config)
    matrices.check_config(config, "up")
    if config.tma and matrices.scheme in ("plain", "fp8_block"):
        check_tma("matrices.gate_up_SNH", matrices.gate_up_SNH, columns=matrices.intermediate_size)
    return fanout


def expert_up(
    x_RH: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    *,
    fanout: int,
    config: GemmConfig,
    backend: str = "auto",
) -> Rows:
    """Gate and up projection of every scheduled row with their biases, and the activation.

    Products and activation are in float32; the result is rounded once. Not differentiable: see `expert_rows`.

    Args:
        x_RH: [R, H] float32, float16 or bfloat16; the flat row n reads the row n // fanout. Rows may be padded. Experts of
            the scheme fp8_block also take `QuantisedRows`; of others they quantise each row once.
        matrices: of the dtype of x, or quantised; the gate and up projection and the activation are used.
        lane_to_slot_L: [L] int32, contiguous; read on the device. Entries of lanes without rows are not used.
        schedule: of the R * fanout flat rows.
        fanout: flat rows per source row: K before a dispatch, 1 after it.
        config: tile sizes; `config.block_m` and `config.schedule_extra_m` must be the schedule's.
        backend: see `resolve_backend`.

    Returns:
        hidden_NI [N, I] of the dtype of x, in the schedule's sorted order; `QuantisedRows` of the scheme fp8_block, which are
        rounded from float32. Rows after the last scheduled one are undefined.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    fanout = check_up(x_RH, matrices, lane_to_slot_L, schedule, fanout, config)
    backend = resolve_backend(backend, values_of(x_RH).device)
    if matrices.scheme == "fp8_block" and not isinstance(x_RH, QuantisedRows):
        x_RH = quantise_rows(x_RH, backend=backend)
    values, scale_RG = x_RH[:2] if isinstance(x_RH, QuantisedRows) else (x_RH, None)
    arguments = (values, scale_RG, x_RH.dtype, matrices, lane_to_slot_L, schedule, fanout, config, backend)
    hidden = _expert_up(*arguments)
    return hidden[0] if len(hidden) == 1 else QuantisedRows(hidden[0], hidden[1], x_RH.dtype)
