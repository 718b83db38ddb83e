"""Steps 4 and 5 of a forward with 4-bit experts, on Hopper: a ring of operands, who fills it and who unpacks and multiplies.

A tile is BLOCK_M rows times GROUPS * 64 rows of weights. One warp fills the ring in shared memory by TMA and runs ahead, also
into the next tile. Each of GROUPS groups of four warps has 64 rows of weights of its own, and multiplies them
(`four_bit_products.py`).

K: the inner dimension, in steps of BLOCK_K. Written in Gluon, Triton's lower level.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_kernels.base.checks import check_tma_address, slot_stride
from moe_kernels.base.launch import num_multiprocessors
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.quantised_weights import group_of
from moe_kernels.tiles.tile_order import tile_and_column_block

SIDE = gl.constexpr(64)  # rows of weights of a group of warps, and columns that are unpacked at once


@gluon.constexpr_function
def mma_layout(block_m):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_m, 16])


@gluon.constexpr_function
def rows_layout():
    """Of x in shared memory, 64 columns."""
    return gl.NVMMASharedLayout(128, 16, rank=2)


def words_layout(block_k: int, rank: int) -> gl.NVMMASharedLayout:
    """Of words in shared memory, BLOCK_K columns. Swizzled, a warp's 32 words are in 32 banks."""
    return gl.NVMMASharedLayout(block_k // 2, 32, rank=rank)


def groups_layout(bits: int) -> gl.NVMMASharedLayout:
    """Of scales or zeros in shared memory."""
    return gl.NVMMASharedLayout(0, bits, rank=3)


@gluon.constexpr_function
def groups_of(columns, group):
    return max(columns // group, 1)


@gluon.constexpr_function
def hands_of_box(groups):
    """Groups of warps that share a box of scales or zeros: a box has a power of two of rows."""
    return 2 if groups == 2 else 1


@gluon.constexpr_function
def places_of_groups(elements, dtype):
    """Of boxes of scales or zeros, how many take 128 bytes: TMA writes to multiples of these only."""
    return max(128 * 8 // (elements * dtype.primitive_bitwidth), 1)


@gluon.jit
def load_tile_of(program, tiles, num_column_blocks, GROUP_M: gl.constexpr):
    """`load_tile` of (tile_lane_ptr, tile_start_ptr, tile_end_ptr, num_tiles); for programs behind the last one, of that.

    If there are no tiles, of one without rows. From L2: before its wait a program may have older lines of this memory in L1.
    """
    tile_lane_ptr, tile_start_ptr, tile_end_ptr, num_tiles = tiles
    num_tiles = gl.maximum(num_tiles, 1)
    program = gl.minimum(program, num_tiles * num_column_blocks - 1)
    tile, column_block = tile_and_column_block(program, num_tiles, num_column_blocks, GROUP_M)
    lane = gl.load(tile_lane_ptr + tile, cache_modifier=".cg")
    start = gl.load(tile_start_ptr + tile, cache_modifier=".cg")
    return column_block, lane, start, gl.load(tile_end_ptr + tile, cache_modifier=".cg")


@gluon.jit
def _new_groups(desc, BOXES: gl.constexpr):
    SHAPE: gl.constexpr = desc.block_shape
    EACH: gl.constexpr = places_of_groups(SHAPE[1] * SHAPE[2], desc.dtype)
    return gl.allocate_shared_memory(desc.dtype, [EACH * BOXES] + SHAPE, desc.layout)  # noqa: RUF005


@gluon.jit
def new_ring(
    words_desc, scale_desc, zero_desc, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr,
    BLOCK_K: gl.constexpr, PARTS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(rows, extra rows, words, scales, zeros, filled, emptied). PARTS: 2 if gate and up rows have scales apart, or 1."""
    CHUNKS: gl.constexpr = BLOCK_K // SIDE
    gl.static_assert(STAGES & (STAGES - 1) == 0)
    rows = gl.allocate_shared_memory(DTYPE, [CHUNKS * STAGES, BLOCK_M, SIDE], rows_layout())
    extra = rows
    if EXTRA_M > 0:
        extra = gl.allocate_shared_memory(DTYPE, [CHUNKS * STAGES, EXTRA_M, SIDE], rows_layout())
    words_shape: gl.constexpr = [GROUPS * STAGES] + words_desc.block_shape  # noqa: RUF005 – Triton has no stars
    words = gl.allocate_shared_memory(gl.int32, words_shape, words_desc.layout)
    BOXES: gl.constexpr = PARTS * (GROUPS // hands_of_box(GROUPS)) * STAGES
    scales = _new_groups(scale_desc, BOXES)
    zeros = scales
    if zero_desc is not None:
        zeros = _new_groups(zero_desc, BOXES)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=GROUPS)
    return rows, extra, words, scales, zeros, filled, emptied


@gluon.jit
def phase_of(count, STAGES: gl.constexpr):
    """Of a barrier: how often its stage has been through, modulo 2."""
    return ((count & STAGES) != 0).to(gl.int32)


@gluon.jit
def _copy_groups(desc, at, filled, buffers, place):
    SHAPE: gl.constexpr = desc.block_shape
    EACH: gl.constexpr = places_of_groups(SHAPE[1] * SHAPE[2], desc.dtype)
    tma.async_copy_global_to_shared(desc, at, filled, buffers.index(EACH * place))


@gluon.jit
def fill_tile(
    ring,
    count,  # steps before this tile
    rows_desc,  # of sorted rows, BLOCK_M
    extra_desc,  # likewise, EXTRA_M, if not 0
    words_desc,
    scale_desc,
    zero_desc,  # None: no zeros
    slot,
    first_row,  # of the tile's weights: of the up rows (gate rows are INTERMEDIATE before, if PARTS is 2)
    INTERMEDIATE: gl.constexpr,
    start,
    end,
    SIZE: gl.constexpr,  # K
    GROUP: gl.constexpr,
    PARTS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EXTRA_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load all steps of a tile, each as soon as its stage is empty. Returns the next `count`.

    Also rows behind `end` are loaded: a product's column has nothing of another row.
    """
    rows, extra, words, scales, zeros, filled, emptied = ring
    CHUNKS: gl.constexpr = BLOCK_K // SIDE
    ROWS: gl.constexpr = SIDE // PARTS
    HANDS: gl.constexpr = hands_of_box(GROUPS)
    ZERO_BYTES: gl.constexpr = 0 if zero_desc is None else zero_desc.block_type.nbytes
    OF_GROUPS: gl.constexpr = PARTS * (GROUPS // HANDS) * (scale_desc.block_type.nbytes + ZERO_BYTES)
    OF_WORDS: gl.constexpr = GROUPS * words_desc.block_type.nbytes
    OF_ALL: gl.constexpr = OF_WORDS + OF_GROUPS + CHUNKS * rows_desc.block_type.nbytes
    OF_EXTRA: gl.constexpr = 0 if extra_desc is None else CHUNKS * extra_desc.block_type.nbytes
    for step in range((SIZE + BLOCK_K - 1) // BLOCK_K):
        stage = count & (STAGES - 1)
        mbarrier.wait(emptied.index(stage), phase_of(count, STAGES) ^ 1)
        if EXTRA_M > 0:
            mbarrier.expect(filled.index(stage), OF_ALL, pred=start + BLOCK_M >= end)
            mbarrier.expect(filled.index(stage), OF_ALL + OF_EXTRA, pred=start + BLOCK_M < end)
        else:
            mbarrier.expect(filled.index(stage), OF_ALL)
        for group in gl.static_range(GROUPS):
            place = GROUPS * stage + group
            row = first_row + group * ROWS
            if PARTS == 2:
                tma.async_copy_global_to_shared(
                    words_desc, [slot, row // 8, 0, 0, step * (BLOCK_K // 8)], filled.index(stage), words.index(place)
                )
            else:
                tma.async_copy_global_to_shared(
                    words_desc, [slot, row, step * (BLOCK_K // 8)], filled.index(stage), words.index(place)
                )
            if group % HANDS == 0:
                for part in gl.static_range(PARTS):
                    box = PARTS * (place // HANDS) + part
                    at_groups = [slot, step * BLOCK_K // GROUP, part * INTERMEDIATE + row]
                    _copy_groups(scale_desc, at_groups, filled.index(stage), scales, box)
                    if zero_desc is not None:
                        _copy_groups(zero_desc, at_groups, filled.index(stage), zeros, box)
        for chunk in gl.static_range(CHUNKS):
            first = step * BLOCK_K + chunk * SIDE
            place = CHUNKS * stage + chunk
            tma.async_copy_global_to_shared(rows_desc, [start, first], filled.index(stage), rows.index(place))
            if EXTRA_M > 0:
                tma.async_copy_global_to_shared(
                    extra_desc, [start + BLOCK_M, first], filled.index(stage), extra.index(place),
                    pred=start + BLOCK_M < end,
                )  # fmt: skip
        count += 1
    return count


def ring_descriptors(
    which: str,
    weights: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    scheme: str,
    config: GemmConfig,
    interleaved: bool = False,
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor | None, int]:
    """Descriptors of the words of matrices [S, N, K / 2] and of their scales and zeros, and the group.

    Raises:
        ValueError: TMA cannot read them, or they are not on a GPU.
    """
    assert scale is not None
    name_of_weights = f"matrices.{which}_{'SNH' if which == 'gate_up' else 'SHI'}"
    if not weights.is_cuda:
        raise ValueError(
            f"{name_of_weights} is on {weights.device}: config.tma of 4-bit weights needs a GPU, also in place of the "
            "interpreter"
        )
    group = group_of(weights, scale, scheme)
    check_tma_address(name_of_weights, weights)
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None:
            check_tma_address(f"matrices.{which}_{name}", tensor)
    slots, rows, inner = weights.shape
    inner, stride_slot, block_k = inner // 4, slot_stride(weights) // 4, config.block_k
    shape, strides, block = [slots, rows, inner], [stride_slot, inner, 1], [1, SIDE.value, block_k // 8]
    if interleaved:  # in an order that is not that of the strides: see `expert_up_tma`
        shape, strides = [slots, rows // 16, 2, 8, inner], [stride_slot, 8 * inner, rows // 2 * inner, inner, 1]
        block = [1, 4, 2, 8, block_k // 8]
    words = TensorDescriptor(weights.view(torch.int32), shape, strides, block, words_layout(block_k, len(block)))

    def of_groups(tensor: torch.Tensor) -> TensorDescriptor:
        rows_of_box = (32 if interleaved else SIDE.value) * hands_of_box(config.block_n // SIDE.value)
        block = [1, max(block_k // group, 1), rows_of_box]
        layout = groups_layout(8 * tensor.element_size())
        return TensorDescriptor(tensor, list(tensor.shape), [slot_stride(tensor), rows, 1], block, layout)

    return words, of_groups(scale), None if zero is None else of_groups(zero), group


def rows_descriptor(name: str, rows: torch.Tensor, block_m: int) -> TensorDescriptor:
    """Of block_m rows and 64 columns of a matrix; raises ValueError if TMA cannot read it."""
    check_tma_address(name, rows)
    stride = rows.stride(0) if len(rows) > 1 else rows.shape[1]
    return TensorDescriptor(rows, list(rows.shape), [stride, 1], [block_m, SIDE.value], rows_layout())


def ring_constants(config: GemmConfig) -> dict[str, int]:
    """Of the kernels' launches. Registers: of one that unpacks, of one that fills the ring, and where two programs share a
    multiprocessor the average, by which it has room for both.
    """
    groups = config.block_n // SIDE.value
    if config.programs_per_sm > 1:
        of_group, of_filler = 104, 32
    else:
        of_group, of_filler = (208, 88) if groups == 2 else (144, 80)
    constants = {
        "GROUPS": groups,
        "REGISTERS": of_group,
        "FILL_REGISTERS": of_filler,
        "TAIL_M": config.tail_m,
        "BLOCK_M": config.block_m,
        "EXTRA_M": config.extra_m,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        "GROUP_M": config.group_m,
    }
    return constants | ({"maxnreg": 80} if config.programs_per_sm > 1 else {})


def ring_programs(device: torch.device, config: GemmConfig, num_tiles: int) -> int:
    """No more than tiles, and `config.programs_per_sm` on each multiprocessor."""
    return min(num_tiles, config.programs_per_sm * num_multiprocessors(device))
