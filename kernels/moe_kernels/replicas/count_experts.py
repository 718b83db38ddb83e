"""Replica choice by batch: how many tokens of each expert this rank has.

T tokens, K experts per token, E logical experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_integer, check_tensor
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.registered import registered_op
from moe_kernels.base.scan import count_chunks, count_hits, first_index, load_bins, num_steps, scan_options


def count_experts_torch(expert_ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Reference of `count_experts`."""
    ids = expert_ids_TK.flatten().long()
    bins = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    counts = ids.new_zeros(num_experts + 1).index_add_(0, bins, torch.ones_like(bins))  # `bincount` takes a host sync
    return counts[:num_experts].to(torch.int32)


@Launcher
@triton.jit(do_not_specialize=["num_elements"])  # or serving would compile when it is a multiple of 16
def _count_experts_kernel(
    # inputs
    ids_ptr,
    # outputs
    counts_ptr,
    # shapes
    num_elements,
    num_experts,
    # constants
    PDL: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program counts one expert. No atomics: the counts need no zeros to begin with.

    Example: ids [1, 0, -1, 1], 2 experts → counts [1, 2].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    index = first_index(num_elements, BLOCK, ROWS)
    hits = count_hits(load_bins(ids_ptr, index, 0, num_elements, num_experts, BLOCK, ROWS) == expert)
    for step in range(1, num_steps(num_elements, BLOCK)):
        hits += count_hits(load_bins(ids_ptr, index, step, num_elements, num_experts, BLOCK, ROWS) == expert)
    tl.store(counts_ptr + expert, tl.sum(hits))


@Launcher
@triton.jit(do_not_specialize=["num_chunks"])  # as above
def _add_chunks_kernel(
    # inputs
    chunks_ptr,  # of `count_chunks`
    # outputs
    counts_ptr,
    # shapes
    num_chunks,
    # constants
    PDL: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
):
    """`_count_experts_kernel` for many elements. Example: chunks [[1, 2], [0, 4]] of 2 experts → counts [3, 4]."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    chunks_ptr += expert.to(tl.int64) * num_chunks
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, num_chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        total += tl.load(chunks_ptr + chunk, mask=chunk < num_chunks, other=0)
    tl.store(counts_ptr + expert, tl.sum(total))


def count_experts_triton(expert_ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    num_elements = expert_ids_TK.numel()
    counts_E = expert_ids_TK.new_empty(num_experts)
    options = scan_options(num_elements)
    chunks_BC = count_chunks(expert_ids_TK, num_experts)
    if chunks_BC is None:
        _count_experts_kernel[(num_experts,)](expert_ids_TK, counts_E, num_elements, num_experts, **options)
    else:
        _add_chunks_kernel[(num_experts,)](
            *(chunks_BC, counts_E, chunks_BC.shape[1]), BLOCK=options["BLOCK"], num_warps=options["num_warps"]
        )
    return counts_E


@registered_op("moe_kernels::count_experts")
def _count_experts(expert_ids_TK: torch.Tensor, num_experts: int, backend: str) -> torch.Tensor:
    count = count_experts_triton if backend == "triton" else count_experts_torch
    return count(expert_ids_TK, num_experts)


@_count_experts.register_fake
def _count_experts_fake(expert_ids_TK, num_experts, *_):
    return expert_ids_TK.new_empty(num_experts)


def count_experts(expert_ids_TK: torch.Tensor, num_experts: int, *, backend: str = "auto") -> torch.Tensor:
    """How often each expert is chosen. Takes no host sync.

    Args:
        expert_ids_TK: [T, K] int32, contiguous; ids outside [0, E), like -1 for a masked token, do not count.
        num_experts: E.
        backend: see `resolve_backend`.

    Returns:
        counts_E [E] int32.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("expert_ids_TK", expert_ids_TK, (None, None), torch.int32)
    num_experts = check_integer("num_experts", num_experts)
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}: must be at least 1")
    return _count_experts(expert_ids_TK, num_experts, resolve_backend(backend, expert_ids_TK.device))
