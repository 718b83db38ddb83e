"""Steps 4 and 5 of a forward with 4-bit experts, on Hopper: products of what is in a ring of operands (`four_bit_ring.py`).

A group of four warps unpacks the words of 64 columns to registers, while tensor cores multiply those before. (Triton's own
pipeline waits for each product before the next unpacking.) W words of 8 weights.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_kernels.quantised.four_bit import LOWERED_UNDONE, factor_of_scale, factor_of_zero, weights_of_words
from moe_kernels.quantised.four_bit_ring import SIDE, groups_of, hands_of_box, mma_layout, phase_of, places_of_groups


@gluon.constexpr_function
def words_by_groups(groups, words):
    """Words [64, groups, words of a group] as threads need them for the tensor core's operand: see `words.py`."""
    registers = [[8, 0, 0]]
    registers += [[0, 0, i] for i in (4, 8, 16) if i < words]
    registers += [[0, i, 0] for i in (1, 2, 4) if i < groups]
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, groups, words])


@gluon.constexpr_function
def all_words(words):
    """The same words, [64, W]."""
    registers = [[8, 0]] + [[0, i] for i in (4, 8, 16) if i < words]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, words])


@gluon.constexpr_function
def _lanes_by_groups(groups):
    """Each thread of a quad has other groups: what four need of a scale is computed once, then they exchange it."""
    return [[1 if groups > 1 else 0, 0], [2 if groups > 2 else 0, 0], [0, 1], [0, 2], [0, 4]]


@gluon.constexpr_function
def half_groups(groups):
    """Scales or zeros [groups, 32] of the gate or up rows among a group of warps' 64."""
    registers, lanes = [[4, 0]] * (groups > 4), _lanes_by_groups(groups)
    return gl.DistributedLinearLayout(registers, lanes, [[0, 8], [0, 16]], [], [groups, 32])


@gluon.constexpr_function
def whole_groups(groups):
    """Scales or zeros [groups, 64] of a group of warps' rows."""
    registers, lanes = [[0, 8]] + [[4, 0]] * (groups > 4), _lanes_by_groups(groups)
    return gl.DistributedLinearLayout(registers, lanes, [[0, 16], [0, 32]], [], [groups, 64])


@gluon.constexpr_function
def is_lowered(scheme, dtype):
    """See `weights_of_words`."""
    return scheme == "mxfp4" and dtype == gl.bfloat16


