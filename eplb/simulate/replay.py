"""Replays a load trace through a policy: would relocation pay?

The trace is cut into windows. Each window is served with the placement and shares that the policy chose from the windows
before it; the first one with what a layer starts with. Shape letters: B batches, L layers, E experts, W ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eplb.planning.balance import free_placement_bound, max_over_mean, per_batch_imbalance, rank_loads
from eplb.planning.make_plan import make_plan
from eplb.planning.placement import Placement, count_experts
from eplb.planning.policy import Policy, Topology
from eplb.planning.shares import equal_shares
from eplb.simulate.traces import Trace
from eplb.simulate.windows import Forecasts


@dataclass(frozen=True)
class WindowResult:
    """One window. Balances are max/mean of the rank loads, averaged over layers.

    Attributes:
        max_over_mean: of the window's summed load.
        worst_layer: the same, of the worst layer.
        per_batch: by each batch's own counts, averaged over batches too; what the ranks really wait for.
        bound: no placement has less over this window.
        moves: experts fetched, before this window, to a rank that did not hold them.
        moved_bytes: moves times the bytes of an expert.
        waves: waves that the moves take.
        planning_ms, plan_ms: wall-clock time of the policy, and of making the waves.
    """

    max_over_mean: float
    worst_layer: float
    per_batch: float
    bound: float
    moves: int
    moved_bytes: int
    waves: int
    planning_ms: float
    plan_ms: float


def simulate(
    trace: Trace,
    policy: Policy,
    topology: Topology,
    *,
    num_redundant_experts: int,
    batches_per_window: int,
    sub_windows: int = 4,
    forecast_windows: int = 8,
    bytes_per_expert: int = 0,
    free_slots: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> list[WindowResult]:
    """One result per window; batches that do not fill a last window are left out.

    Args:
        num_redundant_experts: per layer.
        sub_windows: parts of a window that the policy sees apart; at most `batches_per_window`.
        forecast_windows: see `EplbConfig`.
        free_slots: of a pool that all layers share, on each rank; bounds the moves of a wave.
        progress: called after each window.

    Raises:
        ValueError: sizes that do not go together.
    """
    num_batches, num_layers, num_experts = trace.load_BLE.shape
    forecasts = Forecasts(trace, batches_per_window, sub_windows, forecast_windows)
    if free_slots < 1:
        raise ValueError(f"free_slots={free_slots}: must be at least 1")
    num_ranks = topology.num_ranks
    per_rank = (num_experts + num_redundant_experts) // num_ranks
    start = Placement.initial(num_experts, num_redundant_experts, num_ranks, per_rank + free_slots)
    live, shares = [start] * num_layers, [equal_shares(start)] * num_layers
    results: list[WindowResult] = []
    previous_BLE: np.ndarray | None = None
    for first in range(0, num_batches - batches_per_window + 1, batches_per_window):
        window_BLE = trace.load_BLE[first : first + batches_per_window]
        moves = waves = 0
        planning_ms = plan_ms = 0.0
        if previous_BLE is not None:
            load_LNE = forecasts.cut(previous_BLE)
            physical_LWP = np.stack([placement.compact() for placement in live])
            begin = time.perf_counter()
            load_LNE = forecasts.after(load_LNE)
            proposal = policy.propose(load_LNE, physical_LWP, topology)
            planned = time.perf_counter()
            plan = make_plan(
                live,
                proposal,
                load_LNE.sum(axis=1),
                free_slots_GW=np.full((1, num_ranks), free_slots),
                pool_of_layer=[0] * num_layers,
                bytes_per_expert=[bytes_per_expert] * num_layers,
                max_bytes_in_flight=None,
                topology=topology,
                live_shares=shares,
            )
            planning_ms, plan_ms = (planned - begin) * 1e3, (time.perf_counter() - planned) * 1e3
            waves = len(plan.waves)
            moves = fetched(physical_LWP, proposal.physical_LWP, num_experts)
            for wave in plan.waves:
                for update in wave.updates:
                    live[update.layer], shares[update.layer] = update.placement, update.shares_WS
        lanes_LWS, shares_LWS = np.stack([p.lanes_WS for p in live]), np.stack(shares)
        load_LE = window_BLE.sum(axis=0)
        balance_L = max_over_mean(rank_loads(load_LE, lanes_LWS, shares_LWS))
        mean_L = load_LE.sum(axis=1) / num_ranks
        bound_L = free_placement_bound(load_LE, num_ranks, num_ranks * per_rank) / np.where(mean_L > 0, mean_L, 1.0)
        results.append(
            WindowResult(
                max_over_mean=float(balance_L.mean()),
                worst_layer=float(balance_L.max()),
                per_batch=float(per_batch_imbalance(window_BLE, lanes_LWS, shares_LWS).mean()),
                bound=float(np.where(mean_L > 0, bound_L, 1.0).mean()),
                moves=moves,
                moved_bytes=moves * bytes_per_expert,
                waves=waves,
                planning_ms=planning_ms,
                plan_ms=plan_ms,
            )
        )
        previous_BLE = window_BLE
        progress()
    return results


def fetched(old_LWP: np.ndarray, new_LWP: np.ndarray, num_experts: int) -> int:
    """Experts that a rank holds and did not hold: what must cross a link. The same for every policy."""
    return int(((count_experts(new_LWP, num_experts) > 0) & (count_experts(old_LWP, num_experts) == 0)).sum())
