"""Plans for a whole load trace, window by window, and keeps what comes out: a placement to start from."""

from __future__ import annotations

from collections import deque

import numpy as np

from eplb.planning.forecast import forecast
from eplb.planning.placement import Placement
from eplb.planning.policy import Policy, Topology
from eplb.simulate.traces import Trace


def plan_offline(
    trace: Trace,
    policy: Policy,
    topology: Topology,
    *,
    num_redundant_experts: int,
    batches_per_window: int,
    sub_windows: int = 4,
    forecast_windows: int = 8,
) -> tuple[list[Placement], list[np.ndarray]]:
    """What a controller that had served the trace would have now, for `eplb.save_placements`.

    Args:
        num_redundant_experts: per layer.
        batches_per_window: batches that do not fill a window are left out, the oldest ones.
        sub_windows, forecast_windows: as in `simulate`.

    Returns:
        Placement and shares of each layer, without empty lanes.

    Raises:
        ValueError: sizes that do not go together.
    """
    num_batches, num_layers, num_experts = trace.load_BLE.shape
    if not 1 <= batches_per_window <= num_batches:
        raise ValueError(
            f"batches_per_window={batches_per_window}: must lie in [1, {num_batches}], the trace's batches"
        )
    if not 1 <= sub_windows <= batches_per_window:
        raise ValueError(f"sub_windows={sub_windows}: must lie in [1, batches_per_window={batches_per_window}]")
    if forecast_windows < 1:
        raise ValueError(f"forecast_windows={forecast_windows}: must be at least 1")
    per_rank = (num_experts + num_redundant_experts) // topology.num_ranks
    start = Placement.initial(num_experts, num_redundant_experts, topology.num_ranks, per_rank)
    physical_LWP = np.tile(start.lanes_WS, (num_layers, 1, 1))
    seen: deque[np.ndarray] = deque(maxlen=forecast_windows)
    shares_LWP = np.zeros(physical_LWP.shape)
    for first in range(num_batches % batches_per_window, num_batches, batches_per_window):
        parts = np.array_split(trace.load_BLE[first : first + batches_per_window], sub_windows)
        load_LNE = np.stack([part.sum(axis=0) for part in parts], axis=1)
        seen.append(load_LNE.sum(axis=1))
        proposal = policy.propose(forecast(load_LNE, np.array(seen)[:-1]), physical_LWP, topology)
        physical_LWP, shares_LWP = proposal.physical_LWP, proposal.shares_LWP
    return [Placement(physical_WP, num_experts) for physical_WP in physical_LWP], list(shares_LWP)
