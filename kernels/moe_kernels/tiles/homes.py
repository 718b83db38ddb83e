"""Step 5 of a forward between several GPUs: where the rows of `expert_mlp_home` go.

W ranks, H hidden. A flat row is (rank · B + token) · K + k, see `peers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class RowHomes:
    """The buffers of all ranks that take rows.

    Attributes:
        addresses_W: int64, on the device; where each begins, a multiple of 16.
        own: this rank's, of the rows' dtype.
        rows_per_home: B · K, how many rows each takes.
    """

    addresses_W: torch.Tensor
    own: torch.Tensor
    rows_per_home: int


@triton.jit
def row_at(rows_ptr, flat, hidden_size, homes_ptr, rows_per_home):
    """Where flat rows begin: in `rows_ptr`, or if there are homes, in theirs."""
    if homes_ptr is None:
        at = rows_ptr + flat.to(tl.int64) * hidden_size
    else:
        home = tl.load(homes_ptr + flat // rows_per_home)
        at = tl.multiple_of(home.to(rows_ptr.dtype), 16) + (flat % rows_per_home).to(tl.int64) * hidden_size
    return at
