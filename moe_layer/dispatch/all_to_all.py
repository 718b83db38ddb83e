"""Forward, dispatch and combine: one row per (token, expert), by all-to-all collectives with true splits.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, L = W · S lanes, R rows that came.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_kernels import TileSchedule, build_schedule, combine
from moe_kernels.base.once import differentiable_once
from moe_layer.arguments import check_integer
from moe_layer.collectives import all_gather_rows, all_to_all_rows, backend_of
from moe_layer.dispatch.base import Dispatched, Incoming
from moe_layer.dispatch.gradients import check_gradients
from moe_layer.dispatch.packed import pack_rows, unpack_rows
from moe_layer.dispatch.ways import ExactSplits, Return


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
        num_lanes = check_integer("num_lanes", num_lanes, 1)
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
        way = ExactSplits(self._group, order, receive_splits, send_splits, lanes.numel())
        rows_RH, row_weights_R = _Exchange.apply(x_TH[order // top_k], weights_TK.reshape(-1)[order], way)
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
            route=way,
        )

    def combine(
        self, rows_NH: torch.Tensor | None, dispatched: Dispatched, lanes_TK: torch.Tensor, backend: str
    ) -> torch.Tensor:
        assert rows_NH is not None
        return combine(Return.apply(rows_NH, dispatched.route), lanes_TK, backend=backend)


class _Exchange(torch.autograd.Function):
    """Rows in the order of `way`, and their weights (float32), to the ranks that compute them; gradients come back."""

    @staticmethod
    def forward(
        ctx: Any, rows_NH: torch.Tensor, weights_N: torch.Tensor, way: ExactSplits
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.way = way
        came = all_to_all_rows(pack_rows(rows_NH, weights_N), way.send_splits, way.receive_splits, way.group)
        return unpack_rows(came, rows_NH.shape[1], rows_NH.dtype)

    @staticmethod
    @differentiable_once("a MoELayer of several ranks")
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        way = ctx.way
        came = all_to_all_rows(pack_rows(grad_rows, grad_weights), way.receive_splits, way.send_splits, way.group)
        return *unpack_rows(came, grad_rows.shape[1], grad_rows.dtype), None
