"""Forward, combine: the way of results from the ranks that computed them to the ranks of their tokens, and of gradients back.

Legend: T tokens of this rank, K top-k, W ranks, B tokens to which each rank's are padded, S lanes of a rank, H hidden, R rows
that this rank has for all tokens.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moe_kernels.base.once import differentiable_once
from moe_layer.collectives import all_gather_rows, all_to_all_rows


class Way(Protocol):
    """Each method is one collective. Rows are of any width and dtype; only their bytes travel."""

    def back(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Results ``[R, …]`` of this rank's experts to their tokens' ranks: own rows, in flat order. Lane -1: undefined."""
        ...

    def forth(self, rows: torch.Tensor) -> torch.Tensor:
        """The other way round: of each row that `back` sends the row of its token and k, ``[R, …]``."""
        ...


@dataclass(frozen=True)
class ExactSplits:
    """Every rank sends what it has computed and no more, which takes splits on the host.

    Attributes:
        order: int64 ``[rows sent forth]``, the flat (token, k) of own rows by the rank that computes them.
        send_splits, receive_splits: rows to and from each rank, in `back`.
        num_flat: T · K.
    """

    group: dist.ProcessGroup
    order: torch.Tensor
    send_splits: list[int]
    receive_splits: list[int]
    num_flat: int

    def back(self, rows_R: torch.Tensor) -> torch.Tensor:
        came = all_to_all_rows(rows_R, self.receive_splits, self.send_splits, self.group)
        return came.new_zeros(self.num_flat, *came.shape[1:]).index_copy_(0, self.order, came)

    def forth(self, rows: torch.Tensor) -> torch.Tensor:
        return all_to_all_rows(rows[self.order], self.send_splits, self.receive_splits, self.group)


@dataclass(frozen=True)
class FixedSplits:
    """R = W · B · K: every rank sends each rank B · K rows, computed or not. Static shapes, no host sync.

    The receiver takes each row from the rank of its lane. A reduce-scatter of rows that are zero but on one rank would move
    as many bytes and give the same bits, but it goes round in W - 1 steps instead of one, and somebody must write the zeros.

    Attributes:
        owners_N: int64 ``[T · K]``, the rank that computes each own row; any, if none does.
        num_padded: B · K.
    """

    group: dist.ProcessGroup
    owners_N: torch.Tensor
    num_padded: int

    def back(self, rows_R: torch.Tensor) -> torch.Tensor:
        num_ranks = dist.get_world_size(self.group)
        splits = [self.num_padded] * num_ranks
        came = all_to_all_rows(rows_R, splits, splits, self.group)
        place_N = torch.arange(self.owners_N.numel(), device=came.device)
        return came.view(num_ranks, self.num_padded, *came.shape[1:])[self.owners_N, place_N]

    def forth(self, rows: torch.Tensor) -> torch.Tensor:
        return all_gather_rows(padded(rows, self.num_padded), self.group)


@dataclass(frozen=True)
class PartialSums:
    """R = W · B: every rank has summed its rows of each token; here those sums are summed by rank. Static shapes.

    A K-th of the bytes of `FixedSplits`. Which rows are summed first depends on the placement, so the result does too, in its
    last bits.
    """

    group: dist.ProcessGroup
    num_tokens: int
    num_padded: int

    def back(self, rows_R: torch.Tensor) -> torch.Tensor:
        num_ranks = dist.get_world_size(self.group)
        splits = [self.num_padded] * num_ranks
        came = all_to_all_rows(rows_R, splits, splits, self.group).view(num_ranks, self.num_padded, -1)
        total = came[0, : self.num_tokens].float()
        for part in came[1:, : self.num_tokens]:
            total = total + part
        return total.to(rows_R.dtype)

    def forth(self, rows: torch.Tensor) -> torch.Tensor:
        return all_gather_rows(padded(rows, self.num_padded), self.group)


def padded(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`rows` and undefined ones up to `num_rows`."""
    if rows.shape[0] == num_rows:
        return rows
    whole = rows.new_empty(num_rows, *rows.shape[1:])
    whole[: rows.shape[0]] = rows
    return whole


class Return(torch.autograd.Function):
    """`way.back`; the gradients go `forth`."""

    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, way: Way) -> torch.Tensor:
        ctx.way = way
        return way.back(rows_RH)

    @staticmethod
    @differentiable_once("a MoELayer of several ranks")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.way.forth(grad), None
