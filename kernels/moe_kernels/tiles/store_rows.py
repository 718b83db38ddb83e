"""Step 5 of a forward: what `expert_down` does with a tile of its product: biases, routing weights, stores."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.numerics import narrow, widen
from moe_kernels.tiles.homes import row_at


@triton.jit
def store_rows(
    product, position, end, column, bias_ptr, order_ptr, row_weights_ptr, rows_ptr, hidden_size, homes_ptr, rows_per_home
):  # fmt: skip
    """Add the slot's biases to the product of the sorted rows at `position`, times their weights, to where they belong.

    `bias_ptr`: None, or the slot's; `homes_ptr`: None, or see `row_at`. Rows from `end` on and columns from `hidden_size` on
    are not stored.
    """
    if bias_ptr is not None:
        product += widen(tl.load(bias_ptr + tl.minimum(column, hidden_size - 1)))[None, :]
    inside = position < end
    flat = tl.load(order_ptr + position, mask=inside, other=0)
    row_weight = tl.load(row_weights_ptr + flat, mask=inside, other=0.0)
    rows = narrow(product * row_weight[:, None], rows_ptr.dtype.element_ty)
    rows_at = row_at(rows_ptr, flat, hidden_size, homes_ptr, rows_per_home)[:, None] + column[None, :]
    tl.store(rows_at, rows, mask=inside[:, None] & (column[None, :] < hidden_size))