@gluon.jit
def _load_box(buffers, place, HAND: gl.constexpr, HANDS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scales or zeros in a box, of the rows of one of the groups of warps that share it."""
    SHAPE: gl.constexpr = buffers.shape
    ROWS: gl.constexpr = SHAPE[3] // HANDS
    box = buffers.index(places_of_groups(SHAPE[2] * SHAPE[3], buffers.dtype) * place).reshape((SHAPE[2], SHAPE[3]))
    return box.slice(HAND % HANDS * ROWS, ROWS, 1).load(LAYOUT)


@gluon.jit
def _load_groups(buffers, stage, HAND: gl.constexpr, PARTS: gl.constexpr, GROUPS: gl.constexpr):
    """Scales or zeros [64, groups] of a group of warps.

    Transposed in registers, as Triton 3.6 loads a transposed view of shared memory without a swizzle as if it were not
    transposed.
    """
    SHAPE: gl.constexpr = buffers.shape
    N: gl.constexpr = SHAPE[2]
    HANDS: gl.constexpr = hands_of_box(GROUPS)
    place = PARTS * (GROUPS // HANDS * stage + HAND // HANDS)
    if PARTS == 2:
        gate = _load_box(buffers, place, HAND, HANDS, half_groups(N))
        up = _load_box(buffers, place + 1, HAND, HANDS, half_groups(N))
        return gl.join(gate, up).reshape(N, 4, 8, 2).permute(1, 3, 2, 0).reshape(SIDE, N)
    else:
        return _load_box(buffers, place, HAND, HANDS, whole_groups(N)).permute((1, 0))


@gluon.jit
def _load_stage(
    ring, count, HAND: gl.constexpr, SCHEME: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, PARTS: gl.constexpr,
    GROUPS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Words, scales and zeros (if ZEROS) of group of warps HAND, [64, …], once the stage is filled; for bfloat16 prepared."""
    _, _, words, scales, zeros, filled, _ = ring
    W: gl.constexpr = BLOCK_K // 8
    N: gl.constexpr = groups_of(BLOCK_K, GROUP)
    LAYOUT: gl.constexpr = gl.SliceLayout(2, words_by_groups(N, W // N))
    stage = count & (STAGES - 1)
    mbarrier.wait(filled.index(stage), phase_of(count, STAGES))
    place = GROUPS * stage + HAND
    scale = _load_groups(scales, stage, HAND, PARTS, GROUPS)
    zero = scale
    if ZEROS:
        zero = _load_groups(zeros, stage, HAND, PARTS, GROUPS)
    if gl.bfloat16 == DTYPE:
        scale = factor_of_scale(scale, SCHEME)
        if ZEROS:
            zero = factor_of_zero(zero)
    scale, zero = gl.convert_layout(scale, LAYOUT), gl.convert_layout(zero, LAYOUT)
    return words.index(place).reshape((SIDE, W)).load(all_words(W)), scale, zero


@gluon.jit
def _part(values, NUMBER: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr):
    """The NUMBER-th of so many parts of the columns, which are in the same threads."""
    if PARTS > 1:
        left, right = values.reshape(SIDE, 2, values.shape[1] // 2).permute(0, 2, 1).split()
        values = left if NUMBER < PARTS // 2 else right
        if PARTS == 4:
            left, right = values.reshape(SIDE, 2, values.shape[1] // 2).permute(0, 2, 1).split()
            values = left if NUMBER % 2 == 0 else right
    return gl.convert_layout(values, LAYOUT)


@gluon.jit
def _unpack(
    loaded, CHUNK: gl.constexpr, SCHEME: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, OPERAND: gl.constexpr,
    DTYPE: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The weights [64, 64] of a chunk of the columns in registers, as a tensor core's operand."""
    words, scale, zero = loaded
    N: gl.constexpr = groups_of(SIDE, GROUP)
    W: gl.constexpr = SIDE // 8
    LAYOUT: gl.constexpr = gl.SliceLayout(2, words_by_groups(N, W // N))
    CHUNKS: gl.constexpr = BLOCK_K // SIDE
    words = _part(words, CHUNK, CHUNKS, all_words(W))
    # Of columns that share a scale there may be fewer parts.
    PARTS: gl.constexpr = CHUNKS if GROUP <= SIDE else groups_of(BLOCK_K, GROUP)
    scale = _part(scale, CHUNK * PARTS // CHUNKS, PARTS, LAYOUT)
    if ZEROS:
        zero = _part(zero, CHUNK * PARTS // CHUNKS, PARTS, LAYOUT)
    ASSEMBLY: gl.constexpr = gl.bfloat16 == DTYPE
    if ZEROS:
        weights = weights_of_words(words, scale, zero, SCHEME, GROUP, DTYPE, ASSEMBLY)
    else:
        weights = weights_of_words(words, scale, None, SCHEME, GROUP, DTYPE, ASSEMBLY)
    return gl.convert_layout(weights, OPERAND)


@gluon.jit
def _multiply(
    ring, stage, chunk, weights, product, extra, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr, BLOCK_K: gl.constexpr
):  # fmt: skip
    """Begins to add the products of 64 columns of K."""
    rows, extra_rows, _, _, _, _, _ = ring
    place = BLOCK_K // SIDE * stage + chunk
    of_tile = rows.index(place)
    if of_tile.shape[0] > BLOCK_M:
        of_tile = of_tile.slice(0, BLOCK_M)
    product = warpgroup_mma(weights, of_tile.permute((1, 0)), product, is_async=True)
    if EXTRA_M > 0:
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, mma_layout(EXTRA_M), 2))
        extra = warpgroup_mma(operand, extra_rows.index(place).permute((1, 0)), extra, is_async=True)
    return product, extra


@gluon.jit
def _wait(product, extra, weights, EXTRA_M: gl.constexpr):
    """For all products."""
    if EXTRA_M > 0:
        product, extra, weights = warpgroup_mma_wait(0, deps=(product, extra, weights))
    else:
        product, weights = warpgroup_mma_wait(0, deps=(product, weights))
    return product, extra


@gluon.jit
def multiply_tile(
    ring, count, SIZE: gl.constexpr, HAND: gl.constexpr, SCHEME: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
    PARTS: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Sums [64, BLOCK_M] and [64, EXTRA_M], float32: of group of warps HAND's weights times the tile's first rows and the
    extra ones (nothing of use without), and the next `count`.
    """
    emptied = ring[6]
    CHUNKS: gl.constexpr = BLOCK_K // SIDE
    STEPS: gl.constexpr = (SIZE + BLOCK_K - 1) // BLOCK_K
    LAST: gl.constexpr = (SIZE - (STEPS - 1) * BLOCK_K + SIDE - 1) // SIDE  # chunks of the last step
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, mma_layout(BLOCK_M), 2)
    product = gl.zeros((SIDE, BLOCK_M), gl.float32, mma_layout(BLOCK_M))
    extra = product
    if EXTRA_M > 0:
        extra = gl.zeros((SIDE, EXTRA_M), gl.float32, mma_layout(EXTRA_M))
    loaded = _load_stage(ring, count, HAND, SCHEME, GROUP, ZEROS, PARTS, GROUPS, BLOCK_K, STAGES, DTYPE)
    weights = _unpack(loaded, 0, SCHEME, GROUP, ZEROS, OPERAND, DTYPE, BLOCK_K)
    for _ in range(STEPS - 1):
        stage = count & (STAGES - 1)
        for chunk in gl.static_range(CHUNKS):
            product, extra = _multiply(ring, stage, chunk, weights, product, extra, BLOCK_M, EXTRA_M, BLOCK_K)
            if chunk == CHUNKS - 1:
                loaded = _load_stage(ring, count + 1, HAND, SCHEME, GROUP, ZEROS, PARTS, GROUPS, BLOCK_K, STAGES, DTYPE)
            following = _unpack(loaded, (chunk + 1) % CHUNKS, SCHEME, GROUP, ZEROS, OPERAND, DTYPE, BLOCK_K)
            product, extra = _wait(product, extra, weights, EXTRA_M)
            weights = following
        mbarrier.arrive(emptied.index(stage), count=1)
        count += 1
    stage = count & (STAGES - 1)
    for chunk in gl.static_range(LAST):
        product, extra = _multiply(ring, stage, chunk, weights, product, extra, BLOCK_M, EXTRA_M, BLOCK_K)
        following = weights
        if chunk < LAST - 1:
            following = _unpack(loaded, chunk + 1, SCHEME, GROUP, ZEROS, OPERAND, DTYPE, BLOCK_K)
        product, extra = _wait(product, extra, weights, EXTRA_M)
        weights = following
    mbarrier.arrive(emptied.index(stage), count=1)
    if is_lowered(SCHEME, DTYPE):
        product = product * LOWERED_UNDONE
        extra = extra * LOWERED_UNDONE
    return product, extra, count + 1


@gluon.jit
def _right_or_left(product, IS_RIGHT: gl.constexpr):
    M: gl.constexpr = product.shape[1] // 2
    left, right = product.reshape(SIDE, 2, M).permute(0, 2, 1).split()
    return gl.convert_layout(right if IS_RIGHT else left, mma_layout(M))


@gluon.jit
def part_of(product, NUMBER: gl.constexpr):
    """The NUMBER-th 64 columns of sums, or all of them if there are no more: to store few at once takes few registers."""
    M: gl.constexpr = product.shape[1]
    if M == 256:
        product = _right_or_left(_right_or_left(product, NUMBER // 2 == 1), NUMBER % 2 == 1)
    elif M == 128:
        product = _right_or_left(product, NUMBER == 1)
    return product
