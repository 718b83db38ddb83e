"""Steps 4 to 6 of a forward of a single token with large fp8_block experts: as `one_token_triton`, but for the products.

To widen e4m3 and to scale each weight takes about as long as to read it. So a thread multiplies sixteen neighbours, which share
a scale, and scales their sum; and a program of the down projection has several rows for each piece of hidden.
K experts per token, H hidden, I intermediate, S slots.
"""

# In kernels a tuple grows in a loop that the compiler unrolls.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated, is_gated, narrow, widen
from moe_kernels.one_token.one_token_triton import choice_in
from moe_kernels.quantised.fp8 import operand


@triton.jit
def _load_weights(row_at, first, chosen, SIZE: tl.constexpr, CHUNKS: tl.constexpr, EVICTION: tl.constexpr):
    """[CHUNKS, 16] of the row that begins at `row_at`, from column `first` on; zeros past its end, or if it is not `chosen`."""
    i = first + (tl.arange(0, CHUNKS) * 16)[:, None] + tl.arange(0, 16)[None, :]
    if SIZE % (CHUNKS * 16) == 0:
        return tl.load(row_at + i, mask=chosen, other=0.0, eviction_policy=EVICTION)
    else:
        return tl.load(row_at + i, mask=chosen & (i < SIZE), other=0.0, eviction_policy=EVICTION)


@triton.jit
def _columns(block):
    """The eight columns of [CHUNKS, 8], in some order, each a register of a thread."""
    CHUNKS: tl.constexpr = block.shape[0]
    a, b = block.reshape(CHUNKS, 4, 2).split()
    aa, ab = a.reshape(CHUNKS, 2, 2).split()
    ba, bb = b.reshape(CHUNKS, 2, 2).split()
    return aa.split() + ab.split() + ba.split() + bb.split()


@triton.jit
def _load_columns(at, first, SIZE: tl.constexpr, CHUNKS: tl.constexpr):
    """Of each sixteen elements at `at`, from column `first` on, float32 [CHUNKS] for each place: in the order of `_columns`."""
    i = first + (tl.arange(0, CHUNKS) * 16)[:, None] + tl.arange(0, 8)[None, :]
    if SIZE % (CHUNKS * 16) == 0:
        left, right = tl.load(at + i), tl.load(at + 8 + i)
    else:
        left = tl.load(at + i, mask=i < SIZE, other=0.0)
        right = tl.load(at + 8 + i, mask=i + 8 < SIZE, other=0.0)
    return _columns(widen(left)) + _columns(widen(right))


