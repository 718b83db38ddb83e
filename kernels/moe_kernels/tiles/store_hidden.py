"""Step 4 of a forward, on Hopper: what `expert_up` does with a tile of its product: biases, activation, stores."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.numerics import activated, is_gated, narrow, widen


@triton.jit
def _store_columns(
    out_ptr,  # None: nothing is stored
    values,
    position,
    end,
    first_column,
    STRIDE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    if out_ptr is not None:
        column = first_column + tl.arange(0, BLOCK_I)
        inside = (position < end)[:, None]
        if INTERMEDIATE % BLOCK_I != 0:
            inside &= column[None, :] < INTERMEDIATE
        at = out_ptr + position.to(tl.int64)[:, None] * STRIDE + column[None, :]
        tl.store(at, narrow(values, out_ptr.dtype.element_ty), mask=inside, eviction_policy=EVICTION)


@triton.jit
def _load_bias(bias_ptr, first_column, INTERMEDIATE: tl.constexpr, BLOCK_I: tl.constexpr):
    column = first_column + tl.arange(0, BLOCK_I)
    if INTERMEDIATE % BLOCK_I != 0:
        return widen(tl.load(bias_ptr + column, mask=column < INTERMEDIATE, other=0.0))
    else:
        return widen(tl.load(bias_ptr + column))


@triton.jit
def store_activated(
    gate,
    up,
    bias_ptr,  # the slot's
    hidden_ptr,
    pre_ptr,
    position,
    end,
    first_column,
    INTERMEDIATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Add the biases to BLOCK_I columns of gate and up; store them in `pre_ptr`, and what the activation makes of them in
    `hidden_ptr`, each unless it is None."""
    UP_ROWS: tl.constexpr = INTERMEDIATE if is_gated(ACTIVATION) else 0
    if bias_ptr is not None:
        if is_gated(ACTIVATION):
            gate += _load_bias(bias_ptr, first_column, INTERMEDIATE, BLOCK_I)[None, :]
            bias_ptr += INTERMEDIATE
        up += _load_bias(bias_ptr, first_column, INTERMEDIATE, BLOCK_I)[None, :]
    if pre_ptr is not None:
        WIDTH: tl.constexpr = INTERMEDIATE + UP_ROWS
        if is_gated(ACTIVATION):
            _store_columns(pre_ptr, gate, position, end, first_column, WIDTH, INTERMEDIATE, "", BLOCK_I)
        _store_columns(pre_ptr + UP_ROWS, up, position, end, first_column, WIDTH, INTERMEDIATE, "", BLOCK_I)
    hidden = activated(gate, up, ACTIVATION)
    _store_columns(hidden_ptr, hidden, position, end, first_column, INTERMEDIATE, INTERMEDIATE, EVICTION, BLOCK_I)
