"""Step 5 of a forward with fp8_block experts, on Hopper: `expert_down` by a ring of operands (`fp8_ring.py`).

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_kernels.base.checks import check_tma_address
from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import widen
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.fp8_ring import (
    FILL_REGISTERS,
    MMA,
    MMA_COLUMNS,
    MMA_ROWS,
    REGISTERS,
    ROW_LAYOUT,
    ROWS,
    SIDE,
    fill_tile,
    load_flat,
    load_slot,
    load_tile_of,
    multiply_tile,
    new_ring,
    num_programs,
    weights_descriptor,
)
from moe_kernels.quantised.quantise_rows import QuantisedRows
from moe_kernels.tiles.homes import RowHomes, row_at
from moe_kernels.tiles.tiles import TileSchedule


@gluon.jit
def _fill(
    ring, tiles, hidden, hidden_scale_ptr, down, scale_ptr, lane_to_slot_ptr, sizes, stride_scale,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps."""
    hidden_size, intermediate = sizes
    num_column_blocks, num_groups = gl.cdiv(hidden_size, 2 * SIDE), gl.cdiv(intermediate, SIDE)
    last = gl.cdiv(hidden_size, SIDE) - 1
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    column_block, lane, start, end = load_tile_of(first_program, tiles, num_column_blocks, GROUP_M)
    slot = load_slot(lane_to_slot_ptr, lane)
    # Of the next tile: what a tile needs is a chain of loads, which begins a tile or two before.
    next_block, next_lane, next_start, next_end = load_tile_of(
        first_program + num_programs, tiles, num_column_blocks, GROUP_M
    )
    for program in range(first_program, tiles[3] * num_column_blocks, num_programs):
        next_slot = load_slot(lane_to_slot_ptr, next_lane)
        later_block, later_lane, later_start, later_end = load_tile_of(
            program + 2 * num_programs, tiles, num_column_blocks, GROUP_M
        )
        scale_at = scale_ptr + slot.to(gl.int64) * stride_scale
        first = 2 * column_block
        second = gl.minimum(first + 1, last)  # past the end there are no weights, and any scale does
        count = fill_tile(
            ring, count, None, hidden, hidden_scale_ptr, load_flat(None, start, end), 1, down,
            scale_at + first * num_groups, scale_at + second * num_groups, slot, first * SIDE, (first + 1) * SIDE,
            start, end, 0, intermediate, STAGES,
        )  # fmt: skip
        column_block, start, end, slot = next_block, next_start, next_end, next_slot
        next_block, next_lane, next_start, next_end = later_block, later_lane, later_start, later_end


@gluon.jit
def _store(product, first_column, bias_at, row_weight, rows_at, inside, hidden_size, LAYOUT: gl.constexpr):
    """Add biases to 128 columns, multiply by the routing weights, round, and store."""
    if bias_at is not None:
        column = first_column + gl.arange(0, SIDE, MMA_COLUMNS)
        product += widen(gl.load(bias_at + gl.minimum(column, hidden_size - 1)))[None, :]
    rows = gl.convert_layout((product * row_weight[:, None]).to(rows_at.dtype.element_ty), LAYOUT)
    column = first_column + gl.arange(0, SIDE, gl.SliceLayout(0, LAYOUT))
    gl.store(rows_at[:, None] + column[None, :], rows, mask=inside[:, None] & (column < hidden_size)[None, :])


@gluon.jit
def _load_flat(order_ptr, start, end, HALF: gl.constexpr):
    position = start + HALF * ROWS + gl.arange(0, ROWS, MMA_ROWS)
    return gl.load(order_ptr + position, mask=position < end, other=0)


