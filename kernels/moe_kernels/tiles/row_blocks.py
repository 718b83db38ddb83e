"""Steps 4 and 5 of a forward, references: products in blocks of rows, so that a row's bits depend on no other row.

A BLAS picks its algorithm by the number of rows, and PyTorch's vector loops compute the last elements of a tensor with
other instructions than the rest: a plain `x @ w.T` or `silu(x)` gives a row other bits in other company.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

ROWS = 32
# Below this many elements PyTorch computes in one thread (its GRAIN_SIZE is 32768); a multiple of every vector's width.
_PIECE = 16384
_ALIGNMENT = 64  # bytes: a cache line, the widest vector, and what PyTorch's CPU allocator gives

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Decorator that disables `torch.autocast`: the references multiply in the dtypes of their tensors, as the kernels do."""

    @functools.wraps(function)
    def plain(first: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments, **options)

    return plain  # type: ignore[return-value]


@dataclass(frozen=True)
class RowBlock:
    """At most `ROWS` sorted rows of one lane: `matrix` is its slot's, padded by `padded_matrix`."""

    slot: int
    rows: slice
    matrix: torch.Tensor


def row_blocks(
    matrix_of: Callable[[int], torch.Tensor], lane_to_slot_L: torch.Tensor, offsets_L1: torch.Tensor
) -> Iterator[RowBlock]:
    """The blocks of all lanes, in order; `matrix_of` a slot is its float matrix. Reads the offsets on the host."""
    offsets, slots = offsets_L1.tolist(), lane_to_slot_L.tolist()
    for lane, slot in enumerate(slots):
        start, stop = offsets[lane], offsets[lane + 1]
        if start == stop:
            continue
        matrix = padded_matrix(matrix_of(slot))
        for first in range(start, stop, ROWS):
            yield RowBlock(slot, slice(first, min(first + ROWS, stop)), matrix)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32, and float64 for weights of that dtype, which tests of the references have."""
    return torch.promote_types(dtype, torch.float32)


def padded_matrix(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` in `_exact`, aligned, both sizes zero-padded to a multiple of 16 (small ones take a BLAS's odd paths)."""
    rows, columns = matrix.shape
    matrix = matrix.to(_exact(matrix.dtype))
    if rows % 16 or columns % 16:
        return F.pad(matrix, (0, -columns % 16, 0, -rows % 16))
    return matrix if matrix.data_ptr() % _ALIGNMENT == 0 else matrix.clone()


def padded_rows(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """`rows` in a zeroed block [ROWS, columns] of `_exact`."""
    block = torch.zeros((ROWS, columns), dtype=_exact(rows.dtype), device=rows.device)
    block[: rows.shape[0], : rows.shape[1]] = rows
    return block


def elementwise(function: Callable[..., torch.Tensor], *blocks: torch.Tensor) -> torch.Tensor:
    """`function` of blocks [ROWS, columns], by whole vectors, so that an element's position changes no bit."""
    pieces = zip(*(block.contiguous().view(-1).split(_PIECE) for block in blocks), strict=True)
    return torch.cat([function(*piece) for piece in pieces]).view(blocks[0].shape)


def row_sums(block: torch.Tensor) -> torch.Tensor:
    """The sum of each row of a block [ROWS, columns], so that an element's position changes no bit.

    CUDA's `sum` begins a row at the next 16 bytes, and adds what is before them apart: rows of a multiple of 16 elements begin
    alike.
    """
    return F.pad(block, (0, -block.shape[1] % 16)).contiguous().sum(1)


def unversioned(tensor: torch.Tensor) -> torch.Tensor:
    """An alias without autograd's count of writes, to be saved for a backward: of a tensor of slots or lanes.

    That count is one for the whole tensor, but only the slots and lanes of this forward must keep their contents until
    its backward: others may be filled meanwhile. Where a gradient is needed the count stays: such slots don't move.
    """
    return tensor if tensor.requires_grad else tensor.data
