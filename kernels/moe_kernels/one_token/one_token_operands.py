"""Steps 4 to 6 of a forward of a single token with 4-bit experts, on Hopper: operands of `one_token_four_bit_mma`.

A product has 16 rows of weights and 8 columns, of which a token needs one. So each column takes the x of another group of 32
columns of the matrix, and zeros elsewhere: it sums up that group alone, and the scales multiply sums instead of weights. A
thread unpacks the words that it loads, 16 bytes of a row, and sends no other thread anything. (What does not depend on the
format serves fp8_block's kernels, too.)

P: warps, each with groups of its own. R: 16 rows. T: groups whose words the four threads of a row load at once.
"""

# In kernels a tuple grows in a loop that the compiler unrolls.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_kernels.base.numerics import activated, widen
from moe_kernels.quantised.four_bit import RAW_INT4, RAW_MXFP4, SUMS_FACTOR

_OUTPUTS = gl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r")


@gluon.constexpr_function
def warp_bases(warps, rank):
    """Bases of the first dimension."""
    return [[1 << i, *([0] * (rank - 1))] for i in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def words_layout(warps):
    """Words [P, R, T, 4]: a thread has the 16 bytes of a group, of two rows."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 8, 0, 0]]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 4), [], [warps, 16, 4, 4])


@gluon.constexpr_function
def x_layout(warps):
    """x [P, 8, 4, 32], column of the product by T: a thread has a group."""
    registers = [[0, 0, 0, i] for i in (1, 2, 4, 8, 16)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 4), [], [warps, 8, 4, 32])


@gluon.constexpr_function
def mma_layout(warps):
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def sums_layout(warps):
    """Sums [16]: a thread has one of gate and the one of up."""
    return gl.DistributedLinearLayout([[8]], [[1], [2], [4], [0], [0]], [[0]] * (warps.bit_length() - 1), [], [16])


@gluon.constexpr_function
def out_layout(warps):
    """Eight elements of hidden."""
    lanes = [[1], [2], [4], [0], [0]]
    return gl.DistributedLinearLayout([], lanes, [[0]] * (warps.bit_length() - 1), [], [8])


@gluon.jit
def along_3(PLACE: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """0 … SIZE - 1 along one of three dimensions."""
    if PLACE == 0:
        return gl.arange(0, SIZE, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    elif PLACE == 1:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    else:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]


@gluon.jit
def along_4(PLACE: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Likewise of four."""
    if PLACE == 3:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))[None, None, None, :]
    else:
        return along_3(PLACE, SIZE, gl.SliceLayout(3, LAYOUT))[:, :, :, None]


@gluon.jit
def slot_of(choice_ptr, k, TOP_K: gl.constexpr):
    """Of the k-th chosen expert; of the last one, if there are fewer."""
    return gl.load(choice_ptr + gl.minimum(k, TOP_K - 1), cache_modifier=".cg").to(gl.int64)


@gluon.jit
def weights_operand(words, zero, SCHEME: gl.constexpr, LAYOUT: gl.constexpr):
    """Words [P, R, 4, 4] → weights [P, R, 128] as the product's left operand, unscaled; those of mxfp4 times 2 ** -126.

    Of each 16 of its columns, thread T has two and two, as `words.py` has them in a word.
    """
    P: gl.constexpr = words.shape[0]
    R: gl.constexpr = words.shape[1]
    # Two words at once: a register that has two weights of one of them counts as one of each, so ptxas moves none.
    if SCHEME == "mxfp4":
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            RAW_MXFP4, _OUTPUTS, [words, words], dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2
        )
    else:
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            RAW_INT4, _OUTPUTS, [words, zero], dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2
        )
    even = gl.join(gl.join(a, b), gl.join(c, d))  # [P, R, T, 2v + e, w, l], of word 2v + w, where i = 2j + l
    odd = gl.join(gl.join(e, f), gl.join(g, h))
    parts = gl.join(even, odd).reshape(P, R, 4, 2, 2, 2, 2, 2).permute(0, 1, 3, 5, 7, 6, 2, 4)
    return gl.convert_layout(parts.reshape(P, R, 128), gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def x_operand(x, SCHEME: gl.constexpr, LAYOUT: gl.constexpr):
    """x [P, 8, 4, 32] → the right operand [P, 128, 8]."""
    P: gl.constexpr = x.shape[0]
    if SCHEME == "mxfp4":
        x = (x * SUMS_FACTOR).to(gl.bfloat16)
    parts = x.reshape(P, 8, 4, 2, 2, 4, 2).permute(0, 5, 3, 4, 2, 6, 1)  # i = 2j + l, then word, e
    return gl.convert_layout(parts.reshape(P, 128, 8), gl.DotOperandLayout(1, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def _load_words(at, group, exists, SIZE: gl.constexpr, EVICTION: gl.constexpr, LAYOUT: gl.constexpr):
    """Words of groups [P, 1, T, 1] of rows that begin at `at` [P, R, 1, 1]; of the last group for groups past the end.

    Nobody reads what doesn't exist: the x of groups past the end are zeros.
    """
    group = gl.minimum(group, SIZE // 32 - 1)
    return gl.load(at + group * 4 + along_4(3, 4, LAYOUT), mask=exists, eviction_policy=EVICTION)


@gluon.jit
def load_groups(at, group, exists, ROWS: gl.constexpr, SIZE: gl.constexpr, GROUP: gl.constexpr):
    """Scales or zeros, likewise, of rows at `at`."""
    return gl.load(at + gl.minimum(group, SIZE // 32 - 1) // (GROUP // 32) * ROWS, mask=exists)


@gluon.jit
def load_step(
    words, scales, words_at, scale_at, group, sum_group, exists, needed, step, ROWS: gl.constexpr, SIZE: gl.constexpr,
    GROUP: gl.constexpr, HALVES: gl.constexpr, EVICTION: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """What a step needs: HALVES tensors of words more, of four groups each, and one of scales."""
    for half in gl.static_range(HALVES):
        words += (_load_words(words_at, group + step + half * 4, exists, SIZE, EVICTION, LAYOUT),)
    scales += (load_groups(scale_at, sum_group + step, needed, ROWS, SIZE, GROUP),)
    return words, scales


@gluon.jit
def hidden_of(total, gate_bias, up_bias, ACTIVATION: gl.constexpr, P: gl.constexpr):
    """Eight elements of hidden, of the sums [P, 16, 8] of eight rows of the gate and eight of up."""
    both = gl.convert_layout(gl.sum(gl.sum(total, axis=2), axis=0), sums_layout(P))
    gate, up = both.reshape(2, 8).permute(1, 0).split()
    gate, up = gl.convert_layout(gate, out_layout(P)), gl.convert_layout(up, out_layout(P))
    return activated(gate + gate_bias, up + up_bias, ACTIVATION)


@gluon.jit
def load_biases(bias_ptr, slot, stride_bias, column, exists, INTERMEDIATE: gl.constexpr):
    """Of the gate's and up's columns; zeros if there are none."""
    if bias_ptr is None:
        return 0.0, 0.0
    else:
        bias_at = bias_ptr + slot * stride_bias + column
        return widen(gl.load(bias_at, mask=exists)), widen(gl.load(bias_at + INTERMEDIATE, mask=exists))
