"""Step 4 of a forward with fp8_block experts, on Hopper: `expert_up` by a ring of operands (`fp8_ring.py`).

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated, is_gated, widen
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.fp8 import quantised_fast
from moe_kernels.quantised.fp8_ring import (
    FILL_REGISTERS,
    MMA_COLUMNS,
    MMA_ROWS,
    REGISTERS,
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
from moe_kernels.tiles.tiles import TileSchedule

_STORE = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _fill(
    ring, tiles, rows, gate_up, scale_ptr, lane_to_slot_ptr, order_ptr, sizes, strides,
    GATED: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps; `rows`: of x, values and scales."""
    hidden_size, intermediate, fanout = sizes
    stride_row, stride_scale = strides
    x_ptr, x_scale_ptr = rows
    BLOCKS: gl.constexpr = 1 if GATED else 2
    num_blocks, num_groups = gl.cdiv(intermediate, SIDE), gl.cdiv(hidden_size, SIDE)
    num_column_blocks = gl.cdiv(num_blocks, BLOCKS)
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    column_block, lane, start, end = load_tile_of(first_program, tiles, num_column_blocks, GROUP_M)
    slot = load_slot(lane_to_slot_ptr, lane)
    flat = load_flat(order_ptr, start, end)
    # Of the next tile: what a tile needs is a chain of loads, which begins a tile or two before.
    next_block, next_lane, next_start, next_end = load_tile_of(
        first_program + num_programs, tiles, num_column_blocks, GROUP_M
    )
    for program in range(first_program, tiles[3] * num_column_blocks, num_programs):
        next_slot = load_slot(lane_to_slot_ptr, next_lane)
        next_flat = load_flat(order_ptr, next_start, next_end)
        later_block, later_lane, later_start, later_end = load_tile_of(
            program + 2 * num_programs, tiles, num_column_blocks, GROUP_M
        )
        scale_at = scale_ptr + slot.to(gl.int64) * stride_scale
        first = BLOCKS * column_block
        if GATED:
            second, second_row = num_blocks + first, intermediate + first * SIDE
        else:  # past the end there are no weights, and any scale does
            second, second_row = gl.minimum(first + 1, num_blocks - 1), (first + 1) * SIDE
        count = fill_tile(
            ring, count, x_ptr, None, x_scale_ptr, flat, fanout, gate_up,
            scale_at + first * num_groups, scale_at + second * num_groups, slot, first * SIDE, second_row,
            start, end, stride_row, hidden_size, STAGES,
        )  # fmt: skip
        column_block, start, end, slot, flat = next_block, next_start, next_end, next_slot, next_flat
        next_block, next_lane, next_start, next_end = later_block, later_lane, later_start, later_end


@gluon.jit
def _load_bias(bias_at, column, size):
    return widen(gl.load(bias_at + gl.minimum(column, size - 1)))[None, :]


