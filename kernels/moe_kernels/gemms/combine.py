"""Step 6 of a forward, combine: the sum of a token's K expert outputs, in a fixed order.

T tokens, K experts per token, H hidden, N = T * K flat rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import FLOATS, check_tensor
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import narrow, widen
from moe_kernels.base.registered import registered_op

# Up to so many bytes of rows the sum is set up while the kernel before still runs (measured on an H200, docs/log.md). Beside
# it, a multiprocessor is divided as that kernel needs it, nearly all shared memory, and seems to stay so: loads want L1.
_MOST_BESIDE = 64 << 20


@Launcher
@triton.jit
def _combine_kernel(
    # inputs
    rows_ptr,
    lanes_ptr,  # None: no row is skipped
    places_ptr,  # None, or where each row is instead
    # outputs
    y_ptr,
    # shapes
    hidden_size,
    # constants
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK_H: tl.constexpr,
):
    """One token, BLOCK_H columns. A skipped row adds 0 to a sum that begins with +0: that changes no bit.

    Nobody reads the rows again: L2 lets them go first.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden_size
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        computed = inside
        if lanes_ptr is not None:
            computed &= tl.load(lanes_ptr + row) >= 0
        place = row
        if places_ptr is not None:
            place = tl.load(places_ptr + row).to(tl.int64)
        at = rows_ptr + place * hidden_size + column
        total += widen(tl.load(at, mask=computed, other=0.0, eviction_policy="evict_first"))
    tl.store(y_ptr + token * hidden_size + column, narrow(total, y_ptr.dtype.element_ty), mask=inside)


def combine_triton(rows_NH: torch.Tensor, lanes_TK: torch.Tensor, places_N: torch.Tensor | None = None) -> torch.Tensor:
    """`places_N`: None, or where the rows are (`TileSchedule.places_N`)."""
    return _sum_rows(rows_NH, lanes_TK, places_N, *lanes_TK.shape)


def sum_rows_triton(rows_NH: torch.Tensor, top_k: int) -> torch.Tensor:
    """As `combine_triton`, where no row is to be skipped."""
    return _sum_rows(rows_NH, None, None, rows_NH.shape[0] // top_k, top_k)


def _sum_rows(
    rows_NH: torch.Tensor, lanes_TK: torch.Tensor | None, places_N: torch.Tensor | None, num_tokens: int, top_k: int
) -> torch.Tensor:
    hidden_size = rows_NH.shape[1]
    y_TH = rows_NH.new_empty((num_tokens, hidden_size))
    if y_TH.numel():
        block = min(1024, next_power_of_2(hidden_size))
        grid = (num_tokens, cdiv(hidden_size, block))
        # By the bucket of tokens, as other kernels are compiled for it.
        is_beside = next_power_of_2(num_tokens) * top_k * hidden_size * rows_NH.element_size() <= _MOST_BESIDE
        constants = {"TOP_K": top_k, "PDL": is_beside, "BLOCK_H": block}
        _combine_kernel[grid](rows_NH, lanes_TK, places_N, y_TH, hidden_size, **constants)
    return y_TH


def combine_torch(rows_NH: torch.Tensor, lanes_TK: torch.Tensor) -> torch.Tensor:
    """Reference of `combine`."""
    num_tokens, top_k = lanes_TK.shape
    rows_TKH = rows_NH.view(num_tokens, top_k, rows_NH.shape[1])
    exact = torch.promote_types(rows_NH.dtype, torch.float32)
    total = rows_NH.new_zeros((num_tokens, rows_NH.shape[1]), dtype=exact)
    for k in range(top_k):
        total += torch.where(lanes_TK[:, k, None] >= 0, rows_TKH[:, k].to(exact), 0.0)
    return total.to(rows_NH.dtype)


@registered_op("moe_kernels::combine", has_gradient=True)
def _combine(rows_NH: torch.Tensor, lanes_TK: torch.Tensor, backend: str) -> torch.Tensor:
    return (combine_triton if backend == "triton" else combine_torch)(rows_NH, lanes_TK)


@_combine.register_fake
def _combine_fake(rows_NH, lanes_TK, backend):
    return rows_NH.new_empty((lanes_TK.shape[0], rows_NH.shape[1]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward(ctx, needs, grad_y_TH):
    del needs  # only of the rows
    (lanes_TK,) = ctx.saved_tensors
    grad_TKH = torch.where((lanes_TK >= 0)[:, :, None], grad_y_TH[:, None, :], 0.0)
    return {"rows_NH": grad_TKH.reshape(-1, grad_y_TH.shape[1])}


_combine.register_autograd(_backward, setup_context=_setup_context)


def combine(rows_NH: torch.Tensor, lanes_TK: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """`y[t] = sum over k = 0, 1, ..., K - 1, in this order, of rows[t * K + k]`, in float32, rounded once.

    Differentiable with respect to `rows_NH`.

    Args:
        rows_NH: [T * K, H] float32, float16 or bfloat16, contiguous; already scaled by the routing weights.
        lanes_TK: [T, K] int32, contiguous; a row whose lane is -1 is skipped: it is never read.
        backend: see `resolve_backend`.

    Returns:
        y_TH [T, H], of the dtype of the rows.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("lanes_TK", lanes_TK, (None, None), torch.int32)
    num_tokens, top_k = lanes_TK.shape
    check_tensor("rows_NH", rows_NH, (num_tokens * top_k, None), FLOATS, lanes_TK.device)
    return _combine(rows_NH, lanes_TK, resolve_backend(backend, rows_NH.device))
