"""Step 4 of a forward with fp8_block experts, on Hopper: `expert_up` by a ring of operands (`fp8_ring.py`).

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated, is_gated, widen
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.fp8 import quantised_by
from moe_kernels.quantised.fp8_ring import (
    FILL_REGISTERS,
    HALF,
    REGISTERS,
    SIDE,
    fill_tile,
    load_slot,
    load_tile_of,
    multiply_tile,
    new_ring,
    num_programs,
    weights_descriptor,
)
from moe_kernels.quantised.quantise_rows import QuantisedRows
from moe_kernels.tiles.tiles import TileSchedule


@gluon.jit
def _fill(
    ring, tiles, rows, gate_up, scale_ptr, lane_to_slot_ptr, order_ptr, sizes, strides,
    BLOCKS: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps; `rows`: of x, values and scales."""
    hidden_size, intermediate, fanout = sizes
    stride_row, stride_scale = strides
    x_ptr, x_scale_ptr = rows
    num_blocks, num_steps = gl.cdiv(intermediate, SIDE), gl.cdiv(hidden_size, SIDE)
    num_column_blocks = gl.cdiv(num_blocks, BLOCKS)
    count = 0
    for program in range(gl.program_id(0), tiles[3] * num_column_blocks, gl.num_programs(0)):
        column_block, lane, start, end = load_tile_of(program, tiles, num_column_blocks, GROUP_M)
        slot = load_slot(lane_to_slot_ptr, lane)
        scale_at = scale_ptr + slot.to(gl.int64) * stride_scale
        first = BLOCKS * column_block
        if BLOCKS == 1:
            second, second_row = num_blocks + first, intermediate + first * SIDE
        else:  # past the end there are no weights, and any scale does
            second, second_row = gl.minimum(first + 1, num_blocks - 1), (first + 1) * SIDE
        count = fill_tile(
            ring, count, 0, x_ptr, None, x_scale_ptr, order_ptr, fanout, gate_up,
            scale_at + first * num_steps, scale_at + second * num_steps, slot, first * SIDE, second_row,
            start, end, stride_row, hidden_size, M, STAGES,
        )  # fmt: skip


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
def _largest_of_both(own, meeting, turn, GROUP: gl.constexpr):
    """The largest of each row's 128 values, of which each group of warps has half.

    Both groups write theirs, at one of two places in turn, and read the other's. With barriers of its own for each place, a
    group can't pass one twice before the other has seen it.
    """
    largest, met = meeting
    at = 2 * (turn % 2)
    largest.index(at + GROUP).store(own)
    mbarrier.arrive(met.index(at + GROUP), count=1)
    mbarrier.wait(met.index(at + 1 - GROUP), turn // 2 % 2)
    return gl.maximum(own, largest.index(at + 1 - GROUP).load(own.type.layout))


@gluon.jit
def _store_block(
    hidden, meeting, turn, outputs, start, end, block, intermediate, GROUP: gl.constexpr, IS_FEW: gl.constexpr
):  # fmt: skip
    """Round a group's part of a block of hidden channels, and store it with its scales. IS_FEW: it is [64 channels, rows]."""
    hidden_ptr, hidden_scale_ptr = outputs
    MMA: gl.constexpr = hidden.type.layout
    AXIS: gl.constexpr = 0 if IS_FEW else 1  # of channels
    CHANNELS: gl.constexpr = hidden.shape[AXIS]
    ROWS: gl.constexpr = hidden.shape[1 - AXIS]
    first = block * SIDE + (GROUP * HALF if IS_FEW else 0)
    if first + CHANNELS > intermediate:
        exists = first + gl.arange(0, CHANNELS, gl.SliceLayout(1 - AXIS, MMA)) < intermediate
        hidden = gl.where(gl.expand_dims(exists, 1 - AXIS), hidden, 0.0)
    largest = gl.max(gl.abs(hidden), axis=AXIS)
    if IS_FEW:
        largest = _largest_of_both(largest, meeting, turn, GROUP)
    values, scale = quantised_by(hidden, largest, AXIS)
    if GROUP == 0 or not IS_FEW:
        position = (start + gl.arange(0, ROWS, gl.SliceLayout(AXIS, MMA))).to(gl.int64)
        gl.store(hidden_scale_ptr + position * gl.cdiv(intermediate, SIDE) + block, scale, mask=position < end)
    values = values.to(gl.float8e4nv)
    if IS_FEW:
        values = values.permute((1, 0))
    STORE: gl.constexpr = gl.BlockedLayout([1, 16], [512 // CHANNELS, CHANNELS // 16], [4, 1], [1, 0])
    values = gl.convert_layout(values, STORE)
    position = (start + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))).to(gl.int64)
    column = first + gl.arange(0, CHANNELS, gl.SliceLayout(0, STORE))
    at = hidden_ptr + position[:, None] * intermediate + column[None, :]
    gl.store(at, values, mask=(position < end)[:, None] & (column < intermediate)[None, :])


@gluon.jit
def _with_bias(sums, bias_at, first, size, IS_FEW: gl.constexpr):
    AXIS: gl.constexpr = 0 if IS_FEW else 1  # of columns
    column = first + gl.arange(0, sums.shape[AXIS], gl.SliceLayout(1 - AXIS, sums.type.layout))
    return sums + gl.expand_dims(widen(gl.load(bias_at + gl.minimum(column, size - 1))), 1 - AXIS)


@gluon.jit
def _multiply(
    ring, meeting, tiles, lane_to_slot_ptr, bias_ptr, outputs, sizes, stride_bias,
    GROUP: gl.constexpr, ACTIVATION: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps, for the first or the second half of each tile's rows or, if they are few, of each block of columns."""
    hidden_size, intermediate, _ = sizes
    GATED: gl.constexpr = is_gated(ACTIVATION)
    BLOCKS: gl.constexpr = 1 if GATED else 2
    IS_FEW: gl.constexpr = M < SIDE
    num_column_blocks = gl.cdiv(gl.cdiv(intermediate, SIDE), BLOCKS)
    count = 0
    turn = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    next_block, next_lane, next_start, next_end = load_tile_of(first_program, tiles, num_column_blocks, GROUP_M)
    for program in range(first_program, tiles[3] * num_column_blocks, num_programs):
        column_block, lane, start, end = next_block, next_lane, next_start, next_end
        next_block, next_lane, next_start, next_end = load_tile_of(
            program + num_programs, tiles, num_column_blocks, GROUP_M
        )
        if not IS_FEW:
            start += GROUP * HALF
        left, right, count = multiply_tile(ring, count, start < end, hidden_size, True, GROUP, M, STAGES)
        if start < end:
            block = BLOCKS * column_block
            if bias_ptr is not None:
                bias_at = bias_ptr + load_slot(lane_to_slot_ptr, lane).to(gl.int64) * stride_bias
                first = block * SIDE + (GROUP * HALF if IS_FEW else 0)
                left = _with_bias(left, bias_at, first, intermediate, IS_FEW)
                if GATED:
                    right = _with_bias(right, bias_at + intermediate, first, intermediate, IS_FEW)
                else:
                    right = _with_bias(right, bias_at, first + SIDE, intermediate, IS_FEW)
            if GATED:
                hidden = _activated(left, right, ACTIVATION)
                _store_block(hidden, meeting, turn, outputs, start, end, block, intermediate, GROUP, IS_FEW)
            else:
                hidden = activated(left, left, ACTIVATION)
                _store_block(hidden, meeting, turn, outputs, start, end, block, intermediate, GROUP, IS_FEW)
                if (block + 1) * SIDE < intermediate:
                    turn += 1
                    hidden = activated(right, right, ACTIVATION)
                    _store_block(hidden, meeting, turn, outputs, start, end, block + 1, intermediate, GROUP, IS_FEW)
            turn += 1


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
    M: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Every num_programs-th of: a tile of rows, 128 columns of gate and of up, or 256 of up alone."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ring = new_ring(M, STAGES, False)
    largest = gl.allocate_shared_memory(gl.float32, [4, min(M, HALF)], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    met = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(4):
        mbarrier.init(met.index(place), count=1)
    meeting = (largest, met)
    tiles = (tile_lane_ptr, tile_start_ptr, tile_end_ptr, gl.load(num_tiles_ptr, cache_modifier=".cg"))
    outputs = (hidden_ptr, hidden_scale_ptr)
    sizes = (hidden_size, intermediate, fanout)
    strides = (stride_row, stride_scale)
    rows = (x_ptr, x_scale_ptr)
    BLOCKS: gl.constexpr = 1 if is_gated(ACTIVATION) else 2
    gl.warp_specialize(
        [
            (_multiply, (
                ring, meeting, tiles, lane_to_slot_ptr, bias_ptr, outputs, sizes, stride_bias,
                0, ACTIVATION, M, STAGES, GROUP_M,
            )),
            (_multiply, (
                ring, meeting, tiles, lane_to_slot_ptr, bias_ptr, outputs, sizes, stride_bias,
                1, ACTIVATION, M, STAGES, GROUP_M,
            )),
            (_fill, (
                ring, tiles, rows, gate_up, scale_ptr, lane_to_slot_ptr, order_ptr, sizes, strides,
                BLOCKS, M, STAGES, GROUP_M,
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
        M=config.block_m,
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=4,
    )
