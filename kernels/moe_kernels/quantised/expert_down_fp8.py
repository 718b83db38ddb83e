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
    HALF,
    LINE_LAYOUT,
    REGISTERS,
    ROW_LAYOUT,
    SIDE,
    fill_tile,
    load_slot,
    load_tile_of,
    load_weights,
    mma_layout,
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
    WAITS: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps."""
    hidden_size, intermediate = sizes
    num_column_blocks, num_steps = gl.cdiv(hidden_size, 2 * SIDE), gl.cdiv(intermediate, SIDE)
    last = gl.cdiv(hidden_size, SIDE) - 1
    num_tiles = tiles[3] * num_column_blocks
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    first_count = 0
    if WAITS:
        column_block, lane, start, end = load_tile_of(first_program, tiles, num_column_blocks, GROUP_M)
        first_row, slot = 2 * column_block * SIDE, load_slot(lane_to_slot_ptr, lane)
        for step in gl.static_range(STAGES):
            exist = (first_program < num_tiles) & (step < num_steps)
            load_weights(ring, down, slot, first_row, first_row + SIDE, step, step, exist)
        first_count = gl.minimum(STAGES, num_steps)
        gdc_wait()
        gdc_launch_dependents()
    count = 0
    for program in range(first_program, num_tiles, num_programs):
        column_block, lane, start, end = load_tile_of(program, tiles, num_column_blocks, GROUP_M)
        slot = load_slot(lane_to_slot_ptr, lane)
        scale_at = scale_ptr + slot.to(gl.int64) * stride_scale
        first = 2 * column_block
        second = gl.minimum(first + 1, last)  # past the end there are no weights, and any scale does
        count = fill_tile(
            ring, count, first_count, None, hidden, hidden_scale_ptr, None, 1, down,
            scale_at + first * num_steps, scale_at + second * num_steps, slot, first * SIDE, (first + 1) * SIDE,
            start, end, 0, intermediate, M, STAGES,
        )  # fmt: skip


@gluon.jit
def _store(
    left, right, first_column, bias_at, row_weight, flat, outputs, num_rows, hidden_size, IS_FEW: gl.constexpr
):  # fmt: skip
    """Add biases to both halves, multiply by the routing weights, round, and store. IS_FEW: they are [columns, rows].

    16-bit rows are stored 16 bytes at a time, through shared memory; there is no room for 32-bit ones, of which threads of the
    tensor core's layout have whole sectors of 32 bytes.
    """
    rows_ptr, homes_ptr, rows_per_home = outputs
    DTYPE: gl.constexpr = rows_ptr.dtype.element_ty
    MMA: gl.constexpr = left.type.layout
    AXIS: gl.constexpr = 0 if IS_FEW else 1  # of columns
    COLUMNS: gl.constexpr = left.shape[AXIS]
    IS_WIDE: gl.constexpr = DTYPE.primitive_bitwidth == 32
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    LAYOUT: gl.constexpr = (left.permute((1, 0)).type.layout if IS_FEW else MMA) if IS_WIDE else NARROW
    row_weight = gl.expand_dims(gl.convert_layout(row_weight, gl.SliceLayout(AXIS, MMA)), AXIS)
    of_rows = gl.convert_layout(flat, gl.SliceLayout(1, LAYOUT))
    rows_at = row_at(rows_ptr, of_rows, hidden_size, homes_ptr, rows_per_home)
    inside = gl.arange(0, left.shape[1 - AXIS], gl.SliceLayout(1, LAYOUT)) < num_rows
    for half in gl.static_range(2):
        product = left if half == 0 else right
        first = first_column + half * SIDE
        if bias_at is not None:
            column = first + gl.arange(0, COLUMNS, gl.SliceLayout(1 - AXIS, MMA))
            product += gl.expand_dims(widen(gl.load(bias_at + gl.minimum(column, hidden_size - 1))), 1 - AXIS)
        rows = (product * row_weight).to(DTYPE)
        if IS_FEW:
            rows = rows.permute((1, 0))
        rows = gl.convert_layout(rows, LAYOUT)
        column = first + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
        gl.store(rows_at[:, None] + column[None, :], rows, mask=inside[:, None] & (column < hidden_size)[None, :])


@gluon.jit
def _multiply(
    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, outputs, sizes, stride_bias,
    GROUP: gl.constexpr, WAITS: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps, for the first or the second half of each tile's rows or, if they are few, of each block of columns.

    `outputs`: rows, their homes, and rows of a home.
    """
    hidden_size, intermediate = sizes
    IS_FEW: gl.constexpr = M < SIDE
    OF_ROWS: gl.constexpr = LINE_LAYOUT if IS_FEW else gl.SliceLayout(1, mma_layout(SIDE))
    num_column_blocks = gl.cdiv(hidden_size, 2 * SIDE)
    if WAITS:
        gdc_wait()
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    next_block, next_lane, next_start, next_end = load_tile_of(first_program, tiles, num_column_blocks, GROUP_M)
    for program in range(first_program, tiles[3] * num_column_blocks, num_programs):
        column_block, lane, start, end = next_block, next_lane, next_start, next_end
        first = 2 * column_block * SIDE
        if IS_FEW:
            first += GROUP * HALF
        else:
            start += GROUP * HALF
        position = start + gl.arange(0, M if IS_FEW else HALF, OF_ROWS)
        flat = gl.load(order_ptr + position, mask=position < end, other=0)
        row_weight = gl.load(row_weights_ptr + flat, mask=position < end, other=0.0)
        next_block, next_lane, next_start, next_end = load_tile_of(
            program + num_programs, tiles, num_column_blocks, GROUP_M
        )
        left, right, count = multiply_tile(ring, count, start < end, intermediate, False, GROUP, M, STAGES)
        if start < end:
            bias_at = bias_ptr
            if bias_ptr is not None:
                bias_at = bias_ptr + load_slot(lane_to_slot_ptr, lane).to(gl.int64) * stride_bias
            _store(left, right, first, bias_at, row_weight, flat, outputs, end - start, hidden_size, IS_FEW)


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
    BEHIND_UP: gl.constexpr,
    # tunables
    M: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Every num_programs-th of: a tile of rows, 256 columns of the output.

    BEHIND_UP: the kernel before is `expert_up`, all of whose programs have waited. So the tiles and slots are older, and they
    and the first weights are read before the wait.
    """
    if PDL and not BEHIND_UP:
        gdc_wait()  # the schedule may be what the kernel before makes
        gdc_launch_dependents()
    WAITS: gl.constexpr = PDL and BEHIND_UP  # where warps part
    ring = new_ring(M, STAGES, True)
    tiles = (tile_lane_ptr, tile_start_ptr, tile_end_ptr, gl.load(num_tiles_ptr, cache_modifier=".cg"))
    outputs = (rows_ptr, homes_ptr, rows_per_home)
    sizes = (hidden_size, intermediate)
    gl.warp_specialize(
        [
            (_multiply, (
                ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, outputs, sizes, stride_bias,
                0, WAITS, M, STAGES, GROUP_M,
            )),
            (_multiply, (
                ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, outputs, sizes, stride_bias,
                1, WAITS, M, STAGES, GROUP_M,
            )),
            (_fill, (
                ring, tiles, hidden, hidden_scale_ptr, down, scale_ptr, lane_to_slot_ptr, sizes, stride_scale,
                WAITS, M, STAGES, GROUP_M,
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
    *,
    behind_up: bool,
) -> None:
    """Launches the kernel; arguments as `expert_down`'s and `expert_down_home`'s, and where to write without homes.

    With `behind_up`, `schedule` and `lane_to_slot_L` must be older than the kernel launched last, as they are if that is
    `expert_up`: they, and weights, are read while it runs.
    """
    down_SHI, scale, bias_SH = matrices.down_SHI, matrices.down_scale, matrices.down_bias_SH
    assert scale is not None
    values, num_tiles, hidden_size = hidden_NI.values_RH, schedule.tile_lane.shape[0], matrices.hidden_size
    if not num_tiles:
        return
    weights = weights_descriptor("matrices.down_SHI", down_SHI)
    check_tma_address("hidden_NI.values_RH", values)
    grid = (num_programs(values.device, num_tiles * cdiv(hidden_size, 2 * SIDE.value)),)
    box = [min(config.block_m, HALF.value), SIDE.value]
    _expert_down_fp8_kernel[grid](
        TensorDescriptor(values, list(values.shape), [values.shape[1], 1], box, ROW_LAYOUT.value),
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
        BEHIND_UP=behind_up,
        M=config.block_m,
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=4,
    )
