"""Rebalance, worker: `Worker`, the state machine of one rank. It ticks its pieces in order and passes on what they know."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from eplb.config import EplbConfig
from eplb.connect import Connection
from eplb.health import Health, Metrics
from eplb.load_window import LoadWindowRecorder
from eplb.planner import Planner
from eplb.relocation.communicator.base import Awaited
from eplb.relocation.handoff import Handoff, Inbox
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.protocol import Agreed, Phase, Record, Work, is_through
from eplb.streams import DeviceStreams, EventLike
from eplb.worker.looks import Looks
from eplb.worker.mailbox import Mailbox
from eplb.worker.planning import NOTHING, Planning
from eplb.worker.relocation import Relocation
from eplb.worker.report import Report, Wait, make_health, waits
from eplb.worker.rounds import Clock, Heard, Rounds

Place = tuple[Phase, int, int]
"""Where in the protocol something happens: phase, proposal, wave."""


class Worker:
    """What one rank does about agreed states. `tick()` never blocks; whoever calls it decides when.

    The rule that keeps ranks together: which round comes next is a function of the agreed state alone. A failure here
    changes what this rank *says* in it, never whether it takes part.

    Args:
        layers: all registered layers, in the same order on every rank.
        connection: on its way to the other ranks.
        earlier: events behind every forward that was enqueued so far.
        notify: called, on any thread, when there is something to tick for.

    Attributes:
        rounds, planning, relocation, report, mailbox: its pieces.
        inbox: where a published version waits for the thread that steps.
        health, metrics: as of the last tick.
        ticked_at: when that was.
    """

    def __init__(
        self,
        *,
        layers: Sequence[ResidentExperts],
        config: EplbConfig,
        planner: Planner,
        connection: Connection,
        streams: DeviceStreams,
        windows: dict[Work, LoadWindowRecorder],
        earlier: Sequence[EventLike],
        clock: Clock = time.monotonic,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._planner = planner
        self._clock = clock
        self._num_layers = len(layers)
        rank = self._rank = layers[0].rank
        version = max(layer.newest.number for layer in layers)
        recorded = [word for work, recorder in windows.items() for word in (int(work), recorder.message_words)]
        # Python's hash of integers is the same in every process.
        self._models = hash((version, *recorded, *planner.fingerprint()))
        self.mailbox = Mailbox()
        self.report = Report(rank)
        self.inbox = Inbox(streams, notify, self.report.note_failure)
        self.rounds = Rounds(connection, config, version, clock, notify)
        self.planning = Planning(rank, planner, windows, config, clock, notify)
        self.relocation = Relocation(layers, planner, streams, earlier, config, version, clock)
        self._error = False
        self._stuck_at: Place | None = None
        self._retry_at = 0.0
        self._told_of_missing = False
        self._shown: object = None
        self._looks = Looks(clock())
        self._published_at = clock()
        self.ticked_at = clock()
        self.metrics = Metrics()
        self.health = self._health()
        planner.start()

    # ---- the main thread's side

    def note_failure(self, what: str, error: BaseException) -> None:
        """Count and keep an error that was caught on this rank, on any thread."""
        self.report.note_failure(what, error)

    @property
    def is_published(self) -> bool:
        """Whether this rank has handed over all that the ranks agreed to publish."""
        return self.rounds.agreed.version == self.relocation.published

    @property
    def is_lost(self) -> bool:
        """Whether the rounds failed for good: the ranks can agree on nothing any more."""
        return self.rounds.is_lost

    @property
    def is_over(self) -> bool:
        """Whether there will be no more rounds, as one failed or a rank left."""
        return self.rounds.is_over

    @property
    def is_stuck(self) -> bool:
        """Whether nothing will be balanced, whatever the ranks do."""
        return self.rounds.is_over or self.rounds.models_differ

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do after `leave()`, or nothing can be done.

        Then the other ranks know, what was agreed is published, and nothing can touch a slot of a wave given up for it.
        """
        relocation, agreed = self.relocation, self.rounds.agreed
        has_left = self.rounds.has_left or agreed.phase is Phase.LEFT
        at_rest = self.is_published and not relocation.is_filling(agreed) and not relocation.zombies
        return self.is_lost or (has_left and at_rest)

    @property
    def is_idle(self) -> bool:
        return self.is_over or self.rounds.agreed.phase is Phase.IDLE

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is under way here, as far as this rank knows."""
        return self.relocation.is_at_rest and (self.is_idle or not self.rounds.is_connected)

    @property
    def num_proposals_heard(self) -> int:
        return self.rounds.agreed.proposal

    def waits(self) -> list[Wait]:
        """All that this rank waits for with a deadline of its own."""
        return waits(self.rounds, self.relocation, self._config)

    # ---- the machine

    def tick(self, may_speak: Callable[[], bool] = lambda: True) -> None:
        """Do all that can be done now without waiting. Errors become state (I6).

        Args:
            may_speak: asked before this rank begins a round. Ranks that tick on their own main threads must stop after the
                same round, or one would be left in a round that no other takes part in.
        """
        # Each stage on its own: one that fails every time must not keep this rank from speaking, or all would wait.
        for stage in (
            self.relocation.bury,
            self.rounds.connect,
            self._hear,
            self._collect_windows,
            self._act,
            lambda: self._speak(may_speak),
        ):
            try:
                stage()
            except Exception as error:
                self.fail(error)
            self.relocation.breathe()
        self._look_for_missing()
        self.ticked_at = now = self._clock()
        shown = self._what_health_shows()
        awaited = self.relocation.awaits() if self.is_published else Awaited.STEP
        if awaited in (Awaited.PACE, Awaited.TURN) and (self.is_lost or self._stuck_at is not None):
            awaited = Awaited.STEP  # nothing is begun any more
        self._looks.note((shown, self.relocation.stage_of_wave()), awaited, now)
        # Health that would say the same takes longer than the rest of a tick in which nothing happens.
        if shown != self._shown or now - self._published_at >= self._config.round_interval:
            self._publish_health()

    def _what_health_shows(self) -> object:
        """All of it but times, which pass, and numbers of rounds."""
        agreed, relocation = self.rounds.agreed, self.relocation
        place = _place(agreed), agreed.version, agreed.abandoned, agreed.departed
        wave = relocation.published, relocation.graced, len(relocation.zombies), relocation.fill is None
        return place, self.rounds.is_connected, wave, self.report.num_failures

    def seconds_to_next_tick(self) -> float:
        """How long a thread may sleep if nobody notifies it. Rounds, the main thread and the policy do."""
        interval = self._config.heartbeat_interval if self.is_at_rest else self._config.round_interval
        return self._looks.seconds(self._clock(), interval)

    def close(self) -> None:
        """Give everything back that reaches the other ranks, and the planner; nothing ticks any more."""
        self._planner.close()
        self.relocation.close()
        self.rounds.close()

    def _hear(self) -> None:
        differed = self.rounds.models_differ
        heard = self.rounds.hear()
        if heard is None:
            return
        old, new = heard.old, heard.new
        if old.phase is Phase.PREPARE and new.phase is Phase.FILL:
            self.relocation.agree_to_start()
        if heard.spoken.error:
            self._error = False
        self.mailbox.note_heard(held=bool(heard.spoken.hold) and new.phase is Phase.IDLE)
        self.planning.heard(heard)
        self._count(heard)
        if self.rounds.models_differ and not differed:
            raise RuntimeError(
                "the ranks differ in the models they registered, in their order or placement, or in the config's windows: "
                "nothing can be balanced"
            )

    def _count(self, heard: Heard) -> None:
        old, new = heard.old, heard.new
        begun = new.phase is Phase.LOAD and old.phase is Phase.IDLE and new.work is Work.REBALANCE
        planned = new.phase is Phase.PREPARE and old.phase is Phase.PLAN
        self.metrics = replace(
            self.metrics,
            rounds=new.round,
            proposals=self.metrics.proposals + begun,
            plans=self.metrics.plans + planned,
            abandoned=new.abandoned,
        )
        if old.phase is Phase.LOAD and self.planning.loads is not None:
            value = self._planner.balancedness(self.planning.loads)
            self.metrics = replace(self.metrics, balancedness=value)
            if new.phase is Phase.IDLE:
                self.report.log_balancedness(value, self._num_layers)

    def _collect_windows(self) -> None:
        if not self.is_lost:
            self.planning.collect_windows()

    def _act(self) -> None:
        agreed, relocation = self.rounds.agreed, self.relocation
        if agreed.version > relocation.published:
            if self._clock() < self._retry_at:
                return
            relocation.publish(agreed)
        if relocation.handoff is not None and relocation.handoff is not self.inbox.posted:
            self._post(relocation.handoff)
        relocation.collect_grace(agreed, self.rounds.models_differ)
        if self.is_lost:
            return
        relocation.drop_finished(agreed)
        if self._stuck_at == _place(agreed):
            return
        self._stuck_at = None
        if agreed.phase is Phase.PREPARE:
            self._prepare(agreed)
        elif agreed.phase is Phase.FILL:
            relocation.push()
        else:
            self.planning.act(agreed)

    def _post(self, handoff: Handoff) -> None:
        self._publish_health()  # before the main thread can flip: no table is ahead of what health says
        self.inbox.post(handoff)

    def _prepare(self, agreed: Agreed) -> None:
        if self.relocation.fill is None:
            assert self.rounds.communicator is not None
            wave = self.planning.read_wave(agreed.wave, self.relocation.breathe)
            if not self.relocation.prepare(wave, agreed, self.rounds.communicator):
                self._give_up_here()

    def _give_up_here(self) -> None:
        """Tell the other ranks to give up, and do nothing more in this place of the protocol."""
        self._error = True
        self._stuck_at = _place(self.rounds.agreed)

    def _speak(self, may_speak: Callable[[], bool]) -> None:
        agreed, rounds = self.rounds.agreed, self.rounds
        if not rounds.is_my_turn or not may_speak():
            return
        record = self._record()
        if not rounds.is_worth_saying(record, is_through(agreed, record, self._rank)):
            return
        if agreed.phase is Phase.PLAN:
            rounds.say_plan(self.planning.plan_message)
        elif agreed.phase is Phase.LOAD:
            rounds.say(record, self.planning.load_message(agreed.work, self.relocation.free_slots()))
            self.planning.sent(agreed.work)
        else:
            rounds.say(record, NOTHING)

    def _record(self) -> Record:
        wanted, agreed = self.mailbox.read_requests(), self.rounds.agreed
        prepared, filled = self.relocation.votes(agreed)
        return Record(
            proposal=self.planning.proposal,
            work=int(self.planning.work),
            plan_words=self.planning.plan_words if agreed.phase is Phase.PLANNING else 0,
            plan_hash=self.planning.plan_hash,
            prepared=prepared,
            filled=filled,
            graced=self.relocation.graced,
            error=int(self._error),
            hold=int(wanted.hold > 0),
            holds_completed=wanted.holds_completed,
            left=int(wanted.leaving),
            models=self._models,
        )

    # ---- errors

    def fail(self, error: BaseException) -> None:
        """Make an error of this rank's state: shown by `health`, logged once, told to the other ranks."""
        agreed = self.rounds.agreed
        # Whatever failed is not tried again in this place of the protocol: the next round tells all ranks, and they give
        # it up together. Only a published version has no way back: it is staged again after a delay.
        self._give_up_here()
        if agreed.phase not in (Phase.PLANNING, Phase.PREPARE, Phase.FILL):
            self._stuck_at = None
        self._retry_at = self._clock() + self._config.backoff
        self.report.note_failure(f"rebalancing failed in {agreed.phase.name}", error)
        self._publish_health()

    def _look_for_missing(self) -> None:
        """Make an error, once, of ranks that do not come; they still may."""
        rounds, limit = self.rounds, self._config.connect_timeout
        if rounds.is_connected or rounds.is_over or self._told_of_missing or self._clock() - rounds.began_at <= limit:
            return
        self._told_of_missing = True
        reason = self.waits()[-1].reason()
        self.report.note_failure("connecting takes too long", TimeoutError(f"connect_timeout={limit} s: {reason}"))

    def _health(self) -> Health:
        return make_health(self.rounds, self.relocation, self._config, self._clock(), self.report.last_error)

    def _publish_health(self) -> None:
        self._published_at = self._clock()
        self._shown = self._what_health_shows()
        relocation = self.relocation
        self.metrics = replace(
            self.metrics,
            windows=self.planning.num_windows,
            waves=relocation.num_waves,
            flips=relocation.num_flips,
            moved_experts=relocation.num_moves,
            moved_bytes=relocation.num_bytes,
            planning_seconds=self.planning.planning_seconds,
            fill_seconds=relocation.fill_seconds,
            grace_seconds=relocation.grace_seconds,
        )
        self.health = self._health()


def _place(agreed: Agreed) -> Place:
    return agreed.phase, agreed.proposal, agreed.wave
