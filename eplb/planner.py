"""Rebalance, plan: `Planner` makes the plan from the ranks' summed load and the layers' newest placements."""

import logging
import time
from collections.abc import Sequence

import numpy as np

from eplb.planning.balance import layer_balancedness
from eplb.planning.placement import Placement
from eplb.planning.plan import Plan
from eplb.planning.policy import Policy, Topology
from eplb.planning.rebalance import LayerFacts, plan_rebalance
from eplb.relocation.pool import SlotPool, SlotState
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.messages import Loads, decode_loads

logger = logging.getLogger(__name__)


class Planner:
    """What the layers' newest versions lead to, the same on all ranks; used by the worker's thread.

    Args:
        layers: all registered layers, in the same order on every rank.
        max_bytes_in_flight: bytes that all ranks together move in one wave; None for no bound.

    Attributes:
        pools: of the layers, each once.
    """

    def __init__(
        self,
        layers: Sequence[ResidentExperts],
        policy: Policy,
        topology: Topology,
        max_bytes_in_flight: int | None,
    ) -> None:
        self._layers = list(layers)
        self._policy = policy
        self._topology = topology
        self._max_bytes_in_flight = max_bytes_in_flight
        self.pools: list[SlotPool] = list({id(layer.pool): layer.pool for layer in layers}.values())
        self._facts = [
            LayerFacts(
                layer.num_experts, layer.num_physical_per_rank, self.pools.index(layer.pool), layer.pool.slot_bytes
            )
            for layer in layers
        ]

    @property
    def placements(self) -> list[Placement]:
        """By layer, as published last."""
        return [layer.newest.placement for layer in self._layers]

    @property
    def _shares(self) -> list[np.ndarray]:
        return [layer.newest.shares_WS for layer in self._layers]

    def fingerprint(self) -> tuple[int, ...]:
        """Equal on ranks that registered the same layers with the same placements."""
        return tuple(
            word
            for f, placement in zip(self._facts, self.placements, strict=True)
            for word in (
                f.num_experts,
                f.num_physical_per_rank,
                f.pool,
                f.slot_bytes,
                placement.num_lanes,
                placement.digest(),
            )
        )

    def free_slots(self) -> list[int]:
        """Of this rank, by pool."""
        return [pool.count(SlotState.FREE) for pool in self.pools]

    def decode_loads(self, messages: list[np.ndarray]) -> Loads:
        """What the ranks' messages of loads (`encode_loads`) say together."""
        return decode_loads(messages, len(self.pools), sum(f.num_experts for f in self._facts))

    def plan(self, loads: Loads) -> tuple[Plan, float]:
        """What to move, by the policy; and the seconds that it took to plan."""
        started_at = time.perf_counter()
        plan = plan_rebalance(
            self._facts,
            self.placements,
            self._shares,
            loads.load_NA,
            loads.free_slots_GW,
            self._policy,
            self._topology,
            self._max_bytes_in_flight,
        )
        seconds = time.perf_counter() - started_at
        if plan.waves:
            updates = [update for wave in plan.waves for update in wave.updates]
            moved = [self._facts[update.layer].slot_bytes for update in updates for _ in update.moves]
            logger.info(
                "plan: %d experts move (%.1f MB) in %d waves, after %.1f ms of planning",
                len(moved),
                sum(moved) / 1e6,
                len(plan.waves),
                1e3 * seconds,
            )
        return plan, seconds

    def balancedness(self, loads: Loads) -> float:
        """Mean over the largest of the ranks' loads under what is published, averaged over the layers."""
        ends = np.cumsum([f.num_experts for f in self._facts])
        loads_E = np.split(loads.load_NA.sum(axis=0), ends[:-1])
        layers = zip(loads_E, self.placements, self._shares, strict=True)
        return float(np.mean([layer_balancedness(*layer) for layer in layers]))
