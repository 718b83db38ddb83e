"""Forward, dispatch and combine: every rank gets all tokens by one all-gather, and computes the rows that are its own.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, B tokens to which each rank's are padded,
R = W · B, N rows to compute.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_kernels import TileSchedule, build_schedule, combine
from moe_layer.arguments import check_choice, check_integer
from moe_layer.collectives import all_gather_rows, backend_of
from moe_layer.dispatch.base import Dispatched
from moe_layer.dispatch.gradients import check_gradients
from moe_layer.dispatch.lanes import count_lanes
from moe_layer.dispatch.packed import Tokens, pack_rows, pack_tokens, unpack_rows, unpack_tokens
from moe_layer.dispatch.ways import ExactSplits, FixedSplits, PartialSums, Return, Way


@dataclass(frozen=True)
class _Route:
    way: Way  # of results
    lanes_RK: torch.Tensor  # own lanes of all tokens, -1 for others'
    needs_grad: list[bool] | None  # of each rank, where this one has looked


class AllGatherDispatcher:
    """Hidden states, weights and lanes of all ranks' tokens in one all-gather; results come back in one more collective.

    For few tokens: each rank's are padded to a bound, and every rank gets them all, whichever it needs. Over NCCL the shapes
    are static and the host waits for nothing, so a forward without gradients can be captured in a CUDA graph. Over gloo the
    lanes are in host memory, and each rank sends back only what it has computed.

    Outputs do not depend on the placement, bit for bit. Backwards take two collectives, after the two of the forward that
    they repeat; hidden states are then copied K times, so for training all_to_all is better.

    If only some ranks need a gradient, then over gloo all of them raise ValueError. Over NCCL those that need one do, after
    they have taken part in the forward's collectives: the others, which do not wait for the device, get their outputs.

    Args:
        group: of the ranks that share the experts; every rank calls the layer equally often, also without tokens.
        num_lanes: S.
        max_tokens: most tokens of a rank in one turn, equal on all ranks, at least 1.
        combine: "exact", or "partial": each rank sums its rows of a token first, which moves a K-th of the bytes back and
            lets the last bits of an output depend on the placement.
        static: whether shapes are static; None: over NCCL and with "partial", which have no other way.

    Raises:
        ValueError: an argument breaks one of these rules.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_lanes: int,
        max_tokens: int,
        *,
        combine: str = "exact",
        static: bool | None = None,
    ) -> None:
        check_integer("max_tokens", max_tokens, 1)
        check_choice("combine", combine, ("exact", "partial"))
        if static is False and combine == "partial":
            raise ValueError("static=False does not go with combine='partial', whose shapes are static")
        self.max_tokens: int | None = max_tokens
        self._group = group
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._num_lanes = num_lanes
        self._partial = combine == "partial"
        self._static = True if self._partial else static

    def backend(self, device: torch.device) -> str:
        return backend_of(self._group, device)

    def dispatch(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        backend: str,
        max_tokens: int | None = None,
    ) -> Dispatched:
        del counts_L  # the receiver counts
        bound = max_tokens or self.max_tokens
        assert bound is not None and self.max_tokens is not None and bound <= self.max_tokens
        by_gloo = self.backend(x_TH.device) == "gloo"
        needs_grad = x_TH.requires_grad or weights_TK.requires_grad
        with torch.no_grad():
            packed = pack_tokens(x_TH, weights_TK, lanes_TK, bound, needs_grad)
            came = all_gather_rows(packed, self._group)
            tokens = unpack_tokens(came, x_TH.shape[1], x_TH.dtype, lanes_TK.shape[1])
            own_RK = self._own(tokens.lanes_RK)
        static = self._static if self._static is not None else not by_gloo
        looks = needs_grad and not (x_TH.is_cuda and torch.cuda.is_current_stream_capturing())
        flags = [bool(flag) for flag in tokens.needs_grad_R[::bound].tolist()] if looks or not static else None
        if static:
            return self._all_rows(x_TH, weights_TK, lanes_TK, tokens, own_RK, bound, flags, backend)
        return self._own_rows(x_TH, weights_TK, lanes_TK, tokens, own_RK, bound, flags, backend)

    def _own(self, lanes: torch.Tensor) -> torch.Tensor:
        """This rank's number of each of its lanes, -1 for others'; contiguous."""
        own = lanes - self._rank * self._num_lanes
        return torch.where((own >= 0) & (own < self._num_lanes), own, -1)

    def _all_rows(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        tokens: Tokens,
        own_RK: torch.Tensor,
        bound: int,
        needs_grad: list[bool] | None,
        backend: str,
    ) -> Dispatched:
        """A row for each token and k of all ranks; those of other ranks are in no tile."""
        top_k = lanes_TK.shape[1]
        owners_N = torch.div(lanes_TK.reshape(-1).clamp(min=0), self._num_lanes, rounding_mode="floor").long()
        exact = FixedSplits(self._group, owners_N, bound * top_k)
        way = PartialSums(self._group, lanes_TK.shape[0], bound) if self._partial else exact
        rows, weights, fanout = tokens.rows_RH, tokens.weights_RK.reshape(-1), top_k
        if x_TH.requires_grad or weights_TK.requires_grad:
            every_N = torch.arange(own_RK.numel(), device=x_TH.device)
            rows, weights = _Arrive.apply(x_TH, weights_TK, lanes_TK, tokens, every_N, exact)
            fanout = 1
        lanes_N = own_RK.view(-1)
        counts_S = count_lanes(lanes_N, self._num_lanes)
        return self._dispatched(
            rows, fanout, weights, lanes_N, counts_S, bound, _Route(way, own_RK, needs_grad), backend
        )

    def _own_rows(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        tokens: Tokens,
        own_RK: torch.Tensor,
        bound: int,
        needs_grad: list[bool] | None,
        backend: str,
    ) -> Dispatched:
        """The rows that this rank computes and no others, by rank, token and k: how many of each rank the host knows."""
        num_ranks, lanes = self._num_ranks, lanes_TK.reshape(-1)
        owners = torch.where(lanes >= 0, torch.div(lanes, self._num_lanes, rounding_mode="floor"), num_ranks)
        own_N = own_RK.view(-1)
        counts = [count_lanes(owners, num_ranks), (own_N.view(num_ranks, -1) >= 0).sum(dim=1, dtype=torch.int32)]
        receive_splits, send_splits = torch.stack(counts).tolist()
        order = torch.sort(owners, stable=True).indices[: sum(receive_splits)]
        way = ExactSplits(self._group, order, send_splits, receive_splits, lanes.numel())
        rows_N = torch.nonzero(own_N >= 0).view(-1)
        rows, weights = _Arrive.apply(x_TH, weights_TK, lanes_TK, tokens, rows_N, way)
        lanes_N = own_N[rows_N]
        counts_S = count_lanes(lanes_N, self._num_lanes)
        return self._dispatched(rows, 1, weights, lanes_N, counts_S, bound, _Route(way, own_RK, needs_grad), backend)

    def _dispatched(
        self,
        rows: torch.Tensor,
        fanout: int,
        weights: torch.Tensor,
        lanes_N: torch.Tensor,
        counts_S: torch.Tensor,
        bound: int,
        route: _Route,
        backend: str,
    ) -> Dispatched:
        def schedule(block_m: int, extra_m: int) -> TileSchedule:
            return build_schedule(lanes_N, counts_S, block_m=block_m, extra_m=extra_m, backend=backend)

        return Dispatched(
            rows_RH=rows,
            fanout=fanout,
            row_weights_N=weights,
            schedule=schedule,
            num_tokens=self._num_ranks * bound,
            route=route,
        )

    def combine(
        self, rows_NH: torch.Tensor | None, dispatched: Dispatched, lanes_TK: torch.Tensor, backend: str
    ) -> torch.Tensor:
        assert rows_NH is not None
        route: _Route = dispatched.route
        if self._partial:
            y_TH = Return.apply(combine(rows_NH, route.lanes_RK, backend=backend), route.way)
        else:
            y_TH = combine(Return.apply(rows_NH, route.way), lanes_TK.contiguous(), backend=backend)
        if route.needs_grad is not None:
            # Only now: ranks that have not looked wait for this one in the collective above.
            check_gradients(route.needs_grad)
        return y_TH


