"""Step 4 of a forward with 4-bit experts, on Hopper: `expert_up` by a ring of operands (`four_bit_ring.py`).

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
from moe_kernels.quantised.four_bit_products import multiply_tile, part_of
from moe_kernels.quantised.four_bit_ring import (
    SIDE,
    fill_tile,
    load_tile_of,
    new_ring,
    ring_constants,
    ring_descriptors,
    ring_programs,
    rows_descriptor,
)
from moe_kernels.quantised.fp8_ring import load_slot
from moe_kernels.tiles.gather_sorted import gather_sorted
from moe_kernels.tiles.tiles import TileSchedule

_ROWS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _fill(
    ring, tiles, rows, extra, gate_up, scale, zero, lane_to_slot_ptr,
    HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """One warp."""
    COLUMNS: gl.constexpr = GROUPS * SIDE // PARTS
    NUM_BLOCKS: gl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    column_block, lane, start, end = load_tile_of(first_program, tiles, NUM_BLOCKS, GROUP_M)
    slot = load_slot(lane_to_slot_ptr, lane)
    # Of the next tile: what a tile needs is a chain of loads, which begins a tile or two before.
    next_block, next_lane, next_start, next_end = load_tile_of(first_program + num_programs, tiles, NUM_BLOCKS, GROUP_M)
    for program in range(first_program, tiles[3] * NUM_BLOCKS, num_programs):
        next_slot = load_slot(lane_to_slot_ptr, next_lane)
        later_block, later_lane, later_start, later_end = load_tile_of(
            program + 2 * num_programs, tiles, NUM_BLOCKS, GROUP_M
        )
        count = fill_tile(
            ring, count, rows, extra, gate_up, scale, zero, slot, column_block * COLUMNS, INTERMEDIATE, start, end,
            HIDDEN_SIZE, GROUP, PARTS, GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES,
        )  # fmt: skip
        column_block, start, end, slot = next_block, next_start, next_end, next_slot
        next_block, next_lane, next_start, next_end = later_block, later_lane, later_start, later_end


@gluon.jit
def _load_bias(bias_ptr, first, INTERMEDIATE: gl.constexpr, ROWS: gl.constexpr):
    column = gl.minimum(first + gl.arange(0, ROWS, _ROWS), INTERMEDIATE - 1)
    return widen(gl.load(bias_ptr + column))


@gluon.jit
def _add_bias(values, bias):
    return values + gl.convert_layout(bias, gl.SliceLayout(1, values.type.layout))[:, None]


@gluon.jit
def _store(
    product, gate_bias, up_bias, hidden_ptr, start, end, first, INTERMEDIATE: gl.constexpr, PARTS: gl.constexpr,
    ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Biases and activation of sums [64, M], M at most 64; stored at sorted rows from `start` and columns from `first` on."""
    M: gl.constexpr = product.shape[1]
    ROWS: gl.constexpr = SIDE // PARTS
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // ROWS, ROWS // 8], [4, 1], [1, 0])
    gate = product
    up = product
    if PARTS == 2:
        gate, up = product.reshape(4, 2, 8, M).permute(0, 2, 3, 1).split()
        gate, up = gate.reshape(32, M), up.reshape(32, M)
    if up_bias is not None:
        up = _add_bias(up, up_bias)
        gate = _add_bias(gate, gate_bias) if PARTS == 2 else up
    hidden = gl.convert_layout(activated(gate, up, ACTIVATION).to(DTYPE).permute(1, 0), STORE)
    position = (start + gl.arange(0, M, gl.SliceLayout(1, STORE))).to(gl.int64)
    column = first + gl.arange(0, ROWS, gl.SliceLayout(0, STORE))
    at = hidden_ptr + position[:, None] * INTERMEDIATE + column[None, :]
    gl.store(at, hidden, mask=(position < end)[:, None] & (column < INTERMEDIATE)[None, :])


