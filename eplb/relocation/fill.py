"""`WaveFill`: one wave on one rank, from taking its slots to freeing those it replaced."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Wave
from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch
from eplb.relocation.events import CpuGpuEvent
from eplb.relocation.pool import SlotPool
from eplb.relocation.resident import ResidentExperts
from eplb.streams import DeviceStreams, EventLike


@dataclass(eq=False)
class Handoff:
    """A published version on its way to the main thread.

    Attributes:
        version: what the tables' version becomes.
        layers: whose tables to flip.
        staged: recorded on the side stream behind the upload of the tables; one wait consumes it.
        uploaded: the side stream's event for it, for a flip that has to be tried again.
        flipped: the compute stream's event behind the flip, once the main thread has enqueued it.
    """

    version: int
    layers: list[ResidentExperts]
    staged: CpuGpuEvent = field(default_factory=CpuGpuEvent)
    uploaded: Any = None
    flipped: Any = None


@dataclass(frozen=True)
class _Target:
    layer: ResidentExperts
    lane: int
    slot: int


class WaveFill:
    """Takes the slots and buffers of a wave, fills, publishes and releases them.

    Making one either succeeds or leaves everything as it was.

    Args:
        wave: the wave.
        version: that it will be published as.
        attempt: proposal and wave index; unlike the version, no other wave has them.
        layers: all registered layers; the wave's updates name them by index.
        placements: the newest published placement of each.

    Raises:
        RuntimeError: no slot is free for a move.
        ValueError: the wave does not fit what is published.
    """

    def __init__(
        self,
        wave: Wave,
        version: int,
        attempt: tuple[int, int],
        layers: Sequence[ResidentExperts],
        placements: Sequence[Placement],
        communicator: Communicator,
        streams: DeviceStreams,
    ) -> None:
        self.version = version
        self.attempt = attempt
        self.is_filled = False
        self.updates: tuple[LayerUpdate, ...] = wave.updates
        self._layers = layers
        self._streams = streams
        self._old = [placements[update.layer] for update in wave.updates]
        self._targets: list[_Target] = []
        self._sources: list[tuple[SlotPool, int]] = []
        self._finished: EventLike | None = None
        self._agreed_to_start = False
        self._started = False
        self._reading = False
        self._abandoned = False
        self.num_moves = 0
        self.num_bytes = 0
        try:
            transfers = [
                transfer
                for update, old in zip(self.updates, self._old, strict=True)
                for transfer in self._transfers(update, old)
            ]
            self._batch: TransferBatch = communicator.prepare(transfers)
            for layer, lane, slot in ((target.layer, target.lane, target.slot) for target in self._targets):
                layer.table.map_lane(lane, slot, streams.side)
                layer.lane_slots[lane] = slot
        except BaseException:
            self._give_back_targets()
            raise
        for pool, slot in self._sources:
            pool.begin_read([slot])
        self._reading = True

    def _transfers(self, update: LayerUpdate, old: Placement) -> list[Transfer]:
        layer = self._layers[update.layer]
        transfers = []
        for move in update.moves:
            if old.lanes_WS[move.src_rank, move.src_lane] != move.expert:
                raise ValueError(f"{move} of layer {update.layer} reads a lane that does not hold the expert")
            if old.lanes_WS[move.dst_rank, move.dst_lane] != -1:
                raise ValueError(f"{move} of layer {update.layer} writes a lane that a table names")
            self.num_moves += 1
            self.num_bytes += layer.pool.slot_bytes
            source = target = None
            if move.src_rank == layer.rank:
                slot = layer.lane_slots[move.src_lane]
                self._sources.append((layer.pool, slot))
                source = layer.pool.slab(slot)
            if move.dst_rank == layer.rank:
                slot = layer.pool.allocate()
                self._targets.append(_Target(layer, move.dst_lane, slot))
                target = layer.pool.slab(slot)
            if source is not None or target is not None:
                peer = move.src_rank if source is None else move.dst_rank
                transfers.append(Transfer(source, target, peer))
        return transfers

    def agree_to_start(self) -> None:
        """Every rank has prepared the wave: from here on this rank owes the others its part in the transfers."""
        self._agreed_to_start = True

    def start(self) -> None:
        """Begin the transfers."""
        self._started = True
        self._batch.start()

    @property
    def is_started(self) -> bool:
        return self._started

    def poll(self) -> bool:
        """Push the transfers on; True when this host has seen all of the wave's work on this rank complete."""
        if self._finished is None:
            if not self._batch.poll():
                return False
            # Behind the lanes' entries too, which the side stream wrote.
            self._finished = self._streams.side.record_event()
        if not self._finished.query():
            return False
        self._end_reads()
        self.is_filled = True
        return True

    def stage(self) -> Handoff:
        """Upload the new tables beside the current ones. May be called again if it raised."""
        handoff = Handoff(self.version, [self._layers[update.layer] for update in self.updates])
        for update, layer in zip(self.updates, handoff.layers, strict=True):
            layer.table.stage(update.placement, update.shares_WS, self._streams.side)
        handoff.uploaded = self._streams.side.record_event()
        handoff.staged.record(self._streams.side)
        return handoff

    def publish(self) -> None:
        """The wave's slots are live from now on, and those that the new tables drop are retiring."""
        for target in self._targets:
            target.layer.pool.publish([target.slot])
        for layer, lane in self._dropped():
            layer.pool.retire([layer.lane_slots[lane]])

    def release(self) -> None:
        """Grace is over on all ranks: the dropped slots are free."""
        for layer, lane in self._dropped():
            layer.pool.release([layer.lane_slots[lane]])
            layer.lane_slots[lane] = -1

    def abandon(self) -> None:
        """The wave is given up before it was published: nobody may use its slots until `bury()` says so."""
        self._abandoned = True
        self._forget_lanes()
        for target in self._targets:
            target.layer.pool.quarantine([target.slot])

    def bury(self) -> bool:
        """Free the slots of an abandoned wave if nothing can touch them any more; whether that is so."""
        assert self._abandoned
        if self._agreed_to_start and not self._batch.is_dead():
            return False
        if self._finished is None:
            self._finished = self._streams.side.record_event()
        if not self._finished.query():
            return False
        self._end_reads()
        self._give_back_targets()
        return True

    def _dropped(self) -> list[tuple[ResidentExperts, int]]:
        dropped = []
        for update, old in zip(self.updates, self._old, strict=True):
            layer = self._layers[update.layer]
            before, after = old.lanes_WS[layer.rank], update.placement.lanes_WS[layer.rank]
            dropped += [(layer, lane) for lane in range(layer.num_lanes) if before[lane] >= 0 and after[lane] < 0]
        return dropped

    def _end_reads(self) -> None:
        if self._reading:
            self._reading = False
            for pool, slot in self._sources:
                pool.end_read([slot])

    def _give_back_targets(self) -> None:
        self._forget_lanes()
        for target in self._targets:
            target.layer.pool.release([target.slot])
        self._targets = []

    def _forget_lanes(self) -> None:
        """The lanes are empty again; those that a newer wave has taken by now are its own."""
        for target in self._targets:
            if target.layer.lane_slots[target.lane] == target.slot:
                target.layer.lane_slots[target.lane] = -1
