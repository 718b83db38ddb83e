"""Steps 4 and 5 of a forward with 4-bit experts: words of their weights become operands of a product.

`words` says which weights of a group of 32 columns a word has, and where. Legend: N rows of a tile, W words of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.base.checks import check_tma_address, slot_stride
from moe_kernels.base.numerics import narrow, widen
from moe_kernels.operands.quantised_weights import group_of
from moe_kernels.operands.words import WORD

_E2M1_FACTOR = tl.constexpr(2.0**126)
# Codes of e2m1 are used as numbers of 2 ** -126. Times x in units of 2 ** -48 their products keep far from subnormal numbers,
# and from infinity while x is below 2 ** 78.
SUMS_FACTOR = tl.constexpr(2.0**48)
_SUMS_UNDONE = tl.constexpr(2.0**78)

# Of a bfloat16, twice: its sign, the last two bits of its exponent and the first bit of its mantissa.
_FOUR_OF_MXFP4 = """
    and.b32 a, $8, 0x81C081C0;
    shl.b32 b, $8, 3;
    and.b32 b, b, 0x81C081C0;
    shl.b32 c, $8, 6;
    and.b32 c, c, 0x81C081C0;
    shl.b32 d, $8, 1;
    and.b32 d, d, 0x80008000;
    shr.b32 e, $8, 3;
    lop3.b32 d, e, 0x01800180, d, 0xEA;
    shr.b32 e, $8, 7;
    lop3.b32 d, e, 0x00400040, d, 0xEA;
"""
# 128 plus the code: 0x4300 is 128, whose mantissa ends with the digit of 1.
_FOUR_OF_INT4 = """
    lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 b, $8, 4;
    lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 c, $8, 8;
    lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 d, $8, 12;
    lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
