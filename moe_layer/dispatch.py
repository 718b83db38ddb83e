"""Tokens to the experts' ranks and back. `dispatch()` returns a frozen handle, `combine()` consumes it.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, R rows that came, N rows to compute.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_kernels import combine
from moe_layer.arguments import check_choice
from moe_layer.collectives import all_to_all_rows, backend_of


@dataclass(frozen=True)
class Dispatched:
    """What this rank's experts compute.

    Attributes:
        rows_RH: hidden states.
        row_weights_N: float32, the routing weight of each row to compute.
        lanes_N: int32, the own lane that computes each, -1 for none. The sender's table chose it (docs/design.md).
        counts_S: int32, how many of the rows each own lane computes.
        fanout: row n to compute reads ``rows_RH[n // fanout]``.
        num_tokens: of the batch over all ranks: equal on all of them, whatever the placement.
        lanes_TK: int32, the global lanes that this rank's own tokens went to.
        route: the dispatcher's own; opaque.
    """

    rows_RH: torch.Tensor
    row_weights_N: torch.Tensor
    lanes_N: torch.Tensor
    counts_S: torch.Tensor
    fanout: int
    num_tokens: int
    lanes_TK: torch.Tensor
    route: Any = None


class Dispatcher(Protocol):
    def backend(self, device: torch.device) -> str:
        """What moves rows of `device`: "local", "gloo" or "nccl"."""
        ...

    def dispatch(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, counts_L: torch.Tensor
    ) -> Dispatched:
        """`lanes_TK`: the global lane that each (token, expert) goes to, -1 for none; `counts_L`: how many go to each."""
        ...

    def combine(self, rows_NH: torch.Tensor, dispatched: Dispatched, kernels: str) -> torch.Tensor:
        """The computed rows, weighted already, back to their tokens and summed over K in fixed order: y_TH."""
        ...


class LocalDispatcher:
    """All experts are here: nothing is copied, the kernels gather and scatter."""

    def backend(self, device: torch.device) -> str:
        return "local"

    def dispatch(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, counts_L: torch.Tensor
    ) -> Dispatched:
        num_tokens, top_k = lanes_TK.shape
        return Dispatched(x_TH, weights_TK.reshape(-1), lanes_TK.reshape(-1), counts_L, top_k, num_tokens, lanes_TK)

    def combine(self, rows_NH: torch.Tensor, dispatched: Dispatched, kernels: str) -> torch.Tensor:
        return combine(rows_NH, dispatched.lanes_TK, backend=kernels)


@dataclass(frozen=True)
class _Route:
    order: torch.Tensor  # int64 [sent]: flat (token, k) of each row sent, by destination rank
    send_splits: list[int]
    receive_splits: list[int]


class AllToAllDispatcher:
    """One row per (token, expert) through `all_to_all_single` with true splits, which takes a host sync: eager only.

    Args:
        group: of the ranks that share the experts; every rank calls the layer equally often, also without tokens.
        num_lanes: S.
    """

    def __init__(self, group: dist.ProcessGroup, num_lanes: int) -> None:
        self._group = group
        self._num_ranks = dist.get_world_size(group)
        self._num_lanes = num_lanes

    def backend(self, device: torch.device) -> str:
        return backend_of(self._group, device)

    @torch.compiler.disable
    def dispatch(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, counts_L: torch.Tensor
    ) -> Dispatched:
        num_tokens, top_k = lanes_TK.shape
        num_ranks, num_lanes = self._num_ranks, self._num_lanes
        # To each rank: what its lanes get, and how many tokens there are.
        said = F.pad(counts_L.view(num_ranks, num_lanes), (0, 1), value=num_tokens)
        heard = all_to_all_rows(said, [1] * num_ranks, [1] * num_ranks, self._group)
        sums = [said[:, :num_lanes].sum(dim=1), heard[:, :num_lanes].sum(dim=1), heard[:, num_lanes]]
        send_splits, receive_splits, tokens = torch.stack(sums).tolist()
        lanes = lanes_TK.reshape(-1).long()
        destination = torch.where(lanes >= 0, lanes // num_lanes, num_ranks)  # those of no lane last, not sent
        order = torch.sort(destination, stable=True).indices[: sum(send_splits)]
        route = _Route(order, send_splits, receive_splits)

        def send(rows: torch.Tensor) -> torch.Tensor:
            return all_to_all_rows(rows, receive_splits, send_splits, self._group)

        return Dispatched(
            rows_RH=send(x_TH[order // top_k]),
            row_weights_N=send(weights_TK.reshape(-1)[order]),
            lanes_N=send((lanes % num_lanes).int()[order]),
            counts_S=heard[:, :num_lanes].sum(dim=0, dtype=torch.int32),
            fanout=1,
            num_tokens=sum(tokens),
            lanes_TK=lanes_TK,
            route=route,
        )

    @torch.compiler.disable
    def combine(self, rows_NH: torch.Tensor, dispatched: Dispatched, kernels: str) -> torch.Tensor:
        route: _Route = dispatched.route
        back = all_to_all_rows(rows_NH, route.send_splits, route.receive_splits, self._group)
        flat = back.new_zeros(dispatched.lanes_TK.numel(), back.shape[1])
        return combine(flat.index_copy(0, route.order, back), dispatched.lanes_TK, backend=kernels)


def make_dispatcher(
    dispatcher: str | Dispatcher, group: dist.ProcessGroup | None, num_ranks: int, num_lanes: int
) -> Dispatcher:
    """What `MoELayer`'s argument `dispatcher` means; `num_lanes`: of a rank.

    Raises:
        ValueError: it names none, lacks methods, or does not go with the group.
    """
    if num_ranks > 1 and (type(dispatcher) is LocalDispatcher or dispatcher == "local"):
        raise ValueError(f"dispatcher={dispatcher!r} needs all experts on one rank, but process_group has {num_ranks}")
    methods = ("backend", "dispatch", "combine")
    missing = [name for name in methods if not callable(getattr(dispatcher, name, None))]
    if not missing:
        return dispatcher  # type: ignore[return-value]
    if not isinstance(dispatcher, str) and len(missing) < len(methods):
        raise ValueError(f"dispatcher must have the methods {', '.join(methods)}, but {dispatcher!r} lacks {missing}")
    check_choice("dispatcher", dispatcher, ("auto", "local", "all_to_all"), " or a Dispatcher")
    if dispatcher == "all_to_all" and group is None:
        raise ValueError("dispatcher='all_to_all' needs a process_group, got None")
    if dispatcher == "local" or (dispatcher == "auto" and num_ranks == 1):
        return LocalDispatcher()
    assert group is not None
    return AllToAllDispatcher(group, num_lanes)
