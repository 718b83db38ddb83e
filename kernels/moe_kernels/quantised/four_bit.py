"""Steps 4 and 5 of a forward with 4-bit experts: words of their weights become operands of a product.

`words` says which weights of a group of 32 columns a word has, and where. Legend: N rows of a tile, W words of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.numerics import narrow, widen

_E2M1_FACTOR = tl.constexpr(2.0**126)
# Codes of e2m1 are used as numbers of 2 ** -126. Times x in units of 2 ** -48 their products keep far from subnormal numbers,
# and from infinity while x is below 2 ** 78.
SUMS_FACTOR = tl.constexpr(2.0**48)
_SUMS_UNDONE = tl.constexpr(2.0**78)

# Of a bfloat16, twice: its sign, the last two bits of its exponent and the first bit of its mantissa.
_FOUR_OF_MXFP4 = """
    and.b32 a, $8, 0x81C081C0;
    shf.r.wrap.b32 b, $8, $8, 4;
    and.b32 b, b, 0x81C081C0;
    shl.b32 c, $8, 6;
    and.b32 c, c, 0x81C081C0;
    shf.r.wrap.b32 d, $8, $8, 6;
    and.b32 d, d, 0x81808180;
    shl.b32 e, $8, 2;
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


# $9 is the scale, and $10 what stands for 0, twice each. mxfp4 is multiplied once, by the scale times 2 ** 62: that makes the
# weights times 2 ** -64.
_MXFP4 = _assembly(_FOUR_OF_MXFP4, ("mul.bf16x2 {0}, {0}, $9;",))
_INT4 = _assembly(_FOUR_OF_INT4, ("sub.bf16x2 {0}, {0}, $10;", "mul.bf16x2 {0}, {0}, $9;"))
_EIGHT = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")
LOWERED_UNDONE = tl.constexpr(2.0**64)


def _two_words(four: str, steps: tuple[str, ...]) -> tl.constexpr:
    """PTX of two words $8 and $9, with what stands for 0 in $10 and $11 → outputs, of which 2i + w is pair i of word w."""
    lines = ["{", "    .reg .b32 a, b, c, d, e;"]
    for word in (0, 1):
        lines += [four.strip("\n").replace("$8", f"${8 + word}")]
        lines += [f"    {step.format(pair, 10 + word)}" for step in steps for pair in "abcd"]
        lines += [f"    mov.b32 ${2 * i + word}, {pair};" for i, pair in enumerate("abcd")]
    return tl.constexpr("\n".join([*lines, "}"]))


# Not multiplied: of e2m1 times 2 ** -126, of int4 minus what stands for 0.
RAW_MXFP4 = _two_words(_FOUR_OF_MXFP4, ())
RAW_INT4 = _two_words(_FOUR_OF_INT4, ("sub.bf16x2 {0}, {0}, ${1};",))
NO_ZERO = tl.constexpr(0x43084308)  # 136, where there are no zeros
# A scale's exponent plus 62 as a bfloat16, twice. From 2 ** 66 on it is infinity, then NaN, which 255 stands for.
_EXPONENT = tl.constexpr("""{
    .reg .b32 a, b;
    add.u32 a, $1, 0x1F001F00;
    mov.b32 b, 0x7FC07FC0;
    min.u16x2 $0, a, b;
}""")


@triton.jit
def factor_of_scale(scale, SCHEME: tl.constexpr):
    """A scale (mxfp4: times 2 ** 62) as a bfloat16, twice: int32."""
    if SCHEME == "mxfp4":
        return tl.inline_asm_elementwise(
            _EXPONENT, "=r,r", [scale.to(tl.int32) * 0x00800080], dtype=tl.int32, is_pure=True, pack=1
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
    words, scale, zero, SCHEME: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """The weights [N, 8W] in DTYPE of words [N, W], rounded to nearest; mxfp4 is exact in bfloat16.

    Args:
        words: int32.
        scale, zero: [N, max(8W / GROUP, 1)]; zero may be None: 8.
        ASSEMBLY: whether to unpack two weights by one instruction, by PTX for Hopper; into bfloat16, of a scale and a zero that
            `factor_of_scale` and `factor_of_zero` return. Of int4 the bits are the same. Weights of mxfp4 are times 2 ** -64;
            whoever sums them up multiplies by `LOWERED_UNDONE`. So they are exact for scales of 2 ** -62 to 2 ** 65; smaller
            ones lose bits, larger ones are not finite.
    """
    GROUPS: tl.constexpr = scale.shape[1]
    WORDS: tl.constexpr = words.shape[1] // GROUPS
    if ASSEMBLY:
        tl.static_assert(tl.bfloat16 == DTYPE)
        before = NO_ZERO
        if zero is not None:
            before = _of_words(zero, WORDS)
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _MXFP4 if SCHEME == "mxfp4" else _INT4,
            _EIGHT,
            [words, _of_words(scale, WORDS), before],
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
            first, second, third, fourth = _pairs_of_mxfp4(bits)
            a, b = _pair_of_mxfp4(first, factor, DTYPE)
            c, d = _pair_of_mxfp4(second, factor, DTYPE)
            e, f = _pair_of_mxfp4(third, factor, DTYPE)
            g, h = _pair_of_mxfp4(fourth, factor, DTYPE)
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
def _pairs_of_mxfp4(bits):
    """A word's four pairs, each where a bfloat16 has these bits, twice; other bits are not masked."""
    fourth = (((bits >> 6) | (bits << 26)) & 0x81808180) | ((bits << 2) & 0x00400040)
    return bits, (bits >> 4) | (bits << 28), bits << 6, fourth


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
        first, second, third, fourth = _pairs_of_mxfp4(bits)
        a, b = _raw_of_mxfp4(first)
        c, d = _raw_of_mxfp4(second)
        e, f = _raw_of_mxfp4(third)
        g, h = _raw_of_mxfp4(fourth)
    else:
        middle = 136.0
        if zero is not None:
            middle = _of_words(zero.to(tl.float32) + 128.0, 4)
        a, b = _raw_of_int4(bits, middle)
        c, d = _raw_of_int4(bits >> 4, middle)
        e, f = _raw_of_int4(bits >> 8, middle)
        g, h = _raw_of_int4(bits >> 12, middle)
    values = tl.reshape(_by_columns(a, b, c, d, e, f, g, h), (words.shape[0], words.shape[1] // 4, 32))
    return scaled(tl.sum(values * x, axis=2), scale, SCHEME)


@triton.jit
def scaled(sums, scale, SCHEME: tl.constexpr):
    """Sums of raw weights times x, as in `sums_of_words`, by their groups' scales, in float32."""
    if SCHEME == "mxfp4":
        undone = sums * _SUMS_UNDONE
        is_special = (scale == 0) | (scale == 255)  # 2 ** -127, which is subnormal, and NaN
        factor = (scale.to(tl.uint32) << 23) | tl.where(is_special, 0x400000, 0).to(tl.uint32)
        return undone * factor.to(tl.float32, bitcast=True)
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
