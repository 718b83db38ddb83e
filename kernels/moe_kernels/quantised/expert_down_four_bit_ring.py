"""Step 5 of a forward with 4-bit experts, on Hopper: `expert_down` by a ring of operands (`four_bit_ring.py`).

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import widen
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.four_bit_products import multiply_tile, part_of
from moe_kernels.quantised.four_bit_ring import (
    SIDE,
    fill_tile,
    load_tile_of,
    mma_layout,
    new_ring,
    ring_constants,
    ring_descriptors,
    ring_programs,
    rows_descriptor,
)
from moe_kernels.quantised.fp8_ring import load_slot
from moe_kernels.tiles.homes import RowHomes, row_at
from moe_kernels.tiles.tiles import TileSchedule

_ROWS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_STORE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _fill(
    ring, tiles, hidden, extra, down, scale, zero, lane_to_slot_ptr,
    HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """One warp."""
    COLUMNS: gl.constexpr = GROUPS * SIDE
    NUM_BLOCKS: gl.constexpr = (HIDDEN_SIZE + COLUMNS - 1) // COLUMNS
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
            ring, count, hidden, extra, down, scale, zero, slot, column_block * COLUMNS, 0, start, end,
            INTERMEDIATE, GROUP, 1, GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES,
        )  # fmt: skip
        column_block, start, end, slot = next_block, next_start, next_end, next_slot
        next_block, next_lane, next_start, next_end = later_block, later_lane, later_start, later_end


@gluon.jit
def _load_flat(order_ptr, start, end, M: gl.constexpr):
    position = start + gl.arange(0, M, _ROWS)
    return gl.load(order_ptr + position, mask=position < end, other=0)


@gluon.jit
def _load_flats(order_ptr, start, end, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr):
    """Flat rows of each 64 of a tile's rows, then of the extra ones (of the first ones again where there are none)."""
    PART: gl.constexpr = min(BLOCK_M, 64)
    first = _load_flat(order_ptr, start, end, PART)
    second, third, fourth, extra = first, first, first, first
    if BLOCK_M >= 128:
        second = _load_flat(order_ptr, start + 64, end, PART)
    if BLOCK_M == 256:
        third = _load_flat(order_ptr, start + 128, end, PART)
        fourth = _load_flat(order_ptr, start + 192, end, PART)
    if EXTRA_M > 0:
        extra = _load_flat(order_ptr, start + BLOCK_M, end, EXTRA_M)
    return first, second, third, fourth, extra


@gluon.jit
def _load_weights(row_weights_ptr, flats, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr):
    """Of `_load_flats`."""
    first = gl.load(row_weights_ptr + flats[0])
    second, third, fourth, extra = first, first, first, first
    if BLOCK_M >= 128:
        second = gl.load(row_weights_ptr + flats[1])
    if BLOCK_M == 256:
        third, fourth = gl.load(row_weights_ptr + flats[2]), gl.load(row_weights_ptr + flats[3])
    if EXTRA_M > 0:
        extra = gl.load(row_weights_ptr + flats[4])
    return first, second, third, fourth, extra


