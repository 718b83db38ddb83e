"""Rebalance, worker: `Report`, the errors of one rank on any thread, and the health that follows from its state."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from eplb.config import EplbConfig
from eplb.health import Health, HealthState
from eplb.rounds.protocol import Phase
from eplb.worker.relocation import Relocation
from eplb.worker.rounds import Rounds

logger = logging.getLogger(__name__)


class Report:
    """Counts and keeps errors; each new one is logged once, with its traceback.

    Attributes:
        last_error: the newest, None if there was none.
        num_failures: how many.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self.last_error: str | None = None
        self.num_failures = 0

    def note_failure(self, what: str, error: BaseException) -> None:
        """Keep an error that was caught on this rank, on any thread. Raises nothing that it can help."""
        try:
            text = f"{type(error).__name__}: {error}"
        except Exception:  # no memory, or an error that cannot be printed
            text = type(error).__name__
        with self._lock:
            is_new, self.last_error = text != self.last_error, text
            self.num_failures += 1
        if is_new:
            try:
                logger.error("rank %d: %s; serving goes on", self._rank, what, exc_info=error)
            except Exception:  # a handler of the user's: what it could not log is in `last_error`
                with self._lock:
                    self.num_failures += 1

    def log_balancedness(self, value: float, num_layers: int) -> None:
        if self._rank == 0:
            logger.info("balancedness %.4f (mean/max of the ranks' loads, averaged over %d layers)", value, num_layers)


@dataclass(frozen=True)
class Wait:
    """Something that this rank waits for.

    Attributes:
        state: what health calls it when it takes too long.
        since: when it began, by the worker's clock.
        limit: seconds after which it takes too long.
        reason: says it in words.
    """

    state: HealthState
    since: float
    limit: float
    reason: Callable[[], str]


def waits(rounds: Rounds, relocation: Relocation, config: EplbConfig) -> list[Wait]:
    """All that this rank waits for with a deadline of its own, the most telling one last."""
    if rounds.is_over:
        return []
    if not rounds.is_connected:
        return [Wait(HealthState.PEER_UNREACHABLE, rounds.began_at, config.connect_timeout, lambda: _missing(rounds))]
    found = []
    phase, version = rounds.agreed.phase, rounds.agreed.version
    if phase is Phase.IDLE and rounds.held_since is not None:
        found.append(Wait(HealthState.HELD, rounds.held_since, config.peer_timeout, lambda: _HELD))
    if phase is Phase.GRACE and version == relocation.published:
        reason, since = relocation.what_holds_up_grace, relocation.published_at
        found.append(Wait(HealthState.GRACE_STALLED, since, config.grace_timeout, reason))
    if rounds.is_under_way:
        found.append(Wait(HealthState.PEER_UNREACHABLE, rounds.spoke_at, config.peer_timeout, lambda: _SILENT))
    return found


_HELD = "a rank loads weights, or has loaded them more often than another"
_SILENT = "a rank takes part in no round: it is stopped, hangs, or its connection is broken"


def _missing(rounds: Rounds) -> str:
    if rounds.missing:
        return f"ranks {list(rounds.missing)} have not come to their first step()"
    return "all ranks have come to their first step(), but they are not connected yet"


def make_health(
    rounds: Rounds, relocation: Relocation, config: EplbConfig, now: float, last_error: str | None
) -> Health:
    """How this rank is, from the least to the most serious that holds."""
    agreed = rounds.agreed
    state = HealthState.IDLE if agreed.phase is Phase.IDLE else HealthState.REBALANCING
    seconds, reason = 0.0, None
    if agreed.phase is Phase.IDLE and 0 in relocation.free_slots():
        state, reason = HealthState.DEGRADED, "a pool has no free slot on this rank"
    if relocation.wants_slot_since is not None:
        seconds, reason = now - relocation.wants_slot_since, "waits for a free slot that another controller holds"
    if rounds.models_differ:
        state, reason = HealthState.MODELS_DIFFER, "the ranks registered different models or windows"
    for wait in waits(rounds, relocation, config):
        is_shown_at_once = wait.state is HealthState.HELD and not rounds.models_differ
        if is_shown_at_once or now - wait.since > wait.limit:
            state, seconds, reason = wait.state, now - wait.since, wait.reason()
        elif not rounds.is_connected:
            state, seconds, reason = HealthState.CONNECTING, now - wait.since, wait.reason()
    if agreed.phase is Phase.LEFT:
        state = HealthState.CLOSED if rounds.has_left else HealthState.PEER_LEFT
        seconds, reason = 0.0, None if rounds.has_left else f"ranks {list(agreed.departed)} closed their controllers"
    if rounds.is_lost:
        state, seconds, reason = HealthState.LOST, now - rounds.heard_at, f"the rounds failed for good: {last_error}"
    return Health(
        state=state,
        version=relocation.published,
        phase=agreed.phase.name,
        seconds_waiting=seconds,
        reason=reason,
        missing=rounds.missing,
        departed=agreed.departed,
        quarantined_slots=relocation.num_quarantined(),
        last_error=last_error,
    )
