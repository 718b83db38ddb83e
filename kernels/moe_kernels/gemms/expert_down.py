"""Step 5 of a forward, the second grouped GEMM: rows = (hidden Wd^T) * routing weight, in flat order.

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_kind, check_tensor, check_tma
from moe_kernels.base.registered import registered_op
from moe_kernels.gemms.expert_down_triton import expert_down_triton
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.quantise_rows import QuantisedRows, Rows, as_rows, check_values
from moe_kernels.tiles.row_blocks import padded_rows, row_blocks, without_autocast
from moe_kernels.tiles.tiles import TileSchedule


@without_autocast
def expert_down_torch(
    hidden_NI: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
) -> torch.Tensor:
    """Reference of `expert_down`; its bits do not depend on a `GemmConfig`. Rows of no tile become zero."""
    order_N, columns, dtype = schedule.order_N, matrices.hidden_size, hidden_NI.dtype
    hidden = hidden_NI.dequantised() if isinstance(hidden_NI, QuantisedRows) else hidden_NI
    rows_NH = hidden.new_zeros((order_N.shape[0], columns), dtype=dtype)
    matrix_of = partial(matrices.down_of, dtype=dtype)
    for block in row_blocks(matrix_of, lane_to_slot_L, schedule.offsets_L1):
        flat = order_N[block.rows]
        product = F.linear(padded_rows(hidden[block.rows], block.matrix.shape[1]), block.matrix)
        if matrices.down_bias_SH is not None:
            product[:, :columns] += matrices.down_bias_SH[block.slot].to(product.dtype)
        rows = product[: flat.shape[0], :columns] * row_weights_N[flat, None]
        rows_NH[flat] = rows.to(dtype)
    return rows_NH


@registered_op("moe_kernels::expert_down")
def _expert_down(
    hidden_NI: torch.Tensor,
    hidden_scale_NG: torch.Tensor | None,
    dtype: torch.dtype,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
    backend: str,
) -> torch.Tensor:
    hidden = as_rows(hidden_NI, hidden_scale_NG, dtype)
    arguments = (hidden, matrices, lane_to_slot_L, schedule, row_weights_N)
    return expert_down_triton(*arguments, config) if backend == "triton" else expert_down_torch(*arguments)


@_expert_down.register_fake
def _expert_down_fake(hidden_NI, hidden_scale_NG, dtype, matrices, *_):
    return hidden_NI.new_empty((hidden_NI.shape[0], matrices.hidden_size), dtype=dtype)


def check_down(
    num_columns: int,
    dtype: torch.dtype,
    device: torch.device,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
) -> None:
    """Raises ValueError unless the arguments are `expert_down`'s, with hidden rows of `num_columns` that mean `dtype`."""
    check_kind("schedule", schedule, TileSchedule)
    check_kind("config", config, GemmConfig)
    matrices.check_down(num_columns, dtype, device)
    check_tensor("lane_to_slot_L", lane_to_slot_L, (schedule.offsets_L1.shape[0] - 1,), torch.int32, device)
    check_tensor("row_weights_N", row_weights_N, (schedule.order_N.shape[0],), torch.float32, device)
    schedule.check_config(config)
    matrices.check_config(config, "down")
    if config.tma and matrices.scheme in ("plain", "fp8_block"):
        check_tma("matrices.down_SHI", matrices.down_SHI)


def expert_down(
    hidden_NI: Rows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    *,
    config: GemmConfig,
    backend: str = "auto",
) -> torch.Tensor:
    """Down projection of every scheduled row with its bias, times its routing weight, scattered to flat order.

    The product and the scaling are in float32; the result is rounded once. Not differentiable: see `expert_rows`.

    Args:
        hidden_NI: [N, I] float32, float16 or bfloat16, in the schedule's sorted order: what `expert_up` returns. Of the scheme
            fp8_block it is `QuantisedRows`.
        matrices: of the same dtype, or quantised; the down projection is used.
        lane_to_slot_L: [L] int32, contiguous; read on the device. Entries of lanes without rows are not used.
        schedule: of the N flat rows.
        row_weights_N: [N] float32, contiguous, in flat order.
        config: tile sizes; `config.block_m` and `config.schedule_extra_m` must be the schedule's.
        backend: see `resolve_backend`.

    Returns:
        rows_NH [N, H] of the dtype of hidden, in flat order. Rows with lane -1 are undefined: `combine` skips them.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_kind("matrices", matrices, ExpertMatrices)
    values = check_values("hidden_NI", hidden_NI)
    if isinstance(hidden_NI, QuantisedRows) != (matrices.scheme == "fp8_block"):
        raise ValueError(
            f"hidden_NI is a {type(hidden_NI).__name__}: must be QuantisedRows with matrices.scheme='fp8_block', a tensor "
            f"else, not with {matrices.scheme!r}"
        )
    arguments = (matrices, lane_to_slot_L, schedule, row_weights_N, config)
    check_down(values.shape[1], hidden_NI.dtype, values.device, *arguments)
    check_tensor("schedule.order_N", schedule.order_N, (values.shape[0],), torch.int32, values.device)
    scale_NG = hidden_NI.scale_RG if isinstance(hidden_NI, QuantisedRows) else None
    return _expert_down(values, scale_NG, hidden_NI.dtype, *arguments, resolve_backend(backend, values.device))
