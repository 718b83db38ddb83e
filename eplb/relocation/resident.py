"""`ResidentExperts`: one layer's share of one rank: its slots, lanes, table and load counters."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from eplb.planning.placement import Placement
from eplb.planning.shares import equal_shares
from eplb.relocation.pool import SlotPool, SlotState
from eplb.relocation.table import ExpertTable
from eplb.streams import DeviceStreams, EventLike, StreamLike


class Pin:
    """Keeps a table version ungraced while a backward that will read its slots is pending (I3).

    Held by the autograd graph; it lets go when the graph is freed.
    """

    def __init__(self, owner: "ResidentExperts", version: int) -> None:
        self._owner = owner
        self._held = True
        self.version = version

    def used_on(self, stream: StreamLike) -> None:
        """A backward under this version has been enqueued on `stream` so far."""
        self._owner._pin_events.append((self.version, stream.record_event()))

    def release(self) -> None:
        """Nothing more is enqueued under this version; what was, on the calling thread's stream, may still run."""
        if self._held:
            self._held = False
            self.used_on(self._owner.streams.current())
            self._owner._dropped_pins.append(self.version)

    def __del__(self) -> None:
        if self._held:
            self._owner._dropped_pins.append(self.version)


class ResidentExperts:
    """What the forward of one MoE layer reads on this rank, and what the rebalancer changes.

    A layer makes one, reads `table` and `load_E` in its forward and calls `note_stream()` and `pin()` there. Everything
    else belongs to the controller that it is registered with.

    Args:
        num_experts: E, logical experts.
        num_redundant_experts: physical experts beyond one per logical expert, over all ranks.
        num_shadow_slots: lanes of a rank beyond its physical experts, so how many experts of this layer one wave may
            replace on a rank; the pool must have free slots for them.
        rank, num_ranks: of the group that the experts are spread over.
        placement: what to begin with; `Placement.initial()` if None.
        pool: the slots; may be shared with other layers. This layer reserves its live ones here.

    Attributes:
        load_E: int64 ``[E]``: tokens routed to each logical expert by this rank since the start; only ever grows.
        load_increment_1: int64 ``[1]``: what one token adds to it: 0 while warm-up is not to be counted.
        lane_slots: pool slot of each lane of this rank, -1 for an empty lane; host copy.
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
        self.table = ExpertTable(placement, equal_shares(placement), streams)
        self.load_E = torch.zeros(num_experts, dtype=torch.int64, device=streams.device)
        self.load_increment_1 = torch.ones(1, dtype=torch.int64, device=streams.device)
        slots = iter(pool.reserve(num_physical))
        self.lane_slots = [next(slots) if expert >= 0 else -1 for expert in placement.lanes_WS[rank].tolist()]
        self.table.lane_to_slot_S.copy_(torch.tensor(self.lane_slots, dtype=torch.int32, device="cpu"))
        self.controller: Any = None
        self.quiesced: Callable[[], AbstractContextManager[None]] = nullcontext
        self._streams_seen: dict[int, StreamLike] = {}
        self._lock = threading.Lock()
        self._pins: dict[int, int] = {}
        # Deques, because a pin may die inside any allocation, also one made under the lock: appending takes none.
        self._dropped_pins: deque[int] = deque()
        self._pin_events: deque[tuple[int, EventLike]] = deque()
        self._running: list[tuple[int, EventLike]] = []

    @torch.no_grad()
    def copied_to(self, pool: SlotPool, streams: DeviceStreams) -> "ResidentExperts":
        """The same experts in the same places, with the same shares and counters, in slots of another pool.

        Not registered with any controller, whatever this one is. The pools' tensors may differ in dtype and device.
        """
        copy = ResidentExperts(
            num_experts=self.num_experts,
            num_redundant_experts=self.num_redundant_experts,
            num_shadow_slots=self.num_shadow_slots,
            rank=self.rank,
            num_ranks=self.num_ranks,
            pool=pool,
            streams=streams,
            placement=self.table.placement,
        )
        copy.table.copy_from(self.table)
        copy.load_E.copy_(self.load_E)
        for lane, slot in enumerate(copy.lane_slots):
            if slot >= 0:
                for name, tensor in pool.tensors.items():
                    tensor[slot].copy_(self.pool.tensors[name][self.lane_slots[lane]])
        return copy

    @property
    def num_lanes(self) -> int:
        return self.num_physical_per_rank + self.num_shadow_slots

    def live_slots(self) -> dict[int, list[int]]:
        """The pool slots on this rank that hold each logical expert under the current table."""
        slots: dict[int, list[int]] = {}
        for lane, expert in enumerate(self.table.placement.lanes_WS[self.rank].tolist()):
            if expert >= 0:
                slots.setdefault(expert, []).append(self.lane_slots[lane])
        return slots

    def retiring_slots(self) -> dict[int, int]:
        """Those that hold an expert which the last flip took away, and that nobody may write yet."""
        lanes = enumerate(self.table.previous.lanes_WS[self.rank].tolist())
        held = {expert: self.lane_slots[lane] for lane, expert in lanes if expert >= 0}
        return {e: slot for e, slot in held.items() if slot >= 0 and self.pool.state(slot) is SlotState.RETIRING}

    def release_retired(self) -> None:
        """Free what a controller that was closed in grace has left. No version but the current one may be in use anywhere."""
        for lane, expert in enumerate(self.table.placement.lanes_WS[self.rank].tolist()):
            slot = self.lane_slots[lane]
            if expert < 0 <= slot and self.pool.state(slot) is SlotState.RETIRING:
                self.lane_slots[lane] = -1
                self.pool.release([slot])

    def note_stream(self) -> None:
        """The calling thread's current stream runs a forward: a flip must be ordered against it.

        Not so a stream that is being captured: what runs is the graph, wherever it is replayed.
        """
        handle = self.streams.current_handle()
        if handle not in self._streams_seen and not self.streams.is_capturing():
            self._streams_seen[handle] = self.streams.current()

    @contextmanager
    def choice(self) -> Iterator[Pin]:
        """Around what reads the table: the version cannot change inside; the pin keeps it until released."""
        self.note_stream()
        yield self.pin()

    def streams_seen(self) -> Sequence[StreamLike]:
        return list(self._streams_seen.values())

    def pin(self) -> Pin:
        """Keep every slot of the current version as it is until the returned object is freed."""
        version = self.table.version
        with self._lock:
            if not self.streams.is_capturing():
                self._drain()  # here too, or pins would pile up where nothing is ever relocated
            self._pins[version] = self._pins.get(version, 0) + 1
        return Pin(self, version)

    def is_pinned_before(self, version: int) -> bool:
        """Whether a backward under a version older than `version` is pending or still running on the device."""
        with self._lock:
            self._drain()
            return any(at < version for at in self._pins) or any(at < version for at, _ in self._running)

    def _drain(self) -> None:
        while self._dropped_pins:
            dropped = self._dropped_pins.popleft()
            self._pins[dropped] -= 1
            if not self._pins[dropped]:
                del self._pins[dropped]
        # After the dropped pins: what they used was noted before they were dropped.
        while self._pin_events:
            self._running.append(self._pin_events.popleft())
        self._running = [used for used in self._running if not used[1].query()]