"""


def _assembly(four: str, steps: tuple[str, ...]) -> tl.constexpr:
    """PTX of a word $8 → its eight weights as bfloat16: four pairs, each through these steps."""
    lines = ["{", "    .reg .b32 a, b, c, d, e;", four.strip("\n")]
    lines += [f"    {step.format(pair)}" for step in steps for pair in "abcd"]
    lines += [f"    mov.b32 {{${2 * i}, ${2 * i + 1}}}, {pair};" for i, pair in enumerate("abcd")]
    return tl.constexpr("\n".join([*lines, "}"]))


# $9 is the scale, and $10 what comes before it: a factor, or what stands for 0. Twice each.
_MXFP4 = _assembly(_FOUR_OF_MXFP4, ("mul.bf16x2 {0}, {0}, $10;", "mul.bf16x2 {0}, {0}, $9;"))
_INT4 = _assembly(_FOUR_OF_INT4, ("sub.bf16x2 {0}, {0}, $10;", "mul.bf16x2 {0}, {0}, $9;"))
_EIGHT = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")
# One multiplication by the scale times 2 ** 62 instead: the weights times 2 ** -64.
_LOWERED_MXFP4 = _assembly(_FOUR_OF_MXFP4, ("mul.bf16x2 {0}, {0}, $9;",))
LOWERED_UNDONE = tl.constexpr(2.0**64)
# A scale's exponent plus 62 as a bfloat16, twice. From 2 ** 66 on it is infinity, then NaN, which 255 stands for.
_LOWERED_EXPONENT = tl.constexpr("""{
    .reg .b32 a, b;
    add.u32 a, $1, 0x1F001F00;
    mov.b32 b, 0x7FC07FC0;
    min.u16x2 $0, a, b;
}""")
# A scale's exponent as a bfloat16, twice. 2 ** -127 is subnormal; infinity times 0 is NaN, which 255 stands for.
_EXPONENT = tl.constexpr("""{
    .reg .b32 a, b, c;
    mov.b32 a, 0x00400040;
    max.u16x2 b, $1, a;
    mov.b32 c, 0;
    fma.rn.bf16x2 $0, b, c, b;
}""")


MOST_HALVED = 32
"""Rows of a tile up to which the kernels use `halves` (docs/log.md, "4-bit experts on an H200")."""


def described(
    which: str,
    weights: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    scheme: str,
    block_n: int,
    block_k: int,
    interleaved: bool = False,
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor | None, int]:
    """Descriptors of the words of matrices [S, N, K / 2] and of their scales and zeros, and the group.

    `interleaved`: a box of the words has block_n gate rows and block_n up rows, eight of each in turn. (N is divisible by 64.)
    """
    assert scale is not None
    group = group_of(weights, scale, scheme)
    for name, tensor in (("SNH", weights), ("scale", scale), ("zero", zero)):
        if tensor is not None:
            check_tma_address(f"matrices.{which}_{name}", tensor)
    slots, rows, inner = weights.shape
    inner, stride_slot = inner // 4, slot_stride(weights) // 4
    shape, strides, block = [slots, rows, inner], [stride_slot, inner, 1], [1, block_n, block_k // WORD]
    if interleaved:  # in an order that is not that of the strides: see `expert_up_tma`
        shape, strides = [slots, rows // 16, 2, 8, inner], [stride_slot, 8 * inner, rows // 2 * inner, inner, 1]
        block = [1, block_n // 8, 2, 8, block_k // WORD]
    words = TensorDescriptor(weights.view(torch.int32), shape, strides, block)

    def of_groups(tensor: torch.Tensor) -> TensorDescriptor:
        block = [1, max(block_k // group, 1), block_n]
        return TensorDescriptor(tensor, list(tensor.shape), [slot_stride(tensor), rows, 1], block)

    return words, of_groups(scale), None if zero is None else of_groups(zero), group


@triton.jit
def load_groups(of_groups, slot, first_row, step, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales or zeros [BLOCK_N, groups] of rows from `first_row` and columns from step * BLOCK_K on."""
    GROUPS: tl.constexpr = max(BLOCK_K // GROUP, 1)
    return of_groups.load([slot, step * BLOCK_K // GROUP, first_row]).reshape(GROUPS, BLOCK_N).T


@triton.jit
def halves(weights):
    """The left and the right half of the columns, for two products one after the other.

    The compiler divides a single product in a loop into ones of 16 columns, to unpack the next while one runs. Two it leaves
    whole, and waits for each. With few rows the products are short, and so many synchronisations take longer. The bits are
    the same.
    """
    ROWS: tl.constexpr = weights.shape[0]
    return weights.reshape(ROWS, 2, weights.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def factor_of_scale(scale, SCHEME: tl.constexpr, LOWERED: tl.constexpr):
    """A scale as a bfloat16, twice: int32. LOWERED: see `weights_of_words`."""
    if SCHEME == "mxfp4":
        return tl.inline_asm_elementwise(
            _LOWERED_EXPONENT if LOWERED else _EXPONENT,
            "=r,r",
            [scale.to(tl.int32) * 0x00800080],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        factor = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return factor | (factor << 16)


@triton.jit
def factor_of_zero(zero):
    """128 plus a zero as a bfloat16, twice: int32."""
    return zero.to(tl.int32) * 0x00010001 + 0x43004300


@triton.jit
def weights_of_words(
    words, scale, zero, SCHEME: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
    LOWERED: tl.constexpr = False, PREPARED: tl.constexpr = False,
):  # fmt: skip
    """The weights [N, 8W] in DTYPE of words [N, W], rounded to nearest; mxfp4 is exact in bfloat16.

    Args:
        words: int32.
        scale, zero: [N, max(8W / GROUP, 1)]; zero may be None: 8.
        ASSEMBLY: whether to unpack two weights by one instruction, by PTX for Hopper. The bits are the same. It needs bfloat16.
        PREPARED: with ASSEMBLY, whether scale and zero are those that `factor_of_scale` and `factor_of_zero` return.
        LOWERED: of mxfp4 by ASSEMBLY, the weights times 2 ** -64 by one multiplication less; whoever sums them up multiplies by
            `LOWERED_UNDONE`. Exact for scales of 2 ** -62 to 2 ** 65; smaller weights lose bits, larger ones are not finite.
    """
    GROUPS: tl.constexpr = scale.shape[1]
    WORDS: tl.constexpr = words.shape[1] // GROUPS
    if ASSEMBLY:
        tl.static_assert(tl.bfloat16 == DTYPE)
        factor, before = scale, zero
        if not PREPARED:
            factor = factor_of_scale(scale, SCHEME, LOWERED)
            if zero is not None:
                before = factor_of_zero(zero)
        if SCHEME == "mxfp4":
            before = 0x7E807E80  # 2 ** 126
        elif zero is None:
            before = 0x43084308  # 136
        else:
            before = _of_words(before, WORDS)
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            (_LOWERED_MXFP4 if LOWERED else _MXFP4) if SCHEME == "mxfp4" else _INT4,
            _EIGHT,
            [words, _of_words(factor, WORDS), before],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        bits = words.to(tl.uint32, bitcast=True)
        if SCHEME == "mxfp4":
            is_special = (scale == 0) | (scale == 255)  # 2 ** -127, which is subnormal, and NaN
            factor = (scale.to(tl.uint32) << 23) | tl.where(is_special, 0x400000, 0).to(tl.uint32)
            factor = _of_words(factor.to(tl.float32, bitcast=True), WORDS)
            a, b = _pair_of_mxfp4(bits, factor, DTYPE)
            c, d = _pair_of_mxfp4(bits << 3, factor, DTYPE)
            e, f = _pair_of_mxfp4(bits << 6, factor, DTYPE)
            rest = ((bits << 1) & 0x80008000) | ((bits >> 3) & 0x01800180) | ((bits >> 7) & 0x00400040)
            g, h = _pair_of_mxfp4(rest, factor, DTYPE)
        else:
            factor = _of_words(widen(scale), WORDS)
            middle = 8.0
            if zero is not None:
                middle = _of_words(zero.to(tl.float32), WORDS)
            a, b = _pair_of_int4(bits, middle, factor, DTYPE)
            c, d = _pair_of_int4(bits >> 4, middle, factor, DTYPE)
            e, f = _pair_of_int4(bits >> 8, middle, factor, DTYPE)
            g, h = _pair_of_int4(bits >> 12, middle, factor, DTYPE)
    return _by_columns(a, b, c, d, e, f, g, h)


@triton.jit
def _by_columns(a, b, c, d, e, f, g, h):
    """[N, W] each of a word's eight weights, in the order of i and e → [N, 8W]. Threads keep what they have."""
    even = tl.join(tl.join(a, b), tl.join(c, d))  # [N, W, e, l], where i = 2j + l
    odd = tl.join(tl.join(e, f), tl.join(g, h))
    parts = tl.reshape(tl.join(even, odd), (a.shape[0], a.shape[1] // 4, 4, 2, 2, 2))  # group, t, e, l, j
    return tl.reshape(tl.permute(parts, (0, 1, 5, 4, 2, 3)), (a.shape[0], 8 * a.shape[1]))


@triton.jit
def _of_words(of_groups, WORDS: tl.constexpr):
    """[N, GROUPS] → [N, GROUPS * WORDS]."""
    N: tl.constexpr = of_groups.shape[0]
    GROUPS: tl.constexpr = of_groups.shape[1]
    return tl.reshape(tl.broadcast_to(of_groups[:, :, None], (N, GROUPS, WORDS)), (N, GROUPS * WORDS))


@triton.jit
def _pair_of_mxfp4(bits, factor, DTYPE: tl.constexpr):
    """A bfloat16's bits are the upper half of a float32's."""
    low = ((bits << 16) & 0x81C00000).to(tl.float32, bitcast=True) * _E2M1_FACTOR * factor
    high = (bits & 0x81C00000).to(tl.float32, bitcast=True) * _E2M1_FACTOR * factor
    return narrow(low, DTYPE), narrow(high, DTYPE)


@triton.jit
def _pair_of_int4(bits, middle, factor, DTYPE: tl.constexpr):
    low = ((bits & 15).to(tl.float32) - middle) * factor
    high = (((bits >> 16) & 15).to(tl.float32) - middle) * factor
    return narrow(low, DTYPE), narrow(high, DTYPE)


@triton.jit
def sums_of_words(words, x, scale, zero, SCHEME: tl.constexpr):
    """float32 [R, W / 4]: of each group of 32 columns, the sum of x times the weights of words [R, W].

    The weights are not rounded: the scale multiplies the sum, in float32.

    Args:
        words: int32.
        x: float32 [R, W / 4, 32]; the first dimension may be 1. Of mxfp4 times `SUMS_FACTOR`.
        scale, zero: [R, W / 4]; zero may be None: 8.
    """
    bits = words.to(tl.uint32, bitcast=True)
    if SCHEME == "mxfp4":
        a, b = _raw_of_mxfp4(bits)
        c, d = _raw_of_mxfp4(bits << 3)
        e, f = _raw_of_mxfp4(bits << 6)
        g, h = _raw_of_mxfp4(((bits << 1) & 0x80008000) | ((bits >> 3) & 0x01800180) | ((bits >> 7) & 0x00400040))
    else:
        middle = 136.0
        if zero is not None:
            middle = _of_words(zero.to(tl.float32) + 128.0, 4)
        a, b = _raw_of_int4(bits, middle)
        c, d = _raw_of_int4(bits >> 4, middle)
        e, f = _raw_of_int4(bits >> 8, middle)
        g, h = _raw_of_int4(bits >> 12, middle)
    values = tl.reshape(_by_columns(a, b, c, d, e, f, g, h), (words.shape[0], words.shape[1] // 4, 32))
    sums = tl.sum(values * x, axis=2)
    if SCHEME == "mxfp4":
        is_special = (scale == 0) | (scale == 255)  # 2 ** -127, which is subnormal, and NaN
        factor = (scale.to(tl.uint32) << 23) | tl.where(is_special, 0x400000, 0).to(tl.uint32)
        return sums * _SUMS_UNDONE * factor.to(tl.float32, bitcast=True)
    else:
        return sums * widen(scale)


@triton.jit
def _raw_of_mxfp4(bits):
    """Times 2 ** -126."""
    return ((bits << 16) & 0x81C00000).to(tl.float32, bitcast=True), (bits & 0x81C00000).to(tl.float32, bitcast=True)


@triton.jit
def _raw_of_int4(bits, middle):
    """A code as the last bits of 128, whose mantissa ends 16 bits up with the digit of 1."""
    low = (((bits << 16) & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)
    return low - middle, ((bits & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True) - middle
