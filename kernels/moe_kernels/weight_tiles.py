"""Steps 4 and 5 of a forward with quantised experts: tiles of their weights, and products with them.

A tile has BLOCK_N rows of a weight matrix and BLOCK_K of its columns, which are adjacent in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.backend import INTERPRETED
from moe_kernels.fp8 import operand
from moe_kernels.numerics import dot, narrow, widen

_INTERPRETED = tl.constexpr(INTERPRETED)
_E2M1_FACTOR = tl.constexpr(2.0**126)


@triton.jit
def load_weights(
    weights_ptr, scale_ptr, zero_ptr, row, step, width, num_groups, left,
    SCHEME: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The tile of `row` [BLOCK_N] at column step * BLOCK_K, as an operand of `add_product`.

    fp8_block: values without their scales. mxfp4, int4: the weights, in DTYPE.

    Args:
        weights_ptr, scale_ptr, zero_ptr: of the matrix from which `row` counts; `zero_ptr` may be None.
        width: elements of the matrix in memory from row to row.
        num_groups: of a row of mxfp4 or int4.
        left: columns from the tile's first one on; only read without EVEN_K.
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
        k = tl.arange(0, BLOCK_K // 2)
        at = weights_ptr + row[:, None] * width + (step * (BLOCK_K // 2) + k)[None, :]
        group = step * BLOCK_K // GROUP + tl.arange(0, GROUPS)
        group_at = row[:, None] * num_groups + group[None, :]
        if EVEN_K:
            packed = tl.load(at)
            scale = tl.load(scale_ptr + group_at)
        else:
            packed = tl.load(at, mask=2 * k[None, :] < left, other=0)
            scale = tl.load(scale_ptr + group_at, mask=group[None, :] < num_groups, other=0)
        zero = None
        if zero_ptr is not None:
            if EVEN_K:
                zero = tl.load(zero_ptr + group_at)
            else:
                zero = tl.load(zero_ptr + group_at, mask=group[None, :] < num_groups, other=0)
        return dequantised(packed, scale, zero, SCHEME, GROUPS, DTYPE)


@triton.jit
def dequantised(packed, scale, zero, SCHEME: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """Weights [BLOCK_N, BLOCK_K] in DTYPE of packed bytes [BLOCK_N, BLOCK_K / 2], rounded to nearest.

    Scale and zero (None: 8) are [BLOCK_N, GROUPS].

    bfloat16 has all codes, so natively they are computed in it, by bits: those of e2m1 at the place of a bfloat16's last bits
    of exponent, times 2 ** 126; those of int4 as the last bits of 128. The interpreter has no bfloat16; float32 gives the same
    bits. mxfp4 is exact in bfloat16.
    """
    BLOCK_N: tl.constexpr = packed.shape[0]
    BLOCK_K: tl.constexpr = 2 * packed.shape[1]
    NATIVE: tl.constexpr = not _INTERPRETED and DTYPE == tl.bfloat16  # noqa: SIM300
    code = tl.interleave(packed & 15, packed >> 4)
    if SCHEME == "mxfp4":
        is_special = (scale == 0) | (scale == 255)  # 2 ** -127, which is subnormal, and NaN
        if NATIVE:
            # One factor for both shifts: by 6 for exponent and mantissa, by 12 for the sign.
            value = ((code.to(tl.uint16) * 0x1040) & 0x81C0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            value = value * tl.full((1, 1), _E2M1_FACTOR, tl.bfloat16)
            factor = ((scale.to(tl.uint16) << 7) | tl.where(is_special, 0x40, 0).to(tl.uint16)).to(
                tl.bfloat16, bitcast=True
            )
        else:
            value = ((code.to(tl.uint32) * 0x10400000) & 0x81C00000).to(tl.float32, bitcast=True) * _E2M1_FACTOR
            factor = ((scale.to(tl.uint32) << 23) | tl.where(is_special, 0x400000, 0).to(tl.uint32)).to(
                tl.float32, bitcast=True
            )
        value = tl.reshape(value, (BLOCK_N, GROUPS, BLOCK_K // GROUPS))
    else:
        if NATIVE:
            value = (code.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
            value = tl.reshape(value, (BLOCK_N, GROUPS, BLOCK_K // GROUPS))
            if zero is None:
                value = value - tl.full((1, 1, 1), 136.0, tl.bfloat16)
            else:
                value = value - (zero.to(tl.uint16) + 0x4300).to(tl.bfloat16, bitcast=True)[:, :, None]
            factor = scale
        else:
            value = tl.reshape(code.to(tl.float32), (BLOCK_N, GROUPS, BLOCK_K // GROUPS))
            value = value - (8.0 if zero is None else zero.to(tl.float32)[:, :, None])
            factor = widen(scale)
    value = value * factor[:, :, None]
    return narrow(tl.reshape(value, (BLOCK_N, BLOCK_K)), DTYPE)


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
    weights_at, scale_at, zero_at, row, first_row: tl.constexpr, first, chosen, SIZE: tl.constexpr, SCHEME: tl.constexpr,
    GROUP: tl.constexpr, EVICTION: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """float32 [R, BLOCK] of weights, of one row in each of R matrices of SIZE columns, from column `first` on.

    4-bit weights are rounded to DTYPE before. What is not `chosen` [R, 1], and columns past the end, are zeros.

    Args:
        weights_at, scale_at, zero_at: where the matrices begin: one pointer, or [R, 1].
        first_row: that of the part of the matrix (up behind gate) to which `row` belongs: fp8_block's blocks begin anew there.
    """
    GROUPS: tl.constexpr = max(BLOCK // GROUP, 1)
    NUM_GROUPS: tl.constexpr = tl.cdiv(SIZE, GROUP)
    group = first // GROUP + tl.arange(0, GROUPS)[None, :]
    is_group = chosen & (group < NUM_GROUPS)
    if SCHEME == "fp8_block":
        i = first + tl.arange(0, BLOCK)[None, :]
        at = weights_at + (first_row + row) * SIZE + i
        values = widen(operand(tl.load(at, mask=chosen & (i < SIZE), other=0.0, eviction_policy=EVICTION)))
        scale_row = tl.cdiv(first_row, GROUP) + row // GROUP
        scale = tl.load(scale_at + scale_row * NUM_GROUPS + group, mask=is_group, other=0.0)
        values = tl.reshape(values, (values.shape[0], GROUPS, BLOCK // GROUPS)) * scale[:, :, None]
        return tl.reshape(values, (values.shape[0], BLOCK))
    else:
        i = first // 2 + tl.arange(0, BLOCK // 2)[None, :]
        at = weights_at + (first_row + row) * (SIZE // 2) + i
        packed = tl.load(at, mask=chosen & (i < SIZE // 2), other=0, eviction_policy=EVICTION)
        group_at = (first_row + row) * NUM_GROUPS + group
        scale = tl.load(scale_at + group_at, mask=is_group, other=0)
        zero = None
        if zero_at is not None:
            zero = tl.load(zero_at + group_at, mask=is_group, other=0)
        return widen(dequantised(packed, scale, zero, SCHEME, GROUPS, DTYPE))
