"""Forward and backward, dispatch and combine: one-sided, of the rows that came and no more, where a gradient is needed.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, L = W · S lanes, B the bound of a forward, R rows
that this rank computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Variable

from moe_kernels import TileSchedule, build_schedule
from moe_kernels.base.once import differentiable_once
from moe_kernels.peers.combine_home import combine_home
from moe_kernels.peers.meet_peers import meet_peers
from moe_kernels.peers.peers import (
    DIFFERENTIABLE,
    FORWARD,
    GRADIENTS,
    HOMEWARD,
    NO_RANK,
    PeerArea,
    exchange_word,
    kind_of,
)
from moe_kernels.peers.receive_rows import receive_rows
from moe_kernels.peers.return_sorted import return_sorted
from moe_kernels.peers.send_rows import ANY_BLOCK_M, send_rows
from moe_kernels.tiles.gather_sorted import gather_sorted
from moe_layer.dispatch.base import Dispatched
from moe_layer.dispatch.gradients import check_gradients


@dataclass(frozen=True)
class GradientRoute:
    """The way of a forward's rows.

    Attributes:
        lanes_TK, counts_L: as in `Dispatcher.dispatch`.
        bound: B.
        order_R: int32, the flat row (see `moe_kernels.peers.peers`) that each row is: by lane, then rank, then place there.
        number: of the exchange in which they came, equal on all ranks.
    """

    lanes_TK: torch.Tensor
    counts_L: torch.Tensor
    bound: int
    order_R: torch.Tensor
    number: int


class GradientExchanges:
    """Moves rows forth and home again, in a forward, and in its backward their gradients the same ways.

    A forward is two exchanges, and so is its backward. Each begins and ends with all ranks, like a collective. So others may
    come between them, if they do so on all ranks: a checkpoint repeats a forward inside of a backward. Ranks that are in
    different exchanges find out by what they tell each other (`exchange_word`): a ValueError, never wrong numbers.

    The host waits for the device: in a forward for the counts of rows, so that no more is kept than came; in a backward before
    gradients are used, and at its end, so that no optimizer steps by those of a rank that was lost.

    Args:
        begin: looks for failures and orders streams; before each exchange.
        check: raises a failure that the host can see.
    """

    def __init__(self, area: PeerArea, begin: Callable[[], None], check: Callable[[], None]) -> None:
        self._area, self._begin, self._check = area, begin, check

    def dispatch(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        bound: int,
        backend: str,
    ) -> Dispatched:
        """See `Dispatcher`. The rows and their order within a lane are those of `AllToAllDispatcher`."""
        area, layout = self._area, self._area.layout
        num_lanes = counts_L.numel() // layout.num_ranks
        told = exchange_word(DIFFERENTIABLE, bound)
        order_N = self._send(x_TH.detach(), weights_TK.detach(), lanes_TK, counts_L, bound, told)
        counts = area.part("counts", torch.int32, layout.num_ranks, num_lanes + 2)
        *heard, number = torch.cat(
            (counts.view(-1), area.state[:1])
        ).tolist()  # the state's first is the exchange's number
        tokens, words = heard[num_lanes :: num_lanes + 2], heard[num_lanes + 1 :: num_lanes + 2]
        if area.failure() == NO_RANK and {kind_of(word) for word in words} == {FORWARD, DIFFERENTIABLE}:
            check_gradients([kind_of(word) == DIFFERENTIABLE for word in words])
        self._check()
        num_rows = sum(heard) - sum(tokens) - sum(words)
        counts_S = counts[:, :num_lanes].sum(dim=0, dtype=torch.int32)
        lane_S = torch.arange(num_lanes, dtype=torch.int32, device=counts.device)
        lanes_R = lane_S.repeat_interleave(counts_S, output_size=num_rows)
        order_R = order_N[:num_rows].clone()  # the rest of its memory is for as many rows as may come
        num_flat = layout.num_ranks * bound * layout.top_k
        row_weights_R = area.part("weights", torch.float32, num_flat).index_select(0, order_R)
        rows_RH = self._take(order_R, bound)
        route = GradientRoute(lanes_TK, counts_L, bound, order_R, number)

        def schedule(block_m: int, extra_m: int) -> TileSchedule:
            return build_schedule(lanes_R, counts_S, block_m=block_m, extra_m=extra_m, backend=backend)

        rows_RH, row_weights_R = _Forth.apply(x_TH, weights_TK, self, route, (rows_RH, row_weights_R))
        return Dispatched(rows_RH, 1, row_weights_R, schedule, sum(tokens), route=route)

    def combine(self, rows_RH: torch.Tensor, route: GradientRoute) -> torch.Tensor:
        """See `Dispatcher`; always in fixed order."""
        return _Home.apply(rows_RH, self, route)

    def send_gradients(self, grad_TH: torch.Tensor, route: GradientRoute) -> torch.Tensor:
        """Of the results at the tokens' ranks: the gradient of each row, [R, H]."""
        unused_TK = torch.empty(route.lanes_TK.shape, dtype=torch.float32, device=grad_TH.device)  # weights are known
        told = exchange_word(GRADIENTS, route.number)
        self._send(grad_TH, unused_TK, route.lanes_TK, route.counts_L, route.bound, told)
        if grad_TH.is_cuda:
            torch.cuda.current_stream(grad_TH.device).synchronize()
        # Not later: a rank that gives up must not tell the others that it has come further.
        self._check()
        return self._take(route.order_R, route.bound)

    def send_home(
        self, rows_RH: torch.Tensor, scalars_R: torch.Tensor | None, route: GradientRoute
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows, and of a backward a float32 number with each: their sums [T, H] over K in fixed order, the numbers [T, K]."""
        area, lanes_TK = self._area, route.lanes_TK
        num_lanes = route.counts_L.numel() // area.layout.num_ranks
        rows_RH = rows_RH.contiguous()
        scalars_R = None if scalars_R is None else scalars_R.contiguous()
        self._begin()
        told = exchange_word(HOMEWARD, 2 * route.number + (scalars_R is not None))
        return_sorted(rows_RH, scalars_R, route.order_R, area, route.bound, num_lanes, told)
        y_TH = combine_home(lanes_TK, area, num_lanes)
        if scalars_R is None:
            return y_TH, None
        came_TK = area.part("scalars", torch.float32, *lanes_TK.shape)
        return y_TH, torch.where(lanes_TK >= 0, came_TK, 0.0)

    def check_at_the_end(self) -> None:
        """Raise a failure of what was enqueued when the running backward ends, once the device has done it."""
        event = torch.cuda.Event() if self._area.own.is_cuda else None
        if event is not None:
            event.record()

        def check() -> None:
            if event is not None:
                event.synchronize()
            self._check()

        Variable._execution_engine.queue_callback(check)

    def _send(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        bound: int,
        told: int,
    ) -> torch.Tensor:
        """To the ranks of `lanes_TK`, as `send_rows`; waits on the device for what they send. Its order_N."""
        area = self._area
        x_TH, weights_TK = x_TH.contiguous(), weights_TK.contiguous()
        self._begin()
        # Also in a backward: `send_rows` reads x before the kernel before it has ended, which must be this one's.
        by_lane = build_schedule(lanes_TK.view(-1), counts_L, block_m=ANY_BLOCK_M, backend="triton")
        send_rows(x_TH, weights_TK, lanes_TK, by_lane, area, bound, told)
        num_lanes = counts_L.numel() // area.layout.num_ranks
        return receive_rows(area, bound, num_lanes, block_m=ANY_BLOCK_M, told=told).order_N

    def _take(self, order_R: torch.Tensor, bound: int) -> torch.Tensor:
        """The rows that came, in memory of their own; then nobody needs the area any more."""
        area, layout = self._area, self._area.layout
        came = area.part("rows", layout.dtype, layout.num_ranks * bound, layout.hidden_size)
        rows_RH = gather_sorted(came, order_R, layout.top_k)
        meet_peers(area)
        return rows_RH


class _Forth(torch.autograd.Function):
    """Hidden states and weights to the rows that have come of them; gradients come home."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        exchanges: GradientExchanges,
        route: GradientRoute,
        came: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.exchanges, ctx.route = exchanges, route
        return came

    @staticmethod
    @differentiable_once("a MoELayer of several ranks")
    def backward(ctx: Any, grad_rows_RH: torch.Tensor, grad_weights_R: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Both, also where only one is wanted: another rank may want the other.
        grads = ctx.exchanges.send_home(grad_rows_RH, grad_weights_R, ctx.route)
        ctx.exchanges.check_at_the_end()
        return *grads, None, None, None


class _Home(torch.autograd.Function):
    """Rows to the sums at their tokens; gradients go forth."""

    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, exchanges: GradientExchanges, route: GradientRoute) -> torch.Tensor:
        ctx.exchanges, ctx.route = exchanges, route
        return exchanges.send_home(rows_RH, None, route)[0]

    @staticmethod
    @differentiable_once("a MoELayer of several ranks")
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.exchanges.send_gradients(grad_TH, ctx.route), None, None
