"""Steps 4 to 6 of a forward of a single token with 4-bit experts: two kernels (up; down with combine).

As those of `one_token_triton`, but a program has several rows of the matrices: the scales of adjacent rows are adjacent, and x
is read and widened once for all of them. K experts per token, H hidden, I intermediate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated, is_gated, narrow, widen
from moe_kernels.one_token.one_token_triton import choice_in
from moe_kernels.quantised.four_bit import SUMS_FACTOR, sums_of_words


@triton.jit
def _words_of_rows(
    at, row, first, chosen, SIZE: tl.constexpr, EVICTION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """int32 words [R, BLOCK / 8] of rows [R, 1] of matrices of SIZE columns, from column `first` on.

    What is not `chosen` [R, 1], and columns past the end, are zeros. `at`: where the matrices begin: one pointer, or [R, 1].
    """
    word = first // 8 + tl.arange(0, BLOCK // 8)[None, :]
    exists = chosen & (word < SIZE // 8)
    return tl.load(at + row * (SIZE // 8) + word, mask=exists, other=0, eviction_policy=EVICTION)


@triton.jit
def _groups_of_rows(
    at, row, first, chosen, ROWS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Likewise the scales or zeros [R, BLOCK / 32] of each 32 columns, of matrices of ROWS rows."""
    part = first // 32 + tl.arange(0, BLOCK // 32)[None, :]
    exists = chosen & (part < SIZE // 32)
    return tl.load(at + part // (GROUP // 32) * ROWS + row, mask=exists, other=0)


@triton.jit
def _columns_of(at, exists, first, SIZE: tl.constexpr, SCHEME: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [R, BLOCK / 32, 32] of vectors at [R], as `sums_of_words` takes them; zeros where they don't exist."""
    i = first + tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = widen(
        tl.load(at[:, None, None] + i[None, :, :], mask=exists[:, None, None] & (i < SIZE)[None, :, :], other=0.0)
    )
    return x * SUMS_FACTOR if SCHEME == "mxfp4" else x


@Launcher
@triton.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _up_kernel(
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
    SCRATCH: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    # constants
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R elements of hidden of one expert."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    column, k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1)
    slot = tl.load(choice_in(scratch_ptr, SCRATCH) + k).to(tl.int64)
    if slot < 0:
        return
    GATED: tl.constexpr = is_gated(ACTIVATION)
    UP_ROWS: tl.constexpr = INTERMEDIATE if GATED else 0  # where they begin
    ROWS: tl.constexpr = UP_ROWS + INTERMEDIATE
    zero_at = None
    if zero_ptr is not None:
        zero_at = zero_ptr + slot * stride_zero
    words_at, scale_at = gate_up_ptr + slot * stride_slot, scale_ptr + slot * stride_scale
    row, chosen = column[:, None], (column < INTERMEDIATE)[:, None]
    gate = tl.zeros((BLOCK_R, BLOCK_H // 32), dtype=tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_H // 32), dtype=tl.float32)
    one = tl.zeros((1,), dtype=tl.int32)
    for first in tl.static_range(0, HIDDEN_SIZE, BLOCK_H):
        x = _columns_of(x_ptr + one, one == 0, first, HIDDEN_SIZE, SCHEME, BLOCK_H)
        if GATED:
            words = _words_of_rows(words_at, row, first, chosen, HIDDEN_SIZE, EVICTION, BLOCK_H)
            scale = _groups_of_rows(scale_at, row, first, chosen, ROWS, HIDDEN_SIZE, GROUP, BLOCK_H)
            zero = None
            if zero_ptr is not None:
                zero = _groups_of_rows(zero_at, row, first, chosen, ROWS, HIDDEN_SIZE, GROUP, BLOCK_H)
            gate += sums_of_words(words, x, scale, zero, SCHEME)
        words = _words_of_rows(words_at, UP_ROWS + row, first, chosen, HIDDEN_SIZE, EVICTION, BLOCK_H)
        scale = _groups_of_rows(scale_at, UP_ROWS + row, first, chosen, ROWS, HIDDEN_SIZE, GROUP, BLOCK_H)
        zero = None
        if zero_ptr is not None:
            zero = _groups_of_rows(zero_at, UP_ROWS + row, first, chosen, ROWS, HIDDEN_SIZE, GROUP, BLOCK_H)
        up += sums_of_words(words, x, scale, zero, SCHEME)
    gate, up = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    exists = column < INTERMEDIATE
    if bias_ptr is not None:
        bias_at = bias_ptr + slot * stride_bias + column
        if GATED:
            gate += widen(tl.load(bias_at, mask=exists, other=0.0))
        up += widen(tl.load(bias_at + UP_ROWS, mask=exists, other=0.0))
    hidden = activated(gate, up, ACTIVATION)
    tl.store(scratch_ptr + k * INTERMEDIATE + column, narrow(hidden, scratch_ptr.dtype.element_ty), mask=exists)


@Launcher
@triton.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _down_kernel(
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
    SCRATCH: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    # constants
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R elements of y, each the sum over all experts in a fixed order, in float32.

    With PDL the choice and the first words are read before the wait: see `one_token_triton`.
    """
    # Rows of expert k are the ones at k, BLOCK_K + k, …: a warp has few experts, so it needs few of their hidden rows.
    place = tl.arange(0, BLOCK_R * BLOCK_K)
    of_place = place % BLOCK_K
    row = (tl.program_id(0) * BLOCK_R + place // BLOCK_K)[:, None]
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    # From L2: before its own wait a program may have an older line of this memory in L1.
    slot = tl.load(choice_ptr + of_place, mask=of_place < TOP_K, other=-1, cache_modifier=".cg").to(tl.int64)[:, None]
    chosen = (slot >= 0) & (row < HIDDEN_SIZE)
    zero_at = None
    if zero_ptr is not None:
        zero_at = zero_ptr + slot * stride_zero
    words_at, scale_at = down_ptr + slot * stride_slot, scale_ptr + slot * stride_scale
    words = _words_of_rows(words_at, row, 0, chosen, INTERMEDIATE, EVICTION, BLOCK_I)
    scale = _groups_of_rows(scale_at, row, 0, chosen, HIDDEN_SIZE, INTERMEDIATE, GROUP, BLOCK_I)
    zero = None
    if zero_ptr is not None:
        zero = _groups_of_rows(zero_at, row, 0, chosen, HIDDEN_SIZE, INTERMEDIATE, GROUP, BLOCK_I)
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    k = tl.arange(0, BLOCK_K)
    exists = tl.load(choice_ptr + k, mask=k < TOP_K, other=-1, cache_modifier=".cg") >= 0
    hidden_at = scratch_ptr + k * INTERMEDIATE
    PARTS: tl.constexpr = BLOCK_I // 32
    product = tl.zeros((BLOCK_R * BLOCK_K, PARTS), dtype=tl.float32)
    for first in tl.static_range(0, INTERMEDIATE, BLOCK_I):
        if first > 0:
            words = _words_of_rows(words_at, row, first, chosen, INTERMEDIATE, EVICTION, BLOCK_I)
            scale = _groups_of_rows(scale_at, row, first, chosen, HIDDEN_SIZE, INTERMEDIATE, GROUP, BLOCK_I)
            zero = None
            if zero_ptr is not None:
                zero = _groups_of_rows(zero_at, row, first, chosen, HIDDEN_SIZE, INTERMEDIATE, GROUP, BLOCK_I)
        hidden = _columns_of(hidden_at, exists, first, INTERMEDIATE, SCHEME, BLOCK_I)
        hidden = tl.broadcast_to(hidden[None, :, :, :], (BLOCK_R, BLOCK_K, PARTS, 32))
        product += sums_of_words(words, tl.reshape(hidden, (BLOCK_R * BLOCK_K, PARTS, 32)), scale, zero, SCHEME)
    rows = tl.reshape(tl.sum(product, axis=1), (BLOCK_R, BLOCK_K))
    column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = column < HIDDEN_SIZE
    if bias_ptr is not None:
        slot = tl.load(choice_ptr + k, mask=k < TOP_K, other=-1, cache_modifier=".cg").to(tl.int64)
        bias_at = bias_ptr + (slot * stride_bias)[None, :] + column[:, None]
        rows += widen(tl.load(bias_at, mask=exists[None, :] & inside[:, None], other=0.0))
    weights = tl.load(choice_ptr + TOP_K + k, mask=k < TOP_K, other=0, cache_modifier=".cg").to(
        tl.float32, bitcast=True
    )
    y = tl.sum(rows * weights[None, :], axis=1)
    tl.store(y_ptr + column, narrow(y, y_ptr.dtype.element_ty), mask=inside)
