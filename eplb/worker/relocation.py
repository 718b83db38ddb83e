"""Rebalance, fill → publish → grace: `Relocation` runs one wave at a time on one rank, and buries one given up.

All that is done to slots, tables and versions is done through here.
"""

import random
from collections.abc import Callable, Sequence

from eplb.config import EplbConfig
from eplb.planner import Planner
from eplb.planning.plan import Wave
from eplb.relocation.communicator.base import Awaited, Communicator
from eplb.relocation.fill import WaveFill
from eplb.relocation.handoff import Handoff
from eplb.relocation.pool import NoFreeSlot
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.protocol import Agreed, Phase
from eplb.streams import DeviceStreams, EventLike
from eplb.worker.rounds import Clock


class Relocation:
    """Never blocks: each method does what can be done now.

    Args:
        layers: all registered layers, in the same order on every rank.
        earlier: events behind every forward that was enqueued before the controller began.
        jitter: numbers in [0, 1): two controllers that wait for each other's slots must not give up at the same time.

    Attributes:
        breathe: called between pieces of work that each hold the interpreter for a moment.
        fill: the wave under way.
        zombies: waves given up whose transfers may still touch their slots.
        handoff: the version that was published last, until it is graced here.
        published, published_at: the highest version that this rank handed over, and when.
        graced: the highest version of which this rank needs no older one any more.
        wants_slot_since: since when the next wave waits for a slot that another controller holds; None if it does not.
        num_waves, num_flips, num_moves, num_bytes, fill_seconds, grace_seconds: see `Metrics`.
    """

    def __init__(
        self,
        layers: Sequence[ResidentExperts],
        planner: Planner,
        streams: DeviceStreams,
        earlier: Sequence[EventLike],
        config: EplbConfig,
        version: int,
        clock: Clock,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._layers = list(layers)
        self._planner = planner
        self._streams = streams
        self._earlier: Sequence[EventLike] | None = earlier
        self._config = config
        self._clock = clock
        self._jitter = jitter
        self.breathe: Callable[[], None] = lambda: None
        self._patience = 0.0
        self._fill_began_at = 0.0
        self.fill: WaveFill | None = None
        self.zombies: list[WaveFill] = []
        self.handoff: Handoff | None = None
        self.published = version
        self.published_at = clock()
        self.graced = version - 1
        self.wants_slot_since: float | None = None
        self.num_waves = self.num_flips = self.num_moves = self.num_bytes = 0
        self.fill_seconds = self.grace_seconds = 0.0

    def free_slots(self) -> list[int]:
        """Of this rank, by pool."""
        return self._planner.free_slots()

    def num_quarantined(self) -> int:
        """Slots of this rank that a transfer given up may still touch."""
        return sum(pool.num_quarantined() for pool in self._planner.pools)

    @property
    def is_at_rest(self) -> bool:
        """Whether no wave is under way, in grace or waiting to be buried."""
        return self.fill is None and self.handoff is None and not self.zombies

    def stage_of_wave(self) -> tuple[object, ...]:
        """Changes whenever something about the wave does, that this rank can see without asking the device."""
        fill, handoff = self.fill, self.handoff
        filling = None if fill is None else (fill.version, fill.is_started, fill.is_filled)
        flipping = None if handoff is None else (handoff.version, handoff.flipped is not None)
        return filling, flipping, len(self.zombies), self.graced

    def awaits(self) -> Awaited | None:
        """What must be looked for; None if whatever comes next here wakes the worker: a round, or a step that flips."""
        if self.zombies or self.wants_slot_since is not None:
            return Awaited.STEP
        if self.handoff is not None:
            return Awaited.FLIP if self.handoff.flipped is not None else None
        return self.fill.awaits if self.fill is not None else None

    def is_filling(self, agreed: Agreed) -> bool:
        """Whether a wave is under way that was not published."""
        return self.fill is not None and self.fill.version > agreed.version

    # ---- before publication

    def prepare(self, wave: Wave, agreed: Agreed, communicator: Communicator) -> bool:
        """Take the wave's slots and buffers; False if another controller has held a slot for too long.

        A slot that is wanted is a wait, not a failure. To wait without an end could be a deadlock, as each of two controllers
        may hold what the other wants: the wave is given up then, and planned again later.

        Raises:
            Exception: the wave cannot be prepared.
        """
        try:
            self.fill = WaveFill(
                wave,
                agreed.version + 1,
                (agreed.proposal, agreed.wave),
                self._layers,
                communicator,
                self._streams,
                self.breathe,
            )
        except NoFreeSlot:
            now = self._clock()
            if self.wants_slot_since is None:
                self.wants_slot_since = now
                self._patience = self._config.backoff * (0.5 + self._jitter())
            return now - self.wants_slot_since <= self._patience
        self.wants_slot_since = None
        return True

    def agree_to_start(self) -> None:
        """All ranks have prepared the wave."""
        if self.fill is not None:
            self.fill.agree_to_start()

    def push(self) -> None:
        """Start the transfers, or see how far they are.

        Raises:
            TimeoutError: they take too long.
            Exception: one failed.
        """
        fill = self.fill
        if fill is None or fill.is_filled:
            return
        if not fill.is_started:
            self._fill_began_at = self._clock()
            fill.start()
        if fill.poll():
            self.fill_seconds = self._clock() - self._fill_began_at
        elif self._clock() - self._fill_began_at > self._config.transfer_timeout:
            raise TimeoutError(
                f"transfers of version {fill.version} took more than transfer_timeout={self._config.transfer_timeout} s"
            )

    def votes(self, agreed: Agreed) -> tuple[int, int]:
        """The version that this rank has prepared, and the one that it has filled; 0 for none."""
        fill = self.fill
        # Versions of abandoned waves come again: only the wave that the ranks speak of now may vote.
        if fill is None or fill.attempt != (agreed.proposal, agreed.wave):
            return 0, 0
        return fill.version, fill.version if fill.is_filled else 0

    # ---- publication and after

    def publish(self, agreed: Agreed) -> None:
        """The ranks agreed that the wave is filled everywhere: roll forward. May be called again if it raised."""
        fill = self.fill
        assert fill is not None and fill.version == agreed.version, "a rank votes only for what it has"
        handoff = fill.hand_over()
        fill.publish()
        self.handoff = handoff
        self.published = fill.version
        self.published_at = self._clock()
        self.num_waves += 1
        self.num_moves += fill.num_moves
        self.num_bytes += fill.num_bytes

    def collect_grace(self, agreed: Agreed, models_differ: bool) -> None:
        """Look whether anything on this rank may still use a version older than the newest."""
        if self._earlier is not None:
            self._collect_first_grace(self._earlier, agreed, models_differ)
        handoff = self.handoff
        if handoff is None or self._holds_up(handoff) is not None:
            return
        self.graced = handoff.version
        self.handoff = None
        self.num_flips += len(handoff.layers)
        self.grace_seconds = self._clock() - self.published_at

    def _collect_first_grace(self, earlier: Sequence[EventLike], agreed: Agreed, models_differ: bool) -> None:
        """As `collect_grace()`, for the versions that the controller found."""
        if models_differ:
            return  # nothing is freed, as nothing will be moved
        if agreed.phase not in (Phase.GRACE, Phase.LEFT):  # graced on all ranks
            self._earlier = None
            for layer in self._layers:
                layer.release_retired()
        elif all(event.query() for event in earlier) and not any(
            layer.is_pinned_before(layer.current.number) for layer in self._layers
        ):
            self.graced = self.published

    def what_holds_up_grace(self) -> str:
        """Why an older version may still be in use, for `Health.reason`."""
        if self.graced == self.published:
            return "another rank may still use the version before"
        reason = self._holds_up(self.handoff) if self.handoff is not None else "forwards or backwards from before"
        return reason or "the flip was just seen to be over"

    @staticmethod
    def _holds_up(handoff: Handoff) -> str | None:
        if handoff.flipped is None:
            return "the main thread has not flipped the tables: it calls no step()"
        if not handoff.flipped.query():
            return "the device has not come to the flip yet"
        held = [layer.held_by(handoff.version) for layer in handoff.layers]
        if any(held):
            num_holders = sum(sum(by_version.values()) for by_version in held)
            oldest = min(version for by_version in held for version in by_version)
            return f"{num_holders} forwards or backwards hold version {oldest} or newer: a loss or an output is kept?"
        return None

    def drop_finished(self, agreed: Agreed) -> None:
        """Let go of a wave that the ranks have agreed to be over, one way or the other."""
        if agreed.phase is not Phase.PREPARE:
            self.wants_slot_since = None
        fill = self.fill
        if fill is None:
            return
        if fill.version <= agreed.version:
            if agreed.phase not in (Phase.GRACE, Phase.LEFT):
                fill.release()
                self.fill = None
        elif agreed.phase not in (Phase.PREPARE, Phase.FILL):
            fill.abandon()
            self.zombies.append(fill)
            self.fill = None

    def bury(self) -> None:
        """Free the slots of waves given up that nothing can touch any more."""
        self.zombies = [fill for fill in self.zombies if not fill.bury()]

    def close(self) -> None:
        """Let go of what is under way, and so of the communicator's connections; its slots stay as they are."""
        self.fill, self.zombies = None, []
