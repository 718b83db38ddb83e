"""Several ranks of an expert-parallel layer in one process and on one device, each on a stream of its own.

So the kernels' own cost can be measured without links, and their results checked. Every kernel is launched for all ranks
before the next one is: the first launch of a kernel loads it, which waits for the device, and a rank that waits for one
whose kernel is not even loaded would wait for ever.

Legend: T tokens of a rank, K top-k, H hidden, W ranks, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from eplb.peer_memory import virtual_peers
from eplb.planning.placement import Placement
from eplb.relocation.pool import SlotPool
from eplb.relocation.resident import ResidentExperts
from eplb.streams import streams_of
from moe_kernels import count_experts
from moe_kernels.peers.gather_counts import gather_counts
from moe_kernels.peers.meet_peers import meet_peers
from moe_kernels.peers.peers import PeerLayout
from moe_layer.dispatch import Dispatched
from moe_layer.dispatch.one_sided import OneSidedDispatcher
from moe_layer.forward.batch_shares import BatchShares
from moe_layer.forward.executors import choose_replicas, compute_rows
from moe_layer.router import Router
from moe_layer.weights.expert_format import gated_format
from moe_layer.weights.slot_experts import SlotExperts

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sizes:
    """Of a layer and its ranks."""

    num_ranks: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    max_tokens: int
    num_redundant_experts: int = 0
    num_shadow_slots: int = 1
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False


@dataclass
class VirtualRanks:
    """The ranks of one layer.

    Args:
        placement, shares_WS: where experts are, `Placement.initial()` if None.
        sums, timeout: as in `OneSidedDispatcher`.
        batch_shares: None: those of the table.
        experts_of: other ranks whose experts and streams are shared.
    """

    sizes: Sizes
    device: torch.device
    seed: int = 0
    placement: Placement | None = None
    shares_WS: np.ndarray | None = None
    sums: str = "fixed_order"
    timeout: float = 30.0
    experts_of: VirtualRanks | None = None
    batch_shares: BatchShares | None = None
    experts: list[SlotExperts] = field(init=False)
    dispatchers: list[OneSidedDispatcher] = field(init=False)
    router: Router = field(init=False)
    streams: list[torch.cuda.Stream | None] = field(init=False)

    def __post_init__(self) -> None:
        sizes, device = self.sizes, self.device
        format = gated_format(sizes.hidden_size, sizes.intermediate_size, sizes.dtype, "silu")
        num_lanes = (sizes.num_experts + sizes.num_redundant_experts) // sizes.num_ranks + sizes.num_shadow_slots
        self.layout = PeerLayout(
            num_ranks=sizes.num_ranks,
            num_lanes=num_lanes,
            num_experts=sizes.num_experts,
            max_tokens=sizes.max_tokens,
            top_k=sizes.top_k,
            hidden_size=sizes.hidden_size,
            dtype=sizes.dtype,
            fp8=sizes.fp8,
        )
        memories = virtual_peers(sizes.num_ranks, self.layout.num_bytes, device)
        self.dispatchers = [OneSidedDispatcher(memory, self.layout, self.timeout, self.sums) for memory in memories]
        if self.experts_of is not None:
            other = self.experts_of
            self.experts, self.router, self.streams = other.experts, other.router, other.streams
            return
        self.experts = []
        for rank in range(sizes.num_ranks):
            resident = ResidentExperts(
                num_experts=sizes.num_experts,
                num_redundant_experts=sizes.num_redundant_experts,
                num_shadow_slots=sizes.num_shadow_slots,
                rank=rank,
                num_ranks=sizes.num_ranks,
                pool=SlotPool(format.specs, num_lanes, device),
                streams=streams_of(device),
                placement=self.placement,
                shares_WS=self.shares_WS,
            )
            experts = SlotExperts(format, resident, None, "triton")
            experts.reset_parameters(self.seed)
            self.experts.append(experts)
        self.router = Router(
            sizes.hidden_size, sizes.num_experts, sizes.top_k, "softmax_renormalized", "triton",
            trainable=False, device=device, layer_dtype=sizes.dtype, dtype=None,
        )  # fmt: skip
        is_cuda = device.type == "cuda"
        self.streams = [torch.cuda.Stream(device) if is_cuda else None for _ in self.experts]

    def on(self, rank: int) -> AbstractContextManager[object]:
        """The rank's stream is the current one."""
        stream = self.streams[rank]
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def all(self, run: Callable[[int], Result]) -> list[Result]:
        """`run` of each rank, on its stream."""
        results = []
        for rank in range(self.sizes.num_ranks):
            with self.on(rank):
                results.append(run(rank))
        return results

    def fork(self) -> None:
        """The ranks' streams begin behind the current one."""
        for stream in self.streams:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(self.device))

    def join(self) -> None:
        """The current stream goes on when all ranks' have come here."""
        for stream in self.streams:
            if stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)

    @torch.no_grad()
    def choose(self, logits_WTE: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """weights_TK and ids_TK of each rank."""
        return self.all(lambda rank: self.router.choose(logits_WTE[rank], None))

    @torch.no_grad()
    def forward(
        self,
        x_WTH: Sequence[torch.Tensor],
        chosen: Sequence[tuple[torch.Tensor, torch.Tensor]],
        bound: int | None = None,
    ) -> list[torch.Tensor]:
        """y_TH of each rank, on the ranks' streams; `fork()` before and `join()` after.

        Args:
            chosen: weights_TK (float32) and ids_TK (int32) of each rank.
        """
        sizes = self.sizes
        lanes = self.choose_lanes([ids_TK for _, ids_TK in chosen])

        def send(rank: int) -> Dispatched:
            lanes_TK, counts_L = lanes[rank]
            return self.dispatchers[rank].dispatch(x_WTH[rank], chosen[rank][0], lanes_TK, counts_L, "triton", bound)

        sent = self.all(send)
        rows = self.all(lambda rank: compute_rows(self.experts[rank], sent[rank], sizes.top_k))
        return self.finish(rows, sent, [lanes_TK for lanes_TK, _ in lanes])

    def choose_lanes(self, ids: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """lanes_TK and counts_L of each rank."""
        shares = self.batch_shares
        if shares is None:
            return self.all(lambda rank: choose_replicas(self.experts[rank], ids[rank]))
        areas = [dispatcher.area for dispatcher in self.dispatchers]
        counts = self.all(lambda rank: count_experts(ids[rank], self.sizes.num_experts, backend="triton"))
        if self.device.type == "cuda":
            told = self.all(lambda rank: gather_counts(counts[rank], areas[rank]))
        else:
            self.all(lambda rank: gather_counts(counts[rank], areas[rank], waits=False))
            told = self.all(lambda rank: gather_counts(counts[rank], areas[rank], says=False))

        def choose(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            experts = self.experts[rank]
            lanes_TK, counts_L, _ = shares.lanes(experts, experts.table, ids[rank], told[rank])
            return lanes_TK, counts_L

        return self.all(choose)

    def finish(
        self, rows: Sequence[torch.Tensor | None], sent: Sequence[Dispatched], lanes: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The combine of all ranks."""
        # Before any rank waits: to allocate memory, or to load a kernel, may wait for the device.
        outputs = [
            torch.empty((len(lanes_TK), self.sizes.hidden_size), dtype=self.sizes.dtype, device=self.device)
            for lanes_TK in lanes
        ]
        said = self.all(lambda rank: self.dispatchers[rank].send_back(rows[rank], sent[rank]))
        for rank in (rank for rank in range(self.sizes.num_ranks) if not said[rank]):
            with self.on(rank):
                meet_peers(self.dispatchers[rank].area, waits=False)
        return self.all(lambda rank: self.dispatchers[rank].sum_up(sent[rank], lanes[rank], False, outputs[rank]))