@gluon.jit
def _tile(
    ring, count, gate_bias, up_bias, hidden_ptr, start, end, first, HAND: gl.constexpr,
    HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, SCHEME: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
    PARTS: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M + EXTRA_M rows. Returns the next `count`."""
    product, extra, count = multiply_tile(
        ring, count, HIDDEN_SIZE, HAND, SCHEME, GROUP, ZEROS, PARTS, GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, DTYPE
    )
    for number in gl.static_range((BLOCK_M + 63) // 64):
        _store(
            part_of(product, number), gate_bias, up_bias, hidden_ptr, start + 64 * number, end, first, INTERMEDIATE, PARTS,
            ACTIVATION, DTYPE,
        )  # fmt: skip
    if EXTRA_M > 0:
        _store(
            extra, gate_bias, up_bias, hidden_ptr, start + BLOCK_M, end, first, INTERMEDIATE, PARTS, ACTIVATION, DTYPE
        )
    return count


@gluon.jit
def _multiply(
    ring, tiles, lane_to_slot_ptr, bias_ptr, hidden_ptr, stride_bias, HAND: gl.constexpr,
    HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, SCHEME: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
    PARTS: gl.constexpr, GROUPS: gl.constexpr, TAIL_M: gl.constexpr, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Four warps, for 64 rows of each tile's weights: 32 of gate and of up, interleaved by eight; or 64 of up alone."""
    ROWS: gl.constexpr = SIDE // PARTS
    COLUMNS: gl.constexpr = GROUPS * ROWS
    NUM_BLOCKS: gl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    next_block, next_lane, next_start, next_end = load_tile_of(first_program, tiles, NUM_BLOCKS, GROUP_M)
    next_slot = load_slot(lane_to_slot_ptr, next_lane)
    for program in range(first_program, tiles[3] * NUM_BLOCKS, num_programs):
        column_block, slot, start, end = next_block, next_slot, next_start, next_end
        # What a tile's end needs is a chain of loads, which begins a tile before.
        next_block, next_lane, next_start, next_end = load_tile_of(program + num_programs, tiles, NUM_BLOCKS, GROUP_M)
        first = column_block * COLUMNS + HAND * ROWS
        gate_bias, up_bias = bias_ptr, bias_ptr
        if bias_ptr is not None:
            up_bias = _load_bias(
                bias_ptr + slot.to(gl.int64) * stride_bias + (PARTS - 1) * INTERMEDIATE, first, INTERMEDIATE, ROWS
            )
            gate_bias = up_bias
            if PARTS == 2:
                gate_bias = _load_bias(bias_ptr + slot.to(gl.int64) * stride_bias, first, INTERMEDIATE, ROWS)
        next_slot = load_slot(lane_to_slot_ptr, next_lane)
        if (end - start > BLOCK_M) if EXTRA_M > 0 else False:
            count = _tile(
                ring, count, gate_bias, up_bias, hidden_ptr, start, end, first, HAND, HIDDEN_SIZE, INTERMEDIATE, SCHEME,
                GROUP, ZEROS, PARTS, GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, ACTIVATION, DTYPE,
            )  # fmt: skip
        elif (end - start <= TAIL_M) if TAIL_M > 0 else False:
            count = _tile(
                ring, count, gate_bias, up_bias, hidden_ptr, start, end, first, HAND, HIDDEN_SIZE, INTERMEDIATE, SCHEME,
                GROUP, ZEROS, PARTS, GROUPS, TAIL_M, 0, BLOCK_K, STAGES, ACTIVATION, DTYPE,
            )  # fmt: skip
        else:
            count = _tile(
                ring, count, gate_bias, up_bias, hidden_ptr, start, end, first, HAND, HIDDEN_SIZE, INTERMEDIATE, SCHEME,
                GROUP, ZEROS, PARTS, GROUPS, BLOCK_M, 0, BLOCK_K, STAGES, ACTIVATION, DTYPE,
            )  # fmt: skip


@Launcher
@gluon.jit
def _expert_up_four_bit_ring_kernel(
    # inputs
    gate_up,  # descriptor [S, I / 8, 2, 8, H / 8] of words, or [S, I, H / 8] without a gate
    scale,  # descriptor [S, H / GROUP, 2I]
    zero,  # likewise; None: no zeros
    rows,  # descriptor [N, H] of sorted rows, BLOCK_M
    extra,  # likewise, EXTRA_M, or None
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    # outputs
    hidden_ptr,
    # shapes and strides, in elements
    stride_bias,
    HIDDEN_SIZE: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    # constants
    SCHEME: gl.constexpr,
    GROUP: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
    # tunables
    GROUPS: gl.constexpr,
    REGISTERS: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
    TAIL_M: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EXTRA_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Every num_programs-th of: a tile of rows, GROUPS * 32 columns of gate and of up, or twice as many of up alone."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    DTYPE: gl.constexpr = hidden_ptr.dtype.element_ty
    PARTS: gl.constexpr = 2 if is_gated(ACTIVATION) else 1
    ring = new_ring(gate_up, scale, zero, DTYPE, BLOCK_M, EXTRA_M, BLOCK_K, PARTS, GROUPS, STAGES)
    tiles = (tile_lane_ptr, tile_start_ptr, tile_end_ptr, gl.load(num_tiles_ptr))
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, hidden_ptr, stride_bias, 0, HIDDEN_SIZE, INTERMEDIATE,
                    SCHEME, GROUP, zero is not None, PARTS, GROUPS, TAIL_M, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
                    ACTIVATION, DTYPE,
                )),
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, hidden_ptr, stride_bias, 1, HIDDEN_SIZE, INTERMEDIATE,
                    SCHEME, GROUP, zero is not None, PARTS, GROUPS, TAIL_M, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
                    ACTIVATION, DTYPE,
                )),
                (_fill, (
                    ring, tiles, rows, extra, gate_up, scale, zero, lane_to_slot_ptr, HIDDEN_SIZE, INTERMEDIATE, GROUP,
                    PARTS, GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
                )),
            ],
            [4, 1],
            [REGISTERS, FILL_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize(
            [
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, hidden_ptr, stride_bias, 0, HIDDEN_SIZE, INTERMEDIATE,
                    SCHEME, GROUP, zero is not None, PARTS, GROUPS, TAIL_M, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
                    ACTIVATION, DTYPE,
                )),
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, hidden_ptr, stride_bias, 1, HIDDEN_SIZE, INTERMEDIATE,
                    SCHEME, GROUP, zero is not None, PARTS, GROUPS, TAIL_M, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
                    ACTIVATION, DTYPE,
                )),
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, hidden_ptr, stride_bias, 2, HIDDEN_SIZE, INTERMEDIATE,
                    SCHEME, GROUP, zero is not None, PARTS, GROUPS, TAIL_M, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
                    ACTIVATION, DTYPE,
                )),
                (_fill, (
                    ring, tiles, rows, extra, gate_up, scale, zero, lane_to_slot_ptr, HIDDEN_SIZE, INTERMEDIATE, GROUP,
                    PARTS, GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, FILL_REGISTERS],
        )  # fmt: skip


