"""Rebalance, fill → publish → grace: `WaveFill`, one wave on one rank, from taking its slots to their release."""

from collections.abc import Callable, Sequence

import numpy as np

from eplb.planning.placement import EMPTY
from eplb.planning.plan import LayerUpdate, Moves, Wave
from eplb.relocation.communicator.base import Awaited, Communicator, Transfer, TransferBatch
from eplb.relocation.events import CpuGpuEvent
from eplb.relocation.handoff import Handoff
from eplb.relocation.pool import SlotHold, SlotPool
from eplb.relocation.resident import ResidentExperts
from eplb.relocation.table import ExpertTable, map_lanes, stage
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
        self._finished: CpuGpuEvent | None = None
        self._words: list[np.ndarray] | None = None
        self._agreed_to_start = False
        self._started = False
        self._abandoned = False
        self.num_moves = 0
        self.num_bytes = 0
        try:
            self._versions: list[tuple[ResidentExperts, Version]] = []
            transfers: list[Transfer] = []
            entries: list[tuple[ExpertTable, np.ndarray, np.ndarray]] = []
            taken = self._take_slots(layers)
            for update in self.updates:
                layer = layers[update.layer]
                lanes, slots = self._next_version(update, layer, taken, transfers)
                entries.append((layer.table, lanes, slots))
            breathe()
            self._batch: TransferBatch = communicator.prepare(transfers)
            breathe()
            map_lanes(entries, streams.side)
        except BaseException:
            self._end_holds()
            raise

    def _take_slots(self, layers: Sequence[ResidentExperts]) -> dict[SlotPool, list[int]]:
        """All that this rank needs of each pool at once: a look at a pool costs as much as its slots. The first one last."""
        needed: dict[SlotPool, int] = {}
        for update in self.updates:
            layer = layers[update.layer]
            dst_rank_M = Moves.of(update.moves).columns_5M[3]
            needed[layer.pool] = needed.get(layer.pool, 0) + int((dst_rank_M == layer.rank).sum())
        self._holds = {pool: pool.hold() for pool in needed}
        taken = {}
        for pool, count in needed.items():
            self._breathe()
            taken[pool] = self._holds[pool].take_many(count)[::-1]
        return taken

    def _next_version(
        self,
        update: LayerUpdate,
        layer: ResidentExperts,
        taken: dict[SlotPool, list[int]],
        transfers: list[Transfer],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add the layer's next version to `_versions`, and its transfers; returns the lanes to fill here and their slots.

        No loop in Python over moves but the last: it would hold the interpreter.
        """
        self._breathe()
        if update.placement.num_experts != layer.num_experts:
            raise ValueError(
                f"the placement of layer {update.layer} has {update.placement.num_experts} experts: must be {layer.num_experts}"
            )
        moves, old, pool = Moves.of(update.moves), layer.newest, layer.pool
        expert_M, src_rank_M, src_lane_M, dst_rank_M, dst_lane_M = moves.columns_5M
        wrong_M = old.placement.lanes_WS[src_rank_M, src_lane_M] != expert_M
        if wrong_M.any():
            raise ValueError(
                f"{moves[int(wrong_M.argmax())]} of layer {update.layer} reads a lane that does not hold the expert"
            )
        for one in layer.versions.ungraced:
            named_M = one.placement.lanes_WS[dst_rank_M, dst_lane_M] != EMPTY
            if named_M.any():
                raise ValueError(
                    f"{moves[int(named_M.argmax())]} of layer {update.layer} writes a lane that a table names"
                )
        self.num_moves += len(moves)
        self.num_bytes += len(moves) * pool.slot_bytes
        is_read_M, is_written_M = src_rank_M == layer.rank, dst_rank_M == layer.rank
        lanes, count = dst_lane_M[is_written_M], int(is_written_M.sum())
        slots = np.array([taken[pool].pop() for _ in range(count)], dtype=np.int64)
        slots_S = old.slot_of_lane_S.copy()
        slots_S[lanes] = slots
        # The rank at the other end is this one if both ends are here.
        source_M = np.where(is_read_M, old.slot_of_lane_S[np.where(is_read_M, src_lane_M, 0)], -1)
        target_M = np.where(is_written_M, slots_S[np.where(is_written_M, dst_lane_M, 0)], -1)
        peer_M = np.where(is_read_M, dst_rank_M, src_rank_M)
        self._holds[pool].read_many(source_M[is_read_M].tolist())
        here_M, slabs = is_read_M | is_written_M, [*pool.list_slabs(), None]
        self._breathe()
        ends = zip(*(column[here_M].tolist() for column in (source_M, target_M, peer_M)), strict=True)
        transfers += [Transfer(slabs[source], slabs[target], peer) for source, target, peer in ends]
        if pool.has_dropped_layers:
            pool.has_dropped_layers = False
            self._streams.gate.join(self._streams.side)
        is_held_S = update.placement.lanes_WS[layer.rank] != EMPTY
        slots_S[~is_held_S] = -1
        if (slots_S[is_held_S] < 0).any():
            raise ValueError(f"the placement of layer {update.layer} names a lane that no move fills")
        new = Version(self.version, update.placement, update.shares_WS, tuple(slots_S.tolist()))
        self._versions.append((layer, new))
        return lanes, slots

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

    @property
    def awaits(self) -> Awaited | None:
        """What `poll()` or `bury()` must ask for, None if nothing."""
        if self._abandoned:
            return Awaited.STEP
        return self._batch.awaits if self._started and not self.is_filled else None

    def poll(self) -> bool:
        """Push the transfers on; True when this host has seen all of the wave's work on this rank complete, its tables too."""
        if self._finished is None:
            is_over = self._batch.poll()
            if self._words is None and (is_over or self._batch.is_under_way):
                # Beside the copies: behind them every rank waits for the next table.
                self._words = [self._words_of(update) for update in self.updates]
            if not is_over:
                return False
            assert self._words is not None
            # The new tables, beside the current ones: what was staged there before has been flipped, and graced by all ranks.
            stage([layer.table for layer, _ in self._versions], self._words, self._streams.side)
            self._finished = self._behind_all()
        if not self._finished.query():
            return False
        self.is_filled = True
        return True

    def hand_over(self) -> Handoff:
        """The new tables, which are on the device."""
        assert self._finished is not None and self.is_filled
        return Handoff(self.version, self._versions)

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
            self._finished = self._behind_all()
        if not self._finished.query():
            return False
        self._end_holds()
        return True

    def _behind_all(self) -> CpuGpuEvent:
        """Recorded behind all that the side stream does for the wave: slabs, the lanes' entries, tables."""
        event = CpuGpuEvent()
        event.record(self._streams.side)
        return event

    def _words_of(self, update: LayerUpdate) -> np.ndarray:
        if update.table is None:
            self._breathe()
        return update.table_words()

    def _end_holds(self) -> None:
        for hold in self._holds.values():
            hold.end()
