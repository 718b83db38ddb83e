"""Steps 4 and 5 of a forward with fp8_block experts, on Hopper: a ring of operands, who fills it and who multiplies.

A tile is M rows times 2 * 128 rows of weights (`expert_up`: gate and up; `expert_down`: neighbours). Four warps fill the ring
in shared memory and run ahead, also into the next tile. Two groups of four warps multiply. Of M = 128 rows, each has 64. Fewer
rows, 16 or 32, are on the N side of products: each group has all of them, and 64 of each 128 rows of weights. What tensor
cores sum up must be scaled and added to a float32 sum each 128 of K (I5: in that order), and meanwhile a group's tensor cores
would idle: so the groups are not in step, and one multiplies while the other adds.

K: the inner dimension, in steps of 128. Written in Gluon, Triton's lower level, as Triton itself waits for each product.
"""

# In kernels a tuple grows in a loop that the compiler unrolls.
# mypy: disable-error-code="assignment, misc, var-annotated"

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

HALF = gl.constexpr(64)  # what one instruction multiplies on the M side, and a group of warps has
SIDE = gl.constexpr(128)  # of a block of weights, and channels of a row that share a scale
COPY_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
LINE_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_TOLD_LAYOUT = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
_LINE_OF_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
ROW_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=2))
WEIGHT_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=3))
# Rows on their way out.
STAGED_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=4))
# Of the 504 registers that three threads share: of one that multiplies (two of these), and of one that fills the ring.
REGISTERS = gl.constexpr(224)
FILL_REGISTERS = gl.constexpr(56)
_FILLERS = gl.constexpr(128)  # threads that copy rows and scales


@gluon.constexpr_function
def mma_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32])


@gluon.jit
def load_slot(lane_to_slot_ptr, lane):
    return gl.load(lane_to_slot_ptr + gl.maximum(lane, 0), cache_modifier=".cg")


@gluon.jit
def new_ring(M: gl.constexpr, STAGES: gl.constexpr):
    """(rows [STAGES, M, 128], weights [2 * STAGES, 1, 128, 128], scales of the rows [STAGES, M], of each half of the weights
    [STAGES, 2], what the tile is [STAGES, 8], filled, emptied)."""
    rows = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, M, SIDE], ROW_LAYOUT)
    weights = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 1, SIDE, SIDE], WEIGHT_LAYOUT)
    row_scales = gl.allocate_shared_memory(gl.float32, [STAGES, M], _LINE_OF_SHARED)
    weight_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 2], _LINE_OF_SHARED)
    told = gl.allocate_shared_memory(gl.int32, [STAGES, 8], _LINE_OF_SHARED)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=_FILLERS + 1)  # each that copies, and the one that calls TMA
        mbarrier.init(emptied.index(stage), count=2)
    return rows, weights, row_scales, weight_scales, told, filled, emptied


@gluon.jit
def new_staging(M: gl.constexpr):
    """[2, 1, 1, 64, 128] 16-bit: rows on their way out, of each group of warps; with few rows there is no room, and no need."""
    ROWS: gl.constexpr = HALF if M == SIDE else 8
    return gl.allocate_shared_memory(gl.int16, [2, 1, 1, ROWS, SIDE], STAGED_LAYOUT)


@gluon.jit
def _tell(ring, stage, tile):
    """What is multiplied from this stage on. Each thread writes all of it, so also the one that then says it is there."""
    field = gl.arange(0, 8, _TOLD_LAYOUT)
    fields = gl.full((8,), -1, gl.int32, _TOLD_LAYOUT)
    for i in gl.static_range(len(tile)):
        fields = gl.where(field == i, tile[i], fields)
    ring[4].index(stage).store(fields)


