"""Steps 4 to 6 of a forward of a single token with fp8_block experts, on Hopper: by tensor cores.

`one_token_fp8_operands` says how; the down projection of small experts is in `one_token_fp8_small`. Programs are persistent and
few, as each reads all of x or of hidden from the same lines of L2. P: warps, with PIECES pieces of 64 columns each. Written in
Gluon, Triton's lower level.
"""

# In kernels a tuple grows in a loop that the compiler unrolls.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated, is_gated, narrow, widen
from moe_kernels.one_token.one_token_fp8_operands import (
    PIECE,
    SIDE,
    block_sums,
    piece_sums_layout,
    pieces_layout,
    row_sums,
    x_operands,
    x_pieces_layout,
)
from moe_kernels.one_token.one_token_operands import along_3, load_biases, mma_layout, slot_of
from moe_kernels.one_token.one_token_triton import choice_in


@gluon.constexpr_function
def _products_of_one_expert(pieces, pieces_of_expert, parts):
    """So many products in a row of a warp's have weights of the same expert."""
    common = math.gcd(pieces, pieces_of_expert)
    return 1 if common % parts else common // parts


@gluon.jit
def _inside(exists, place, END: gl.constexpr, MOST: gl.constexpr):
    """`exists`, and the place, which is below MOST, is below END."""
    if MOST <= END:
        return exists
    else:
        return exists & (place < END)


