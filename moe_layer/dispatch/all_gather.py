"""Forward, dispatch and combine: every rank gets all tokens by one all-gather, and computes the rows that are its own.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, B tokens to which each rank's are padded,
R = W · B, N rows to compute.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_kernels import TileSchedule, build_schedule, combine
from moe_kernels.base.once import differentiable_once
from moe_layer.arguments import check_choice, check_integer
from moe_layer.collectives import all_gather_rows, backend_of
from moe_layer.dispatch.base import Dispatched
from moe_layer.dispatch.gradients import check_gradients
from moe_layer.dispatch.lanes import LaneTables, count_bins
from moe_layer.dispatch.packed import Tokens, pack_rows, pack_tokens, unpack_rows, unpack_tokens
from moe_layer.dispatch.ways import ExactSplits, FixedSplits, PartialSums, Return, Way

_Rows = tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor, Way, torch.Tensor]
"""(rows and their weights, own lane of each row, how many rows each lane has, the way back, own lanes_RK)."""


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
        num_lanes = check_integer("num_lanes", num_lanes, 1)
        max_tokens = check_integer("max_tokens", max_tokens, 1)
        check_choice("combine", combine, ("exact", "partial"))
        if static is False and combine == "partial":
            raise ValueError("static=False does not go with combine='partial', whose shapes are static")
        self.max_tokens: int | None = max_tokens
        self._group = group
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._num_lanes = num_lanes
        self._tables: dict[torch.device, LaneTables] = {}
        self._partial = combine == "partial"
        self._static = True if self._partial else static

    def backend(self, device: torch.device) -> str:
        return backend_of(self._group, device)

    def gather_counts(self, counts_E: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        """One collective more."""
        return all_gather_rows(counts_E[None], self._group)

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
        static = self._static if self._static is not None else self.backend(x_TH.device) != "gloo"
        needs_grad = x_TH.requires_grad or weights_TK.requires_grad
        with torch.no_grad():
            came = all_gather_rows(pack_tokens(x_TH, weights_TK, lanes_TK, bound, needs_grad), self._group)
        tokens = unpack_tokens(came, x_TH.shape[1], x_TH.dtype, lanes_TK.shape[1])
        looks = not static or (needs_grad and not _is_capturing(x_TH))
        flags = [bool(flag) for flag in tokens.needs_grad_R[::bound].tolist()] if looks else None
        rows_of = self._all_rows if static else self._own_rows
        rows, lanes_N, counts_S, way, own_RK = rows_of(x_TH, weights_TK, lanes_TK, tokens, bound)

        def schedule(block_m: int, extra_m: int) -> TileSchedule:
            return build_schedule(lanes_N, counts_S, block_m=block_m, extra_m=extra_m, backend=backend)

        return Dispatched(
            rows_RH=rows[0],
            fanout=lanes_N.numel() // rows[0].shape[0] if static else 1,
            row_weights_N=rows[1],
            schedule=schedule,
            num_tokens=self._num_ranks * bound,
            route=_Route(way, own_RK, flags),
        )

    def _all_rows(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, tokens: Tokens, bound: int
    ) -> _Rows:
        """A row for each token and k of all ranks; those of other ranks are in no tile. No host sync."""
        tables = self._tables_on(x_TH.device)
        exact = FixedSplits(self._group, tables.owners[lanes_TK.view(-1).long()], bound * lanes_TK.shape[1])
        way = PartialSums(self._group, lanes_TK.shape[0], bound) if self._partial else exact
        numbers_RK = tokens.lanes_RK.long()
        own_RK = tables.own[numbers_RK]
        counts_S = count_bins(tables.bins[numbers_RK.view(-1)], self._num_lanes)
        rows = tokens.rows_RH, tokens.weights_RK.contiguous().view(-1)
        if x_TH.requires_grad or weights_TK.requires_grad:
            every_N = torch.arange(own_RK.numel(), device=x_TH.device)
            rows = _Arrive.apply(x_TH, weights_TK, lanes_TK, tokens, every_N, exact)
        return rows, own_RK.view(-1), counts_S, way, own_RK

    def _own_rows(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, tokens: Tokens, bound: int
    ) -> _Rows:
        """The rows that this rank computes and no others, by rank, token and k: how many of each rank the host knows."""
        tables, num_ranks = self._tables_on(x_TH.device), self._num_ranks
        owners_N = tables.owners_or_none[lanes_TK.view(-1).long()]
        own_RK = tables.own[tokens.lanes_RK.long()]
        is_own_N = own_RK.view(-1) >= 0
        sent_W = is_own_N.view(num_ranks, -1).sum(dim=1, dtype=torch.int32)
        receive_splits, send_splits = torch.stack([count_bins(owners_N, num_ranks), sent_W]).tolist()
        order = torch.sort(owners_N, stable=True).indices[: sum(receive_splits)]
        way = ExactSplits(self._group, order, send_splits, receive_splits, lanes_TK.numel())
        rows_N = torch.nonzero(is_own_N).view(-1)
        lanes_N = own_RK.view(-1)[rows_N]
        rows = _Arrive.apply(x_TH, weights_TK, lanes_TK, tokens, rows_N, way)
        return rows, lanes_N, count_bins(lanes_N.long(), self._num_lanes), way, own_RK

    @torch.inference_mode(False)  # or forwards with gradients could not use them
    def _tables_on(self, device: torch.device) -> LaneTables:
        tables = self._tables.get(device)
        if tables is None:
            tables = LaneTables.build(self._rank, self._num_ranks, self._num_lanes, device)
            if not _is_capturing(tables.own):  # or they would be the graph's
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()  # once: any stream may read them from now on
                self._tables[device] = tables
        return tables

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


def _is_capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


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
    @differentiable_once("a MoELayer of several ranks")
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
