"""Swapped experts where all ranks hold the same batch: each rank takes a part of its tokens, and all get all results.

Legend: T tokens, W ranks, H hidden.
"""

from typing import Any

import torch
import torch.distributed as dist

from moe_kernels.base.once import differentiable_once
from moe_layer.collectives import all_gather_rows, backend_of


class Parts:
    """How T tokens are divided among the ranks of a group: in order, equal parts but for the last ones.

    Raises:
        ValueError: the ranks have different T. (Over gloo only: over NCCL, to find out would make the host wait.)
    """

    def __init__(self, num_tokens: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.num_tokens, self.group = num_tokens, group
        self._size = max(1, -(-num_tokens // dist.get_world_size(group)))
        first = min(num_tokens, dist.get_rank(group) * self._size)
        self._mine = slice(first, min(num_tokens, first + self._size))
        if backend_of(group, device) == "gloo":
            every = all_gather_rows(torch.tensor([num_tokens], device="cpu"), group).tolist()
            if len(set(every)) > 1:
                raise ValueError(
                    f"tokens='replicated' needs the same batch on all ranks, but these have {every} tokens: pass the same "
                    "inputs everywhere, or swap with tokens='own'"
                )

    def mine(self, rows_TN: torch.Tensor) -> torch.Tensor:
        return rows_TN[self._mine]

    def whole(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Every rank's rows of its part, in order. Collective."""
        padded = rows_N.new_zeros(self._size, *rows_N.shape[1:])
        padded[: len(rows_N)] = rows_N
        return all_gather_rows(padded, self.group)[: self.num_tokens]


class TakePart(torch.autograd.Function):
    """This rank's part of what all ranks hold alike; so is its gradient gathered. (rows ``[T, …]``, parts) → rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, parts: Parts) -> torch.Tensor:
        ctx.parts = parts
        return parts.mine(rows).contiguous()

    @staticmethod
    @differentiable_once("a MoELayer of several ranks")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.parts.whole(grad), None


class GatherParts(torch.autograd.Function):
    """All ranks' rows; of a gradient, which all ranks hold alike, this rank's part. (rows of a part, parts) → ``[T, …]``."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, parts: Parts) -> torch.Tensor:
        ctx.parts = parts
        return parts.whole(rows)

    @staticmethod
    @differentiable_once("a MoELayer of several ranks")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.parts.mine(grad).contiguous(), None