@gluon.jit
def _load_rows(
    at, scale_at, piece, first_piece, n, exists, SIZE: gl.constexpr, PARTS: gl.constexpr, PIECES: gl.constexpr,
    P: gl.constexpr, EVICTION: gl.constexpr,
):  # fmt: skip
    """Words of each product and scales of each block, of rows that begin at `at` and `scale_at`."""
    words = ()
    scales = ()
    MOST: gl.constexpr = P * PIECES
    for first in gl.static_range(0, PIECES, PARTS):
        inside = _inside(exists, piece + first, SIZE // PIECE, MOST)
        words += (gl.load(at + first * (PIECE // 4), mask=inside, other=0, eviction_policy=EVICTION),)
    for first in gl.static_range(0, PIECES, 8):
        inside = _inside(exists, first_piece + n + first, SIZE // PIECE, MOST)
        inside = _inside(inside, n + first, PIECES, first + 8)
        scales += (gl.load(scale_at + first // 2, mask=inside, other=0.0),)
    return words, scales


@Launcher
@gluon.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _up_fp8_mma_kernel(
    # inputs
    x_ptr,
    gate_up_ptr,
    bias_ptr,  # None: no biases
    scale_ptr,
    # input and output
    scratch_ptr,
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
    ACTIVATION: gl.constexpr,
    EVICTION: gl.constexpr,
    PDL: gl.constexpr,
    # tunables
    PARTS: gl.constexpr,
    PIECES: gl.constexpr,
    P: gl.constexpr,
):
    """Every num_programs-th 8 // PARTS elements of hidden, by as many rows of the gate and of up.

    What the next elements need is loaded while these are computed.

    With PDL x is read before the wait: it is older than the choice, whose every program has waited.
    """
    MMA: gl.constexpr = mma_layout(P)
    LAYOUT: gl.constexpr = pieces_layout(P)
    X: gl.constexpr = x_pieces_layout(P)
    SUMS: gl.constexpr = piece_sums_layout(P)
    gl.static_assert(is_gated(ACTIVATION))
    gl.static_assert(PIECES % 2 == 0 and PIECES % PARTS == 0 and HIDDEN_SIZE <= P * PIECES * PIECE)
    GROUPS: gl.constexpr = HIDDEN_SIZE // SIDE
    BLOCKS: gl.constexpr = INTERMEDIATE // SIDE
    COLUMNS: gl.constexpr = 8 // PARTS
    TILES: gl.constexpr = INTERMEDIATE // COLUMNS  # of an expert
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    first_tile, num_programs = gl.program_id(0), gl.num_programs(0)
    x = ()
    for first in gl.static_range(0, PIECES, 8):
        x_n = first + along_3(1, 8, X)
        x_piece = along_3(0, P, X) * PIECES + x_n
        has_x = _inside(x_n < PIECES, x_piece, HIDDEN_SIZE // PIECE, P * PIECES)
        # From L2: before its own wait a program may have an older line of this memory in L1.
        x += (gl.load(x_ptr + x_piece * PIECE + along_3(2, PIECE, X), mask=has_x, other=0.0, cache_modifier=".cg"),)
    x, power = x_operands(x, MMA, SUMS)
    p, r = along_3(0, P, LAYOUT), along_3(1, 16, LAYOUT)
    piece = p * PIECES + r % PARTS
    words_at = gate_up_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    words_at += (r // 8 * INTERMEDIATE + r % 8 // PARTS) * (HIDDEN_SIZE // 4)
    words_at += piece * (PIECE // 4) + along_3(2, 16, LAYOUT)
    first_piece, n = along_3(0, P, SUMS) * PIECES, along_3(2, 4, SUMS) * 2
    scales_at = scale_ptr + along_3(1, 16, SUMS) // 8 * (BLOCKS * GROUPS) + (first_piece + n) // 2
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    slot = slot_of(choice_ptr, first_tile // TILES, TOP_K)
    next_slot = slot_of(choice_ptr, (first_tile + num_programs) // TILES, TOP_K)
    first = first_tile % TILES * COLUMNS
    at = words_at + slot * (stride_slot // 4) + first * (HIDDEN_SIZE // 4)
    scale_at = scales_at + slot * stride_scale + first // SIDE * GROUPS
    words, scales = _load_rows(
        at, scale_at, piece, first_piece, n, slot >= 0, HIDDEN_SIZE, PARTS, PIECES, P, EVICTION
    )  # fmt: skip
    for tile in range(first_tile, TOP_K * TILES, num_programs):
        first, next_tile = tile % TILES * COLUMNS, tile + num_programs
        next_first = next_tile % TILES * COLUMNS
        will = (next_slot >= 0) & (next_tile < TOP_K * TILES)
        later_slot = slot_of(choice_ptr, (next_tile + num_programs) // TILES, TOP_K)
        at = words_at + next_slot * (stride_slot // 4) + next_first * (HIDDEN_SIZE // 4)
        scale_at = scales_at + next_slot * stride_scale + next_first // SIDE * GROUPS
        total = gl.zeros((P, 16, 4), gl.float32, SUMS)
        for b in gl.static_range(len(x)):
            total += block_sums(words, b, x[b], PARTS, PIECES, MMA, SUMS) * scales[b]
        words, scales = _load_rows(
            at, scale_at, piece, first_piece, n, will, HIDDEN_SIZE, PARTS, PIECES, P, EVICTION
        )  # fmt: skip
        gate, up = row_sums(total * power, PARTS)
        exists = slot >= 0
        out = first + gl.arange(0, COLUMNS, gate.type.layout)
        gate_bias, up_bias = load_biases(bias_ptr, slot, stride_bias, out, exists, INTERMEDIATE)
        hidden = activated(gate + gate_bias, up + up_bias, ACTIVATION)
        hidden_at = scratch_ptr + tile // TILES * INTERMEDIATE + out
        gl.store(hidden_at, narrow(hidden, scratch_ptr.dtype.element_ty), mask=exists)
        slot, next_slot = next_slot, later_slot


@gluon.jit
def _bias(bias_ptr, row, choice_ptr, stride_bias, TOP_K: gl.constexpr):
    """Of elements of y: the experts' biases, weighted; zero if there are none."""
    total = 0.0
    if bias_ptr is not None:
        for k in gl.static_range(TOP_K):
            slot = slot_of(choice_ptr, k, TOP_K)
            weight = gl.load(choice_ptr + TOP_K + k, cache_modifier=".cg").to(gl.float32, bitcast=True)
            total += widen(gl.load(bias_ptr + slot * stride_bias + row, mask=slot >= 0, other=0.0)) * weight
    return total


@Launcher
@gluon.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _down_fp8_mma_kernel(
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
    PARTS: gl.constexpr,
    PIECES: gl.constexpr,
    P: gl.constexpr,
):
    """Every num_programs-th 16 // PARTS elements of y, each the sum over all experts in a fixed order, in float32.

    The warps share the pieces of all experts. What the next elements need is loaded while these are computed.

    With PDL the choice and the first weights are read before the wait: see `one_token_triton`.
    """
    MMA: gl.constexpr = mma_layout(P)
    LAYOUT: gl.constexpr = pieces_layout(P)
    X: gl.constexpr = x_pieces_layout(P)
    SUMS: gl.constexpr = piece_sums_layout(P)
    OF_EXPERT: gl.constexpr = INTERMEDIATE // PIECE
    UNIT: gl.constexpr = _products_of_one_expert(PIECES, OF_EXPERT, PARTS)
    ROWS: gl.constexpr = 16 // PARTS
    gl.static_assert(PIECES % 2 == 0 and PIECES % PARTS == 0 and TOP_K * OF_EXPERT <= P * PIECES)
    first_tile, num_programs = gl.program_id(0), gl.num_programs(0)
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    r = along_3(1, 16, LAYOUT)
    row_at = down_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    row_at += r // PARTS * (INTERMEDIATE // 4) + along_3(2, 16, LAYOUT)
    words_at = ()
    chosen = ()
    for first in gl.static_range(0, PIECES, UNIT * PARTS):
        piece = along_3(0, P, LAYOUT) * PIECES + first + r % PARTS
        k = piece // OF_EXPERT
        # From L2: before its own wait a program may have an older line of this memory in L1.
        slot = gl.load(choice_ptr + k, mask=k < TOP_K, other=-1, cache_modifier=".cg").to(gl.int64)
        words_at += (row_at + slot * (stride_slot // 4) + piece % OF_EXPERT * (PIECE // 4),)
        chosen += (slot >= 0,)
    words = ()
    for i in gl.static_range(PIECES // PARTS):
        at = words_at[i // UNIT] + i % UNIT * (PARTS * PIECE // 4) + first_tile * (ROWS * INTERMEDIATE // 4)
        words += (gl.load(at, mask=chosen[i // UNIT], other=0, eviction_policy=EVICTION),)
    scales_at = ()
    needed = ()
    expert_weights = ()
    scales = ()
    for first in gl.static_range(0, PIECES, 8):
        n = first + along_3(2, 4, SUMS) * 2
        sum_piece = along_3(0, P, SUMS) * PIECES + n
        sum_k = gl.where(n < PIECES, sum_piece // OF_EXPERT, TOP_K)
        slot = gl.load(choice_ptr + sum_k, mask=sum_k < TOP_K, other=-1, cache_modifier=".cg").to(gl.int64)
        scales_at += (scale_ptr + slot * stride_scale + sum_piece % OF_EXPERT // 2,)
        needed += (slot >= 0,)
        expert_weight = gl.load(choice_ptr + TOP_K + sum_k, mask=sum_k < TOP_K, other=0, cache_modifier=".cg")
        expert_weights += (expert_weight.to(gl.float32, bitcast=True),)
    for b in gl.static_range(len(scales_at)):
        scale_at = scales_at[b] + first_tile * ROWS // SIDE * (INTERMEDIATE // SIDE)
        scales += (gl.load(scale_at, mask=needed[b], other=0.0),)
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    x = ()
    for first in gl.static_range(0, PIECES, 8):
        x_n = first + along_3(1, 8, X)
        x_piece = along_3(0, P, X) * PIECES + x_n
        x_k = gl.where(x_n < PIECES, x_piece // OF_EXPERT, TOP_K)
        x_slot = gl.load(choice_ptr + x_k, mask=x_k < TOP_K, other=-1, cache_modifier=".cg")
        x_at = scratch_ptr + x_piece * PIECE + along_3(2, PIECE, X)
        x += (gl.load(x_at, mask=x_slot >= 0, other=0.0),)
    x, power = x_operands(x, MMA, SUMS)
    for tile in range(first_tile, HIDDEN_SIZE // ROWS, num_programs):
        next_tile = tile + num_programs
        will = next_tile < HIDDEN_SIZE // ROWS
        total = gl.zeros((P, 16, 4), gl.float32, SUMS)
        for b in gl.static_range(len(x)):
            total += block_sums(words, b, x[b], PARTS, PIECES, MMA, SUMS) * (scales[b] * expert_weights[b])
        new_words = ()
        new_scales = ()
        for i in gl.static_range(PIECES // PARTS):
            at = words_at[i // UNIT] + i % UNIT * (PARTS * PIECE // 4) + next_tile * (ROWS * INTERMEDIATE // 4)
            new_words += (gl.load(at, mask=chosen[i // UNIT] & will, other=0, eviction_policy=EVICTION),)
        for b in gl.static_range(len(x)):
            scale_at = scales_at[b] + next_tile * ROWS // SIDE * (INTERMEDIATE // SIDE)
            new_scales += (gl.load(scale_at, mask=needed[b] & will, other=0.0),)
        left, right = row_sums(total * power, PARTS)
        out = tile * ROWS + gl.arange(0, ROWS // 2, left.type.layout)
        left += _bias(bias_ptr, out, choice_ptr, stride_bias, TOP_K)
        right += _bias(bias_ptr, out + ROWS // 2, choice_ptr, stride_bias, TOP_K)
        gl.store(y_ptr + out, narrow(left, y_ptr.dtype.element_ty))
        gl.store(y_ptr + out + ROWS // 2, narrow(right, y_ptr.dtype.element_ty))
        words, scales = new_words, new_scales
