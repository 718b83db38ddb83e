"""Step 5 of a forward with fp8_block experts, on Hopper: the end of a tile of `expert_down` (`experts_fp8.py`).

N flat rows, H hidden.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.tools.ragged_tma import to_ragged_indices

from moe_kernels.base.numerics import widen
from moe_kernels.quantised.fp8_ring import HALF, SIDE, STAGED_LAYOUT
from moe_kernels.tiles.homes import row_at


@gluon.jit
def store_rows(
    left, right, staging, boxes, bias_at, row_weight, flat, outputs, first_column, start, end,
    HIDDEN_SIZE: gl.constexpr, IS_FEW: gl.constexpr,
):  # fmt: skip
    """Add biases to both halves, multiply by the routing weights, round, and store. IS_FEW: they are [columns, rows].

    16-bit rows are brought into the order of memory first, in shared memory. Into `boxes`, where they are sorted, they go by
    TMA: nobody waits until memory has them. 32-bit rows, of which threads of the tensor core's layout have whole sectors of 32
    bytes, go as they are.
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
    if boxes is None:
        of_rows = gl.convert_layout(flat, gl.SliceLayout(1, LAYOUT))
        rows_at = row_at(rows_ptr, of_rows, HIDDEN_SIZE, homes_ptr, rows_per_home)
        inside = start + gl.arange(0, left.shape[1 - AXIS], gl.SliceLayout(1, LAYOUT)) < end
    for half in gl.static_range(2):
        product = left if half == 0 else right
        first = first_column + half * SIDE
        if bias_at is not None:
            column = first + gl.arange(0, COLUMNS, gl.SliceLayout(1 - AXIS, MMA))
            product += gl.expand_dims(widen(gl.load(bias_at + gl.minimum(column, HIDDEN_SIZE - 1))), 1 - AXIS)
        rows = (product * row_weight).to(DTYPE)
        if boxes is not None:
            staged = staging._reinterpret(DTYPE, [1, 1, HALF, SIDE], STAGED_LAYOUT)
            tma.store_wait(0)  # until the half before has been read
            staged.store(rows.reshape(1, 1, HALF, SIDE))
            fence_async_shared()
            i, j, row = to_ragged_indices(start, end - start, 0)
            tma.async_copy_shared_to_global(boxes, [i, j, row, first], staged)
        else:
            if IS_FEW:
                rows = rows.permute((1, 0))
                rows = gl.convert_layout(rows, LAYOUT)
            elif not IS_WIDE:
                staged = staging._reinterpret(DTYPE, [1, 1, HALF, SIDE], STAGED_LAYOUT)
                staged.store(rows.reshape(1, 1, HALF, SIDE))
                rows = staged.reshape((HALF, SIDE)).load(LAYOUT)
            column = first + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
            gl.store(rows_at[:, None] + column[None, :], rows, mask=inside[:, None] & (column < HIDDEN_SIZE)[None, :])
