"""Rebalance, windows → plan: forecast, policy, then waves, for all registered layers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eplb.planning.forecast import forecast
from eplb.planning.make_plan import make_plan
from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Plan, Wave
from eplb.planning.policy import Policy, Topology


@dataclass(frozen=True)
class LayerFacts:
    """What planning knows of one layer.

    Attributes:
        num_physical_per_rank: P.
        pool: number of the pool that its slots come from.
        slot_bytes: bytes that one move carries.
    """

    num_experts: int
    num_physical_per_rank: int
    pool: int
    slot_bytes: int


def plan_rebalance(
    layers: Sequence[LayerFacts],
    placements: Sequence[Placement],
    shares: Sequence[np.ndarray],
    load_NA: np.ndarray,
    past_HA: np.ndarray,
    free_slots_GW: np.ndarray,
    policy: Policy,
    topology: Topology,
    max_bytes_in_flight: int | None,
) -> Plan:
    """Ask the policy for each group of like layers, and put the groups' waves behind each other.

    Args:
        layers: facts of every registered layer.
        placements, shares: the live ones of each.
        load_NA: int64, N sub-windows of the last load window, the layers' logical experts side by side, summed over ranks.
        past_HA: int64, the windows before it, oldest first; may be none. The policy gets the `forecast()` from all of them.
        free_slots_GW: free slots of every pool on every rank.
    """
    ends = np.cumsum([layer.num_experts for layer in layers])
    loads_NE = np.split(load_NA, ends[:-1], axis=1)
    pasts_HE = np.split(past_HA, ends[:-1], axis=1)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, layer in enumerate(layers):
        key = (layer.num_experts, layer.num_physical_per_rank, placements[index].num_lanes)
        groups.setdefault(key, []).append(index)
    plans = []
    for members in groups.values():
        load_LNE = np.stack([loads_NE[index] for index in members])
        load_LNE = forecast(load_LNE, np.stack([pasts_HE[index] for index in members], axis=1))
        current = [placements[index] for index in members]
        proposal = policy.propose(load_LNE, np.stack([placement.compact() for placement in current]), topology)
        plan = make_plan(
            current,
            proposal,
            load_LNE.sum(axis=1),
            free_slots_GW=free_slots_GW,
            pool_of_layer=[layers[index].pool for index in members],
            bytes_per_expert=[layers[index].slot_bytes for index in members],
            max_bytes_in_flight=max_bytes_in_flight,
            topology=topology,
            live_shares=[shares[index] for index in members],
        )
        plans.append(_renumbered(plan, members))
    if len(plans) == 1:
        return plans[0]
    return Plan(waves=tuple(wave for plan in plans for wave in plan.waves))


def _renumbered(plan: Plan, members: Sequence[int]) -> Plan:
    def renumber(update: LayerUpdate) -> LayerUpdate:
        return replace(update, layer=members[update.layer])

    return replace(plan, waves=tuple(Wave(tuple(renumber(update) for update in wave.updates)) for wave in plan.waves))
