"""Rebalance, fill → publish → grace: `WaveFill`, one wave on one rank, from taking its slots to their release."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from eplb.gate import EventLike
from eplb.planning.plan import LayerUpdate, Wave
from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch
from eplb.relocation.handoff import Handoff
from eplb.relocation.pool import SlotHold, SlotPool
from eplb.relocation.resident import ResidentExperts
from eplb.relocation.table import map_lanes, stage
from eplb.relocation.versions import Version
from eplb.streams import DeviceStreams


class WaveFill:
    """Takes the slots and buffers of a wave, fills the slots, and makes the layers' next versions of them.

    Making one either succeeds or leaves everything as it was.

    Args:
        wave: the wave.
        version: that it will be published as.
        attempt: proposal and wave index; unlike the version, no other wave has them.
        layers: all registered layers; the wave's updates name them by index.
        breathe: called between pieces of work that each hold the interpreter for a moment.

    Raises:
        NoFreeSlot: no slot is free for a move now.
        ValueError: the wave does not fit what is published.
    """

    def __init__(
        self,
        wave: Wave,
        version: int,
        attempt: tuple[int, int],
        layers: Sequence[ResidentExperts],
        communicator: Communicator,
        streams: DeviceStreams,
        breathe: Callable[[], None] = lambda: None,
    ) -> None:
        self._breathe = breathe
        self.version = version
        self.attempt = attempt
        self.is_filled = False
        self.updates: tuple[LayerUpdate, ...] = wave.updates
        self._streams = streams
        self._holds: dict[SlotPool, SlotHold] = {}
        self._finished: EventLike | None = None
        self._agreed_to_start = False
        self._started = False
        self._abandoned = False
        self.num_moves = 0
        self.num_bytes = 0
        try:
            transfers: list[Transfer] = []
            taken = self._take_slots(layers)
            self._versions = [
                (layers[update.layer], self._next_version(update, layers[update.layer], taken, transfers))
                for update in self.updates
            ]
            self._batch: TransferBatch = communicator.prepare(transfers)
            breathe()
            map_lanes(
                [
                    (layers[update.layer].table, move.dst_lane, new.slots_S[move.dst_lane])
                    for update, (layer, new) in zip(self.updates, self._versions, strict=True)
                    for move in update.moves
                    if move.dst_rank == layer.rank
                ],
                streams.side,
            )
        except BaseException:
            self._end_holds()
            raise

    def _take_slots(self, layers: Sequence[ResidentExperts]) -> dict[SlotPool, Iterator[int]]:
        """All that this rank needs of each pool at once: a look at a pool costs as much as its slots."""
        needed: dict[SlotPool, int] = {}
        for update in self.updates:
            layer = layers[update.layer]
            count = sum(move.dst_rank == layer.rank for move in update.moves)
            needed[layer.pool] = needed.get(layer.pool, 0) + count
        self._holds = {pool: pool.hold() for pool in needed}
        taken = {}
        for pool, count in needed.items():
            taken[pool] = iter(self._holds[pool].take_many(count))
            self._breathe()
        return taken

    def _next_version(
        self,
        update: LayerUpdate,
        layer: ResidentExperts,
        taken: dict[SlotPool, Iterator[int]],
        transfers: list[Transfer],
    ) -> Version:
        self._breathe()
        if update.placement.num_experts != layer.num_experts:
            raise ValueError(
                f"the placement of layer {update.layer} has {update.placement.num_experts} experts: must be {layer.num_experts}"
            )
        old, slots = layer.newest, list(layer.newest.slots_S)
        hold = self._holds[layer.pool]
        for move in update.moves:
            if old.placement.lanes_WS[move.src_rank, move.src_lane] != move.expert:
                raise ValueError(f"{move} of layer {update.layer} reads a lane that does not hold the expert")
            if any(one.placement.lanes_WS[move.dst_rank, move.dst_lane] != -1 for one in layer.versions.ungraced):
                raise ValueError(f"{move} of layer {update.layer} writes a lane that a table names")
            self._breathe()
            self.num_moves += 1
            self.num_bytes += layer.pool.slot_bytes
            source = target = None
            if move.src_rank == layer.rank:
                hold.read(old.slots_S[move.src_lane])
                source = layer.pool.slab(old.slots_S[move.src_lane])
            if move.dst_rank == layer.rank:
                slots[move.dst_lane] = next(taken[layer.pool])
                target = layer.pool.slab(slots[move.dst_lane])
            if source is not None or target is not None:
                peer = move.src_rank if source is None else move.dst_rank
                transfers.append(Transfer(source, target, peer))
        if layer.pool.has_dropped_layers:
            layer.pool.has_dropped_layers = False
            self._streams.gate.join(self._streams.side)
        held = update.placement.lanes_WS[layer.rank].tolist()
        slots_S = tuple(slot if expert >= 0 else -1 for expert, slot in zip(held, slots, strict=True))
        if any(expert >= 0 > slot for expert, slot in zip(held, slots_S, strict=True)):
            raise ValueError(f"the placement of layer {update.layer} names a lane that no move fills")
        return Version(self.version, update.placement, update.shares_WS, slots_S)

    def agree_to_start(self) -> None:
        """Every rank has prepared the wave: from here on this rank owes the others its part in the transfers."""
        self._agreed_to_start = True

    def start(self) -> None:
        """Begin the transfers."""
        self._started = True
        self._batch.start()
        self._breathe()
        # Before they are needed: `stage()` comes when every rank waits for the next table.
        self._words = [self._words_of(update) for update in self.updates]

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
        self.is_filled = True
        return True

    def stage(self) -> Handoff:
        """Upload the new tables beside the current ones. May be called again if it raised."""
        handoff = Handoff(self.version, self._versions)
        stage([layer.table for layer, _ in self._versions], self._words, self._streams.side)
        handoff.staged.record(self._streams.side)
        return handoff

    def publish(self) -> None:
        """From now on the layers' newest versions name the wave's slots; the transfers are over."""
        for layer, new in self._versions:
            layer.versions.publish(new)
        self._end_holds()

    def release(self) -> None:
        """Grace is over on all ranks: nothing older is in use."""
        for layer, new in self._versions:
            layer.versions.grace_before(new.number)

    def abandon(self) -> None:
        """The wave is given up before it was published: nobody may use its slots until `bury()` says so."""
        self._abandoned = True
        for hold in self._holds.values():
            hold.is_abandoned = True

    def bury(self) -> bool:
        """Free the slots of an abandoned wave if nothing can touch them any more; whether that is so."""
        assert self._abandoned
        if self._agreed_to_start and not self._batch.is_dead():
            return False
        if self._finished is None:
            self._finished = self._streams.side.record_event()
        if not self._finished.query():
            return False
        self._end_holds()
        return True

    def _words_of(self, update: LayerUpdate) -> np.ndarray:
        if update.table is None:
            self._breathe()
        return update.table_words()

    def _end_holds(self) -> None:
        for hold in self._holds.values():
            hold.end()
