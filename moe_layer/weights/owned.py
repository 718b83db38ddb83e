"""`OwnedExperts`: lanes, table and load counter of a trainable layer, whose weights are parameters of the experts' owners.

An expert's owner is the rank in whose range it is, always. Where it computes, a placement says; it changes between steps.

Legend: E logical experts, W ranks, S lanes of a rank, P physical experts of all ranks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from eplb.planning.placement import Placement
from eplb.planning.shares import cumulative_shares, equal_shares, table_words
from eplb.streams import DeviceStreams, streams_of


class OwnedTable:
    """What `ExpertTable` is to serving layers: it is written between steps, when nothing reads it. Lane s has slot s."""

    version = 0

    def __init__(self, placement: Placement, shares_WS: np.ndarray, device: torch.device) -> None:
        self._num_experts = placement.num_experts
        words = torch.from_numpy(table_words(placement, shares_WS))
        self._words = words.to(device)
        num_physical = (len(words) - self._num_experts - 1) // 2
        self.offsets_E1, self.lanes_P, self.cumulative_P = self._words.split(
            [self._num_experts + 1, num_physical, num_physical]
        )
        self.lane_to_slot_S = torch.arange(placement.num_lanes, dtype=torch.int32, device=device)

    def write(self, placement: Placement, shares_WS: np.ndarray) -> None:
        """Behind what the current stream has to do. At the same addresses, so that CUDA graphs see it."""
        self._words.copy_(torch.from_numpy(table_words(placement, shares_WS)))


class _NoPin(nullcontext[Any]):
    """There is one version at a time, and it ends between steps."""

    def __enter__(self) -> "_NoPin":
        return self

    def release(self) -> None:
        pass


_NO_PIN = _NoPin()


class OwnedExperts:
    """What the executors read of `ResidentExperts`, for a trainable layer: rank r owns the experts r · E/W to (r + 1) · E/W.

    Args:
        num_experts: E; must divide by the ranks.
        num_redundant_experts: physical experts beyond one per logical expert.
        placement, shares_WS: where they compute at first; `Placement.initial()` and equal shares if None.

    Attributes:
        num_owned: E / W.
        placement, shares_WS: where experts compute, and which part of its expert's tokens each lane gets.
        is_at_home: whether each expert computes at its owner, in the order of its parameters, and nowhere else.
        load_E: int64 ``[E]``: tokens routed to each logical expert by this rank; only ever grows.
        load_increment_1: int64 ``[1]``: what one token adds to it.
        controller: None. Such a layer is not registered: `moe_layer.TrainingBalancer` moves its experts, between steps.
    """

    num_shadow_slots = 0
    controller: Any = None
    quiesced: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)

    def __init__(
        self,
        num_experts: int,
        rank: int,
        num_ranks: int,
        device: torch.device,
        num_redundant_experts: int = 0,
        placement: Placement | None = None,
        shares_WS: np.ndarray | None = None,
    ) -> None:
        self.num_experts = num_experts
        self.num_redundant_experts = num_redundant_experts
        self.rank = rank
        self.num_ranks = num_ranks
        self.num_owned = num_experts // num_ranks
        self.num_physical_per_rank = self.num_lanes = (num_experts + num_redundant_experts) // num_ranks
        self._home = Placement.initial(num_experts, num_redundant_experts, num_ranks, self.num_lanes)
        if placement is None or num_ranks == 1:  # one rank reads its parameters, whatever the order of its lanes
            placement, shares_WS = self._home, None
        self._be_at(placement, equal_shares(placement) if shares_WS is None else shares_WS)
        self.streams: DeviceStreams = streams_of(device)
        self.table = OwnedTable(self.placement, self.shares_WS, device)
        self.load_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.load_increment_1 = torch.ones(1, dtype=torch.int64, device=device)

    def moved_to(self, device: torch.device) -> "OwnedExperts":
        """The same on another device, with a counter of its own."""
        sizes = (self.num_experts, self.rank, self.num_ranks, device, self.num_redundant_experts)
        other = OwnedExperts(*sizes, self.placement, self.shares_WS)
        other.load_E.copy_(self.load_E)
        return other

    def check(self, placement: Placement, shares_WS: np.ndarray | None = None) -> None:
        """Raises ValueError if the experts cannot be placed so: sizes, an expert without a replica, or shares."""
        wanted, got = (self._home.lanes_WS.shape, self.num_experts), (placement.lanes_WS.shape, placement.num_experts)
        if got != wanted or (placement.lanes_WS < 0).any():
            raise ValueError(
                f"placement must fill {wanted[0]} lanes (ranks, lanes of a rank) with {wanted[1]} experts, has {got[0]} lanes "
                f"and {got[1]} experts, {int((placement.lanes_WS < 0).sum())} lanes empty"
            )
        placement.validate()
        if shares_WS is not None:
            cumulative_shares(placement, shares_WS)

    def place(self, placement: Placement, shares_WS: np.ndarray | None = None) -> None:
        """From the next forward on experts compute there. Between steps: no forward or backward is under way.

        Raises:
            ValueError: see `check`. Nothing has changed then.
        """
        self.check(placement, shares_WS)
        shares_WS = equal_shares(placement) if shares_WS is None else shares_WS
        self.table.write(placement, shares_WS)
        self._be_at(placement, shares_WS)

    def go_home(self) -> None:
        """To where they are if nothing else is said."""
        self.place(self._home)

    def _be_at(self, placement: Placement, shares_WS: np.ndarray) -> None:
        self.placement, self.shares_WS = placement, shares_WS
        self.is_at_home = not self.num_redundant_experts and placement == self._home

    @property
    def experts(self) -> range:
        """The logical experts that this rank owns."""
        return range(self.rank * self.num_owned, (self.rank + 1) * self.num_owned)

    def live_slots(self) -> dict[int, list[int]]:
        """The row of the parameters that holds each expert of this rank."""
        return {expert: [row] for row, expert in enumerate(self.experts)}

    def choice(self) -> _NoPin:
        return _NO_PIN
