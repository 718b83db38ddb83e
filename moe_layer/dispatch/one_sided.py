"""Forward, dispatch and combine: one-sided, over peer memory. No collective. Without gradients no host sync: CUDA graphs can
capture it.

Legend: T tokens of this rank, K top-k, H hidden, W ranks, S lanes of a rank, B the bound of a forward, N = W · B · K flat rows.
"""

from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from eplb.peer_memory import PeerMemory, connect_peers, over_group
from moe_kernels import TileSchedule, build_schedule
from moe_kernels.peers.combine_home import combine_home
from moe_kernels.peers.expand_rows import expand_rows
from moe_kernels.peers.gather_counts import gather_counts
from moe_kernels.peers.peers import NO_RANK, PeerArea, PeerLayout
from moe_kernels.peers.receive_rows import receive_rows
from moe_kernels.peers.return_rows import return_rows, return_sums
from moe_kernels.peers.send_few_rows import FEW_ROWS, send_few_rows
from moe_kernels.peers.send_rows import ANY_BLOCK_M, send_rows
from moe_kernels.tiles.homes import RowHomes
from moe_layer.arguments import check_choice
from moe_layer.dispatch.all_to_all import AllToAllDispatcher
from moe_layer.dispatch.base import Dispatched, Dispatcher
from moe_layer.dispatch.one_sided_gradients import GradientExchanges, GradientRoute


@dataclass(frozen=True)
class _Route:
    bound: int
    num_lanes: int
    schedules: list[TileSchedule]


