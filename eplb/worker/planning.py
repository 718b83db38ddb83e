"""Rebalance, window → plan: `Planning`, from this rank's load windows to the plan that all ranks hear."""

from collections import deque
from collections.abc import Callable

import numpy as np

from eplb.config import EplbConfig
from eplb.load_window import LoadWindowRecorder
from eplb.plan_process import MadePlan
from eplb.planner import Planner
from eplb.planning.plan import Wave
from eplb.rounds.messages import Loads, PlanReader, encode_loads
from eplb.rounds.protocol import RECORD_WORDS, Agreed, Phase, Work
from eplb.worker.job import Job, Pending, Start
from eplb.worker.rounds import Clock, Heard

NOTHING = np.empty(0, dtype=np.int64)


class Planning:
    """The proposal under way: rank 0 decides when it begins and what the plan is; every rank gives its load.

    Args:
        rank: rank 0 plans.
        start: how the planner is called; on a thread of its own, because the policy may never return.
        notify: called, on any thread, when it has returned.

    Attributes:
        proposal, work: rank 0's number of the work that it wants begun, or began last, and what it is.
        loads: of the proposal under way, summed over ranks; None before they were heard.
        plan_words: length of rank 0's encoded plan; 0 while it is planning, -1 if there is nothing to do.
        plan, plan_hash: as heard from rank 0; None and 0 before `read_wave()`.
        num_windows: how many windows this rank has brought to the host.
        planning_seconds: of the last plan.
    """

    def __init__(
        self,
        rank: int,
        planner: Planner,
        windows: dict[Work, LoadWindowRecorder],
        config: EplbConfig,
        clock: Clock,
        notify: Callable[[], None],
        start: Start = Job,
    ) -> None:
        self._rank = rank
        self._planner = planner
        self._windows = windows
        self._config = config
        self._clock = clock
        self._notify = notify
        self.start = start
        self._due: dict[Work, int] = {}
        self._unsent: dict[Work, np.ndarray] = {}
        self._propose_after = 0.0
        self._consecutive_failures = 0
        self._job: Pending[MadePlan] | None = None
        self._abandoned_job: Pending[MadePlan] | None = None
        self._job_began_at = 0.0
        self._message = NOTHING
        self._load_trace: deque[np.ndarray] = deque(maxlen=config.load_trace_windows)
        self._seen: deque[np.ndarray] = deque(maxlen=config.forecast_windows)  # by window, newest last
        self.proposal = 0
        self.work = Work.NONE
        self.loads: Loads | None = None
        self.plan_words = 0
        self.plan: PlanReader | None = None
        self.plan_hash = 0
        self.num_windows = 0
        self.planning_seconds = 0.0

    # ---- load windows

    def collect_windows(self) -> None:
        """Bring windows that have ended to the host; in the background each of rank 0's makes a proposal due."""
        for work, recorder in self._windows.items():
            window_NA = recorder.poll()
            if window_NA is not None:
                self._unsent[work] = window_NA
                self.num_windows += 1
                if self._config.use_async:
                    self.propose(work)

    def load_message(self, work: Work, free_slots: list[int]) -> np.ndarray:
        """What this rank says in a round of loads; `sent()` when it has said it.

        A rank that has no window which it has not sent yet (it is behind in steps, or lost one) adds nothing, and the
        others' say stands: to send one twice would make up load that nobody routed.
        """
        window_NA = self._unsent.get(work)
        if window_NA is None:
            window_NA = np.zeros(self._windows[work].message_words, dtype=np.int64)
        return encode_loads(free_slots, window_NA)

    def sent(self, work: Work) -> None:
        self._unsent.pop(work, None)

    def load_trace(self) -> list[np.ndarray]:
        return list(self._load_trace)

    # ---- proposals

    def propose(self, work: Work) -> None:
        """Rank 0 begins `work` with all ranks as soon as nothing else is under way; other ranks leave it to it.

        What is proposed again before it has begun is done once, and counted as often.
        """
        if self._rank == 0:
            self._due[work] = self._due.get(work, 0) + 1

    def act(self, agreed: Agreed) -> None:
        """Rank 0: begin what is due, or go on with the plan under way.

        Raises:
            TimeoutError: the policy did not return in time. It is given up: what it returns later is not used.
            Exception: it failed.
        """
        if self._rank != 0:
            return
        if agreed.phase is Phase.IDLE and self._due and self.proposal == agreed.proposal:
            if self._clock() >= self._propose_after:
                self.work = next(iter(self._due))
                self.proposal += self._due.pop(self.work)
        elif agreed.phase is Phase.PLANNING and not self.plan_words:
            self._make_plan()

    def _make_plan(self) -> None:
        if self._job is None:
            if self._abandoned_job is not None and not self._abandoned_job.done():
                raise TimeoutError("the policy has not returned from an earlier proposal yet, which was given up")
            loads = self.loads
            assert loads is not None
            self._abandoned_job = None
            self._job_began_at = self._clock()
            request = self._planner.request(loads, list(self._seen)[:-1])
            self._job = self.start(lambda: self._planner.plan(request), self._notify)
        if not self._job.done():
            if self._clock() - self._job_began_at > self._config.planning_timeout:
                self._give_up_job()
                raise TimeoutError(
                    f"the policy did not return within {self._config.planning_timeout} s (planning_timeout)"
                )
            return
        job, self._job = self._job, None
        made = job.result()
        self.planning_seconds = made.seconds
        self._message = made.words
        self.plan_words = len(made.words) if made.num_waves else -1

    def _give_up_job(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            self._abandoned_job = job
            if not job.done():
                self._planner.give_up()

    @property
    def plan_message(self) -> np.ndarray | None:
        """Rank 0's encoded plan, for its round; None on other ranks."""
        return self._message if self._rank == 0 else None

    def read_wave(self, number: int, breathe: Callable[[], None]) -> Wave:
        """A wave of the plan that was heard.

        Raises:
            ValueError: it does not arrive as it was sent.
        """
        if self.plan is None:
            self.plan = PlanReader(self._message)
            self.plan_hash = self.plan.plan_hash
        return self.plan.wave(number, breathe)

    # ---- what a round changes

    def heard(self, heard: Heard) -> None:
        old, new = heard.old, heard.new
        if new.abandoned > old.abandoned:
            # Every rank counts the same abandoned proposals, so all wait equally long.
            self._consecutive_failures += 1
            delay = min(self._config.backoff * 2.0 ** min(self._consecutive_failures - 1, 30), self._config.max_backoff)
            self._propose_after = self._clock() + (delay if self._config.use_async else 0.0)
        elif new.phase is Phase.IDLE and old.phase is not Phase.IDLE:
            self._consecutive_failures = 0
        if new.phase in (Phase.IDLE, Phase.LEFT):
            self._give_up_job()
        if old.phase is Phase.IDLE and new.phase is Phase.LOAD:
            self.loads, self.plan, self.plan_hash, self.plan_words, self._message = None, None, 0, 0, NOTHING
        elif old.phase is Phase.PLAN:
            self._message = heard.messages[0]
        elif old.phase is Phase.LOAD and new.phase is not old.phase:
            self.loads = self._planner.decode_loads([message[RECORD_WORDS:] for message in heard.messages])
            if old.work is Work.REBALANCE:
                self._load_trace.append(self.loads.load_NA)
                self._seen.append(self.loads.load_NA.sum(axis=0))
