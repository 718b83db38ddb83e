"""Forward, dispatch and combine: one row per (token, expert), by all-to-all collectives with true splits.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, L = W · S lanes, R rows that came.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_kernels import TileSchedule, build_schedule, combine
from moe_layer.collectives import all_gather_rows, all_to_all_rows, backend_of
from moe_layer.dispatch.base import Dispatched, Incoming
from moe_layer.dispatch.gradients import check_gradients
from moe_layer.dispatch.packed import pack_rows, unpack_rows


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
    whether a backward comes: ValueError on all of them. With `BatchShares` it comes before the choice of replicas, and what
    arrives is derived from it; only where ranks have different versions of the table, for a moment, counts travel again.

    It pads nothing, so it takes any number of tokens in one turn, whatever `max_tokens` is.

    Args:
        group: of the ranks that share the experts; every rank calls the layer equally often, also without tokens.
        num_lanes: S.
    """

    max_tokens: int | None = None
    takes_incoming = True

    def __init__(self, group: dist.ProcessGroup, num_lanes: int) -> None:
        self._group = group
        self._num_ranks = dist.get_world_size(group)
        self._num_lanes = num_lanes

    def backend(self, device: torch.device) -> str:
        return backend_of(self._group, device)

    def gather_counts(self, counts_E: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        """See `Dispatcher`."""
        return all_gather_rows(counts_E[None], self._group)

    def dispatch(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        backend: str,
        max_tokens: int | None = None,
        incoming: Incoming | None = None,
    ) -> Dispatched:
        """See `Dispatcher`. `incoming`: what this rank knows; the same ranks give it that give it elsewhere."""
        del max_tokens
        num_tokens, top_k = lanes_TK.shape
        num_ranks, num_lanes = self._num_ranks, self._num_lanes
        send_W = counts_L.view(num_ranks, num_lanes).sum(dim=1)
        versions = None
        if incoming is not None:
            counts_WS = incoming.counts_WS
            facts = [send_W, counts_WS.sum(dim=1), *incoming.facts_W2.T]
            send_splits, receive_splits, last, versions = torch.stack(facts).tolist()
        if versions is None or len(set(versions)) > 1:
            # To each rank: how many rows its lanes get, how many tokens there are, and in the last bit whether a backward
            # comes.
            needs_grad = x_TH.requires_grad or weights_TK.requires_grad
            said = F.pad(counts_L.view(num_ranks, num_lanes), (0, 1), value=2 * num_tokens + needs_grad)
            heard = all_to_all_rows(said, [1] * num_ranks, [1] * num_ranks, self._group)
            counts_WS = heard[:, :num_lanes]
            send_splits, receive_splits, last = torch.stack(
                [send_W, counts_WS.sum(dim=1), heard[:, num_lanes]]
            ).tolist()
        check_gradients([bool(one & 1) for one in last])
        # By lane, so that the counts tell the receiver the lane of each row. Rows without a lane sort last and stay here.
        lanes = lanes_TK.reshape(-1)
        order = torch.sort(torch.where(lanes >= 0, lanes, counts_L.numel()), stable=True).indices[: sum(send_splits)]
        route = _Route(order, send_splits, receive_splits)
        rows_RH, row_weights_R = _Exchange.apply(
            x_TH[order // top_k], weights_TK.reshape(-1)[order], route, self._group
        )
        lane_WS = torch.arange(num_lanes, dtype=torch.int32, device=lanes.device).repeat(num_ranks)
        lanes_R = lane_WS.repeat_interleave(counts_WS.flatten(), output_size=sum(receive_splits))
        counts_S = counts_WS.sum(dim=0, dtype=torch.int32)

        def schedule(block_m: int, extra_m: int) -> TileSchedule:
            return build_schedule(lanes_R, counts_S, block_m=block_m, extra_m=extra_m, backend=backend)

        return Dispatched(
            rows_RH=rows_RH,
            fanout=1,
            row_weights_N=row_weights_R,
            schedule=schedule,
            num_tokens=sum(one >> 1 for one in last),
            route=route,
        )

    def combine(
        self, rows_NH: torch.Tensor | None, dispatched: Dispatched, lanes_TK: torch.Tensor, backend: str
    ) -> torch.Tensor:
        assert rows_NH is not None
        back = _Return.apply(rows_NH, dispatched.route, self._group)
        flat = back.new_zeros(lanes_TK.numel(), back.shape[1])
        return combine(flat.index_copy(0, dispatched.route.order, back), lanes_TK, backend=backend)


def _send(rows: torch.Tensor, route: _Route, group: dist.ProcessGroup) -> torch.Tensor:
    return all_to_all_rows(rows, route.receive_splits, route.send_splits, group)


def _exchange(
    rows_NH: torch.Tensor, weights_N: torch.Tensor, route: _Route, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and their weights (float32) in one collective."""
    received = _send(pack_rows(rows_NH, weights_N), route, group)
    return unpack_rows(received, rows_NH.shape[1], rows_NH.dtype)


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