@triton.jit
def _sums(weights, x, scale_at, first, chosen, SIZE: tl.constexpr, CHUNKS: tl.constexpr):
    """[CHUNKS]: of each sixteen weights times x, scaled."""
    left, right = operand(weights).to(tl.float16).reshape(CHUNKS, 2, 8).permute(0, 2, 1).split()
    columns = _columns(left) + _columns(right)
    total = columns[0].to(tl.float32) * x[0]
    for c in tl.static_range(1, 16):
        total += columns[c].to(tl.float32) * x[c]
    i = first + tl.arange(0, CHUNKS) * 16
    if SIZE % (CHUNKS * 16) == 0:
        scale = tl.load(scale_at + i // 128, mask=chosen, other=0.0)
    else:
        scale = tl.load(scale_at + i // 128, mask=chosen & (i < SIZE), other=0.0)
    return total * scale


@Launcher
@triton.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _up_fp8_kernel(
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
    SCRATCH: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    # constants
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    CHUNKS: tl.constexpr,
):
    """One element of hidden of one expert."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    column, k = tl.program_id(0), tl.program_id(1)
    slot = tl.load(choice_in(scratch_ptr, SCRATCH) + k).to(tl.int64)
    if slot < 0:
        return
    GATED: tl.constexpr = is_gated(ACTIVATION)
    BLOCKS: tl.constexpr = (INTERMEDIATE + 128 - 1) // 128
    GROUPS: tl.constexpr = (HIDDEN_SIZE + 128 - 1) // 128
    gate_at = gate_up_ptr + slot * stride_slot + column.to(tl.int64) * HIDDEN_SIZE
    scale_at = scale_ptr + slot * stride_scale + column // 128 * GROUPS
    UP: tl.constexpr = INTERMEDIATE if GATED else 0  # where up's rows begin
    UP_SCALES: tl.constexpr = BLOCKS * GROUPS if GATED else 0
    up_at = gate_at + tl.full((), UP, tl.int64) * HIDDEN_SIZE
    gate = tl.zeros((CHUNKS,), tl.float32)
    up = tl.zeros((CHUNKS,), tl.float32)
    for first in tl.static_range(0, HIDDEN_SIZE, CHUNKS * 16):
        x = _load_columns(x_ptr, first, HIDDEN_SIZE, CHUNKS)
        if GATED:
            weights = _load_weights(gate_at, first, True, HIDDEN_SIZE, CHUNKS, EVICTION)
            gate += _sums(weights, x, scale_at, first, True, HIDDEN_SIZE, CHUNKS)
        weights = _load_weights(up_at, first, True, HIDDEN_SIZE, CHUNKS, EVICTION)
        up += _sums(weights, x, scale_at + UP_SCALES, first, True, HIDDEN_SIZE, CHUNKS)
    gate, up = tl.sum(gate, axis=0), tl.sum(up, axis=0)
    if bias_ptr is not None:
        bias_at = bias_ptr + slot * stride_bias + column
        if GATED:
            gate += widen(tl.load(bias_at))
        up += widen(tl.load(bias_at + UP))
    hidden = activated(gate, up, ACTIVATION)
    tl.store(scratch_ptr + k * INTERMEDIATE + column, narrow(hidden, scratch_ptr.dtype.element_ty))


@Launcher
@triton.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _down_fp8_kernel(
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
    SCRATCH: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    # constants
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """ROWS elements of y, the sum over all experts in a fixed order, in float32; they divide the hidden size.

    With PDL: see `_down_kernel`.
    """
    first_row = tl.program_id(0) * ROWS
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    GROUPS: tl.constexpr = (INTERMEDIATE + 128 - 1) // 128
    scale_at = scale_ptr + first_row // 128 * GROUPS
    weights = ()
    slots = ()
    for k in tl.static_range(TOP_K):
        # From L2: before its own wait a program may have an older line of this memory in L1.
        slot = tl.load(choice_ptr + k, cache_modifier=".cg").to(tl.int64)
        slots += (slot,)
        for r in tl.static_range(ROWS):
            at = down_ptr + slot * stride_slot + (first_row + r).to(tl.int64) * INTERMEDIATE
            weights += (_load_weights(at, 0, slot >= 0, INTERMEDIATE, CHUNKS, EVICTION),)
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((CHUNKS,), tl.float32),)
    for first in tl.static_range(0, INTERMEDIATE, CHUNKS * 16):
        for k in tl.static_range(TOP_K):
            slot = slots[k]
            x = _load_columns(scratch_ptr + k * INTERMEDIATE, first, INTERMEDIATE, CHUNKS)
            expert_weight = tl.load(choice_ptr + TOP_K + k, cache_modifier=".cg").to(tl.float32, bitcast=True)
            new_sums = ()
            for r in tl.static_range(ROWS):
                if first == 0:
                    of_row = weights[k * ROWS + r]
                else:
                    at = down_ptr + slot * stride_slot + (first_row + r).to(tl.int64) * INTERMEDIATE
                    of_row = _load_weights(at, first, slot >= 0, INTERMEDIATE, CHUNKS, EVICTION)
                more = _sums(of_row, x, scale_at + slot * stride_scale, first, slot >= 0, INTERMEDIATE, CHUNKS)
                new_sums += (sums[r] + more * expert_weight,)
            sums = new_sums
    for r in tl.static_range(ROWS):
        y = tl.sum(sums[r], axis=0)
        if bias_ptr is not None:
            for k in tl.static_range(TOP_K):
                expert_weight = tl.load(choice_ptr + TOP_K + k, cache_modifier=".cg").to(tl.float32, bitcast=True)
                bias_at = bias_ptr + slots[k] * stride_bias + first_row + r
                y += widen(tl.load(bias_at, mask=slots[k] >= 0, other=0.0)) * expert_weight
        tl.store(y_ptr + first_row + r, narrow(y, y_ptr.dtype.element_ty))