@gluon.jit
def _multiply(
    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, outputs, sizes, stride_bias,
    HALF: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps, for the first or the second 64 rows of each tile; `outputs`: rows, their homes, and rows of a home."""
    hidden_size, intermediate = sizes
    rows_ptr, homes_ptr, rows_per_home = outputs
    # 16-bit rows are stored 16 bytes at a time, through shared memory; there is no room for 32-bit ones, whose 8 bytes of a
    # thread of the tensor core's layout make whole sectors of 32 with those of its neighbours.
    BITS: gl.constexpr = rows_ptr.dtype.element_ty.primitive_bitwidth
    LAYOUT: gl.constexpr = MMA if BITS == 32 else gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    num_column_blocks = gl.cdiv(hidden_size, 2 * SIDE)
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    column_block, lane, start, end = load_tile_of(first_program, tiles, num_column_blocks, GROUP_M)
    flat = _load_flat(order_ptr, start, end, HALF)
    # Of the next tile: see `_fill`.
    next_block, next_lane, next_start, next_end = load_tile_of(
        first_program + num_programs, tiles, num_column_blocks, GROUP_M
    )
    for program in range(first_program, tiles[3] * num_column_blocks, num_programs):
        next_flat = _load_flat(order_ptr, next_start, next_end, HALF)
        later_block, later_lane, later_start, later_end = load_tile_of(
            program + 2 * num_programs, tiles, num_column_blocks, GROUP_M
        )
        start += HALF * ROWS
        row_weight = gl.load(row_weights_ptr + flat, mask=start + gl.arange(0, ROWS, MMA_ROWS) < end, other=0.0)
        left, right, count = multiply_tile(ring, count, start < end, intermediate, False, HALF, STAGES)
        if start < end:
            bias_at = bias_ptr
            if bias_ptr is not None:
                bias_at = bias_ptr + gl.load(lane_to_slot_ptr + lane).to(gl.int64) * stride_bias
            position = start + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            inside = position < end
            of_rows = gl.convert_layout(flat, gl.SliceLayout(1, LAYOUT))
            rows_at = row_at(rows_ptr, of_rows, hidden_size, homes_ptr, rows_per_home)
            first = 2 * column_block * SIDE
            _store(left, first, bias_at, row_weight, rows_at, inside, hidden_size, LAYOUT)
            _store(right, first + SIDE, bias_at, row_weight, rows_at, inside, hidden_size, LAYOUT)
        column_block, lane, start, end, flat = next_block, next_lane, next_start, next_end, next_flat
        next_block, next_lane, next_start, next_end = later_block, later_lane, later_start, later_end


@Launcher
@gluon.jit(do_not_specialize=["rows_per_home"])
def _expert_down_fp8_kernel(
    # inputs
    hidden,  # descriptor [N, I]
    hidden_scale_ptr,
    down,  # descriptor [S, H, I]
    scale_ptr,
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    row_weights_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    homes_ptr,  # None: all rows go to `rows_ptr`
    # outputs
    rows_ptr,
    # shapes and strides, in elements
    rows_per_home,
    hidden_size,
    intermediate,
    stride_scale,
    stride_bias,
    # constants
    PDL: gl.constexpr,
    # tunables
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Every num_programs-th of: a tile of rows, 256 columns of the output."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ring = new_ring(2, ROWS, 2 * SIDE, 2, STAGES)
    tiles = (tile_lane_ptr, tile_start_ptr, tile_end_ptr, gl.load(num_tiles_ptr))
    outputs = (rows_ptr, homes_ptr, rows_per_home)
    sizes = (hidden_size, intermediate)
    gl.warp_specialize(
        [
            (_multiply, (
                ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, outputs, sizes, stride_bias,
                0, STAGES, GROUP_M,
            )),
            (_multiply, (
                ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, outputs, sizes, stride_bias,
                1, STAGES, GROUP_M,
            )),
            (_fill, (
                ring, tiles, hidden, hidden_scale_ptr, down, scale_ptr, lane_to_slot_ptr, sizes, stride_scale, STAGES, GROUP_M,
            )),
        ],
        [4, 4],
        [REGISTERS, FILL_REGISTERS],
    )  # fmt: skip


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
    """Launches the kernel; arguments as `expert_down`'s and `expert_down_home`'s, and where to write without homes."""
    down_SHI, scale, bias_SH = matrices.down_SHI, matrices.down_scale, matrices.down_bias_SH
    assert scale is not None
    values, num_tiles, hidden_size = hidden_NI.values_RH, schedule.tile_lane.shape[0], matrices.hidden_size
    if not num_tiles:
        return
    weights = weights_descriptor("matrices.down_SHI", down_SHI)
    check_tma_address("hidden_NI.values_RH", values)
    grid = (num_programs(values.device, num_tiles * cdiv(hidden_size, 2 * SIDE.value)),)
    _expert_down_fp8_kernel[grid](
        TensorDescriptor(values, list(values.shape), [values.shape[1], 1], [ROWS.value, SIDE.value], ROW_LAYOUT.value),
        hidden_NI.scale_RG,
        weights,
        scale,
        bias_SH,
        lane_to_slot_L,
        row_weights_N,
        schedule.order_N,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        schedule.num_tiles,
        None if homes is None else homes.addresses_W,
        rows_NH,
        1 if homes is None else homes.rows_per_home,
        hidden_size,
        values.shape[1],
        scale.stride(0),
        0 if bias_SH is None else bias_SH.stride(0),
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=4,
    )
