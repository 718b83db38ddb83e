"""Steps 4 and 5 of a forward with fp8_block experts, on Hopper: launches of the kernel in `experts_fp8_kernel.py`.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.ragged_tma import create_ragged_descriptor

from moe_kernels.base.checks import check_tma_address
from moe_kernels.base.integers import cdiv
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.experts_fp8_kernel import experts_fp8_kernel
from moe_kernels.quantised.fp8_ring import HALF, ROW_LAYOUT, SIDE, STAGED_LAYOUT, num_programs, weights_descriptor
from moe_kernels.quantised.quantise_rows import QuantisedRows, new_quantised_rows, quantise_rows_triton
from moe_kernels.tiles.homes import RowHomes
from moe_kernels.tiles.tiles import TileSchedule


def _launch(
    x_RH: QuantisedRows | None,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
    hidden_NI: QuantisedRows,
    row_weights_N: torch.Tensor | None = None,
    homes: RowHomes | None = None,
    rows_NH: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Of `expert_up` if there is `x_RH`, and of `expert_down` if there is `rows_NH`; for both, zeros in `counters`."""
    values, hidden_scale = hidden_NI.values_RH, hidden_NI.scale_RG
    num_tiles, hidden_size, intermediate = schedule.tile_lane.shape[0], matrices.hidden_size, values.shape[1]
    if not num_tiles:
        return
    gate_up, gate_up_scale, up_bias = None, matrices.gate_up_scale, matrices.gate_up_bias_SN
    down, down_scale, down_bias = None, matrices.down_scale, matrices.down_bias_SH
    assert gate_up_scale is not None and down_scale is not None
    work = 0
    if x_RH is not None:
        gate_up = weights_descriptor("matrices.gate_up_SNH", matrices.gate_up_SNH)
        work += cdiv(intermediate, SIDE.value if matrices.is_gated else 2 * SIDE.value)
    if rows_NH is not None:
        down = weights_descriptor("matrices.down_SHI", matrices.down_SHI)
        work += cdiv(hidden_size, 2 * SIDE.value)
    check_tma_address("hidden_NI.values_RH", values)
    boxes = None
    if schedule.places_N is not None and rows_NH is not None:
        assert homes is None and config.sorts_rows and rows_NH.dtype.itemsize == 2
        boxes = _boxes(rows_NH)
    box = [min(config.block_m, HALF.value), SIDE.value]
    x, x_scale = (None, None) if x_RH is None else x_RH[:2]
    experts_fp8_kernel[num_programs(values.device, num_tiles * work),](
        TensorDescriptor(values, list(values.shape), [intermediate, 1], box, ROW_LAYOUT.value),
        x,
        x_scale,
        gate_up,
        gate_up_scale,
        up_bias,
        down,
        down_scale,
        down_bias,
        lane_to_slot_L,
        row_weights_N,
        schedule.order_N,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        schedule.num_tiles,
        None if homes is None else homes.addresses_W,
        boxes,
        counters,
        values,
        hidden_scale,
        rows_NH,
        1 if homes is None else homes.rows_per_home,
        0 if x is None else x.stride(0),
        gate_up_scale.stride(0),
        down_scale.stride(0),
        0 if up_bias is None else up_bias.stride(0),
        0 if down_bias is None else down_bias.stride(0),
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=intermediate,
        FANOUT=fanout,
        UP=x_RH is not None,
        DOWN=rows_NH is not None,
        ACTIVATION=matrices.activation,
        M=config.block_m,
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=4,
    )


def _boxes(rows_NH: torch.Tensor) -> TensorDescriptor:
    """Of 64 rows or fewer, and 128 columns."""
    ragged = create_ragged_descriptor(rows_NH, [HALF.value, SIDE.value])
    return TensorDescriptor(rows_NH, ragged.shape, ragged.strides, ragged.block_shape, STAGED_LAYOUT.value)


def expert_up_fp8(
    x_RH: QuantisedRows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
    hidden_NI: QuantisedRows,
) -> None:
    """Launches the kernel; arguments as `expert_up`'s, and where to write."""
    _launch(x_RH, matrices, lane_to_slot_L, schedule, fanout, config, hidden_NI)


def expert_down_fp8(
    hidden_NI: QuantisedRows,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
    homes: RowHomes | None,
    rows_NH: torch.Tensor,
) -> None:
    """Launches the kernel; arguments as `expert_down`'s and `expert_mlp_home`'s, and where to write without homes."""
    _launch(None, matrices, lane_to_slot_L, schedule, 1, config, hidden_NI, row_weights_N, homes, rows_NH)


def experts_fp8(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    fanout: int,
    config: GemmConfig,
    homes: RowHomes | None = None,
) -> torch.Tensor:
    """rows_NH: of `expert_up` and then `expert_down`, by one kernel; x is quantised by one before it.

    With `schedule.places_N`, 16-bit rows are where they are sorted, as `expert_down_tma`'s.
    """
    num_rows, dtype = schedule.order_N.shape[0], x_RH.dtype
    counters = x_RH.new_empty(1 + schedule.tile_lane.shape[0], dtype=torch.int32)
    x = QuantisedRows(*quantise_rows_triton(x_RH, zeroed=counters), dtype)
    hidden_NI = new_quantised_rows(x_RH, num_rows, matrices.intermediate_size, dtype)
    rows_NH = x_RH.new_empty((num_rows, matrices.hidden_size)) if homes is None else homes.own
    _launch(x, matrices, lane_to_slot_L, schedule, fanout, config, hidden_NI, row_weights_N, homes, rows_NH, counters)
    return rows_NH
