"""Rebalance, plan: `Planner` makes the plan from the ranks' summed load and the layers' newest placements."""

import logging
from collections.abc import Sequence

import numpy as np

from eplb.config import EplbConfig
from eplb.plan_process import MadePlan, PlanProcess, PlanRequest, make, why_not_sent
from eplb.planning.balance import balancedness, rank_loads
from eplb.planning.placement import Placement
from eplb.planning.policy import Policy, Topology
from eplb.planning.rebalance import LayerFacts
from eplb.relocation.pool import SlotPool
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.messages import Loads, decode_loads

logger = logging.getLogger(__name__)


class Planner:
    """What the layers' newest versions lead to, the same on all ranks; used by the worker's thread.

    Args:
        layers: all registered layers, in the same order on every rank.
        max_bytes_in_flight: bytes that all ranks together move in one wave; None for no bound.
        process: plans, if it is not to be done here. Belongs to this from now on.

    Attributes:
        pools: of the layers, each once.
        process: see above; None if planning is done here.
    """

    def __init__(
        self,
        layers: Sequence[ResidentExperts],
        policy: Policy,
        topology: Topology,
        max_bytes_in_flight: int | None,
        process: PlanProcess | None = None,
    ) -> None:
        self.process = process
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
        return [pool.num_free() for pool in self.pools]

    def decode_loads(self, messages: list[np.ndarray]) -> Loads:
        """What the ranks' messages of loads (`encode_loads`) say together."""
        return decode_loads(messages, len(self.pools), sum(f.num_experts for f in self._facts))

    def request(self, loads: Loads, past: Sequence[np.ndarray]) -> PlanRequest:
        """What a plan is made from now. `past`: the load of each earlier window that counts, oldest first."""
        return PlanRequest(
            self._facts,
            self.placements,
            self._shares,
            loads.load_NA,
            np.array(past, dtype=np.int64).reshape(len(past), loads.load_NA.shape[1]),
            loads.free_slots_GW,
            self._max_bytes_in_flight,
        )

    def plan(self, request: PlanRequest) -> MadePlan:
        """What to move, by the policy. Blocks while the policy thinks; on a thread of its own.

        Raises:
            Exception: of the policy, or of `PlanProcess.plan()`.
        """
        process = self.process
        made = process.plan(request) if process is not None else make(request, self._policy, self._topology)
        if made.num_waves:
            logger.info(
                "plan: %d experts move (%.1f MB) in %d waves, after %.1f ms of planning",
                made.num_moves,
                made.num_bytes / 1e6,
                made.num_waves,
                1e3 * made.seconds,
            )
        return made

    def start(self) -> None:
        """Get ready to plan. To be called when somebody is there to call `close()`."""
        if self.process is not None:
            self.process.start()

    def give_up(self) -> None:
        """Nobody waits for the plan under way any more: end it, if that can be done."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """Nothing is planned any more."""
        if self.process is not None:
            self.process.close()

    def balancedness(self, loads: Loads) -> float:
        """Mean over the largest of the ranks' loads under what is published, averaged over the layers."""
        ends = np.cumsum([f.num_experts for f in self._facts])
        loads_E = np.split(loads.load_NA.sum(axis=0), ends[:-1])
        # Like layers at once: layer by layer it would hold the interpreter for a millisecond.
        alike: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for load_E, placement, shares_WS in zip(loads_E, self.placements, self._shares, strict=True):
            key = (len(load_E), *placement.lanes_WS.shape)
            alike.setdefault(key, []).append((load_E, placement.lanes_WS, shares_WS))
        stacks = [[np.stack(arrays) for arrays in zip(*layers, strict=True)] for layers in alike.values()]
        return float(np.concatenate([balancedness(rank_loads(*stack)) for stack in stacks]).mean())


def plans_in_a_process(config: EplbConfig, policy: Policy) -> bool:
    """Whether rank 0 plans in a process of its own; see `EplbConfig.planning`.

    Raises:
        ValueError: it is asked for, and the policy cannot be sent there.
    """
    if config.planning == "thread" or (
        config.planning == "auto" and not (config.use_async and isinstance(config.policy, str))
    ):
        return False
    reason = why_not_sent(policy)
    if reason is None:
        return True
    if config.planning == "process":
        raise ValueError(
            f"planning='process' needs a policy that can be sent there, got policy={config.policy!r}: {reason}"
        )
    logger.warning("policy=%r plans on a thread, beside the forwards: %s", config.policy, reason)
    return False
