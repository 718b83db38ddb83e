"""All steps of a rebalance: `ResidentExperts`, one layer's versions, slots, table and load counters on one rank."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from eplb.planning.placement import Placement
from eplb.planning.shares import equal_shares
from eplb.relocation.pins import Pin, Pins
from eplb.relocation.pool import SlotPool
from eplb.relocation.table import ExpertTable
from eplb.relocation.versions import Version
from eplb.streams import DeviceStreams


class ResidentExperts:
    """What the forward of one MoE layer reads on this rank, and what the rebalancer changes.

    A layer makes one, and reads `table` and adds to `load_E` inside `choice()`. Everything else belongs to the controller
    that it is registered with.

    Args:
        num_experts: E, logical experts.
        num_redundant_experts: physical experts beyond one per logical expert, over all ranks.
        num_shadow_slots: lanes of a rank beyond its physical experts, so how many experts of this layer one wave may
            replace on a rank; the pool must have free slots for them.
        rank, num_ranks: of the group that the experts are spread over.
        pool: the slots; may be shared with other layers. This layer takes its live ones here.
        placement, shares_WS: what to begin with; `Placement.initial()` if None, and equal shares.

    Attributes:
        load_E: int64 ``[E]``: tokens routed to each logical expert by this rank since the start; only ever grows.
        load_increment_1: int64 ``[1]``: what one token adds to it: 0 while warm-up is not to be counted.
        versions: what its lanes hold, from the oldest version in use to the newest.
        pins: which of them are in use.
        controller: what the layer is registered with, or None.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        num_redundant_experts: int,
        num_shadow_slots: int,
        rank: int,
        num_ranks: int,
        pool: SlotPool,
        streams: DeviceStreams,
        placement: Placement | None = None,
        shares_WS: np.ndarray | None = None,
    ) -> None:
        num_physical = (num_experts + num_redundant_experts) // num_ranks
        if placement is None:
            num_lanes = num_physical + num_shadow_slots
            placement = Placement.initial(num_experts, num_redundant_experts, num_ranks, num_lanes=num_lanes)
        self.num_experts = num_experts
        self.num_redundant_experts = num_redundant_experts
        self.num_shadow_slots = num_shadow_slots
        self.num_physical_per_rank = num_physical
        self.rank = rank
        self.num_ranks = num_ranks
        self.pool = pool
        self.streams = streams
        shares_WS = equal_shares(placement) if shares_WS is None else shares_WS
        # Other layers of the pool have as many experts each, as far as this one knows.
        num_tables = pool.num_slots // max(1, num_physical)
        self.table = ExpertTable(placement, shares_WS, streams, pool.table_words, num_tables)
        self.load_E = torch.zeros(num_experts, dtype=torch.int64, device=streams.device)
        self.load_increment_1 = torch.ones(1, dtype=torch.int64, device=streams.device)
        self.versions = pool.place(placement, shares_WS, rank)
        self.pins = Pins(self.versions, streams.gate)
        streams.gate.join(streams.current())  # forwards of a layer that was dropped may still read the slots
        self.table.map_all(self.current.slots_S)
        self.controller: Any = None
        self.quiesced: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def copied_to(
        self,
        pool: SlotPool,
        streams: DeviceStreams,
        convert: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None,
    ) -> "ResidentExperts":
        """The same experts in the same places, with the same shares and counters, in slots of another pool.

        Not registered with any controller, whatever this one is. The pools' tensors may differ in dtype and device, and in
        what they are: then `convert` makes one expert's new tensors of its old ones. From "meta" there is nothing to copy:
        the new slots stay as they are.
        """
        copy = ResidentExperts(
            num_experts=self.num_experts,
            num_redundant_experts=self.num_redundant_experts,
            num_shadow_slots=self.num_shadow_slots,
            rank=self.rank,
            num_ranks=self.num_ranks,
            pool=pool,
            streams=streams,
            placement=self.current.placement,
            shares_WS=self.current.shares_WS,
        )
        if not self.load_E.is_meta:
            copy.load_E.copy_(self.load_E)
            copy.load_increment_1.copy_(self.load_increment_1)
        if not self.pool.slab_SB.is_meta:
            for new, old in zip(copy.current.slots_S, self.current.slots_S, strict=True):
                if old >= 0:
                    held: Mapping[str, torch.Tensor] = {name: one[old] for name, one in self.pool.tensors.items()}
                    held = held if convert is None else convert(dict(held))
                    for name, tensor in pool.tensors.items():
                        tensor[new].copy_(held[name])
        return copy

    @property
    def current(self) -> Version:
        """The version that was flipped last: what kernels enqueued from now on read."""
        return self.versions.current

    @property
    def newest(self) -> Version:
        """The version that was published last; it may wait to be flipped."""
        return self.versions.newest

    @property
    def num_lanes(self) -> int:
        return self.num_physical_per_rank + self.num_shadow_slots

    def live_slots(self) -> dict[int, list[int]]:
        """The pool slots on this rank that hold each logical expert under the current version."""
        slots: dict[int, list[int]] = {}
        for expert, slot in self._experts(self.current):
            slots.setdefault(expert, []).append(slot)
        return slots

    def retiring_slots(self) -> dict[int, int]:
        """The slots of experts that the last flip took away, and that nobody may write yet."""
        current = self.current
        older = [version for version in self.versions.ungraced if version.number < current.number]
        held = {expert: slot for version in older for expert, slot in self._experts(version)}
        return {expert: slot for expert, slot in held.items() if slot not in current.slots_S}

    def _experts(self, version: Version) -> list[tuple[int, int]]:
        lanes = zip(version.placement.lanes_WS[self.rank].tolist(), version.slots_S, strict=True)
        return [(expert, slot) for expert, slot in lanes if expert >= 0]

    @contextmanager
    def reading(self) -> Iterator[tuple[dict[int, list[int]], dict[int, int]]]:
        """`live_slots()` and `retiring_slots()`, none of which is written inside: for saving experts."""
        with self.streams.gate.lock:  # no flip between the hold and the look
            hold = self.pool.hold(self.versions)
            live, retiring = self.live_slots(), self.retiring_slots()
        try:
            yield live, retiring
        finally:
            # What was read inside may still be on its way on the device.
            self.streams.side.wait_event(self.streams.current().record_event())
            hold.end()

    def release_retired(self) -> None:
        """Free what a controller that was closed in grace has left. No version but the current one may be in use anywhere."""
        self.versions.grace_before(self.current.number)

    # ---- forwards

    def choice(self) -> Pin:
        """``with resident.choice() as pin:`` around whatever reads the table.

        Inside, no table changes, on any thread, and the calling thread's stream is behind the last flip. The pin keeps the
        version until `pin.release()`, or until it is freed.
        """
        return Pin(self.pins)

    def pin(self) -> Pin:
        """Keep the current version until the pin is released or freed. What is chosen later may be a newer version."""
        with self.choice() as pin:
            return pin

    def held_by(self, version: int) -> dict[int, int]:
        """How many forwards and backwards hold each version older than `version`, by its number; empty if none does.

        They are to come, or still run on the device. On the thread that relocates.
        """
        return self.pins.held_by(version)

    def is_pinned_before(self, version: int) -> bool:
        """Whether anything holds a version older than `version`."""
        return bool(self.held_by(version))