@gluon.jit
def tell_end(ring, count, STAGES: gl.constexpr):
    """There is no further tile."""
    filled, emptied = ring[5], ring[6]
    stage = count % STAGES
    mbarrier.wait(emptied.index(stage), (count // STAGES & 1) ^ 1)
    _tell(ring, stage, ())
    async_copy.mbarrier_arrive(filled.index(stage), increment_count=False)
    mbarrier.arrive(filled.index(stage), count=1)


@gluon.jit
def hear(ring, count, STAGES: gl.constexpr):
    """Wait for the next tile: `fill_tile`'s, or -1 and any."""
    stage = count % STAGES
    mbarrier.wait(ring[5].index(stage), count // STAGES & 1)
    fields = ring[4].index(stage).load(_TOLD_LAYOUT)
    field = gl.arange(0, 8, _TOLD_LAYOUT)
    tile = ()
    for i in gl.static_range(5):
        tile += (gl.sum(gl.where(field == i, fields, 0), axis=0),)
    return tile


@gluon.jit
def fence_async():
    """Between writes by threads and reads of them by TMA, in global memory."""
    gl.inline_asm_elementwise("fence.proxy.async; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fill_tile(
    ring,
    count,  # steps before this tile
    tile,  # kind (0: of `expert_up`, 1: of `expert_down`), column block, lane, start, end: what `hear` returns
    rows_ptr,  # None: `rows_desc`, whose rows are sorted
    rows_desc,  # descriptor [N, K], or None
    row_scale_ptr,
    order_ptr,  # None: rows are sorted
    weights_desc,
    first_scale_ptr,  # of each half of the weights, the scales of its first block
    second_scale_ptr,
    slot,
    first_row,  # of each half of the weights
    second_row,
    stride_row,
    FANOUT: gl.constexpr,
    SIZE: gl.constexpr,  # K
    M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load all steps of a tile, each as soon as its stage is empty. Returns the next `count`."""
    rows, weights, row_scales, weight_scales, _, filled, emptied = ring
    start, end = tile[3], tile[4]
    BOX: gl.constexpr = min(M, HALF)
    NUM_STEPS: gl.constexpr = (SIZE + SIDE - 1) // SIDE
    scaled = start + gl.arange(0, M, LINE_LAYOUT)
    has_scale = scaled < end
    row = scaled
    position = start + gl.arange(0, M, gl.SliceLayout(1, COPY_LAYOUT))
    if order_ptr is not None:
        row = gl.load(order_ptr + row, mask=has_scale, other=0) // FANOUT
    if rows_ptr is not None:
        source = gl.load(order_ptr + position, mask=position < end, other=0) // FANOUT
        rows_at = rows_ptr + source.to(gl.int64)[:, None] * stride_row
    row_scale_at = row_scale_ptr + row.to(gl.int64) * NUM_STEPS
    weight_scale_at = gl.where(gl.arange(0, 2, LINE_LAYOUT) == 0, first_scale_ptr, second_scale_ptr)
    is_whole = start + BOX < end
    mbarrier.wait(emptied.index(count % STAGES), (count // STAGES & 1) ^ 1)
    _tell(ring, count % STAGES, tile)
    for step in range(NUM_STEPS):
        stage = count % STAGES
        k = step * SIDE
        mbarrier.wait(emptied.index(stage), (count // STAGES & 1) ^ 1)
        bar = filled.index(stage)
        if rows_ptr is not None:
            mbarrier.expect(bar, 2 * SIDE * SIDE)
        elif M == BOX:
            mbarrier.expect(bar, 2 * SIDE * SIDE + M * SIDE)
        else:  # of 128 rows, the second half only if it exists
            mbarrier.expect(bar, 2 * SIDE * SIDE + BOX * SIDE, pred=start + BOX >= end)
            mbarrier.expect(bar, 2 * SIDE * SIDE + M * SIDE, pred=is_whole)
        tma.async_copy_global_to_shared(weights_desc, [slot, first_row, k], bar, weights.index(2 * stage))
        tma.async_copy_global_to_shared(weights_desc, [slot, second_row, k], bar, weights.index(2 * stage + 1))
        if rows_ptr is None:
            if M > BOX:
                into = rows.index(stage).slice(BOX, BOX)
                tma.async_copy_global_to_shared(rows_desc, [start + BOX, k], bar, into, pred=is_whole)
            tma.async_copy_global_to_shared(rows_desc, [start, k], bar, rows.index(stage).slice(0, BOX))
        else:  # zeros for what does not exist
            column = k + gl.arange(0, SIDE, gl.SliceLayout(0, COPY_LAYOUT))
            exists = (position < end)[:, None]
            if SIZE % SIDE:
                exists = exists & (column < SIZE)[None, :]
            async_copy.async_copy_global_to_shared(rows.index(stage), rows_at + column[None, :], mask=exists)
        async_copy.async_copy_global_to_shared(row_scales.index(stage), row_scale_at + step, mask=has_scale)
        async_copy.async_copy_global_to_shared(weight_scales.index(stage), weight_scale_at + step)
        async_copy.mbarrier_arrive(bar, increment_count=False)
        count += 1
    return count


@gluon.jit
def multiply_tile(ring, count, has_rows, num_steps, GROUP: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    """A group's sums of each half of the weights, float32, and the next `count`.

    [64, 128]: its half of the rows times 128 rows of weights; with few rows [64, M]: its half of those times the rows.
    """
    rows, weights, row_scales, weight_scales, _, filled, emptied = ring
    IS_FEW: gl.constexpr = M < SIDE
    COLUMNS: gl.constexpr = M if IS_FEW else SIDE
    MMA: gl.constexpr = mma_layout(COLUMNS)
    OF_ROWS: gl.constexpr = gl.SliceLayout(0 if IS_FEW else 1, MMA)
    left = gl.zeros((HALF, COLUMNS), gl.float32, MMA)
    right = gl.zeros((HALF, COLUMNS), gl.float32, MMA)
    product = gl.zeros((HALF, COLUMNS), gl.float32, MMA)
    for _ in range(num_steps):
        stage = count % STAGES
        mbarrier.wait(filled.index(stage), count // STAGES & 1)
        if has_rows:
            fence_async_shared()  # rows that threads have written, tensor cores see only behind it
            row_scale, weight_scale = row_scales.index(stage), weight_scales.index(stage)
            left_scale, right_scale = weight_scale.slice(0, 1).load(OF_ROWS), weight_scale.slice(1, 1).load(OF_ROWS)
            weight = weights.index(2 * stage).reshape((SIDE, SIDE))
            other = weights.index(2 * stage + 1).reshape((SIDE, SIDE))
            if IS_FEW:
                row_scale = row_scale.load(OF_ROWS)
                x = rows.index(stage).permute((1, 0))
                product = warpgroup_mma(weight.slice(GROUP * HALF, HALF), x, product, use_acc=False, is_async=True)
                more = warpgroup_mma(other.slice(GROUP * HALF, HALF), x, product, use_acc=False, is_async=True)
                product, more = warpgroup_mma_wait(0, deps=(product, more))
                mbarrier.arrive(emptied.index(stage), count=1)
                left = left + product * (row_scale * left_scale)[None, :]
                right = right + more * (row_scale * right_scale)[None, :]
            else:
                row_scale = row_scale.slice(GROUP * HALF, HALF).load(OF_ROWS)
                x = rows.index(stage).slice(GROUP * HALF, HALF)
                product = warpgroup_mma(x, weight.permute((1, 0)), product, use_acc=False, is_async=True)
                product = warpgroup_mma_wait(0, deps=(product,))
                left = left + product * (row_scale * left_scale)[:, None]
                product = warpgroup_mma(x, other.permute((1, 0)), product, use_acc=False, is_async=True)
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
