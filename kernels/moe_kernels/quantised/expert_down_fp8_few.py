"""Step 5 of a forward with fp8_block experts and few rows, on Hopper: `expert_down` by a ring of operands.

As in `fp8_ring.py` some warps fill a ring in shared memory and run ahead. Here weights are on the M side of products, and one
group of warps is enough to multiply. What counts is that memory never idles: so a program loads the first weights while
`expert_up` still runs elsewhere.

N flat rows, H hidden, I intermediate, S slots, L lanes; M rows of a tile.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import widen
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.fp8_ring import (
    COPY_LAYOUT,
    FILL_REGISTERS,
    SCALE_LAYOUT,
    SIDE,
    new_ring,
    num_programs,
    weights_descriptor,
)
from moe_kernels.quantised.quantise_rows import QuantisedRows
from moe_kernels.tiles.homes import RowHomes, row_at
from moe_kernels.tiles.tile_order import tile_and_column_block
from moe_kernels.tiles.tiles import TileSchedule


@gluon.constexpr_function
def _mma_layout(m):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, m, 32])


@gluon.jit
def _load_tile(program, tiles, NUM_BLOCKS: gl.constexpr, GROUP_M: gl.constexpr):
    """`load_tile_of`, but from L2: before its wait a program may have older lines of this memory in L1."""
    tile_lane_ptr, tile_start_ptr, tile_end_ptr, num_tiles = tiles
    num_tiles = gl.maximum(num_tiles, 1)
    program = gl.minimum(program, num_tiles * NUM_BLOCKS - 1)
    tile, column_block = tile_and_column_block(program, num_tiles, NUM_BLOCKS, GROUP_M)
    lane = gl.load(tile_lane_ptr + tile, cache_modifier=".cg")
    start = gl.load(tile_start_ptr + tile, cache_modifier=".cg")
    return column_block, lane, start, gl.load(tile_end_ptr + tile, cache_modifier=".cg")


@gluon.jit
def _load_slot(lane_to_slot_ptr, lane):
    return gl.load(lane_to_slot_ptr + gl.maximum(lane, 0), cache_modifier=".cg")


@gluon.jit
def _load_weights(ring, down, slot, column_block, step, stage, exist):
    _, weights, _, filled, _ = ring
    mbarrier.expect(filled.index(stage), 2 * SIDE * SIDE, pred=exist)
    for half in gl.static_range(2):
        at = [slot, (2 * column_block + half) * SIDE, step * SIDE]
        tma.async_copy_global_to_shared(down, at, filled.index(stage), weights.index(2 * stage + half), pred=exist)


@gluon.jit
def _fill(
    ring, tiles, hidden_ptr, hidden_scale_ptr, down, scale_ptr, lane_to_slot_ptr, stride_scale,
    HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, PDL: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps: load all steps of all tiles, each as soon as its stage is empty.

    With BEHIND_UP the tiles and slots are older than `expert_up`, all of whose programs have waited: so they, and weights, are
    read before the wait.
    """
    rows, _, scales, filled, emptied = ring
    STEPS: gl.constexpr = (INTERMEDIATE + SIDE - 1) // SIDE
    EARLY: gl.constexpr = min(STAGES, STEPS)
    NUM_BLOCKS: gl.constexpr = (HIDDEN_SIZE + 2 * SIDE - 1) // (2 * SIDE)
    LAST: gl.constexpr = (HIDDEN_SIZE + SIDE - 1) // SIDE - 1
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    num_tiles = tiles[3] * NUM_BLOCKS
    column_block, lane, start, end = _load_tile(first_program, tiles, NUM_BLOCKS, GROUP_M)
    slot = _load_slot(lane_to_slot_ptr, lane)
    for early in gl.static_range(EARLY):
        _load_weights(ring, down, slot, column_block, early, early, first_program < num_tiles)
    # Of the next tile: what a tile needs is a chain of loads, which begins a tile or two before.
    next_block, next_lane, next_start, next_end = _load_tile(first_program + num_programs, tiles, NUM_BLOCKS, GROUP_M)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = gl.arange(0, M, gl.SliceLayout(1, COPY_LAYOUT))
    k = gl.arange(0, SIDE, gl.SliceLayout(0, COPY_LAYOUT))
    place = gl.arange(0, 4 * M, SCALE_LAYOUT)
    count = 0
    for program in range(first_program, num_tiles, num_programs):
        next_slot = _load_slot(lane_to_slot_ptr, next_lane)
        later_block, later_lane, later_start, later_end = _load_tile(
            program + 2 * num_programs, tiles, NUM_BLOCKS, GROUP_M
        )
        rows_at = hidden_ptr + (start + row).to(gl.int64)[:, None] * INTERMEDIATE + k[None, :]
        # Behind the rows' scales, those of the weights, once for each row. Past the end there are no weights: any scale does.
        block = 2 * column_block + gl.where(place < 2 * M, 0, 1)
        weight_scale = scale_ptr + slot.to(gl.int64) * stride_scale + gl.minimum(block, LAST) * STEPS
        row_scale = hidden_scale_ptr + (start + place).to(gl.int64) * STEPS
        scale_at = gl.where(place < M, row_scale, weight_scale)
        has_scale = (start + place < end) | (place >= M)
        for step in range(STEPS):
            stage = count % STAGES
            mbarrier.wait(emptied.index(stage), (count // STAGES & 1) ^ 1)
            _load_weights(ring, down, slot, column_block, step, stage, count >= EARLY)
            exists = (start + row < end)[:, None] & (step * SIDE + k < INTERMEDIATE)[None, :]
            async_copy.async_copy_global_to_shared(rows.index(stage), rows_at + step * SIDE, mask=exists)
            async_copy.async_copy_global_to_shared(scales.index(stage), scale_at + step, mask=has_scale)
            async_copy.mbarrier_arrive(filled.index(stage), increment_count=False)
            count += 1
        column_block, start, end, slot = next_block, next_start, next_end, next_slot
        next_block, next_lane, next_start, next_end = later_block, later_lane, later_start, later_end


@gluon.jit
def _multiply_tile(ring, count, INTERMEDIATE: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    """Sums [128, M] of each half of the tile's weights, float32, and the next `count`."""
    rows, weights, scales, filled, emptied = ring
    MMA: gl.constexpr = _mma_layout(M)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    left = gl.zeros((SIDE, M), gl.float32, MMA)
    right = gl.zeros((SIDE, M), gl.float32, MMA)
    zeros = gl.zeros((SIDE, M), gl.float32, MMA)
    for _ in range((INTERMEDIATE + SIDE - 1) // SIDE):
        stage = count % STAGES
        mbarrier.wait(filled.index(stage), count // STAGES & 1)
        fence_async_shared()  # what threads have written, tensor cores see only behind it
        x = rows.index(stage).permute((1, 0))
        weight, other = weights.index(2 * stage), weights.index(2 * stage + 1)
        product = warpgroup_mma(weight.reshape((SIDE, SIDE)), x, zeros, use_acc=False, is_async=True)
        more = warpgroup_mma(other.reshape((SIDE, SIDE)), x, zeros, use_acc=False, is_async=True)
        of_step = scales.index(stage)
        row_scale = of_step.slice(0, M).load(COLUMNS)
        left_scale, right_scale = of_step.slice(M, M).load(COLUMNS), of_step.slice(2 * M, M).load(COLUMNS)
        product, more = warpgroup_mma_wait(0, deps=(product, more))
        mbarrier.arrive(emptied.index(stage), count=1)
        left = left + product * (row_scale * left_scale)[None, :]
        right = right + more * (row_scale * right_scale)[None, :]
        count += 1
    return left, right, count


@gluon.jit
def _store(
    product, first_column, bias_at, row_weight, rows_at, inside, HIDDEN_SIZE: gl.constexpr, LAYOUT: gl.constexpr
):
    """Add biases to 128 columns, multiply by the routing weights, round, and store."""
    if bias_at is not None:
        column = first_column + gl.arange(0, SIDE, gl.SliceLayout(1, product.type.layout))
        product += widen(gl.load(bias_at + gl.minimum(column, HIDDEN_SIZE - 1)))[:, None]
    rows = (product * row_weight[None, :]).to(rows_at.dtype.element_ty)
    rows = gl.convert_layout(rows.permute((1, 0)), LAYOUT)
    column = first_column + gl.arange(0, SIDE, gl.SliceLayout(0, LAYOUT))
    gl.store(rows_at[:, None] + column[None, :], rows, mask=inside[:, None] & (column < HIDDEN_SIZE)[None, :])


@gluon.jit
def _multiply(
    ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, outputs, stride_bias,
    HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, PDL: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """Four warps; `outputs`: rows, their homes, and rows of a home."""
    if PDL:
        gdc_wait()
    rows_ptr, homes_ptr, rows_per_home = outputs
    EACH: gl.constexpr = 128 // rows_ptr.dtype.element_ty.primitive_bitwidth  # that a thread stores at once: 16 bytes
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, EACH], [EACH // 4, 128 // EACH], [4, 1], [1, 0])
    NUM_BLOCKS: gl.constexpr = (HIDDEN_SIZE + 2 * SIDE - 1) // (2 * SIDE)
    count = 0
    first_program, num_programs = gl.program_id(0), gl.num_programs(0)
    next_block, next_lane, next_start, next_end = _load_tile(first_program, tiles, NUM_BLOCKS, GROUP_M)
    for program in range(first_program, tiles[3] * NUM_BLOCKS, num_programs):
        column_block, lane, start, end = next_block, next_lane, next_start, next_end
        position = start + gl.arange(0, M, gl.SliceLayout(0, _mma_layout(M)))
        flat = gl.load(order_ptr + position, mask=position < end, other=0)
        row_weight = gl.load(row_weights_ptr + flat, mask=position < end, other=0.0)
        bias_at = bias_ptr
        if bias_ptr is not None:
            bias_at = bias_ptr + _load_slot(lane_to_slot_ptr, lane).to(gl.int64) * stride_bias
        next_block, next_lane, next_start, next_end = _load_tile(program + num_programs, tiles, NUM_BLOCKS, GROUP_M)
        left, right, count = _multiply_tile(ring, count, INTERMEDIATE, M, STAGES)
        inside = start + gl.arange(0, M, gl.SliceLayout(1, LAYOUT)) < end
        of_rows = gl.convert_layout(flat, gl.SliceLayout(1, LAYOUT))
        rows_at = row_at(rows_ptr, of_rows, HIDDEN_SIZE, homes_ptr, rows_per_home)
        first = 2 * column_block * SIDE
        _store(left, first, bias_at, row_weight, rows_at, inside, HIDDEN_SIZE, LAYOUT)
        _store(right, first + SIDE, bias_at, row_weight, rows_at, inside, HIDDEN_SIZE, LAYOUT)


@Launcher
@gluon.jit(do_not_specialize=["rows_per_home"])
def _expert_down_fp8_few_kernel(
    # inputs
    hidden_ptr,
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
    stride_scale,
    stride_bias,
    HIDDEN_SIZE: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    # constants
    PDL: gl.constexpr,
    BEHIND_UP: gl.constexpr,
    # tunables
    M: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Every num_programs-th of: a tile of rows, 256 columns of the output. Waits where its warps part: see `_fill`."""
    if PDL and not BEHIND_UP:
        gdc_wait()  # the schedule may be what the kernel before makes
    ring = new_ring(1, M, 4 * M, 1, STAGES)
    tiles = (tile_lane_ptr, tile_start_ptr, tile_end_ptr, gl.load(num_tiles_ptr, cache_modifier=".cg"))
    outputs = (rows_ptr, homes_ptr, rows_per_home)
    gl.warp_specialize(
        [
            (_multiply, (
                ring, tiles, lane_to_slot_ptr, bias_ptr, row_weights_ptr, order_ptr, outputs, stride_bias,
                HIDDEN_SIZE, INTERMEDIATE, PDL, M, STAGES, GROUP_M,
            )),
            (_fill, (
                ring, tiles, hidden_ptr, hidden_scale_ptr, down, scale_ptr, lane_to_slot_ptr, stride_scale,
                HIDDEN_SIZE, INTERMEDIATE, PDL, M, STAGES, GROUP_M,
            )),
        ],
        [4],
        [FILL_REGISTERS],
    )  # fmt: skip


def expert_down_fp8_few(
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
    grid = (num_programs(values.device, num_tiles * cdiv(hidden_size, 2 * SIDE.value)),)
    _expert_down_fp8_few_kernel[grid](
        values,
        hidden_NI.scale_RG,
        weights_descriptor("matrices.down_SHI", down_SHI),
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
        scale.stride(0),
        0 if bias_SH is None else bias_SH.stride(0),
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=values.shape[1],
        BEHIND_UP=behind_up,
        M=config.block_m,
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=4,
    )