class _Arrive(torch.autograd.Function):
    """The rows of `tokens` with the flat numbers `rows_N`, and their weights. Gradients go `way.back` to the token's rank.

    Those of a token's K rows are summed there in the order of k: by ranks they would depend on the placement.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        tokens: Tokens,
        rows_N: torch.Tensor,
        way: Way,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.lanes_TK, ctx.way = lanes_TK, way
        ctx.shape, ctx.dtype = x_TH.shape, x_TH.dtype
        top_k = lanes_TK.shape[1]
        source_N = torch.div(rows_N, top_k, rounding_mode="floor")
        return tokens.rows_RH[source_N], tokens.weights_RK.reshape(-1)[rows_N]

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (num_tokens, hidden_size), top_k = ctx.shape, ctx.lanes_TK.shape[1]
        came = ctx.way.back(pack_rows(grad_rows, grad_weights))
        grad_x, grad_w = unpack_rows(came, hidden_size, ctx.dtype)
        computed_TK = ctx.lanes_TK >= 0
        grad_w_TK = torch.where(computed_TK, grad_w.view(num_tokens, top_k), 0.0)
        grad_TKH = torch.where(computed_TK[:, :, None], grad_x.reshape(num_tokens, top_k, hidden_size), 0)
        grad_x_TH = torch.zeros(ctx.shape, dtype=torch.float32, device=came.device)
        for k in range(top_k):
            grad_x_TH += grad_TKH[:, k]
        return grad_x_TH.to(ctx.dtype), grad_w_TK, None, None, None, None
