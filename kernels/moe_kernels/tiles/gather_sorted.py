"""Rows in sorted order, for TMA, which Hopper has for rows that follow each other only: of a backward and of 4-bit experts.

R source rows, N = R * fanout flat rows, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait


@Launcher
@triton.jit(do_not_specialize=["num_rows"])
def _gather_sorted_kernel(
    # inputs
    rows_ptr,
    order_ptr,
    # outputs
    sorted_ptr,
    # shapes and strides, in elements
    num_rows,
    width,
    fanout,
    stride_row,
    # constants
    PDL: tl.constexpr,
    # tunables
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows, BLOCK_N columns."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < num_rows
    row = tl.load(order_ptr + position, mask=inside, other=0) // fanout
    exists = inside[:, None] & (column[None, :] < width)
    rows = tl.load(rows_ptr + row.to(tl.int64)[:, None] * stride_row + column[None, :], mask=exists)
    tl.store(sorted_ptr + position.to(tl.int64)[:, None] * width + column[None, :], rows, mask=exists)


def gather_sorted(rows_RH: torch.Tensor, order_N: torch.Tensor, fanout: int) -> torch.Tensor:
    """sorted_NH: at each sorted position the source row, ``order // fanout``. Rows of no lane are copied too."""
    (num_rows,), width = order_N.shape, rows_RH.shape[1]
    sorted_NH = rows_RH.new_empty((num_rows, width))
    block_m, block_n = 4, min(1024, next_power_of_2(width))
    if num_rows:
        _gather_sorted_kernel[(cdiv(num_rows, block_m), cdiv(width, block_n))](
            rows_RH,
            order_N,
            sorted_NH,
            num_rows,
            width,
            fanout,
            rows_RH.stride(0),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
    return sorted_NH
