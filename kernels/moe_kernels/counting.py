# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""Stable rank of each element within its key, and the count of each key: what a counting sort needs.

N elements, P keys, B blocks of elements. A key outside [0, P) belongs to one more bin, P.

On a GPU in two steps without a host sync: each block ranks its own elements, then the counts of the blocks are summed
up per bin. So the rank of an element is `block_starts[block, bin] + rank_in_block`. Only integers, and no order that
depends on the scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 128  # elements that are ranked at once; their comparison is quadratic


@triton.jit
def bin_of(key, num_keys):
    """The bin of a key: itself, or `num_keys` for what is outside [0, num_keys)."""
    return tl.where((key >= 0) & (key < num_keys), key, num_keys)


# What a batch changes is not specialised on, or serving would stop to compile when a count is first a multiple of 16.
@triton.jit(do_not_specialize=["num_elements"])
def _block_ranks_kernel(
    # inputs
    keys_ptr,
    # outputs
    rank_ptr,
    block_counts_ptr,  # [B, P + 1], zeroed
    # shapes
    num_elements,
    num_keys,
    # tunables
    BLOCK: tl.constexpr,
):
    """Ranks within a block, and the block's counts.

    Example (BLOCK = 4, P = 3): keys [2, 0, 2, 2 | 0, -1] → ranks [0, 0, 1, 2 | 0, 0],
    block_counts [[1, 0, 3, 0], [1, 0, 0, 1]].
    """
    block = tl.program_id(0)
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < num_elements
    bins = bin_of(tl.load(keys_ptr + element, mask=inside, other=0), num_keys)
    bins = tl.where(inside, bins, num_keys + 1)  # what is no element is alike only to itself
    alike = bins[:, None] == bins[None, :]
    earlier = element[None, :] < element[:, None]
    rank = tl.sum((alike & earlier).to(tl.int32), axis=1)
    count = tl.sum(alike.to(tl.int32), axis=1)
    tl.store(rank_ptr + element, rank, mask=inside)
    # The last of its kind knows the count.
    tl.store(block_counts_ptr + block * (num_keys + 1) + bins, count, mask=inside & (rank == count - 1))


@triton.jit(do_not_specialize=["num_blocks"])
def _block_starts_kernel(
    # inputs, overwritten with the outputs
    block_counts_ptr,  # [B, P + 1]
    # outputs
    counts_ptr,
    # shapes
    num_blocks,
    num_bins,
    # tunables
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Running sum over the blocks, exclusive, and the total.

    Example: block_counts [[1, 0, 3, 0], [1, 0, 0, 1]] → [[0, 0, 0, 0], [1, 0, 3, 0]], counts [2, 0, 3, 1].
    """
    bins = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P,), dtype=tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        at = block_counts_ptr + block[:, None] * num_bins + bins[None, :]
        inside = (block[:, None] < num_blocks) & (bins[None, :] < num_bins)
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + bins, total, mask=bins < num_bins)


@dataclass(frozen=True)
class BlockRanks:
    """Attributes: rank_N [N], block_starts_BP [B, P + 1], counts_P [P + 1]; all int32, on the device."""

    rank_N: torch.Tensor
    block_starts_BP: torch.Tensor
    counts_P: torch.Tensor
    num_blocks: int


def count_block_ranks(keys_N: torch.Tensor, num_keys: int) -> BlockRanks:
    """Launches the two kernels; `keys_N` is int32 and contiguous."""
    num_blocks = triton.cdiv(keys_N.numel(), BLOCK)
    num_bins = num_keys + 1
    rank_N = torch.empty_like(keys_N)
    block_starts_BP = keys_N.new_zeros((num_blocks, num_bins))
    counts_P = keys_N.new_empty(num_bins)
    if num_blocks:
        _block_ranks_kernel[(num_blocks,)](keys_N, rank_N, block_starts_BP, keys_N.numel(), num_keys, BLOCK=BLOCK)
    grid = (triton.cdiv(num_bins, 32),)
    _block_starts_kernel[grid](block_starts_BP, counts_P, num_blocks, num_bins, BLOCK_B=64, BLOCK_P=32)
    return BlockRanks(rank_N, block_starts_BP, counts_P, num_blocks)


def count_ranks_torch(keys_N: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference: ranks, counts and the sorting order.

    Args:
        keys_N: [N] integer.
        num_keys: P.

    Returns:
        rank_N [N] int64: how many earlier elements are in the same bin; counts_P [P + 1] int64; order_N [N] int64:
        the elements sorted by bin, those of one bin in their order.

    Example:
        keys [2, 0, 2, 2, 0, -1], 3 keys → ranks [0, 0, 1, 2, 1, 0], counts [2, 0, 3, 1], order [1, 4, 0, 2, 3, 5].
    """
    keys = keys_N.long()
    bins = torch.where((keys >= 0) & (keys < num_keys), keys, num_keys)
    order = torch.argsort(bins, stable=True)
    counts = bins.new_zeros(num_keys + 1).index_add_(0, bins, torch.ones_like(bins))
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(bins)
    rank[order] = torch.arange(bins.numel(), device=bins.device) - starts[bins[order]]
    return rank, counts, order
