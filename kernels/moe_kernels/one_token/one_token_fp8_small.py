"""Steps 5 and 6 of a forward of a single token with small fp8_block experts, on Hopper: by tensor cores.

As `one_token_fp8_mma`, but a product has 16 rows of weights, and each column the hidden of another group of 128 columns of the
matrix, which share a scale. All weights of a program are under way at once, and there is one program on a multiprocessor: of
few weights that takes less time (docs/log.md). P: warps, with G groups each. R: 16 rows.
"""

# In kernels a tuple grows in a loop that the compiler unrolls.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import narrow, widen
from moe_kernels.one_token.one_token_fp8_operands import SIDE, WIDEN, exponent_and_inverse
from moe_kernels.one_token.one_token_operands import along_3, along_4, mma_layout, warp_bases
from moe_kernels.one_token.one_token_triton import choice_in


@gluon.constexpr_function
def _words_layout(warps):
    """Words of four weights, [P, R, 2, 16] of a group: a thread has four neighbours of each half, of two rows."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 8, 0, 0]]
    lanes = [[0, 0, 0, 4], [0, 0, 0, 8], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 4), [], [warps, 16, 2, 16])


@gluon.constexpr_function
def _x_layout(warps):
    """x [P, 8, 2, 64], by column of the product: likewise."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 1, 0]]
    lanes = [[0, 0, 0, 16], [0, 0, 0, 32], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 4), [], [warps, 8, 2, 64])


