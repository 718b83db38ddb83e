"""Steps 4 and 5 of a forward, on Hopper: the rows of a tile stored by TMA, and only those that exist.

A box ends where its tensor ends, so the descriptor has to end where the tile's rows end. Triton's `ragged_tma` shows how: two
more dimensions whose strides add up to 2 ** 64 elements' worth of bytes, so that the last row of the tile is the last one of
the tensor that the descriptor describes, wherever it lies in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

_MOST_ROWS = tl.constexpr(2**30)  # of `create_ragged_descriptor`


def boxes_of(rows: torch.Tensor, block_m: int, block_n: int) -> TensorDescriptor:
    """What `store_box` stores in: `rows` [N, C], contiguous, in boxes of block_m rows and block_n columns."""
    return create_ragged_descriptor(rows, [block_m, block_n])


@triton.jit
def store_box(boxes, values, start, end, first_column):
    """Store the values of the rows from `start` to before `end`, of at most as many as the box has."""
    row = _MOST_ROWS - (end - start)
    boxes.store([_MOST_ROWS, end, row, first_column], values.reshape(1, 1, values.shape[0], values.shape[1]))