def expert_up_four_bit_ring(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
) -> torch.Tensor:
    """hidden_NI; arguments as `expert_up`'s."""
    hidden_size, intermediate = x_RH.shape[1], matrices.intermediate_size
    hidden_NI = x_RH.new_empty((schedule.order_N.shape[0], intermediate))
    columns = config.block_n // (2 if matrices.is_gated else 1)
    num_tiles = schedule.tile_lane.shape[0] * cdiv(intermediate, columns)
    if not num_tiles:
        return hidden_NI
    bias_SN = matrices.gate_up_bias_SN
    *descriptors, group = ring_descriptors(
        "gate_up", matrices.gate_up_SNH, matrices.gate_up_scale, matrices.gate_up_zero, matrices.scheme, config,
        interleaved=matrices.is_gated,
    )  # fmt: skip
    grid = (ring_programs(x_RH.device, config, num_tiles),)
    # As TMA loads rows that follow each other only.
    sorted_NH = gather_sorted(x_RH, schedule.order_N, fanout)
    _expert_up_four_bit_ring_kernel[grid](
        *descriptors,
        rows_descriptor("sorted_NH", sorted_NH, config.block_m),
        rows_descriptor("sorted_NH", sorted_NH, config.extra_m) if config.extra_m else None,
        bias_SN,
        lane_to_slot_L,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        schedule.num_tiles,
        hidden_NI,
        0 if bias_SN is None else bias_SN.stride(0),
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=intermediate,
        SCHEME=matrices.scheme,
        GROUP=group,
        ACTIVATION=matrices.activation,
        num_warps=4,
        **ring_constants(config),
    )
    return hidden_NI