@gluon.jit
def _weights_operand(words, MMA: gl.constexpr):
    """Words [P, R, 2, 16] → weights [P, R, 128] as the product's left operand."""
    P: gl.constexpr = words.shape[0]
    # A register of two weights of one word counts as one of each of two words.
    a, b, c, d = gl.inline_asm_elementwise(
        WIDEN, "=r,=r,=r,=r,r,r", [words], dtype=(gl.float16,) * 4, is_pure=False, pack=2
    )
    # Half, thread, v, l, pair, w: of word 2v + w.
    parts = gl.join(gl.join(a, b), gl.join(c, d)).reshape(P, 16, 2, 4, 2, 2, 2, 2)
    parts = parts.permute(0, 1, 2, 4, 7, 6, 3, 5).reshape(P, 16, SIDE)
    return gl.convert_layout(parts, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _x_operand(x, MMA: gl.constexpr):
    """x [P, 8, 2, 64] → the right operand [P, 128, 8], and the powers of two [P, 1, 8] by which it was divided."""
    x = widen(x)
    exponent, inverse = exponent_and_inverse(gl.max(gl.max(gl.abs(x), axis=3), axis=2))
    parts = (x * inverse[:, :, None, None]).to(gl.float16).reshape(x.shape[0], 8, 2, 4, 4, 2, 2)
    parts = parts.permute(0, 2, 4, 5, 3, 6, 1).reshape(x.shape[0], SIDE, 8)
    power = gl.convert_layout((exponent << 23).to(gl.float32, bitcast=True), gl.SliceLayout(1, MMA))
    return gl.convert_layout(parts, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True), power[:, None, :]


@gluon.jit
def _load_groups(at, group, exists, SIZE: gl.constexpr, PARTS: gl.constexpr, G: gl.constexpr, EVICTION: gl.constexpr):
    """Weights of G groups of each warp, of rows that begin at `at`; of the last group for one past the end.

    `group` is the first one's number; PARTS * SIDE columns of a row are loaded.
    """
    words = ()
    for g in gl.static_range(G):
        if SIZE == PARTS * SIDE:
            of_group = group * (SIDE // 4) + g * (SIDE // 4)
        else:
            of_group = gl.minimum(group + g, SIZE // SIDE - 1) * (SIDE // 4)
        words += (gl.load(at + of_group, mask=exists, eviction_policy=EVICTION),)
    return words


@gluon.jit
def _with_sums(kept, words, x, is_column, MMA: gl.constexpr):
    """`kept` [P, 16, 8], where `is_column` of each row the products with the words' weights."""
    zeros = gl.zeros(kept.shape, gl.float32, MMA)
    return gl.where(is_column, mma_v2(_weights_operand(words, MMA), x, zeros), kept)


@Launcher
@gluon.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _down_small_fp8_mma_kernel(
    # inputs
    scratch_ptr,
    down_ptr,
    bias_ptr,  # None: no biases
    scale_ptr,
    # outputs
    y_ptr,
    # strides, in elements
    stride_slot,
    stride_bias,
    stride_scale,
    # shapes
    SCRATCH: gl.constexpr,
    HIDDEN_SIZE: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    TOP_K: gl.constexpr,
    # constants
    EVICTION: gl.constexpr,
    PDL: gl.constexpr,
    # tunables
    SHARE: gl.constexpr,
    G: gl.constexpr,
    P: gl.constexpr,
):
    """16 elements of y, each the sum over all experts in a fixed order, in float32. SHARE warps share an expert.

    With PDL the choice and the weights are read before the wait: see `one_token_triton`.
    """
    MMA: gl.constexpr = mma_layout(P)
    LAYOUT: gl.constexpr = _words_layout(P)
    X: gl.constexpr = _x_layout(P)
    GROUPS: gl.constexpr = INTERMEDIATE // SIDE
    first = gl.program_id(0) * 16
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    p = along_4(0, P, LAYOUT)
    # From L2: before its own wait a program may have an older line of this memory in L1.
    slot = gl.load(choice_ptr + p // SHARE, mask=p // SHARE < TOP_K, other=-1, cache_modifier=".cg").to(gl.int64)
    words_at = down_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + slot * (stride_slot // 4)
    words_at += (first + along_4(1, 16, LAYOUT)) * (INTERMEDIATE // 4)
    words_at += along_4(2, 2, LAYOUT) * 16 + along_4(3, 16, LAYOUT)
    words = _load_groups(words_at, p % SHARE * G, slot >= 0, INTERMEDIATE, SHARE * G, G, EVICTION)
    sum_p, sum_n = along_3(0, P, MMA), along_3(2, 8, MMA)
    sum_k = sum_p // SHARE
    sum_slot = gl.load(choice_ptr + sum_k, mask=sum_k < TOP_K, other=-1, cache_modifier=".cg").to(gl.int64)
    sum_group = sum_p % SHARE * G + sum_n
    needed = (sum_slot >= 0) & (sum_n < G) & (sum_group < GROUPS)
    scale_at = scale_ptr + sum_slot * stride_scale + first // SIDE * GROUPS + sum_group
    scales = gl.load(scale_at, mask=needed, other=0.0)
    expert_weight = gl.load(choice_ptr + TOP_K + sum_k, mask=sum_k < TOP_K, other=0, cache_modifier=".cg")
    scales *= expert_weight.to(gl.float32, bitcast=True)
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [P, 1], [1, 0])
    out = first + gl.arange(0, 16, gl.SliceLayout(0, OUT))
    bias = 0.0
    if bias_ptr is not None:
        k = gl.arange(0, 2 * P, gl.SliceLayout(1, OUT))
        bias_slot = gl.load(choice_ptr + k, mask=k < TOP_K, other=-1, cache_modifier=".cg").to(gl.int64)
        bias_weight = gl.load(choice_ptr + TOP_K + k, mask=k < TOP_K, other=0, cache_modifier=".cg")
        bias_at = bias_ptr + (bias_slot * stride_bias)[:, None] + out[None, :]
        bias = widen(gl.load(bias_at, mask=(bias_slot >= 0)[:, None], other=0.0))
        bias = gl.sum(bias * bias_weight.to(gl.float32, bitcast=True)[:, None], axis=0)
    x_p, n = along_4(0, P, X), along_4(1, 8, X)
    x_group = x_p % SHARE * G + n
    x_at = scratch_ptr + x_p // SHARE * INTERMEDIATE + x_group * SIDE + along_4(2, 2, X) * 64 + along_4(3, 64, X)
    x_slot = gl.load(choice_ptr + x_p // SHARE, mask=x_p // SHARE < TOP_K, other=-1, cache_modifier=".cg")
    has_x = (x_slot >= 0) & (n < G) & (x_group < GROUPS)
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    x, power = _x_operand(gl.load(x_at, mask=has_x, other=0.0, cache_modifier=".cg"), MMA)
    total = gl.zeros((P, 16, 8), gl.float32, MMA)
    for g in gl.static_range(G):
        total = _with_sums(total, words[g], x, sum_n == g, MMA)
    total = gl.where(needed, total * (scales * power), 0.0)
    y = gl.convert_layout(gl.sum(gl.sum(total, axis=2), axis=0), gl.SliceLayout(0, OUT)) + bias
    gl.store(y_ptr + out, narrow(y, y_ptr.dtype.element_ty))