class OneSidedDispatcher:
    """Each rank writes what its peers need into their memory, and raises a flag behind it.

    A token's hidden state travels once to each rank that has one of its experts. The down projection writes its rows straight
    to the rank of their token, where they are summed over K in fixed order: the same bits as on one rank.

    All layers of a model share one, and run one after the other, on every rank in the same order: on any streams, but graphs
    are replayed on one. What it holds is sized by `max_tokens`; see `PeerLayout`.

    Forwards that need a gradient, and their backwards, go over the same buffers, by `GradientExchanges`: a step keeps as many
    rows as came. The host waits for the device, so no CUDA graph can capture them. Gradients of hidden states are summed over K
    in the order of the choices, in float32, rounded once: like outputs they do not depend on the placement.

    A rank that waits in vain for a peer goes on after `timeout`, with outputs that mean nothing; from then on no forward waits.
    The next eager forward and `raise_if_failed()` raise it; a controller's `health()` shows it, also where graphs are replayed.
    A backward raises it itself, at its end at the latest. A dispatcher that failed stays so: make a new one.

    Attributes:
        asks_for_gradients: see `Dispatcher`.

    Args:
        memory: of `PeerLayout.num_bytes` or more, zero.
        layout: what the buffers hold.
        timeout: seconds that the device waits for a peer.
        sums: "fixed_order", or "by_rank": what a rank has computed for a token travels summed, which is less, but the output
            then depends on the placement, to rounding. Where a gradient is needed, always in fixed order.
        gradients: what becomes of forwards that need one: "here" (each rank must have a host thread of its own, which waits for
            the others), "refused", or another dispatcher, by which they go.

    Raises:
        ValueError: an argument breaks one of these rules.
    """

    def __init__(
        self,
        memory: PeerMemory,
        layout: PeerLayout,
        timeout: float = 30.0,
        sums: str = "fixed_order",
        gradients: str | Dispatcher = "refused",
    ) -> None:
        check_choice("sums", sums, ("fixed_order", "by_rank"))
        if isinstance(gradients, str):
            check_choice("gradients", gradients, ("here", "refused"), " or a Dispatcher")
        if gradients == "here" and layout.fp8:
            raise ValueError("gradients='here' does not go with rows in fp8, which they could not travel in")
        if memory.size != layout.num_ranks or memory.own.numel() < layout.num_bytes:
            raise ValueError(
                f"memory has {memory.size} ranks and {memory.own.numel()} bytes: the layout needs "
                f"{layout.num_ranks} and {layout.num_bytes}"
            )
        self.max_tokens: int | None = layout.max_tokens
        self.asks_for_gradients = gradients == "here"
        self._memory = memory
        self._layout = layout
        self._timeout = timeout
        self._by_rank = sums == "by_rank"
        self._stream: torch.cuda.Stream | None = None
        self.area = PeerArea(memory.addresses_W, memory.own, memory.rank, layout, timeout)
        self._elsewhere = None if isinstance(gradients, str) else gradients

    @classmethod
    def connect(
        cls,
        group: dist.ProcessGroup,
        num_lanes: int,
        num_experts: int,
        max_tokens: int,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        timeout: float = 30.0,
        sums: str = "fixed_order",
        payload: str = "exact",
        source: str = "auto",
    ) -> "OneSidedDispatcher":
        """One for the ranks of a group. Collective.

        Args:
            num_lanes, num_experts, max_tokens, hidden_size, top_k, dtype: S, E, the largest B, K, H; equal on all ranks.
            device: of this rank's buffer.
            payload: "exact", or "fp8": hidden states travel as e4m3 with a float32 scale for each 128 channels, which is half
                the bytes; for the error see `moe_kernels.peers.expand_rows`. It is the same wherever a row goes, so the output
                does not depend on the placement. From Ada and Hopper on. Forwards that need a gradient go by `all_to_all` then.
            source: of the peer memory, see `eplb.peer_memory.connect_peers`.

        Raises:
            ValueError, RuntimeError: the ranks have no peer memory (as `connect_peers`).
        """
        check_choice("payload", payload, ("exact", "fp8"))
        if payload == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError(f"payload='fp8' needs a GPU that converts to e4m3, from Ada on; {device} does not")
        num_ranks = dist.get_world_size(group)
        sizes = (num_ranks, num_lanes, num_experts, max_tokens, top_k, hidden_size)
        layout = PeerLayout(*sizes, dtype, payload == "fp8")
        rank, exchange = dist.get_rank(group), over_group(group)
        memory = connect_peers(layout.num_bytes, device, rank, exchange, source, group)
        return cls(memory, layout, timeout, sums, AllToAllDispatcher(group, num_lanes) if layout.fp8 else "here")

    def backend(self, device: torch.device) -> str:
        """What moves rows."""
        return "symm_mem"

    def raise_if_failed(self) -> None:
        """Look whether a peer did not come, without waiting for the device.

        Raises:
            TimeoutError: one did not, in some forward until now. Outputs since then mean nothing.
            ValueError: the ranks did different things: other `max_tokens` in a forward, gradients needed on some of them only,
                or forwards and backwards in another order.
        """
        failure = self.why_failed()
        if failure is not None:
            raise (ValueError if self.area.failure() == NO_RANK else TimeoutError)(failure)

    def why_failed(self) -> str | None:
        """What `raise_if_failed` raises, in words; None if all is well. Never blocks."""
        failure = self.area.failure()
        if failure is None:
            return None
        if failure == NO_RANK:
            return (
                "max_tokens must be equal on all ranks in each forward, x or expert_weights must require a gradient on all of "
                "them or on none, and all must run forwards and backwards in the same order; but another rank did otherwise"
            )
        return (
            f"rank {failure} of the ranks that share the experts did not come to a forward within {self._timeout} s. "
            "Outputs since then mean nothing; make the layers anew once all ranks are there"
        )

    def gather_counts(self, counts_E: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        """See `Dispatcher`. The result lasts until the forward is over."""
        if needs_grad and self._elsewhere is not None:
            return self._elsewhere.gather_counts(counts_E, needs_grad)
        self._begin()
        return gather_counts(counts_E, self.area)

    def _begin(self) -> None:
        """Before each exchange: look for failures, and put the current stream behind the one of the exchange before, which used
        the same buffers. (A capture cannot.)"""
        self.raise_if_failed()
        device = self.area.own.device
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _exchanges(self) -> GradientExchanges:
        """Not kept: it refers to this dispatcher, which must go with its last layer."""
        return GradientExchanges(self.area, self._begin_with_gradients, self.raise_if_failed)

    def _begin_with_gradients(self) -> None:
        if self.area.own.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dispatcher='symm_mem' waits for the device where a gradient is needed, so no CUDA graph can capture that "
                "forward: capture it in torch.no_grad(), or run it eagerly"
            )
        self._begin()

    def dispatch(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        backend: str,
        max_tokens: int | None = None,
    ) -> Dispatched:
        """See `Dispatcher`. `max_tokens`: most tokens that any rank has in this forward; None: as many as there may be."""
        layout, area = self._layout, self.area
        bound = layout.max_tokens if max_tokens is None else max_tokens
        if x_TH.requires_grad or weights_TK.requires_grad:
            if self.asks_for_gradients:
                return self._exchanges().dispatch(x_TH, weights_TK, lanes_TK, counts_L, bound, backend)
            if self._elsewhere is None:
                _refuse_gradients()
            return self._elsewhere.dispatch(x_TH, weights_TK, lanes_TK, counts_L, backend)
        self._begin()
        num_lanes = counts_L.numel() // layout.num_ranks
        if lanes_TK.numel() <= FEW_ROWS:
            send_few_rows(x_TH, weights_TK, lanes_TK, counts_L, area, bound)
        else:
            by_lane = build_schedule(lanes_TK.view(-1), counts_L, block_m=ANY_BLOCK_M, backend="triton")
            send_rows(x_TH, weights_TK, lanes_TK, by_lane, area, bound)
        schedules: list[TileSchedule] = []

        num_rows = layout.num_ranks * bound
        if layout.fp8:
            rows_RH = torch.empty((num_rows, layout.hidden_size), dtype=layout.dtype, device=area.own.device)
        else:
            rows_RH = area.part("rows", layout.dtype, num_rows, layout.hidden_size)

        def schedule(block_m: int, extra_m: int) -> TileSchedule:
            schedules.append(
                receive_rows(area, bound, num_lanes, block_m=block_m, extra_m=extra_m, note_here=self._by_rank)
            )
            if layout.fp8:
                expand_rows(rows_RH, area, bound, num_lanes)
            return schedules[0]

        homes = RowHomes(area.results_W, area.part("results", layout.dtype, bound * layout.top_k), bound * layout.top_k)
        return Dispatched(
            rows_RH=rows_RH,
            fanout=layout.top_k,
            row_weights_N=area.part("weights", torch.float32, num_rows * layout.top_k),
            schedule=schedule,
            num_tokens=num_rows,
            homes=None if self._by_rank else homes,
            route=_Route(bound, num_lanes, schedules),
        )

    def combine(
        self, rows_NH: torch.Tensor | None, dispatched: Dispatched, lanes_TK: torch.Tensor, backend: str
    ) -> torch.Tensor:
        """See `Dispatcher`. rows_NH: None if they are home already."""
        if isinstance(dispatched.route, GradientRoute):
            assert rows_NH is not None
            return self._exchanges().combine(rows_NH, dispatched.route)
        if not isinstance(dispatched.route, _Route):
            assert self._elsewhere is not None
            return self._elsewhere.combine(rows_NH, dispatched, lanes_TK, backend)
        has_said = self.send_back(rows_NH, dispatched)
        return self.sum_up(dispatched, lanes_TK, not has_said)

    def send_back(self, rows_NH: torch.Tensor | None, dispatched: Dispatched) -> bool:
        """The part of `combine` before ranks meet. Returns whether it has told the ranks that their rows are there."""
        route: _Route = dispatched.route
        if self._by_rank:
            assert rows_NH is not None
            return_sums(rows_NH, self.area, route.bound, route.num_lanes)
        elif rows_NH is not None:
            return_rows(rows_NH, route.schedules[0], self.area, route.bound)
        return rows_NH is not None

    def sum_up(
        self, dispatched: Dispatched, lanes_TK: torch.Tensor, says: bool = True, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The part of `combine` in which ranks meet; for `says` and `out` see `combine_home`."""
        route: _Route = dispatched.route
        return combine_home(lanes_TK, self.area, route.num_lanes, by_rank=self._by_rank, says=says, out=out)


def _refuse_gradients() -> NoReturn:
    raise ValueError(
        "this dispatcher moves no gradients, but x or expert_weights requires one: run the layer in torch.no_grad(), or "
        "connect the dispatcher over a process group"
    )


_shared: WeakValueDictionary[tuple[object, ...], OneSidedDispatcher] = WeakValueDictionary()


def one_sided_of(group: dist.ProcessGroup, *sizes: Any) -> OneSidedDispatcher:
    """`OneSidedDispatcher.connect(group, *sizes)`, the same one for all layers of the same sizes. Collective."""
    key = (id(group), *sizes)
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = OneSidedDispatcher.connect(group, *sizes)
    return found
