"""Steps 4 and 5 of a forward with fp8_block experts, on Hopper: a ring of operands, who fills it and who multiplies.

A tile is 128 rows times 2 * 128 rows of weights (`expert_up`: gate and up; `expert_down`: neighbours). Four warps fill the ring
in shared memory and run ahead, also into the next tile. Two groups of four warps multiply 64 rows each. What tensor cores sum
up must be scaled and added to a float32 sum each 128 of K (I5: in that order), and meanwhile a group's tensor cores would idle:
so the groups are not in step, and one multiplies while the other adds.

K: the inner dimension, in steps of 128. Written in Gluon, Triton's lower level, as Triton itself waits for each product.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_kernels.base.checks import check_tma_address, slot_stride
from moe_kernels.base.launch import num_multiprocessors
from moe_kernels.tiles.tile_order import load_tile

ROWS = gl.constexpr(64)  # of a group of warps: what one instruction multiplies
SIDE = gl.constexpr(128)  # of a block of weights, and channels of a row that share a scale
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
MMA_ROWS = gl.constexpr(gl.SliceLayout(1, MMA.value))
MMA_COLUMNS = gl.constexpr(gl.SliceLayout(0, MMA.value))
COPY_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
SCALE_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
ROW_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=2))
WEIGHT_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=3))
# Of the 504 registers that three threads share: of one that multiplies (two of these), and of one that fills the ring.
REGISTERS = gl.constexpr(224)
FILL_REGISTERS = gl.constexpr(56)
_FILLERS = gl.constexpr(128)  # threads that copy rows and scales


@gluon.jit
def load_tile_of(program, tiles, num_column_blocks, GROUP_M: gl.constexpr):
    """`load_tile` of (tile_lane_ptr, tile_start_ptr, tile_end_ptr, num_tiles); for programs behind the last one, of that.

    If there are no tiles, of one without rows.
    """
    tile_lane_ptr, tile_start_ptr, tile_end_ptr, num_tiles = tiles
    num_tiles = gl.maximum(num_tiles, 1)
    program = gl.minimum(program, num_tiles * num_column_blocks - 1)
    return load_tile(program, num_tiles, num_column_blocks, tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M)


@gluon.jit
def load_slot(lane_to_slot_ptr, lane):
    return gl.load(lane_to_slot_ptr + gl.maximum(lane, 0))


@gluon.jit
def new_ring(PARTS: gl.constexpr, M: gl.constexpr, SCALES: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """(rows [PARTS * STAGES, M, 128], weights [2 * STAGES, 1, 128, 128], scales [STAGES, SCALES], filled, emptied).

    GROUPS: of four warps that multiply.
    """
    rows = gl.allocate_shared_memory(gl.float8e4nv, [PARTS * STAGES, M, SIDE], ROW_LAYOUT)
    weights = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 1, SIDE, SIDE], WEIGHT_LAYOUT)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, SCALES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=_FILLERS + 1)  # each that copies, and the one that calls TMA
        mbarrier.init(emptied.index(stage), count=GROUPS)
    return rows, weights, scales, filled, emptied


@gluon.jit
def _copy_rows(into, rows_ptr, source, inside, first, size):
    """64 rows, 128 of K from `first` on; zeros for what does not exist."""
    k = first + gl.arange(0, SIDE, gl.SliceLayout(0, COPY_LAYOUT))
    at = rows_ptr + source[:, None] + k[None, :]
    async_copy.async_copy_global_to_shared(into, at, mask=inside[:, None] & (k < size)[None, :])


@gluon.jit
def load_flat(order_ptr, start, end):
    """The tile's flat rows, in the layouts of those who copy: first half, second half, scales (twice).

    Nothing is computed with them here: so a caller can go on before they are there.
    """
    half = start + gl.arange(0, ROWS, gl.SliceLayout(1, COPY_LAYOUT))
    scaled = start + gl.arange(0, 2 * SIDE, SCALE_LAYOUT) % SIDE
    if order_ptr is None:
        return half, half, scaled
    else:
        first = gl.load(order_ptr + half, mask=half < end, other=0)
        second = gl.load(order_ptr + half + ROWS, mask=half + ROWS < end, other=0)
        return first, second, gl.load(order_ptr + scaled, mask=scaled < end, other=0)


@gluon.jit
def fill_tile(
    ring,
    count,  # steps before this tile
    rows_ptr,  # None: `rows_desc`, whose rows are sorted
    rows_desc,  # descriptor [N, K], or None
    row_scale_ptr,
    flat,  # see `load_flat`
    fanout,
    weights_desc,
    first_scale_ptr,  # of each half of the weights, the scales of its first block
    second_scale_ptr,
    slot,
    first_row,  # of each half of the weights
    second_row,
    start,
    end,
    stride_row,
    size,  # K
    STAGES: gl.constexpr,
):
    """Load all steps of a tile, each as soon as its stage is empty. Returns the next `count`."""
    rows, weights, scales, filled, emptied = ring
    num_steps = gl.cdiv(size, SIDE)
    flat, other_flat, scaled_flat = flat
    half = start + gl.arange(0, ROWS, gl.SliceLayout(1, COPY_LAYOUT))
    other = half + ROWS
    source, other_source = (flat // fanout).to(gl.int64) * stride_row, (other_flat // fanout).to(gl.int64) * stride_row
    place = gl.arange(0, 2 * SIDE, SCALE_LAYOUT)
    # Behind the rows' scales, those of the weights, once for each row of a group of warps.
    weight_scale = gl.where(place < SIDE + ROWS, first_scale_ptr, second_scale_ptr)
    scale_at = gl.where(place < SIDE, row_scale_ptr + scaled_flat // fanout * num_steps, weight_scale)
    has_scale = (start + place < end) | (place >= SIDE)
    for step in range(num_steps):
        stage = count % STAGES
        mbarrier.wait(emptied.index(stage), (count // STAGES & 1) ^ 1)
        first = step * SIDE
        of_weights: gl.constexpr = 2 * SIDE * SIDE  # bytes
        if rows_ptr is None:
            mbarrier.expect(filled.index(stage), of_weights + ROWS * SIDE, pred=start + ROWS >= end)
            mbarrier.expect(filled.index(stage), of_weights + 2 * ROWS * SIDE, pred=start + ROWS < end)
        else:
            mbarrier.expect(filled.index(stage), of_weights)
        tma.async_copy_global_to_shared(
            weights_desc, [slot, first_row, first], filled.index(stage), weights.index(2 * stage)
        )
        tma.async_copy_global_to_shared(
            weights_desc, [slot, second_row, first], filled.index(stage), weights.index(2 * stage + 1)
        )
        if rows_ptr is None:
            tma.async_copy_global_to_shared(rows_desc, [start, first], filled.index(stage), rows.index(2 * stage))
            tma.async_copy_global_to_shared(
                rows_desc,
                [start + ROWS, first],
                filled.index(stage),
                rows.index(2 * stage + 1),
                pred=start + ROWS < end,
            )
        else:
            _copy_rows(rows.index(2 * stage), rows_ptr, source, half < end, first, size)
            _copy_rows(rows.index(2 * stage + 1), rows_ptr, other_source, other < end, first, size)
        async_copy.async_copy_global_to_shared(scales.index(stage), scale_at + step, mask=has_scale)
        async_copy.mbarrier_arrive(filled.index(stage), increment_count=False)
        count += 1
    return count


@gluon.jit
def multiply_tile(
    ring, count, has_rows, size, ARE_COPIED: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sums [64, 128] of this half of the tile's rows times each half of its weights, float32, and the next `count`.

    ARE_COPIED: the rows did not come by TMA.
    """
    rows, weights, scales, filled, emptied = ring
    left = gl.zeros((ROWS, SIDE), gl.float32, MMA)
    right = gl.zeros((ROWS, SIDE), gl.float32, MMA)
    product = gl.zeros((ROWS, SIDE), gl.float32, MMA)
    for _ in range(gl.cdiv(size, SIDE)):
        stage = count % STAGES
        mbarrier.wait(filled.index(stage), count // STAGES & 1)
        if has_rows:
            if ARE_COPIED:
                fence_async_shared()  # what threads have written, tensor cores see only behind it
            of_step = scales.index(stage)
            row_scale = of_step.slice(HALF * ROWS, ROWS).load(MMA_ROWS)
            left_scale = of_step.slice(SIDE, ROWS).load(MMA_ROWS)
            right_scale = of_step.slice(SIDE + ROWS, ROWS).load(MMA_ROWS)
            x = rows.index(2 * stage + HALF)
            weight = weights.index(2 * stage).reshape((SIDE, SIDE)).permute((1, 0))
            product = warpgroup_mma(x, weight, product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            left = left + product * (row_scale * left_scale)[:, None]
            weight = weights.index(2 * stage + 1).reshape((SIDE, SIDE)).permute((1, 0))
            product = warpgroup_mma(x, weight, product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(emptied.index(stage), count=1)
            right = right + product * (row_scale * right_scale)[:, None]
        else:
            mbarrier.arrive(emptied.index(stage), count=1)
        count += 1
    return left, right, count


def weights_descriptor(name: str, weights_SNK: torch.Tensor) -> TensorDescriptor:
    """Of one slot's 128 rows and 128 columns; raises ValueError if TMA cannot read `weights_SNK`."""
    if not weights_SNK.is_cuda:
        raise ValueError(
            f"{name} is on {weights_SNK.device}: with fp8_block config.tma needs a GPU, also in place of the interpreter"
        )
    check_tma_address(name, weights_SNK)
    strides = [slot_stride(weights_SNK), weights_SNK.shape[2], 1]
    return TensorDescriptor(
        weights_SNK, list(weights_SNK.shape), strides, [1, SIDE.value, SIDE.value], WEIGHT_LAYOUT.value
    )


def num_programs(device: torch.device, num_tiles: int) -> int:
    """One for each multiprocessor, whose shared memory and registers it needs, and no more than tiles."""
    return min(num_tiles, num_multiprocessors(device))
