"""Forward, dispatch and combine: rows travel to the ranks of their experts, and results travel back.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, L = W · S lanes, R rows that came.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_kernels import combine
from moe_layer.arguments import check_choice
from moe_layer.collectives import all_to_all_rows, backend_of

# Rows travel as bytes, hidden state and routing weight together, at multiples of this: TMA asks for 16.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Dispatched:
    """What this rank's experts compute.

    Attributes:
        rows_RH: hidden states; rows may be padded.
        row_weights_R: float32, the routing weight of each row.
        lanes_R: int32, the own lane that computes each row. The sender's table chose it (docs/design.md).
        counts_S: int32, how many rows each own lane computes.
        num_tokens: of the batch over all ranks: equal on all of them, whatever the placement.
        route: the dispatcher's own; opaque.
    """

    rows_RH: torch.Tensor
    row_weights_R: torch.Tensor
    lanes_R: torch.Tensor
    counts_S: torch.Tensor
    num_tokens: int
    route: Any = None


class Dispatcher(Protocol):
    def backend(self, device: torch.device) -> str:
        """What moves rows of `device`: "gloo" or "nccl"."""
        ...

    def dispatch(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, counts_L: torch.Tensor
    ) -> Dispatched:
        """Send each (token, expert) to its global lane in `lanes_TK`, -1 for none; `counts_L` says how many go to each.

        Differentiable with respect to `x_TH` and `weights_TK`, and then both gradients travel back: a rank that wants
        one of them takes part in as many collectives as a rank that wants both. Inputs require a gradient exactly where
        a backward may come, inside a custom autograd function too.
        """
        ...

    def combine(
        self, rows_RH: torch.Tensor, dispatched: Dispatched, lanes_TK: torch.Tensor, backend: str
    ) -> torch.Tensor:
        """Send the computed rows, already weighted, back to their tokens and sum over K in fixed order: y_TH."""
        ...


@dataclass(frozen=True)
class _Route:
    order: torch.Tensor  # int64 [sent]: flat (token, k) of each row sent, by lane
    send_splits: list[int]
    receive_splits: list[int]

    def reversed(self) -> "_Route":
        return _Route(self.order, self.receive_splits, self.send_splits)


class AllToAllDispatcher:
    """One row per (token, expert) through `all_to_all_single` with true splits, which takes a host sync: eager only.

    Three collectives a forward: counts; rows with their weights; results. The first also finds ranks that differ in
    whether a backward comes: ValueError on all of them.

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

    def dispatch(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, counts_L: torch.Tensor
    ) -> Dispatched:
        num_tokens, top_k = lanes_TK.shape
        num_ranks, num_lanes = self._num_ranks, self._num_lanes
        # To each rank: how many rows its lanes get, how many tokens there are, and in the last bit whether a backward comes.
        needs_grad = x_TH.requires_grad or weights_TK.requires_grad
        said = F.pad(counts_L.view(num_ranks, num_lanes), (0, 1), value=2 * num_tokens + needs_grad)
        heard = all_to_all_rows(said, [1] * num_ranks, [1] * num_ranks, self._group)
        counts_WS = heard[:, :num_lanes]
        sums = [said[:, :num_lanes].sum(dim=1), counts_WS.sum(dim=1), heard[:, num_lanes]]
        send_splits, receive_splits, last = torch.stack(sums).tolist()
        _check_gradients([bool(one & 1) for one in last])
        # By lane, so that the counts tell the receiver the lane of each row. Rows without a lane sort last and stay here.
        lanes = lanes_TK.reshape(-1)
        order = torch.sort(torch.where(lanes >= 0, lanes, counts_L.numel()), stable=True).indices[: sum(send_splits)]
        route = _Route(order, send_splits, receive_splits)
        rows_RH, row_weights_R = _Exchange.apply(
            x_TH[order // top_k], weights_TK.reshape(-1)[order], route, self._group
        )
        lane_WS = torch.arange(num_lanes, dtype=torch.int32, device=lanes.device).repeat(num_ranks)
        return Dispatched(
            rows_RH=rows_RH,
            row_weights_R=row_weights_R,
            lanes_R=lane_WS.repeat_interleave(counts_WS.flatten(), output_size=sum(receive_splits)),
            counts_S=counts_WS.sum(dim=0, dtype=torch.int32),
            num_tokens=sum(one >> 1 for one in last),
            route=route,
        )

    def combine(
        self, rows_RH: torch.Tensor, dispatched: Dispatched, lanes_TK: torch.Tensor, backend: str
    ) -> torch.Tensor:
        back = _Return.apply(rows_RH, dispatched.route, self._group)
        flat = back.new_zeros(lanes_TK.numel(), back.shape[1])
        return combine(flat.index_copy(0, dispatched.route.order, back), lanes_TK, backend=backend)


def _check_gradients(needs_grad: list[bool]) -> None:
    """Raises ValueError, on all ranks, if only some of them would take part in the collectives of the backward."""
    ranks = {wanted: [rank for rank, needs in enumerate(needs_grad) if needs is wanted] for wanted in (True, False)}
    if ranks[True] and ranks[False]:
        raise ValueError(
            f"x or expert_weights must require a gradient on all ranks of process_group or on none: those of the ranks "
            f"{ranks[True]} do, those of the ranks {ranks[False]} do not, and the backward would wait for ever. A rank "
            "without tokens passes an empty tensor that requires a gradient like the others"
        )


def _send(rows: torch.Tensor, route: _Route, group: dist.ProcessGroup) -> torch.Tensor:
    return all_to_all_rows(rows, route.receive_splits, route.send_splits, group)


def _exchange(
    rows_NH: torch.Tensor, weights_N: torch.Tensor, route: _Route, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and their weights (float32) in one collective."""
    num_rows, hidden_size = rows_NH.shape
    item = rows_NH.element_size()
    width = -(-hidden_size * item // _ALIGNMENT) * _ALIGNMENT
    packed = rows_NH.new_empty((num_rows, width + _ALIGNMENT), dtype=torch.uint8)
    packed.view(rows_NH.dtype)[:, :hidden_size] = rows_NH
    packed.view(torch.float32)[:, width // 4] = weights_N
    received = _send(packed, route, group)
    return received.view(rows_NH.dtype)[:, :hidden_size], received.view(torch.float32)[:, width // 4].contiguous()


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_NH: torch.Tensor, weights_N: torch.Tensor, route: _Route, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.back, ctx.group = route.reversed(), group
        return _exchange(rows_NH, weights_N, route, group)

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_exchange(grad_rows, grad_weights, ctx.back, ctx.group), None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, route: _Route, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.route, ctx.group = route, group
        return _send(rows_RH, route.reversed(), group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _send(grad, ctx.route, ctx.group), None, None


def make_dispatcher(
    dispatcher: str | Dispatcher, group: dist.ProcessGroup | None, num_ranks: int, num_lanes: int
) -> Dispatcher | None:
    """What `MoELayer`'s argument `dispatcher` means, None for no dispatch; `num_lanes`: of a rank.

    Raises:
        ValueError: it names none, lacks methods, or does not go with the group.
    """
    if num_ranks > 1 and dispatcher == "local":
        raise ValueError(f"dispatcher='local' needs all experts on one rank, but process_group has {num_ranks}")
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
        return None
    assert group is not None
    return AllToAllDispatcher(group, num_lanes)
