"""What the rebalancer shows of itself: `Health` (how it is) and `Metrics` (what it has done)."""

from dataclasses import dataclass
from enum import StrEnum


class HealthState(StrEnum):
    """How the rebalancer of a rank is. Equal to, and printed as, its string."""

    CONNECTING = "connecting"
    """The ranks have not all come to their first `step()` yet."""
    IDLE = "idle"
    REBALANCING = "rebalancing"
    DEGRADED = "degraded"
    """A pool has no free slot on this rank, so its layers cannot move."""
    HELD = "held"
    """A rank loads weights, or has loaded them more often than another, so nothing moves."""
    MODELS_DIFFER = "models_differ"
    """The ranks registered different things, so nothing moves."""
    GRACE_STALLED = "grace_stalled"
    """A published version is not in force everywhere after `grace_timeout`; `Health.reason` says what holds it up."""
    PEER_UNREACHABLE = "peer_unreachable"
    """A rank has taken part in no round for `peer_timeout`, or has not come within `connect_timeout`. It still may."""
    LOST = "lost"
    """The rounds failed for good, or the worker's thread has ended or hangs."""
    PEER_LEFT = "peer_left"
    """Another rank closed its controller."""
    DISPATCH_FAILED = "dispatch_failed"
    """A layer's forward waited in vain for a rank; `Health.reason` says for which. Its outputs mean nothing since then, until
    the layers are made anew. Whatever else holds is not shown, but for `CLOSED`."""
    CLOSED = "closed"


@dataclass(frozen=True)
class Metrics:
    """What the rebalancer has done so far, on this rank unless said otherwise.

    Attributes:
        rounds: agreement rounds heard.
        windows: load windows brought to the host.
        proposals: rebalances that the ranks began; plans: those that had something to do.
        waves, flips: versions published; tables that the main thread flipped, as the device has completed it.
        moved_experts, moved_bytes: over all ranks, of published waves.
        abandoned: proposals that the ranks gave up after an error on any of them, or for want of a free slot.
        failures: errors on this rank.
        planning_seconds, fill_seconds, grace_seconds: of the last plan (rank 0), fill, and grace.
        balancedness: mean/max of the ranks' loads in the last window, averaged over layers; None before the first.
    """

    rounds: int = 0
    windows: int = 0
    proposals: int = 0
    plans: int = 0
    waves: int = 0
    flips: int = 0
    moved_experts: int = 0
    moved_bytes: int = 0
    abandoned: int = 0
    failures: int = 0
    planning_seconds: float = 0.0
    fill_seconds: float = 0.0
    grace_seconds: float = 0.0
    balancedness: float | None = None


@dataclass(frozen=True)
class Health:
    """How the rebalancer of this rank is. The layers serve in every state but "dispatch_failed".

    Attributes:
        state: a `HealthState`.
        version: the highest published version.
        phase: what the ranks have agreed to be doing.
        seconds_waiting: for what `state` names, else 0: since the first `step()` (connecting), the hold began (held), this
            rank spoke (peer_unreachable), the version was published (grace_stalled) or the last round was heard (lost).
        reason: what the rebalancer waits for or why it cannot go on, in words; None if there is nothing to say.
        missing: ranks, by their numbers in the default group, that have not come to their first `step()`.
        departed: ranks that closed their controllers.
        quarantined_slots: slots that a transfer given up may still touch.
        last_tick_seconds: since the worker last looked after its work; None before the first `step()`.
        last_error: the newest error on this rank, None if there was none.
    """

    state: HealthState
    version: int
    phase: str
    seconds_waiting: float = 0.0
    reason: str | None = None
    missing: tuple[int, ...] = ()
    departed: tuple[int, ...] = ()
    quarantined_slots: int = 0
    last_tick_seconds: float | None = None
    last_error: str | None = None
