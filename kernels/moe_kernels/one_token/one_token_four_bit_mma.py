"""Steps 4 to 6 of a forward of a single token with 4-bit experts in bfloat16, on Hopper: `one_token_four_bit` by tensor cores.

`one_token_operands` says how. One program for each place on a multiprocessor takes eight rows after eight rows, and keeps its
piece of x in registers. P, R, T as there. Written in Gluon, Triton's lower level.
"""

# In kernels a tuple grows in a loop that the compiler unrolls.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import is_gated, narrow, widen
from moe_kernels.one_token.one_token_operands import (
    along_3,
    along_4,
    hidden_of,
    load_biases,
    load_groups,
    load_step,
    mma_layout,
    out_layout,
    slot_of,
    weights_operand,
    words_layout,
    x_layout,
    x_operand,
)
from moe_kernels.one_token.one_token_triton import choice_in
from moe_kernels.quantised.four_bit import NO_ZERO, factor_of_zero, scaled


@Launcher
@gluon.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _up_mma_kernel(
    # inputs
    x_ptr,
    gate_up_ptr,  # of words
    bias_ptr,  # None: no biases
    scale_ptr,
    zero_ptr,  # None: no zeros
    # input and output
    scratch_ptr,
    # shapes and strides, in elements
    stride_slot,
    stride_bias,
    stride_scale,
    stride_zero,
    SCRATCH: gl.constexpr,
    HIDDEN_SIZE: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    TOP_K: gl.constexpr,
    # constants
    SCHEME: gl.constexpr,
    GROUP: gl.constexpr,
    ACTIVATION: gl.constexpr,
    EVICTION: gl.constexpr,
    PDL: gl.constexpr,
    # tunables
    P: gl.constexpr,
):
    """Every num_programs-th eight elements of hidden of an expert, by eight rows of the gate and eight of up.

    What the next eight need is loaded while these are computed. Memory would idle if all programs loaded, then all computed.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    MMA: gl.constexpr = mma_layout(P)
    WORDS: gl.constexpr = words_layout(P)
    X: gl.constexpr = x_layout(P)
    gl.static_assert(is_gated(ACTIVATION))
    ROWS: gl.constexpr = 2 * INTERMEDIATE
    NUM_BLOCKS: gl.constexpr = INTERMEDIATE // 8
    STEPS: gl.constexpr = (HIDDEN_SIZE + 256 * P - 1) // (256 * P)
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    first_tile, num_programs = gl.program_id(0), gl.num_programs(0)
    slot = slot_of(choice_ptr, first_tile // NUM_BLOCKS, TOP_K)
    next_slot = slot_of(choice_ptr, (first_tile + num_programs) // NUM_BLOCKS, TOP_K)
    # Of step s, warp p has the groups from 8 * (s * P + p) on: two for each thread of a row.
    r, sum_r = along_4(1, 16, WORDS), along_3(1, 16, MMA)
    row = r % 8 + r // 8 * INTERMEDIATE
    sum_row = sum_r % 8 + sum_r // 8 * INTERMEDIATE
    group, sum_n = along_4(0, P, WORDS) * 8 + along_4(2, 4, WORDS), along_3(2, 8, MMA)
    sum_group = along_3(0, P, MMA) * 8 + sum_n
    words = ()
    scales = ()
    for step in gl.static_range(STEPS):
        first = first_tile % NUM_BLOCKS * 8
        words_at = gate_up_ptr + slot * stride_slot + (first + row) * (HIDDEN_SIZE // 8)
        scale_at = scale_ptr + slot * stride_scale + first + sum_row
        words, scales = load_step(
            words, scales, words_at, scale_at, group, sum_group, slot >= 0, slot >= 0, step * 8 * P, ROWS, HIDDEN_SIZE, GROUP,
            2, EVICTION, WORDS,
        )  # fmt: skip
    # A thread's x of the first four columns belongs to its first words, that of the others to its second.
    n, t = along_4(1, 8, X), along_4(2, 4, X)
    x_group = along_4(0, P, X) * 8 + n
    columns = ()
    for step in gl.static_range(STEPS):
        of_step = x_group + step * 8 * P
        has_x = (n % 4 == t) & (of_step < HIDDEN_SIZE // 32)
        x = gl.load(x_ptr + of_step * 32 + along_4(3, 32, X), mask=has_x, other=0.0)
        columns += (x_operand(x, SCHEME, MMA),)
    for tile in range(first_tile, TOP_K * NUM_BLOCKS, num_programs):
        first, next_tile = tile % NUM_BLOCKS * 8, tile + num_programs
        next_first = next_tile % NUM_BLOCKS * 8
        will = (next_slot >= 0) & (next_tile < TOP_K * NUM_BLOCKS)
        later_slot = slot_of(choice_ptr, (next_tile + num_programs) // NUM_BLOCKS, TOP_K)
        column = first + gl.arange(0, 8, out_layout(P))
        exists = slot >= 0
        gate_bias, up_bias = load_biases(bias_ptr, slot, stride_bias, column, exists, INTERMEDIATE)
        total = gl.zeros((P, 16, 8), gl.float32, MMA)
        new_words = ()
        new_scales = ()
        for step in gl.static_range(STEPS):
            new_words, new_scales = load_step(
                new_words, new_scales, gate_up_ptr + next_slot * stride_slot + (next_first + row) * (HIDDEN_SIZE // 8),
                scale_ptr + next_slot * stride_scale + next_first + sum_row, group, sum_group, will, will, step * 8 * P, ROWS,
                HIDDEN_SIZE, GROUP, 2, EVICTION, WORDS,
            )  # fmt: skip
            sums = ()
            for half in gl.static_range(2):
                zero = NO_ZERO
                if zero_ptr is not None:
                    zero_at = zero_ptr + slot * stride_zero + first + row
                    at = group + step * 8 * P + half * 4
                    zero = factor_of_zero(load_groups(zero_at, at, exists, ROWS, HIDDEN_SIZE, GROUP))
                weights = weights_operand(words[2 * step + half], zero, SCHEME, MMA)
                sums += (mma_v2(weights, columns[step], gl.zeros((P, 16, 8), gl.float32, MMA)),)
            total += scaled(gl.where(sum_n < 4, sums[0], sums[1]), scales[step], SCHEME)
        hidden = hidden_of(total, gate_bias, up_bias, ACTIVATION, P)
        hidden_at = scratch_ptr + tile // NUM_BLOCKS * INTERMEDIATE + column
        gl.store(hidden_at, narrow(hidden, scratch_ptr.dtype.element_ty), mask=exists)
        words, scales, slot, next_slot = new_words, new_scales, next_slot, later_slot


@Launcher
@gluon.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _down_mma_kernel(
    # inputs
    scratch_ptr,
    down_ptr,  # of words
    bias_ptr,  # None: no biases
    scale_ptr,
    zero_ptr,  # None: no zeros
    # outputs
    y_ptr,
    # shapes and strides, in elements
    stride_slot,
    stride_bias,
    stride_scale,
    stride_zero,
    SCRATCH: gl.constexpr,
    HIDDEN_SIZE: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    TOP_K: gl.constexpr,
    # constants
    SCHEME: gl.constexpr,
    GROUP: gl.constexpr,
    EVICTION: gl.constexpr,
    PDL: gl.constexpr,
    # tunables
    EXPERT_PAIRS: gl.constexpr,
    P: gl.constexpr,
):
    """Every num_programs-th eight elements of y, each the sum over all experts in a fixed order, in float32.

    Eight of a warp's 16 rows are one expert's and eight another's, whose hidden rows are in columns 0 to 3 and 4 to 7 of the
    product. Half of the sums are of one's weights and the other's hidden row: nobody needs them. There are EXPERT_PAIRS
    (not PAIRS, which would mean clusters: see `PreparedLaunch`), a power of two, and P / EXPERT_PAIRS warps share one.

    With PDL the choice and the first words are read before the wait: see `one_token_triton`.
    """
    MMA: gl.constexpr = mma_layout(P)
    WORDS: gl.constexpr = words_layout(P)
    X: gl.constexpr = x_layout(P)
    SHARE: gl.constexpr = P // EXPERT_PAIRS
    STEPS: gl.constexpr = (INTERMEDIATE + 128 * SHARE - 1) // (128 * SHARE)
    first_tile, num_programs = gl.program_id(0), gl.num_programs(0)
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    p, r = along_4(0, P, WORDS), along_4(1, 16, WORDS)
    expert = p // SHARE * 2 + r // 8
    # From L2: before its own wait a program may have an older line of this memory in L1.
    slot = gl.load(choice_ptr + expert, mask=expert < TOP_K, other=-1, cache_modifier=".cg").to(gl.int64)
    words_at = down_ptr + slot * stride_slot + r % 8 * (INTERMEDIATE // 8)
    chosen = slot >= 0
    group = p % SHARE * 4 + along_4(2, 4, WORDS)
    sum_p, sum_r, sum_n = along_3(0, P, MMA), along_3(1, 16, MMA), along_3(2, 8, MMA)
    sum_expert = sum_p // SHARE * 2 + sum_r // 8
    sum_slot = gl.load(choice_ptr + sum_expert, mask=sum_expert < TOP_K, other=-1, cache_modifier=".cg").to(gl.int64)
    needed = (sum_slot >= 0) & (sum_r // 8 == sum_n // 4)
    sum_group = sum_p % SHARE * 4 + sum_n % 4
    scale_at = scale_ptr + sum_slot * stride_scale + sum_r % 8
    words = ()
    scales = ()
    for step in gl.static_range(STEPS):
        words, scales = load_step(
            words, scales, words_at + first_tile * INTERMEDIATE, scale_at + first_tile * 8, group, sum_group, chosen, needed,
            step * 4 * SHARE, HIDDEN_SIZE, INTERMEDIATE, GROUP, 1, EVICTION, WORDS,
        )  # fmt: skip
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    n, t = along_4(1, 8, X), along_4(2, 4, X)
    x_expert = along_4(0, P, X) // SHARE * 2 + n // 4
    x_group = along_4(0, P, X) % SHARE * 4 + t
    x_slot = gl.load(choice_ptr + x_expert, mask=x_expert < TOP_K, other=-1, cache_modifier=".cg")
    x_at = scratch_ptr + x_expert * INTERMEDIATE + x_group * 32 + along_4(3, 32, X)
    columns = ()
    for step in gl.static_range(STEPS):
        has_x = (x_slot >= 0) & (n % 4 == t) & (x_group + step * 4 * SHARE < INTERMEDIATE // 32)
        x = gl.load(x_at + step * 128 * SHARE, mask=has_x, other=0.0)
        columns += (x_operand(x, SCHEME, MMA),)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [P, 1], [1, 0])
    k = gl.arange(0, 2 * EXPERT_PAIRS, gl.SliceLayout(1, LAYOUT))
    bias_slot = gl.load(choice_ptr + k, mask=k < TOP_K, other=-1, cache_modifier=".cg").to(gl.int64)
    expert_weights = gl.load(choice_ptr + TOP_K + k, mask=k < TOP_K, other=0, cache_modifier=".cg").to(
        gl.float32, bitcast=True
    )
    for tile in range(first_tile, HIDDEN_SIZE // 8, num_programs):
        first, next_tile = tile * 8, tile + num_programs
        is_tile = next_tile < HIDDEN_SIZE // 8
        column = first + gl.arange(0, 8, gl.SliceLayout(0, LAYOUT))
        bias = 0.0
        if bias_ptr is not None:
            bias_at = bias_ptr + (bias_slot * stride_bias)[:, None] + column[None, :]
            bias = widen(gl.load(bias_at, mask=(bias_slot >= 0)[:, None], other=0.0))
        total = gl.zeros((P, 16, 8), gl.float32, MMA)
        new_words = ()
        new_scales = ()
        for step in gl.static_range(STEPS):
            new_words, new_scales = load_step(
                new_words, new_scales, words_at + next_tile * INTERMEDIATE, scale_at + next_tile * 8, group, sum_group,
                chosen & is_tile, needed & is_tile, step * 4 * SHARE, HIDDEN_SIZE, INTERMEDIATE, GROUP, 1, EVICTION, WORDS,
            )  # fmt: skip
            zero = NO_ZERO
            if zero_ptr is not None:
                zero_at = zero_ptr + slot * stride_zero + first + r % 8
                at = group + step * 4 * SHARE
                zero = factor_of_zero(load_groups(zero_at, at, chosen, HIDDEN_SIZE, INTERMEDIATE, GROUP))
            weights = weights_operand(words[step], zero, SCHEME, MMA)
            sums = mma_v2(weights, columns[step], gl.zeros((P, 16, 8), gl.float32, MMA))
            total += gl.where(needed, scaled(sums, scales[step], SCHEME), 0.0)
        rows = gl.sum(gl.sum(total, axis=2).reshape(EXPERT_PAIRS, SHARE, 2, 8), axis=1)
        rows = gl.convert_layout(rows.reshape(2 * EXPERT_PAIRS, 8), LAYOUT) + bias
        y = gl.sum(rows * expert_weights[:, None], axis=0)
        gl.store(y_ptr + column, narrow(y, y_ptr.dtype.element_ty))
        words, scales = new_words, new_scales
