"""Step 5 of a forward with fp8_block experts, on Hopper: the end of a tile of `expert_down` (`experts_fp8.py`).

N flat rows, H hidden.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_kernels.base.numerics import widen
from moe_kernels.quantised.fp8_ring import SIDE
from moe_kernels.tiles.homes import row_at


@gluon.jit
def store_rows(
    left, right, first_column, bias_at, row_weight, flat, outputs, num_rows, hidden_size, IS_FEW: gl.constexpr
):  # fmt: skip
    """Add biases to both halves, multiply by the routing weights, round, and store. IS_FEW: they are [columns, rows].

    16-bit rows are stored 16 bytes at a time, through shared memory; there is no room for 32-bit ones, of which threads of the
    tensor core's layout have whole sectors of 32 bytes.
    """
    rows_ptr, homes_ptr, rows_per_home = outputs
    DTYPE: gl.constexpr = rows_ptr.dtype.element_ty
    MMA: gl.constexpr = left.type.layout
    AXIS: gl.constexpr = 0 if IS_FEW else 1  # of columns
    COLUMNS: gl.constexpr = left.shape[AXIS]
    IS_WIDE: gl.constexpr = DTYPE.primitive_bitwidth == 32
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    LAYOUT: gl.constexpr = (left.permute((1, 0)).type.layout if IS_FEW else MMA) if IS_WIDE else NARROW
    row_weight = gl.expand_dims(gl.convert_layout(row_weight, gl.SliceLayout(AXIS, MMA)), AXIS)
    of_rows = gl.convert_layout(flat, gl.SliceLayout(1, LAYOUT))
    rows_at = row_at(rows_ptr, of_rows, hidden_size, homes_ptr, rows_per_home)
    inside = gl.arange(0, left.shape[1 - AXIS], gl.SliceLayout(1, LAYOUT)) < num_rows
    for half in gl.static_range(2):
        product = left if half == 0 else right
        first = first_column + half * SIDE
        if bias_at is not None:
            column = first + gl.arange(0, COLUMNS, gl.SliceLayout(1 - AXIS, MMA))
            product += gl.expand_dims(widen(gl.load(bias_at + gl.minimum(column, hidden_size - 1))), 1 - AXIS)
        rows = (product * row_weight).to(DTYPE)
        if IS_FEW:
            rows = rows.permute((1, 0))
        rows = gl.convert_layout(rows, LAYOUT)
        column = first + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
        gl.store(rows_at[:, None] + column[None, :], rows, mask=inside[:, None] & (column < hidden_size)[None, :])
