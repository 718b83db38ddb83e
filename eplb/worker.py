"""The rebalancer's own thread: one state machine over agreement rounds."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from eplb.config import EplbConfig
from eplb.health import Health, Metrics
from eplb.load_window import LoadWindowRecorder
from eplb.planner import Planner
from eplb.planning.plan import Plan
from eplb.relocation.communicator.base import Communicator
from eplb.relocation.fill import WaveFill
from eplb.relocation.handoff import Handoff, Inbox
from eplb.relocation.pool import SlotState
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.exchange import Agreement, Exchange
from eplb.rounds.messages import Loads, decode_plan, encode_loads, encode_plan
from eplb.rounds.protocol import RECORD_WORDS, Agreed, Phase, Record, Work, advance, heard_plan, is_held, models_differ
from eplb.streams import DeviceStreams, EventLike

logger = logging.getLogger(__name__)

_NOTHING = np.empty(0, dtype=np.int64)


class Clock(Protocol):
    def __call__(self) -> float:
        """Seconds; only differences matter."""
        ...


@dataclass
class _Requests:
    """What the main thread wants; guarded by the worker's lock."""

    hold: int = 0
    holds_completed: int = 0
    leaving: bool = False


@dataclass
class _Mine:
    """This rank's part of the proposal under way; made anew for each."""

    planned: bool = False
    plan_words: int = 0
    message: np.ndarray = field(default_factory=lambda: _NOTHING)
    plan: Plan | None = None
    plan_hash: int = 0
    loads: Loads | None = None


