"""Forward, dispatch and combine: what every dispatcher does.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, L = W · S lanes, R rows that came, N rows to
compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe_kernels import TileSchedule
from moe_kernels.tiles.homes import RowHomes


@dataclass(frozen=True)
class Dispatched:
    """What this rank's experts compute.

    Attributes:
        rows_RH: hidden states; rows may be padded.
        fanout: row n is computed from ``rows_RH[n // fanout]``.
        row_weights_N: float32, the routing weight of each row.
        schedule: of (block_m, extra_m): which own lane computes which row. The sender's table chose it (docs/design.md).
        num_tokens: of the batch over all ranks, or a bound of it, by which tiles are chosen: equal on all of them, whatever
            the placement.
        homes: where the down projection writes the rows, if not into a tensor of its own.
        route: the dispatcher's own; opaque.
    """

    rows_RH: torch.Tensor
    fanout: int
    row_weights_N: torch.Tensor
    schedule: Callable[[int, int], TileSchedule]
    num_tokens: int
    homes: RowHomes | None = None
    route: Any = None


@dataclass(frozen=True)
class Incoming:
    """What a rank knows of a batch before it is dispatched, where replicas are chosen by the counts of all ranks.

    Attributes:
        counts_WS: int32, the rows that each rank sends to each of the own lanes, if all ranks have the same version.
        facts_W2: int32, what each rank has said: 2 · tokens + whether a backward comes; the number of its version.
    """

    counts_WS: torch.Tensor
    facts_W2: torch.Tensor


class Dispatcher(Protocol):
    """Moves rows between ranks.

    One with an attribute `takes_incoming` that is true gets, with `BatchShares`, two more counts to gather, and what comes of
    them as `dispatch`'s argument `incoming`.

    One with an attribute `asks_for_gradients` that is true gets inputs that require a gradient also where only the experts'
    weights need one.

    Attributes:
        max_tokens: most tokens of a rank in one `dispatch`, equal on all ranks: what static buffers are made for. None: any
            number, and nothing is padded.
    """

    max_tokens: int | None

    def backend(self, device: torch.device) -> str:
        """What moves rows of `device`: "gloo" or "nccl"."""
        ...

    def gather_counts(self, counts_E: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        """Every rank's tokens of each expert, int32 [W, E]; needed for `BatchShares` only. Collective.

        Called before `dispatch`, at most once a forward. The result lasts until the forward is over. `needs_grad`: whether
        inputs of that dispatch require a gradient.
        """
        ...

    def dispatch(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        backend: str,
        max_tokens: int | None = None,
    ) -> Dispatched:
        """Send each (token, expert) to its global lane in `lanes_TK`, -1 for none; `counts_L` says how many go to each.

        Differentiable with respect to `x_TH` and `weights_TK`, and then both gradients travel back: a rank that wants
        one of them takes part in as many collectives as a rank that wants both. Inputs require a gradient exactly where
        a backward may come, inside a custom autograd function too. `backend`: of kernels. `max_tokens`: no rank has more
        tokens; equal on all ranks, at least 1 and at most `self.max_tokens`, and None only if that is None.
        """
        ...

    def combine(
        self, rows_NH: torch.Tensor | None, dispatched: Dispatched, lanes_TK: torch.Tensor, backend: str
    ) -> torch.Tensor:
        """Send the computed rows, already weighted, back to their tokens and sum over K in fixed order: y_TH.

        rows_NH: None where `Dispatched.homes` said where to write them.
        """
        ...
