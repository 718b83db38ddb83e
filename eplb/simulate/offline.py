"""Plans for a whole load trace, window by window, and keeps what comes out: a placement to start from."""

from __future__ import annotations

import numpy as np

from eplb.planning.placement import Placement
from eplb.planning.policy import Policy, Topology
from eplb.simulate.traces import Trace
from eplb.simulate.windows import Forecasts


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
    forecasts = Forecasts(trace, batches_per_window, sub_windows, forecast_windows)
    per_rank = (num_experts + num_redundant_experts) // topology.num_ranks
    start = Placement.initial(num_experts, num_redundant_experts, topology.num_ranks, per_rank)
    physical_LWP = np.tile(start.lanes_WS, (num_layers, 1, 1))
    shares_LWP = np.zeros(physical_LWP.shape)
    for first in range(num_batches % batches_per_window, num_batches, batches_per_window):
        load_LNE = forecasts.after(forecasts.cut(trace.load_BLE[first : first + batches_per_window]))
        proposal = policy.propose(load_LNE, physical_LWP, topology)
        physical_LWP, shares_LWP = proposal.physical_LWP, proposal.shares_LWP
    return [Placement(physical_WP, num_experts) for physical_WP in physical_LWP], list(shares_LWP)