class Worker:
    """What one rank does about agreed states. `tick()` never blocks; whoever calls it decides when.

    The rule that keeps ranks together: which round comes next is a function of the agreed state alone. A failure here
    changes what this rank *says* in it, never whether it takes part.

    Args:
        layers: all registered layers, in the same order on every rank.
        earlier: events behind every forward that was enqueued so far.
        notify: called, on any thread, when a round is over.
    """

    def __init__(
        self,
        *,
        layers: Sequence[ResidentExperts],
        config: EplbConfig,
        planner: Planner,
        agreement: Agreement,
        communicator: Communicator,
        streams: DeviceStreams,
        windows: dict[Work, LoadWindowRecorder],
        earlier: Sequence[EventLike],
        clock: Clock = time.monotonic,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self._layers = list(layers)
        self._config = config
        self._planner = planner
        self._agreement = agreement
        self._communicator = communicator
        self._streams = streams
        self._windows = windows
        self._clock = clock
        self._notify = notify
        self._rank = layers[0].rank
        version = max(layer.newest.number for layer in layers)
        recorded = [word for work, recorder in windows.items() for word in (int(work), recorder.message_words)]
        # Python's hash of integers is the same in every process.
        self._models = hash((version, *recorded, *planner.fingerprint()))

        # A controller before may have been closed in grace: the versions that are found need theirs before anything moves.
        self._agreed = Agreed(version=version, phase=Phase.GRACE, num_waves=1)
        self._earlier: Sequence[EventLike] | None = earlier
        self._exchange: Exchange | None = None
        self._spoken = Record()
        self._spoke_at = clock()
        self._heard_at = clock()
        self._lost = False
        self._held_since: float | None = None
        self._models_differ = False

        self._proposal = 0
        self._proposed_work = Work.NONE
        self._due: dict[Work, int] = {}
        self._latest: dict[Work, np.ndarray] = {}
        self._mine = _Mine()
        self._load_trace: deque[np.ndarray] = deque(maxlen=config.load_trace_windows)
        self._fill: WaveFill | None = None
        self._fill_started_at = 0.0
        self._handoff: Handoff | None = None
        self._published = version
        self._published_at = clock()
        self._graced = version - 1
        self._zombies: list[WaveFill] = []

        self._error = False
        self._stuck_at: tuple[Phase, int, int] | None = None
        self._consecutive_failures = 0
        self._retry_at = 0.0
        self._propose_after = 0.0

        self._lock = threading.Lock()
        self._requests = _Requests()
        self.inbox = Inbox()
        self._held = False
        self._said_left = False
        self.last_error: str | None = None
        self.num_failures = 0
        self.metrics = Metrics()
        self.health = Health("rebalancing", version, Phase.GRACE.name)

    # ---- the main thread's side

    def propose(self, work: Work) -> None:
        """Rank 0 begins `work` with all ranks as soon as nothing else is under way; other ranks leave it to it.

        Called by the thread that ticks. What is proposed again before it has begun is done once, and counted as often.
        """
        if self._rank == 0:
            self._due[work] = self._due.get(work, 0) + 1

    def hold(self) -> None:
        """Want no new waves, until `end_hold()`."""
        with self._lock:
            self._requests.hold += 1
            self._held = False

    def end_hold(self, completed: bool = True) -> None:
        """Want new waves again, as soon as every rank has completed as many holds."""
        with self._lock:
            self._requests.hold -= 1
            self._requests.holds_completed += completed
            self._held = False

    @property
    def is_held(self) -> bool:
        """Whether all ranks know of this rank's hold, and nothing is under way."""
        with self._lock:
            return self._held

    def leave(self) -> None:
        with self._lock:
            self._requests.leaving = True

    @property
    def is_published(self) -> bool:
        """Whether this rank has handed over all that the ranks agreed to publish."""
        return self._agreed.version == self._published

    def load_trace(self) -> list[np.ndarray]:
        """The last load windows that were summed over ranks, int64 ``[N, A]`` each, oldest first."""
        with self._lock:
            return list(self._load_trace)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do after `leave()`, or nothing can be done.

        Then the other ranks know, what was agreed is published, and nothing can touch a slot of a wave given up for it.
        """
        fill = self._fill
        has_left = self._said_left or self._agreed.phase is Phase.LEFT
        is_filling = fill is not None and fill.version > self._agreed.version
        return self._lost or (has_left and self.is_published and not is_filling and not self._zombies)

    @property
    def is_idle(self) -> bool:
        return self._agreed.phase in (Phase.IDLE, Phase.LEFT) or self._lost

    @property
    def num_proposals_heard(self) -> int:
        return self._agreed.proposal

    # ---- the machine

    def tick(self, may_speak: Callable[[], bool] = lambda: True) -> None:
        """Do all that can be done now without waiting. Errors become state (I6).

        Args:
            may_speak: asked before this rank begins a round. Ranks that tick on their own main threads must stop after the
                same round, or one would be left in a round that no other takes part in.
        """
        # Each stage on its own: one that fails every time must not keep this rank from speaking, or all would wait.
        for stage in (self._bury, self._hear, self._collect_windows, self._act, lambda: self._speak(may_speak)):
            try:
                stage()
            except Exception as error:
                self.fail(error)
        self._report()

    def seconds_to_next_tick(self) -> float:
        """How long a thread may sleep if nobody notifies it."""
        if self._fill is not None or self._handoff is not None or self._zombies:
            return min(self._config.round_interval, 0.001)
        at_rest = self._lost or self._agreed.phase in (Phase.IDLE, Phase.LEFT)
        return self._config.heartbeat_interval if at_rest else self._config.round_interval

    def _hear(self) -> None:
        exchange, agreed = self._exchange, self._agreed
        if self._lost or exchange is None or not exchange.done():
            return
        try:
            messages = exchange.result()
        except Exception:
            # Nothing can be agreed on any more. What is published stays; a slot voted for is never written again, as
            # other ranks may have published it: all this rank can do in doubt is to keep what it said it has.
            self._lost = True
            raise
        mine, differed = self._mine, self._models_differ
        if agreed.phase is Phase.PLAN:
            mine.message = messages[0]
            new = heard_plan(agreed, num_waves=int(messages[0][0]))
        else:
            records = [Record.decode(message) for message in messages]
            new = advance(agreed, records)
            self._models_differ = models_differ(records)
            if not is_held(records):
                self._held_since = None
            elif self._held_since is None:
                self._held_since = self._clock()
            if agreed.phase is Phase.IDLE and new.phase is Phase.LOAD:
                mine = _Mine()
            elif agreed.phase is Phase.LOAD and new.phase is not agreed.phase:
                mine.loads = self._planner.decode_loads([message[RECORD_WORDS:] for message in messages])
        spoken = self._spoken
        self._mine, self._agreed, self._exchange = mine, new, None
        self._heard_at = self._clock()
        self._settle(agreed, new, spoken)
        if self._models_differ and not differed:
            raise RuntimeError(
                "the ranks differ in the models they registered, in their order or placement, or in the config's windows: "
                "nothing can be balanced"
            )

    def _settle(self, old: Agreed, new: Agreed, spoken: Record) -> None:
        """What a round heard changes on this rank; nothing here touches the device."""
        if spoken.error:
            self._error = False
        if spoken.left:
            self._said_left = True
        if new.phase is Phase.FILL and old.phase is Phase.PREPARE and self._fill is not None:
            self._fill.agree_to_start()
        with self._lock:
            self._held = bool(spoken.hold) and self._requests.hold > 0 and new.phase is Phase.IDLE
        if new.abandoned > old.abandoned:
            # Every rank counts the same abandoned proposals, so all wait equally long.
            self._consecutive_failures += 1
            delay = self._config.backoff * 2.0 ** min(self._consecutive_failures - 1, 30)
            self._propose_after = self._clock() + (
                min(delay, self._config.max_backoff) if self._config.use_async else 0.0
            )
        elif new.phase is Phase.IDLE and old.phase is not Phase.IDLE:
            self._consecutive_failures = 0
        begun = new.phase is Phase.LOAD and old.phase is Phase.IDLE and new.work is Work.REBALANCE
        planned = new.phase is Phase.PREPARE and old.phase is Phase.PLAN
        self.metrics = replace(
            self.metrics,
            rounds=new.round,
            proposals=self.metrics.proposals + begun,
            plans=self.metrics.plans + planned,
            abandoned=new.abandoned,
        )
        if self._mine.loads is not None and old.phase is Phase.LOAD:
            if old.work is Work.REBALANCE:
                with self._lock:
                    self._load_trace.append(self._mine.loads.load_NA)
            self._measure_balance(self._mine.loads, new.phase)

    def _measure_balance(self, loads: Loads, phase: Phase) -> None:
        value = self._planner.balancedness(loads)
        self.metrics = replace(self.metrics, balancedness=value)
        if phase is Phase.IDLE and self._rank == 0:
            logger.info(
                "balancedness %.4f (mean/max of the ranks' loads, averaged over %d layers)", value, len(self._layers)
            )

    def _collect_windows(self) -> None:
        for work, recorder in self._windows.items():
            window_NA = recorder.poll() if not self._lost else None
            if window_NA is not None:
                self._latest[work] = window_NA
                self.metrics = replace(self.metrics, windows=self.metrics.windows + 1)
                if self._config.use_async:
                    self.propose(work)

    def _act(self) -> None:
        agreed = self._agreed
        if agreed.version > self._published:
            if self._clock() >= self._retry_at:
                self._publish()
            return
        self._collect_grace()
        if self._fill is not None:
            self._drop_finished(self._fill)
        if self._lost or self._stuck_at == _place(agreed):
            return
        self._stuck_at = None
        match agreed.phase:
            case Phase.IDLE if self._rank == 0 and self._due and self._proposal == agreed.proposal:
                if self._clock() >= self._propose_after:
                    self._proposed_work = next(iter(self._due))
                    self._proposal += self._due.pop(self._proposed_work)
            case Phase.PLANNING if self._rank == 0 and not self._mine.planned:
                self._make_plan()
            case Phase.PREPARE if self._fill is None:
                self._prepare()
            case Phase.FILL if self._fill is not None and not self._fill.is_filled:
                self._push_fill(self._fill)

    def _make_plan(self) -> None:
        loads = self._mine.loads
        assert loads is not None
        plan, seconds = self._planner.plan(loads)
        self._mine.message = encode_plan(plan)
        self._mine.plan_words = len(self._mine.message) if plan.waves else -1
        self._mine.planned = True
        self.metrics = replace(self.metrics, planning_seconds=seconds)

    def _prepare(self) -> None:
        mine, agreed = self._mine, self._agreed
        if mine.plan is None:
            plan, mine.plan_hash = decode_plan(mine.message)
            mine.plan = plan
        self._fill = WaveFill(
            mine.plan.waves[agreed.wave],
            agreed.version + 1,
            (agreed.proposal, agreed.wave),
            self._layers,
            self._communicator,
            self._streams,
        )

    def _push_fill(self, fill: WaveFill) -> None:
        if not fill.is_started:
            self._fill_started_at = self._clock()
            fill.start()
        if fill.poll():
            self.metrics = replace(self.metrics, fill_seconds=self._clock() - self._fill_started_at)
        elif self._clock() - self._fill_started_at > self._config.transfer_timeout:
            raise TimeoutError(
                f"transfers of version {fill.version} took more than transfer_timeout={self._config.transfer_timeout} s"
            )

    def _publish(self) -> None:
        """The ranks agreed that the wave is filled everywhere: roll forward, as often as it takes."""
        fill = self._fill
        assert fill is not None and fill.version == self._agreed.version, "a rank votes only for what it has"
        handoff = fill.stage()
        fill.publish()
        self._handoff = handoff
        self._published = fill.version
        self._published_at = self._clock()
        self.metrics = replace(
            self.metrics,
            waves=self.metrics.waves + 1,
            moved_experts=self.metrics.moved_experts + fill.num_moves,
            moved_bytes=self.metrics.moved_bytes + fill.num_bytes,
        )
        self._report()  # before the main thread can flip: no table is ahead of what health says
        self.inbox.post(handoff)

    def _collect_first_grace(self, earlier: Sequence[EventLike]) -> None:
        """As `_collect_grace()`, for the versions that this worker found."""
        if self._models_differ:
            return  # nothing is freed, as nothing will be moved
        if self._agreed.phase not in (Phase.GRACE, Phase.LEFT):  # graced on all ranks
            self._earlier = None
            for layer in self._layers:
                layer.release_retired()
        elif all(event.query() for event in earlier) and not any(
            layer.is_pinned_before(layer.current.number) for layer in self._layers
        ):
            self._graced = self._published

    def _collect_grace(self) -> None:
        if self._earlier is not None:
            self._collect_first_grace(self._earlier)
        handoff = self._handoff
        if handoff is None or handoff.flipped is None or not handoff.flipped.query():
            return
        if any(layer.is_pinned_before(handoff.version) for layer in handoff.layers):
            return
        self._graced = handoff.version
        self._handoff = None
        self.metrics = replace(
            self.metrics,
            flips=self.metrics.flips + len(handoff.layers),
            grace_seconds=self._clock() - self._published_at,
        )

    def _drop_finished(self, fill: WaveFill) -> None:
        """Let go of a wave that the ranks have agreed to be over, one way or the other."""
        agreed = self._agreed
        if fill.version <= agreed.version:
            if agreed.phase not in (Phase.GRACE, Phase.LEFT) and not self._lost:
                fill.release()
                self._fill = None
        elif agreed.phase not in (Phase.PREPARE, Phase.FILL) and not self._lost:
            fill.abandon()
            self._zombies.append(fill)
            self._fill = None

    def _bury(self) -> None:
        self._zombies = [fill for fill in self._zombies if not fill.bury()]

    def _speak(self, may_speak: Callable[[], bool]) -> None:
        agreed = self._agreed
        if self._lost or self._exchange is not None or agreed.phase is Phase.LEFT or not may_speak():
            return
        record = self._record()
        now = self._clock()
        if agreed.phase in (Phase.PREPARE, Phase.FILL, Phase.GRACE, Phase.IDLE) and record == self._spoken:
            idle = agreed.phase is Phase.IDLE
            if now - self._spoke_at < (self._config.heartbeat_interval if idle else self._config.round_interval):
                return
        if agreed.phase is Phase.PLAN:
            message = self._mine.message if self._rank == 0 else None
            self._exchange = self._agreement.broadcast(message, agreed.plan_words, self._notify)
        else:
            loads = self._my_loads(agreed.work) if agreed.phase is Phase.LOAD else _NOTHING
            self._exchange = self._agreement.all_gather(np.concatenate([record.encode(), loads]), self._notify)
            self._spoken = record
        self._spoke_at = now

    def _record(self) -> Record:
        with self._lock:
            hold, holds_completed = self._requests.hold > 0, self._requests.holds_completed
            leaving = self._requests.leaving
        mine, agreed, fill = self._mine, self._agreed, self._fill
        # Versions of abandoned waves come again: only the wave that the ranks speak of now may vote.
        votes = fill is not None and fill.attempt == (agreed.proposal, agreed.wave)
        return Record(
            proposal=self._proposal,
            work=int(self._proposed_work),
            plan_words=mine.plan_words if agreed.phase is Phase.PLANNING else 0,
            plan_hash=mine.plan_hash,
            prepared=fill.version if fill is not None and votes else 0,
            filled=fill.version if fill is not None and votes and fill.is_filled else 0,
            graced=self._graced,
            error=int(self._error),
            hold=int(hold),
            holds_completed=holds_completed,
            left=int(leaving),
            models=self._models,
        )

    def _my_loads(self, work: Work) -> np.ndarray:
        # A rank that has no window yet (it is behind in steps) adds nothing, and the others' say stands.
        window_NA = self._latest.get(work)
        if window_NA is None:
            window_NA = np.zeros(self._windows[work].message_words, dtype=np.int64)
        return encode_loads(self._planner.free_slots(), window_NA)

    def fail(self, error: Exception) -> None:
        """Make an error of this rank's state: shown by `health`, logged once, told to the other ranks."""
        agreed = self._agreed
        self._error = True
        # Whatever failed is not tried again in this place of the protocol: the next round tells all ranks, and they give
        # it up together. Only a published version has no way back: it is staged again after a delay.
        self._stuck_at = _place(agreed) if agreed.phase in (Phase.PLANNING, Phase.PREPARE, Phase.FILL) else None
        self._retry_at = self._clock() + self._config.backoff
        self.note_failure(f"rebalancing failed in {agreed.phase.name}", error)
        self._report()

    def note_failure(self, what: str, error: Exception) -> None:
        """Count and keep an error that was caught on this rank, on any thread; log it once, with its traceback."""
        text = f"{type(error).__name__}: {error}"
        with self._lock:
            is_new = text != self.last_error
            self.last_error = text
            self.num_failures += 1
        if is_new:
            logger.exception("rank %d: %s; serving goes on", self._rank, what)

    def _report(self) -> None:
        agreed, now = self._agreed, self._clock()
        state, waiting = "idle" if agreed.phase is Phase.IDLE else "rebalancing", 0.0
        if agreed.phase is Phase.IDLE and 0 in self._planner.free_slots():
            state = "degraded"
        if agreed.phase is Phase.IDLE and self._held_since is not None:
            state, waiting = "held", now - self._held_since
        if self._models_differ:
            state = "models_differ"
        stalled = agreed.phase is Phase.GRACE and self.is_published
        if stalled and now - self._published_at > self._config.grace_timeout:
            state, waiting = "grace_stalled", now - self._published_at
        if self._exchange is not None and now - self._spoke_at > self._config.peer_timeout:
            state, waiting = "peer_unreachable", now - self._spoke_at
        if agreed.phase is Phase.LEFT:
            state = "closed" if self._said_left else "peer_left"
        if self._lost:
            state, waiting = "lost", now - self._heard_at
        self.health = Health(
            state=state,
            version=self._published,
            phase=agreed.phase.name,
            seconds_waiting=waiting,
            departed=agreed.departed,
            quarantined_slots=sum(pool.count(SlotState.QUARANTINED) for pool in self._planner.pools),
            last_error=self.last_error,
        )


def _place(agreed: Agreed) -> tuple[Phase, int, int]:
    return agreed.phase, agreed.proposal, agreed.wave
