"""Step 4 of a forward with fp8_block experts, on Hopper: the end of a tile of `expert_up` (`experts_fp8.py`).

N flat rows, I intermediate.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe_kernels.base.numerics import activated, is_gated, widen
from moe_kernels.quantised.fp8 import quantised_by
from moe_kernels.quantised.fp8_ring import HALF, ROW_LAYOUT, SIDE


@gluon.jit
def _approximately(x, FUNCTION: gl.constexpr):
    return gl.inline_asm_elementwise(
        FUNCTION + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _activated(gate, up, ACTIVATION: gl.constexpr):
    """`activated`, SiLU in half of the instructions: with the same bits unless 0 < |gate| < 2 ** -124."""
    if ACTIVATION == "silu":
        # A quarter of each denominator, whose reciprocal is never a denormal number: a division scales large ones only.
        denominator = gl.fma(_approximately(gate * -1.4426950408889634, "ex2"), 0.25, 0.25)
        return gate * 0.25 * _approximately(denominator, "rcp") * up
    else:
        return activated(gate, up, ACTIVATION)


@gluon.jit
def _largest_of_both(own, meeting, turn, GROUP: gl.constexpr):
    """The largest of each row's 128 values, of which each group of warps has half.

    Both groups write theirs, at one of two places in turn, and read the other's. With barriers of its own for each place, a
    group can't pass one twice before the other has seen it.
    """
    largest, met = meeting
    at = 2 * (turn % 2)
    largest.index(at + GROUP).store(own)
    mbarrier.arrive(met.index(at + GROUP), count=1)
    mbarrier.wait(met.index(at + 1 - GROUP), turn // 2 % 2)
    return gl.maximum(own, largest.index(at + 1 - GROUP).load(own.type.layout))


@gluon.jit
def _store_block(
    hidden, staging, meeting, turn, outputs, start, end, block, INTERMEDIATE: gl.constexpr, GROUP: gl.constexpr,
    IS_FEW: gl.constexpr,
):  # fmt: skip
    """Round a group's part of a block of hidden channels, and store it with its scales. IS_FEW: it is [64 channels, rows]."""
    hidden_ptr, hidden_scale_ptr = outputs
    MMA: gl.constexpr = hidden.type.layout
    AXIS: gl.constexpr = 0 if IS_FEW else 1  # of channels
    CHANNELS: gl.constexpr = hidden.shape[AXIS]
    ROWS: gl.constexpr = hidden.shape[1 - AXIS]
    first = block * SIDE + (GROUP * HALF if IS_FEW else 0)
    if INTERMEDIATE % SIDE != 0 and first + CHANNELS > INTERMEDIATE:
        exists = first + gl.arange(0, CHANNELS, gl.SliceLayout(1 - AXIS, MMA)) < INTERMEDIATE
        hidden = gl.where(gl.expand_dims(exists, 1 - AXIS), hidden, 0.0)
    largest = gl.max(gl.abs(hidden), axis=AXIS)
    if IS_FEW:
        largest = _largest_of_both(largest, meeting, turn, GROUP)
    values, scale = quantised_by(hidden, largest, AXIS)
    if GROUP == 0 or not IS_FEW:
        position = (start + gl.arange(0, ROWS, gl.SliceLayout(AXIS, MMA))).to(gl.int64)
        gl.store(hidden_scale_ptr + position * gl.cdiv(INTERMEDIATE, SIDE) + block, scale, mask=position < end)
    values = values.to(gl.float8e4nv)
    STORE: gl.constexpr = gl.BlockedLayout([1, 16], [512 // CHANNELS, CHANNELS // 16], [4, 1], [1, 0])
    if IS_FEW:
        values = gl.convert_layout(values.permute((1, 0)), STORE)
    else:
        staged = staging._reinterpret(gl.float8e4nv, [ROWS, CHANNELS], ROW_LAYOUT)
        staged.store(values)
        values = staged.load(STORE)
    position = (start + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))).to(gl.int64)
    column = first + gl.arange(0, CHANNELS, gl.SliceLayout(0, STORE))
    at = hidden_ptr + position[:, None] * INTERMEDIATE + column[None, :]
    gl.store(at, values, mask=(position < end)[:, None] & (column < INTERMEDIATE)[None, :])


@gluon.jit
def _with_bias(sums, bias_at, first, size, IS_FEW: gl.constexpr):
    AXIS: gl.constexpr = 0 if IS_FEW else 1  # of columns
    column = first + gl.arange(0, sums.shape[AXIS], gl.SliceLayout(1 - AXIS, sums.type.layout))
    return sums + gl.expand_dims(widen(gl.load(bias_at + gl.minimum(column, size - 1))), 1 - AXIS)


@gluon.jit
def new_meeting(M: gl.constexpr):
    """Where groups of warps that share rows tell each other the largest values: two places of two groups each."""
    largest = gl.allocate_shared_memory(gl.float32, [4, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    met = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(4):
        mbarrier.init(met.index(place), count=1)
    return largest, met


@gluon.jit
def store_hidden(
    left, right, staging, meeting, turn, column_block, bias_at, outputs, start, end, INTERMEDIATE: gl.constexpr,
    GROUP: gl.constexpr, ACTIVATION: gl.constexpr, IS_FEW: gl.constexpr,
):  # fmt: skip
    """A group's part of a tile: biases, the activation, rounding. Returns the next `turn`."""
    GATED: gl.constexpr = is_gated(ACTIVATION)
    block = column_block if GATED else 2 * column_block
    if bias_at is not None:
        first = block * SIDE + (GROUP * HALF if IS_FEW else 0)
        left = _with_bias(left, bias_at, first, INTERMEDIATE, IS_FEW)
        if GATED:
            right = _with_bias(right, bias_at + INTERMEDIATE, first, INTERMEDIATE, IS_FEW)
        else:
            right = _with_bias(right, bias_at, first + SIDE, INTERMEDIATE, IS_FEW)
    if GATED:
        hidden = _activated(left, right, ACTIVATION)
        _store_block(hidden, staging, meeting, turn, outputs, start, end, block, INTERMEDIATE, GROUP, IS_FEW)
    else:
        hidden = activated(left, left, ACTIVATION)
        _store_block(hidden, staging, meeting, turn, outputs, start, end, block, INTERMEDIATE, GROUP, IS_FEW)
        if (block + 1) * SIDE < INTERMEDIATE:
            turn += 1
            hidden = activated(right, right, ACTIVATION)
            _store_block(hidden, staging, meeting, turn, outputs, start, end, block + 1, INTERMEDIATE, GROUP, IS_FEW)
    return turn + 1
