"""`FixedExperts`: the lanes, table and load counter of a trainable layer, whose experts never move.

Legend: E logical experts, S experts of this rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from eplb.streams import DeviceStreams, streams_of
from moe_kernels import SHARE_BITS


class FixedTable:
    """The identity: expert e is on lane e, and lane s of a rank reads row s of its parameters. As `ExpertTable` has it."""

    version = 0

    def __init__(self, num_experts: int, num_lanes: int, device: torch.device) -> None:
        self.offsets_E1 = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
        self.lanes_P = torch.arange(num_experts, dtype=torch.int32, device=device)
        self.cumulative_P = torch.full((num_experts,), 2**SHARE_BITS, dtype=torch.int32, device=device)
        self.lane_to_slot_S = torch.arange(num_lanes, dtype=torch.int32, device=device)


class _NoPin(nullcontext[Any]):
    """There is one version, and nothing ends it."""

    def __enter__(self) -> "_NoPin":
        return self

    def release(self) -> None:
        pass


_NO_PIN = _NoPin()


class FixedExperts:
    """What the executors read of `ResidentExperts`, for a trainable layer: rank r has the experts r · E/W to (r + 1) · E/W.

    Attributes:
        load_E: int64 ``[E]``: tokens routed to each logical expert by this rank; only ever grows.
        load_increment_1: int64 ``[1]``: what one token adds to it.
        controller: None. Such a layer cannot be registered.
    """

    num_redundant_experts = 0
    num_shadow_slots = 0
    controller: Any = None
    quiesced: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)

    def __init__(self, num_experts: int, rank: int, num_ranks: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self.rank = rank
        self.num_ranks = num_ranks
        self.num_physical_per_rank = self.num_lanes = num_experts // num_ranks
        self._place(device, torch.zeros(num_experts, dtype=torch.int64, device=device))

    def _place(self, device: torch.device, load_E: torch.Tensor) -> None:
        self.streams: DeviceStreams = streams_of(device)
        self.table = FixedTable(self.num_experts, self.num_lanes, device)
        self.load_E = load_E
        self.load_increment_1 = torch.ones(1, dtype=torch.int64, device=device)

    def moved_to(self, device: torch.device) -> "FixedExperts":
        """The same on another device, with a counter of its own."""
        other = FixedExperts(self.num_experts, self.rank, self.num_ranks, device)
        other.load_E.copy_(self.load_E)
        return other

    @property
    def experts(self) -> range:
        """The logical experts of this rank."""
        return range(self.rank * self.num_lanes, (self.rank + 1) * self.num_lanes)

    def live_slots(self) -> dict[int, list[int]]:
        """The row of the parameters that holds each expert of this rank."""
        return {expert: [row] for row, expert in enumerate(self.experts)}

    def choice(self) -> _NoPin:
        return _NO_PIN
