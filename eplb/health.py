"""What the rebalancer shows of itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """What the rebalancer has done so far, on this rank unless said otherwise.

    Attributes:
        rounds: agreement rounds heard.
        windows: load windows brought to the host.
        proposals: rebalances that the ranks began; plans: those that had something to do.
        waves, flips: versions published; tables that the main thread flipped, as the device has completed it.
        moved_experts, moved_bytes: over all ranks, of published waves.
        abandoned: proposals that the ranks gave up after an error on any of them.
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
    """How the rebalancer of this rank is. The layers serve in every state.

    Attributes:
        state: "idle", "rebalancing", "degraded" (a pool has no free slot on this rank, so its layers cannot move), "held"
            (a rank loads weights, or has loaded them more often than another, so nothing moves), "models_differ" (the
            ranks registered different things, so nothing moves), "grace_stalled" (a main thread calls no `step()`),
            "peer_unreachable" (a round is overdue), "lost" (rounds failed for good), "peer_left", "closed".
        version: the highest published version.
        phase: what the ranks have agreed to be doing.
        seconds_waiting: since the hold began (held), this rank spoke (peer_unreachable) or the version was published
            (grace_stalled).
        departed: ranks that closed their controllers.
        quarantined_slots: slots that a transfer given up may still touch.
        last_error: the newest error on this rank, None if there was none.
    """

    state: str
    version: int
    phase: str
    seconds_waiting: float = 0.0
    departed: tuple[int, ...] = ()
    quarantined_slots: int = 0
    last_error: str | None = None
