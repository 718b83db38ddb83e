"""Steps 4 to 6 of a forward of a single token with fp8_block experts, on Hopper: operands of `one_token_fp8_mma`.

A product has 16 rows and 8 columns, of which a token needs one. So a column has a piece of x, 64 elements, of eight neighbours,
a block; and a row has the piece of a row of weights that belongs to one of these: of the product only that column counts. PARTS
rows of a product are neighbours in one row of weights, so that a warp reads PARTS * 64 bytes in a line. A thread widens the
weights that it loads, 16 bytes of a piece, to float16, which has all of e4m3's values; it sends no other thread anything.

x (and hidden) of a warp is divided by a power of two, so that its largest is below 2 ** 15: then what float16 can't hold is
less than 2 ** -39 of the largest. P: warps, with PIECES pieces each.
"""

# In kernels a tuple grows in a loop that the compiler unrolls.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from moe_kernels.base.numerics import widen
from moe_kernels.one_token.one_token_operands import along_3, warp_bases

SIDE = gl.constexpr(128)  # columns and rows that share a scale
PIECE = gl.constexpr(64)
WIDEN = gl.constexpr(
    "{ .reg .b16 l, h; mov.b32 {l, h}, $4; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h;"
    " mov.b32 {l, h}, $5; cvt.rn.f16x2.e4m3x2 $2, l; cvt.rn.f16x2.e4m3x2 $3, h; }"
)


@gluon.constexpr_function
def pieces_layout(warps):
    """Words of four weights, [P, 16, 16], of a product: a thread has four neighbours, of two rows."""
    registers, lanes = [[0, 0, 1], [0, 0, 2], [0, 8, 0]], [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 16, 16])


@gluon.constexpr_function
def x_pieces_layout(warps):
    """x [P, 8, 64], by column of the product: likewise."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]]
    lanes = [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 8, 64])


@gluon.constexpr_function
def piece_sums_layout(warps):
    """Every second column of the product, [P, 16, 4]: a thread has one, of two rows."""
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([[0, 8, 0]], lanes, warp_bases(warps, 3), [], [warps, 16, 4])


@gluon.jit
def _weights_operand(words, MMA: gl.constexpr):
    """Words [P, 16, 16] → weights [P, 16, 64] as the product's left operand."""
    P: gl.constexpr = words.shape[0]
    # A register of two weights of one word counts as one of each of two words.
    a, b, c, d = gl.inline_asm_elementwise(
        WIDEN, "=r,=r,=r,=r,r,r", [words], dtype=(gl.float16,) * 4, is_pure=False, pack=2
    )
    # Thread, v, l, pair, w: of word 2v + w.
    parts = gl.join(gl.join(a, b), gl.join(c, d)).reshape(P, 16, 4, 2, 2, 2, 2)
    parts = parts.permute(0, 1, 3, 6, 5, 2, 4).reshape(P, 16, PIECE)
    return gl.convert_layout(parts, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def exponent_and_inverse(largest):
    """Of the power of two by which magnitudes up to `largest` are divided to be below 2 ** 15: exponent, biased by 127."""
    bits = largest.to(gl.int32, bitcast=True)
    exponent = gl.minimum(gl.maximum((bits >> 23) - 14, 1), 253)
    return exponent, ((254 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def x_operands(blocks, MMA: gl.constexpr, SUMS: gl.constexpr):
    """x of blocks, [P, 8, 64] each → right operands [P, 64, 8], and powers of two [P, 1, 1], that divided them."""
    P: gl.constexpr = blocks[0].shape[0]
    largest = gl.abs(widen(blocks[0]))
    for b in gl.static_range(1, len(blocks)):
        largest = gl.maximum(largest, gl.abs(widen(blocks[b])))
    exponent, inverse = exponent_and_inverse(gl.max(gl.max(largest, axis=2), axis=1))
    inverse = inverse[:, None, None]
    operands = ()
    for b in gl.static_range(len(blocks)):
        parts = (widen(blocks[b]) * inverse).to(gl.float16).reshape(P, 8, 4, 4, 2, 2)
        parts = parts.permute(0, 3, 4, 2, 5, 1).reshape(P, PIECE, 8)
        operands += (gl.convert_layout(parts, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True),)
    power = (exponent << 23).to(gl.float32, bitcast=True)
    power = gl.convert_layout(power, gl.SliceLayout(1, gl.SliceLayout(2, SUMS)), assert_trivial=True)
    return operands, power[:, None, None]


@gluon.jit
def block_sums(
    words, b: gl.constexpr, x, PARTS: gl.constexpr, PIECES: gl.constexpr, MMA: gl.constexpr, SUMS: gl.constexpr
):
    """[P, 16, 4]: of the b-th block, each row's products with its own pieces; zeros where there are none.

    The column of the sums is that of the piece, divided by two.
    """
    gl.static_assert(PARTS % 2 == 0)  # else two pieces have the same column
    P: gl.constexpr = words[0].shape[0]
    part, column = along_3(1, 16, SUMS) % PARTS, along_3(2, 4, SUMS)
    kept = gl.zeros((P, 16, 4), gl.float32, SUMS)
    for first in gl.static_range(0, min(8, PIECES - 8 * b), PARTS):
        weights = _weights_operand(words[(8 * b + first) // PARTS], MMA)
        product = mma_v2(weights, x, gl.zeros((P, 16, 8), gl.float32, MMA))
        even, odd = product.reshape(P, 16, 4, 2).split()
        even = gl.convert_layout(even, SUMS, assert_trivial=True)
        odd = gl.convert_layout(odd, SUMS, assert_trivial=True)
        own = gl.where((first + part) % 2 == 1, odd, even)
        kept = gl.where((first + part) // 2 == column, own, kept)
    return kept


@gluon.jit
def row_sums(sums, PARTS: gl.constexpr):
    """Sums [P, 16, 4] → of the first 8 // PARTS rows, and of the others."""
    P: gl.constexpr = sums.shape[0]
    ROWS: gl.constexpr = 8 // PARTS
    sums = sums.reshape(P, 2, ROWS, PARTS, 4).permute(2, 1, 0, 3, 4).reshape(ROWS, 2, P * PARTS * 4)
    return gl.sum(sums, axis=2).split()