@gluon.jit
def _approximately(x, FUNCTION: gl.constexpr):
    return gl.inline_asm_elementwise(
        FUNCTION + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _activated(gate, up, ACTIVATION: gl.constexpr):
    """`activated`, SiLU in half of the instructions: with the same bits unless 0 < |gate| < 2 ** -124."""
    if ACTIVATION == "silu":
        # A quarter of each denominator, whose reciprocal is never a denormal number: a division scales large ones only.
        denominator = gl.fma(_approximately(gate * -1.4426950408889634, "ex2"), 0.25, 0.25)
        return gate * 0.25 * _approximately(denominator, "rcp") * up
    else:
        return activated(gate, up, ACTIVATION)


@gluon.jit
def _store_block(hidden, outputs, start, end, block, intermediate):
    """Round 64 rows of a group of hidden channels and store them with their scales."""
    hidden_ptr, hidden_scale_ptr = outputs
    column = block * SIDE + gl.arange(0, SIDE, MMA_COLUMNS)
    if (block + 1) * SIDE > intermediate:
        hidden = gl.where((column < intermediate)[None, :], hidden, 0.0)
    values, scale = quantised_fast(hidden)
    position = (start + gl.arange(0, ROWS, MMA_ROWS)).to(gl.int64)
    gl.store(hidden_scale_ptr + position * gl.cdiv(intermediate, SIDE) + block, scale, mask=position < end)
    values = gl.convert_layout(values.to(gl.float8e4nv), _STORE)
    position = (start + gl.arange(0, ROWS, gl.SliceLayout(1, _STORE))).to(gl.int64)
    column = block * SIDE + gl.arange(0, SIDE, gl.SliceLayout(0, _STORE))
    at = hidden_ptr + position[:, None] * intermediate + column[None, :]
    gl.store(at, values, mask=(position < end)[:, None] & (column < intermediate)[None, :])


@gluon.jit
def _multiply(
    ring, tiles, lane_to_slot_ptr, bias_ptr, outputs, sizes, stride_bias,
    HALF: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps, for the first or the second 64 rows of each tile."""
    hidden_size, intermediate, _ = sizes
    GATED: gl.constexpr = is_gated(ACTIVATION)
    BLOCKS: gl.constexpr = 1 if GATED else 2
    num_column_blocks = gl.cdiv(gl.cdiv(intermediate, SIDE), BLOCKS)
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    next_block, next_lane, next_start, next_end = load_tile_of(first_program, tiles, num_column_blocks, GROUP_M)
    for program in range(first_program, tiles[3] * num_column_blocks, num_programs):
        column_block, lane, start, end = next_block, next_lane, next_start, next_end
        next_block, next_lane, next_start, next_end = load_tile_of(
            program + num_programs, tiles, num_column_blocks, GROUP_M
        )
        start += HALF * ROWS
        left, right, count = multiply_tile(ring, count, start < end, hidden_size, True, HALF, STAGES)
        if start < end:
            block = BLOCKS * column_block
            if bias_ptr is not None:
                bias_at = bias_ptr + gl.load(lane_to_slot_ptr + lane).to(gl.int64) * stride_bias
                column = block * SIDE + gl.arange(0, SIDE, MMA_COLUMNS)
                left += _load_bias(bias_at, column, intermediate)
                if GATED:
                    right += _load_bias(bias_at + intermediate, column, intermediate)
                else:
                    right += _load_bias(bias_at, column + SIDE, intermediate)
            if GATED:
                _store_block(_activated(left, right, ACTIVATION), outputs, start, end, block, intermediate)
            else:
                _store_block(activated(left, left, ACTIVATION), outputs, start, end, block, intermediate)
                if (block + 1) * SIDE < intermediate:
                    _store_block(activated(right, right, ACTIVATION), outputs, start, end, block + 1, intermediate)


@Launcher
@gluon.jit
def _expert_up_fp8_kernel(
    # inputs
    x_ptr,
    x_scale_ptr,
    gate_up,  # descriptor [S, 2I, H], or [S, I, H] without a gate
    scale_ptr,
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    # outputs
    hidden_ptr,
    hidden_scale_ptr,
    # shapes and strides, in elements
    hidden_size,
    intermediate,
    fanout,
    stride_row,
    stride_scale,
    stride_bias,
    # constants
    PDL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    # tunables
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Every num_programs-th of: a tile of rows, 128 columns of gate and of up, or 256 of up alone."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ring = new_ring(2, ROWS, 2 * SIDE, 2, STAGES)
    tiles = (tile_lane_ptr, tile_start_ptr, tile_end_ptr, gl.load(num_tiles_ptr))
    outputs = (hidden_ptr, hidden_scale_ptr)
    sizes = (hidden_size, intermediate, fanout)
    strides = (stride_row, stride_scale)
    rows = (x_ptr, x_scale_ptr)
    GATED: gl.constexpr = is_gated(ACTIVATION)
    gl.warp_specialize(
        [
            (_multiply, (
                ring, tiles, lane_to_slot_ptr, bias_ptr, outputs, sizes, stride_bias, 0, ACTIVATION, STAGES, GROUP_M,
            )),
            (_multiply, (
                ring, tiles, lane_to_slot_ptr, bias_ptr, outputs, sizes, stride_bias, 1, ACTIVATION, STAGES, GROUP_M,
            )),
            (_fill, (
                ring, tiles, rows, gate_up, scale_ptr, lane_to_slot_ptr, order_ptr, sizes, strides, GATED, STAGES, GROUP_M,
            )),
        ],
        [4, 4],
        [REGISTERS, FILL_REGISTERS],
    )  # fmt: skip


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
    gate_up_SNH, scale, bias_SN = matrices.gate_up_SNH, matrices.gate_up_scale, matrices.gate_up_bias_SN
    assert scale is not None
    num_tiles, intermediate = schedule.tile_lane.shape[0], matrices.intermediate_size
    if not num_tiles:
        return
    weights = weights_descriptor("matrices.gate_up_SNH", gate_up_SNH)
    columns = SIDE.value if matrices.is_gated else 2 * SIDE.value
    grid = (num_programs(x_RH.device, num_tiles * cdiv(intermediate, columns)),)
    _expert_up_fp8_kernel[grid](
        x_RH.values_RH,
        x_RH.scale_RG,
        weights,
        scale,
        bias_SN,
        lane_to_slot_L,
        schedule.order_N,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        schedule.num_tiles,
        hidden_NI.values_RH,
        hidden_NI.scale_RG,
        x_RH.values_RH.shape[1],
        intermediate,
        fanout,
        x_RH.values_RH.stride(0),
        scale.stride(0),
        0 if bias_SN is None else bias_SN.stride(0),
        ACTIVATION=matrices.activation,
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=4,
    )
