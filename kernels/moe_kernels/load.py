# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""Load recording: tokens per logical expert, added to a monotonic counter.

T tokens, E logical experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.backend import on_device, resolve_backend
from moe_kernels.checks import check_tensor


@triton.jit(do_not_specialize=["num_elements"])
def _record_load_kernel(
    # inputs
    ids_ptr,
    increment_ptr,
    # outputs, added to
    load_ptr,
    # shapes
    num_elements,
    num_experts,
    # tunables
    BLOCK: tl.constexpr,
):
    """Example: ids [[2, 0], [2, -1]], increment 1: load [5, 5, 5] → [6, 5, 7]. Integer sums have no order."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + element, mask=element < num_elements, other=-1)
    increment = tl.load(increment_ptr) + tl.zeros((BLOCK,), dtype=tl.int64)
    tl.atomic_add(load_ptr + ids, increment, mask=(ids >= 0) & (ids < num_experts), sem="relaxed")


def _record_load_triton(load_E: torch.Tensor, expert_ids_TK: torch.Tensor, increment_1: torch.Tensor) -> None:
    size, block = expert_ids_TK.numel(), 256
    if size:
        with on_device(load_E):
            _record_load_kernel[(triton.cdiv(size, block),)](
                expert_ids_TK, increment_1, load_E, size, load_E.numel(), BLOCK=block
            )


def record_load_torch(load_E: torch.Tensor, expert_ids_TK: torch.Tensor, increment_1: torch.Tensor) -> None:
    """Reference of `record_load_`."""
    num_experts = load_E.numel()
    ids = expert_ids_TK.flatten()
    valid = (ids >= 0) & (ids < num_experts)
    # One more bin, which is dropped, takes what is not counted.
    counts = load_E.new_zeros(num_experts + 1)
    counts.index_add_(0, torch.where(valid, ids, num_experts), torch.ones_like(ids, dtype=torch.int64))
    load_E.add_(counts[:num_experts] * increment_1)


@torch.library.custom_op("moe_kernels::record_load_", mutates_args=("load_E",))
def _record_load(load_E: torch.Tensor, expert_ids_TK: torch.Tensor, increment_1: torch.Tensor, backend: str) -> None:
    (_record_load_triton if backend == "triton" else record_load_torch)(load_E, expert_ids_TK, increment_1)


@_record_load.register_fake
def _record_load_fake(load_E, expert_ids_TK, increment_1, backend):
    return None


def record_load_(
    load_E: torch.Tensor, expert_ids_TK: torch.Tensor, increment_1: torch.Tensor, *, backend: str = "auto"
) -> None:
    """Add `increment_1` to `load_E[e]` for every occurrence of e in `expert_ids_TK`, in place.

    Args:
        load_E: [E] int64, contiguous; the counter.
        expert_ids_TK: [T, K] int32, contiguous; an id outside [0, E), as the -1 of a masked token, is not counted.
        increment_1: [1] int64, on the device: 1 counts, 0 does not (warm-up), without a new graph capture.
        backend: see `resolve_backend`.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("load_E", load_E, (None,), torch.int64)
    check_tensor("expert_ids_TK", expert_ids_TK, (None, None), torch.int32, load_E.device)
    check_tensor("increment_1", increment_1, (1,), torch.int64, load_E.device)
    _record_load(load_E, expert_ids_TK, increment_1, resolve_backend(backend, load_E.device))
