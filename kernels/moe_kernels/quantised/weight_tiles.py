"""Steps 4 and 5 of a forward with quantised experts: tiles of their weights, and products with them.

A tile has BLOCK_N rows of a weight matrix and BLOCK_K of its columns, which are adjacent in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.numerics import dot, widen
from moe_kernels.quantised.four_bit import weights_of_words
from moe_kernels.quantised.fp8 import operand


@triton.jit
def load_weights(
    weights_ptr, scale_ptr, zero_ptr, row, step, width, num_groups, num_rows, left,
    SCHEME: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The tile of `row` [BLOCK_N] at column step * BLOCK_K, as an operand of `add_product`.

    fp8_block: values without their scales. mxfp4, int4: the weights, in DTYPE.

    Args:
        weights_ptr, scale_ptr, zero_ptr: of the first row, from which `row` counts; `zero_ptr` may be None.
        width: elements (of 4-bit weights: words) of the matrix in memory from row to row.
        num_groups, num_rows: of mxfp4 or int4: the shape of the matrix's scales.
        left: columns from the tile's first one on; only read without EVEN_K, of fp8_block.
    """
    if SCHEME == "fp8_block":
        k = tl.arange(0, BLOCK_K)
        at = weights_ptr + row[:, None] * width + (step * BLOCK_K + k)[None, :]
        if EVEN_K:
            return operand(tl.load(at))
        else:
            return operand(tl.load(at, mask=k[None, :] < left, other=0.0))
    else:
        GROUPS: tl.constexpr = max(BLOCK_K // GROUP, 1)
        word = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        at = weights_ptr + row[:, None] * width + word[None, :]
        group = step * BLOCK_K // GROUP + tl.arange(0, GROUPS)
        group_at = group[None, :] * num_rows + row[:, None]
        zero = None
        if EVEN_K:
            words = tl.load(at)
            scale = tl.load(scale_ptr + group_at)
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + group_at)
        else:
            words = tl.load(at, mask=word[None, :] < width, other=0)
            scale = tl.load(scale_ptr + group_at, mask=group[None, :] < num_groups, other=0)
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + group_at, mask=group[None, :] < num_groups, other=0)
        return weights_of_words(words, scale, zero, SCHEME, GROUP, DTYPE, False)


@triton.jit
def new_accumulator(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """Of zeros; with SWAP weights are on its first side."""
    return tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)


@triton.jit
def add_product(accumulator, rows, weights, row_scale, block_scale, SWAP: tl.constexpr):
    """`accumulator` plus rows [BLOCK_M, BLOCK_K] times weights [BLOCK_N, BLOCK_K], in float32.

    With a `row_scale` [BLOCK_M] (None: of no fp8_block) the product is scaled by it and by the number `block_scale`.
    """
    before = accumulator if row_scale is None else tl.zeros_like(accumulator)
    product = dot(weights, tl.trans(rows), before) if SWAP else dot(rows, tl.trans(weights), before)
    if row_scale is None:
        return product
    else:
        scale = row_scale * block_scale
        return accumulator + product * (scale[None, :] if SWAP else scale[:, None])


@triton.jit
def load_rows(
    weights_at, scale_at, row, first_row: tl.constexpr, first, chosen, SIZE: tl.constexpr, GROUP: tl.constexpr,
    EVICTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 [R, BLOCK] of fp8_block weights, of one row in each of R matrices of SIZE columns, from column `first` on.

    What is not `chosen` [R, 1], and columns past the end, are zeros.

    Args:
        weights_at, scale_at: where the matrices begin: one pointer, or [R, 1].
        first_row: that of the part of the matrix (up behind gate) to which `row` belongs: blocks begin anew there.
    """
    GROUPS: tl.constexpr = max(BLOCK // GROUP, 1)
    NUM_GROUPS: tl.constexpr = tl.cdiv(SIZE, GROUP)
    group = first // GROUP + tl.arange(0, GROUPS)[None, :]
    i = first + tl.arange(0, BLOCK)[None, :]
    at = weights_at + (first_row + row) * SIZE + i
    values = widen(operand(tl.load(at, mask=chosen & (i < SIZE), other=0.0, eviction_policy=EVICTION)))
    scale_row = tl.cdiv(first_row, GROUP) + row // GROUP
    is_group = chosen & (group < NUM_GROUPS)
    scale = tl.load(scale_at + scale_row * NUM_GROUPS + group, mask=is_group, other=0.0)
    values = tl.reshape(values, (values.shape[0], GROUPS, BLOCK // GROUPS)) * scale[:, :, None]
    return tl.reshape(values, (values.shape[0], BLOCK))