@gluon.jit
def _store(
    product, bias, flat, row_weight, rows_ptr, homes_ptr, rows_per_home, start, end, first, HIDDEN_SIZE: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Biases and routing weights of sums [64, M], M at most 64; stored for sorted rows from `start` on."""
    M: gl.constexpr = product.shape[1]
    MMA: gl.constexpr = mma_layout(M)
    if bias is not None:
        product += gl.convert_layout(bias, gl.SliceLayout(1, MMA))[:, None]
    row_weight = gl.convert_layout(row_weight, gl.SliceLayout(0, MMA))
    rows = gl.convert_layout((product * row_weight[None, :]).to(DTYPE).permute(1, 0), _STORE)
    rows_at = row_at(
        rows_ptr, gl.convert_layout(flat, gl.SliceLayout(1, _STORE)), HIDDEN_SIZE, homes_ptr, rows_per_home
    )
    position = start + gl.arange(0, M, gl.SliceLayout(1, _STORE))
    column = first + gl.arange(0, SIDE, gl.SliceLayout(0, _STORE))
    mask = (position < end)[:, None] & (column < HIDDEN_SIZE)[None, :]
    gl.store(rows_at[:, None] + column[None, :], rows, mask=mask)


@gluon.jit
def _tile(
    ring, count, bias, flats, row_weights, rows_ptr, homes_ptr, rows_per_home, start, end, first,
    HAND: gl.constexpr, HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, SCHEME: gl.constexpr, GROUP: gl.constexpr,
    ZEROS: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M + EXTRA_M rows. Returns the next `count`."""
    product, extra, count = multiply_tile(
        ring, count, INTERMEDIATE, HAND, SCHEME, GROUP, ZEROS, 1, GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, DTYPE
    )
    for number in gl.static_range((BLOCK_M + 63) // 64):
        _store(
            part_of(product, number), bias, flats[number], row_weights[number], rows_ptr, homes_ptr, rows_per_home,
            start + 64 * number, end, first, HIDDEN_SIZE, DTYPE,
        )  # fmt: skip
    if EXTRA_M > 0:
        _store(
            extra, bias, flats[4], row_weights[4], rows_ptr, homes_ptr, rows_per_home, start + BLOCK_M, end, first,
            HIDDEN_SIZE, DTYPE,
        )  # fmt: skip
    return count


@gluon.jit
def _multiply(
    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, rows_ptr, homes_ptr, rows_per_home, stride_bias,
    HAND: gl.constexpr, HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, SCHEME: gl.constexpr, GROUP: gl.constexpr,
    ZEROS: gl.constexpr, GROUPS: gl.constexpr, TAIL_M: gl.constexpr, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Four warps, for 64 rows of each tile's weights."""
    COLUMNS: gl.constexpr = GROUPS * SIDE
    NUM_BLOCKS: gl.constexpr = (HIDDEN_SIZE + COLUMNS - 1) // COLUMNS
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    next_block, next_lane, next_start, next_end = load_tile_of(first_program, tiles, NUM_BLOCKS, GROUP_M)
    next_slot = load_slot(lane_to_slot_ptr, next_lane)
    next_flats = _load_flats(order_ptr, next_start, next_end, BLOCK_M, EXTRA_M)
    for program in range(first_program, tiles[3] * NUM_BLOCKS, num_programs):
        column_block, slot, start, end, flats = next_block, next_slot, next_start, next_end, next_flats
        # What a tile's end needs is a chain of loads, which begins a tile before.
        next_block, next_lane, next_start, next_end = load_tile_of(program + num_programs, tiles, NUM_BLOCKS, GROUP_M)
        first = column_block * COLUMNS + HAND * SIDE
        bias = bias_ptr
        if bias_ptr is not None:
            column = gl.minimum(first + gl.arange(0, SIDE, _ROWS), HIDDEN_SIZE - 1)
            bias = widen(gl.load(bias_ptr + slot.to(gl.int64) * stride_bias + column))
        row_weights = _load_weights(row_weights_ptr, flats, BLOCK_M, EXTRA_M)
        next_slot = load_slot(lane_to_slot_ptr, next_lane)
        next_flats = _load_flats(order_ptr, next_start, next_end, BLOCK_M, EXTRA_M)
        if (end - start > BLOCK_M) if EXTRA_M > 0 else False:
            count = _tile(
                ring, count, bias, flats, row_weights, rows_ptr, homes_ptr, rows_per_home, start, end, first,
                HAND, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ZEROS, GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, DTYPE,
            )  # fmt: skip
        elif (end - start <= TAIL_M) if TAIL_M > 0 else False:
            of_tail = flats
            weights_of_tail = row_weights
            if TAIL_M < 64:  # those loaded before are not as many
                of_tail = _load_flats(order_ptr, start, end, TAIL_M, 0)
                weights_of_tail = _load_weights(row_weights_ptr, of_tail, TAIL_M, 0)
            count = _tile(
                ring, count, bias, of_tail, weights_of_tail, rows_ptr, homes_ptr, rows_per_home, start, end, first,
                HAND, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ZEROS, GROUPS, TAIL_M, 0, BLOCK_K, STAGES, DTYPE,
            )  # fmt: skip
        else:
            count = _tile(
                ring, count, bias, flats, row_weights, rows_ptr, homes_ptr, rows_per_home, start, end, first,
                HAND, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, ZEROS, GROUPS, BLOCK_M, 0, BLOCK_K, STAGES, DTYPE,
            )  # fmt: skip


@Launcher
@gluon.jit(do_not_specialize=["rows_per_home"])
def _expert_down_four_bit_ring_kernel(
    # inputs
    hidden,  # descriptor [N, I], BLOCK_M rows
    extra,  # likewise, EXTRA_M rows, or None
    down,  # descriptor [S, H, I / 8] of words
    scale,  # descriptor [S, I / GROUP, H]
    zero,  # likewise; None: no zeros
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
    stride_bias,
    HIDDEN_SIZE: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    # constants
    SCHEME: gl.constexpr,
    GROUP: gl.constexpr,
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
    """Every num_programs-th of: a tile of rows, GROUPS * 64 columns of the output."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    DTYPE: gl.constexpr = hidden.dtype
    ring = new_ring(down, scale, zero, DTYPE, BLOCK_M, EXTRA_M, BLOCK_K, 1, GROUPS, STAGES)
    tiles = (tile_lane_ptr, tile_start_ptr, tile_end_ptr, gl.load(num_tiles_ptr))
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, rows_ptr, homes_ptr, rows_per_home,
                    stride_bias, 0, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, zero is not None, GROUPS, TAIL_M, BLOCK_M,
                    EXTRA_M, BLOCK_K, STAGES, GROUP_M, DTYPE,
                )),
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, rows_ptr, homes_ptr, rows_per_home,
                    stride_bias, 1, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, zero is not None, GROUPS, TAIL_M, BLOCK_M,
                    EXTRA_M, BLOCK_K, STAGES, GROUP_M, DTYPE,
                )),
                (_fill, (
                    ring, tiles, hidden, extra, down, scale, zero, lane_to_slot_ptr, HIDDEN_SIZE, INTERMEDIATE, GROUP,
                    GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
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
                    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, rows_ptr, homes_ptr, rows_per_home,
                    stride_bias, 0, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, zero is not None, GROUPS, TAIL_M, BLOCK_M,
                    EXTRA_M, BLOCK_K, STAGES, GROUP_M, DTYPE,
                )),
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, rows_ptr, homes_ptr, rows_per_home,
                    stride_bias, 1, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, zero is not None, GROUPS, TAIL_M, BLOCK_M,
                    EXTRA_M, BLOCK_K, STAGES, GROUP_M, DTYPE,
                )),
                (_multiply, (
                    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, rows_ptr, homes_ptr, rows_per_home,
                    stride_bias, 2, HIDDEN_SIZE, INTERMEDIATE, SCHEME, GROUP, zero is not None, GROUPS, TAIL_M, BLOCK_M,
                    EXTRA_M, BLOCK_K, STAGES, GROUP_M, DTYPE,
                )),
                (_fill, (
                    ring, tiles, hidden, extra, down, scale, zero, lane_to_slot_ptr, HIDDEN_SIZE, INTERMEDIATE, GROUP,
                    GROUPS, BLOCK_M, EXTRA_M, BLOCK_K, STAGES, GROUP_M,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, FILL_REGISTERS],
        )  # fmt: skip


def expert_down_four_bit_ring(
    hidden_NI: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
    homes: RowHomes | None = None,
) -> torch.Tensor:
    """Launches the kernel; arguments as `expert_down`'s and `expert_mlp_home`'s."""
    bias_SH = matrices.down_bias_SH
    hidden_size, intermediate = matrices.hidden_size, hidden_NI.shape[1]
    rows_NH = hidden_NI.new_empty((schedule.order_N.shape[0], hidden_size)) if homes is None else homes.own
    num_tiles = schedule.tile_lane.shape[0] * cdiv(hidden_size, config.block_n)
    if not num_tiles:
        return rows_NH
    *descriptors, group = ring_descriptors(
        "down", matrices.down_SHI, matrices.down_scale, matrices.down_zero, matrices.scheme, config
    )
    grid = (ring_programs(hidden_NI.device, config, num_tiles),)
    _expert_down_four_bit_ring_kernel[grid](
        rows_descriptor("hidden_NI", hidden_NI, config.block_m),
        rows_descriptor("hidden_NI", hidden_NI, config.extra_m) if config.extra_m else None,
        *descriptors,
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
        0 if bias_SH is None else bias_SH.stride(0),
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=intermediate,
        SCHEME=matrices.scheme,
        GROUP=group,
        num_warps=4,
        **ring_constants(config),
    )
    return rows_NH
