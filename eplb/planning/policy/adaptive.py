"""Policy "adaptive", the default: keeps what is well placed, follows the load by shares, moves only what pays.

Shape letters: L layers, N sub-windows, E logical experts, W ranks, P physical experts per rank.
"""

from __future__ import annotations

import time
from statistics import NormalDist
from typing import Literal

import numpy as np

from eplb.planning.balance import free_placement_bound, max_over_mean, rank_loads
from eplb.planning.placement import count_experts
from eplb.planning.policy.base import Proposal, Topology, check_input, register_policy
from eplb.planning.policy.decode import decode_shares, expert_costs, per_batch
from eplb.planning.policy.groups import regroup, split_by_node
from eplb.planning.policy.repair import repair
from eplb.planning.policy.spread import spread as spread_hot
from eplb.planning.shares import balanced_shares


def yield_gil() -> None:
    """Lets another thread (the one that serves) have the interpreter; costs about a microsecond if none wants it."""
    time.sleep(0)


@register_policy("adaptive")
class AdaptivePolicy:
    """Repairs the live placement instead of making a new one.

    1. The best shares for what is live. Layers whose largest rank load is then within `min_gain` of the bound B* (what any
       placement could reach, `eplb.planning.balance.free_placement_bound`) keep their placement.
    2. Layers that are worse, and by more than the sub-windows' own scatter explains, are repaired: few moves until they are
       within `target` of the bound (`eplb.planning.policy.repair`).
    3. Layers whose repair gains less than `min_gain` keep their placement after all; so do those that `max_moves` leaves out,
       the least gain per move first.
    4. Two replicas of one expert on one rank, where it can be avoided, give way to another expert.
    5. In layers that are left alone, spare replicas go to the hottest experts, few in each plan, so that their noise falls on
       many ranks (`eplb.planning.policy.spread`).

    With node-limited routing (`Topology.num_groups` divisible by more than one node) the experts of a group stay in one node.
    With several nodes and no groups, replicas inside the node of another replica are preferred.

    Args:
        min_gain: what a repair must take off a layer's max/mean (relative to the bound) to be worth it. 0.003 is 0.3 %.
        target: how near to the bound a repair goes; at most `min_gain`. None: 5/6 of `min_gain`.
        confidence: with N ≥ 2 sub-windows, a layer's overload must exceed so many of its standard errors beyond what the worst
            of W equal ranks show by chance (`overload_is_significant`); 0 trusts the mean.
        spread: the part of all slots that step 5 may change in one plan; 0: none. Not for "decode", which splits no expert
            without need.
        max_moves, max_moves_per_layer: most experts moved in one plan, or in one layer of it; None: no limit.
        objective: "tokens" balances tokens (compute-bound: prefill, training); "decode" what a batch costs a rank where reading
            experts counts (`eplb.planning.policy.decode`): activated experts + `token_cost` · tokens, and splits an expert
            only where that pays for reading it twice. Prefill and decode may run controllers of their own.
        batch_assignments: tokens · top-k of one batch over all ranks, for "decode".
        token_cost: what computing one token costs, in units of reading one expert, for "decode".

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        min_gain: float = 0.003,
        target: float | None = None,
        confidence: float = 1.0,
        spread: float = 0.01,
        max_moves: int | None = None,
        max_moves_per_layer: int | None = None,
        objective: Literal["tokens", "decode"] = "tokens",
        batch_assignments: float | None = None,
        token_cost: float = 0.0,
    ) -> None:
        if not 0 <= min_gain < np.inf:
            raise ValueError(f"min_gain={min_gain}: must be finite and not negative")
        if target is not None and not 0 <= target <= min_gain:
            raise ValueError(f"target={target}: must lie in [0, min_gain={min_gain}]")
        if not confidence >= 0:
            raise ValueError(f"confidence={confidence}: must not be negative")
        if not 0 <= spread <= 1:
            raise ValueError(f"spread={spread}: must lie in [0, 1]")
        for name, value in (("max_moves", max_moves), ("max_moves_per_layer", max_moves_per_layer)):
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: must not be negative")
        if objective not in ("tokens", "decode"):
            raise ValueError(f"objective={objective!r}: must be 'tokens' or 'decode'")
        if objective == "decode" and not 0 < (batch_assignments or 0) < np.inf:
            raise ValueError(
                f"batch_assignments={batch_assignments}: objective 'decode' needs the tokens · top-k of a batch"
            )
        if not 0 <= token_cost < np.inf:
            raise ValueError(f"token_cost={token_cost}: must be finite and not negative")
        self.min_gain = min_gain
        self.target = min_gain * 5 / 6 if target is None else target
        self.confidence = confidence
        self.spread = spread if objective == "tokens" else 0.0
        self.max_moves = max_moves
        self.max_moves_per_layer = max_moves_per_layer
        self.objective = objective
        self.batch_assignments = batch_assignments
        self.token_cost = token_cost

    def propose(self, load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> Proposal:
        """See `eplb.planning.policy.Policy.propose`."""
        load_LNE, live_LWP = check_input(load_LNE, physical_LWP, topology)
        num_experts = load_LNE.shape[2]
        tokens_LE = per_batch(load_LNE.sum(axis=1), self.batch_assignments or 1.0)
        if self.objective == "decode":
            load_LNE = expert_costs(per_batch(load_LNE, self.batch_assignments or 1.0), self.token_cost)
        load_LE = load_LNE.mean(axis=1)
        if topology.num_nodes > 1 and topology.num_groups > 1 and topology.num_groups % topology.num_nodes == 0:
            base_LWP = regroup(load_LE, live_LWP, topology, self.min_gain)
            parts = split_by_node(load_LNE, base_LWP, topology)
            node_W = np.zeros(base_LWP.shape[1] // topology.num_nodes, dtype=np.int64)
            new_LWP = parts.join(self._improve(parts.load_LNE, parts.physical_LWP, node_W))
        else:
            base_LWP = live_LWP
            new_LWP = self._improve(load_LNE, live_LWP, topology.node_of_rank())
        new_LWP = self._within_budget(load_LE, live_LWP, new_LWP, num_experts)
        if self.objective == "decode":
            return Proposal(new_LWP, decode_shares(tokens_LE, new_LWP, self.token_cost))
        return Proposal(new_LWP, balanced_shares(load_LE, new_LWP))

    def _improve(self, load_LNE: np.ndarray, live_LWP: np.ndarray, node_W: np.ndarray) -> np.ndarray:
        """Steps 1, 2 and 4 for layers, or for nodes as if they were layers."""
        load_LE = load_LNE.mean(axis=1)
        num_ranks, per_rank = live_LWP.shape[1:]
        base_LWP = without_twins(load_LE, live_LWP)
        mean_L = load_LE.sum(axis=1) / num_ranks
        bound_L = free_placement_bound(load_LE, num_ranks, num_ranks * per_rank) / np.where(mean_L > 0, mean_L, 1.0)
        rank_load_LW = rank_loads(load_LE, base_LWP, balanced_shares(load_LE, base_LWP))
        stale_L = max_over_mean(rank_load_LW)
        limit_L = bound_L * (1 + self.target)
        poor_L = (mean_L > 0) & (stale_L > bound_L * (1 + self.min_gain))
        if load_LNE.shape[1] > 1 and self.confidence > 0 and poor_L.any():
            poor_L &= overload_is_significant(load_LNE, base_LWP, rank_load_LW, bound_L, self.confidence)
        poor, calm = np.flatnonzero(poor_L), np.flatnonzero(~poor_L & (mean_L > 0))
        new_LWP = base_LWP.copy()
        budget_L = np.full(len(live_LWP), live_LWP[0].size)
        if self.max_moves_per_layer is not None:
            budget_L = np.maximum(self.max_moves_per_layer - num_moves(live_LWP, base_LWP, load_LE.shape[1]), 0)
        if calm.size and self.spread:
            most = int(self.spread * base_LWP.size)
            new_LWP[calm] = spread_hot(load_LE[calm], base_LWP[calm], limit_L[calm], most, budget_L[calm])
        if not poor.size:
            return new_LWP
        found_LWP = repair(load_LE[poor], base_LWP[poor], limit_L[poor], node_W, budget_L[poor], yield_gil)
        after_L = max_over_mean(rank_loads(load_LE[poor], found_LWP, balanced_shares(load_LE[poor], found_LWP)))
        # Compared with the limits, a layer that was just above min_gain and is now at the target counts as gaining enough.
        pays = stale_L[poor] - after_L >= (self.min_gain - self.target) * bound_L[poor]
        new_LWP[poor[pays]] = found_LWP[pays]
        return new_LWP

    def _within_budget(
        self, load_LE: np.ndarray, live_LWP: np.ndarray, new_LWP: np.ndarray, num_experts: int
    ) -> np.ndarray:
        """Step 3: the layers with most gain per move, as many as `max_moves` pays for."""
        limit = self.max_moves
        moves_L = num_moves(live_LWP, new_LWP, num_experts)
        if limit is None or moves_L.sum() <= limit:
            return new_LWP
        gain_L = max_over_mean(rank_loads(load_LE, live_LWP, balanced_shares(load_LE, live_LWP))) - max_over_mean(
            rank_loads(load_LE, new_LWP, balanced_shares(load_LE, new_LWP))
        )
        order = np.argsort(-np.round(gain_L / np.maximum(moves_L, 1), 9), kind="stable")
        kept_LWP = live_LWP.copy()
        for layer in order[moves_L[order] > 0].tolist():
            if moves_L[layer] <= limit:
                kept_LWP[layer] = new_LWP[layer]
                limit -= int(moves_L[layer])
        return kept_LWP


def num_moves(old_LWP: np.ndarray, new_LWP: np.ndarray, num_experts: int) -> np.ndarray:
    """int64 [L]: experts that a rank holds in the new placement and did not hold in the old one."""
    return ((count_experts(new_LWP, num_experts) > 0) & (count_experts(old_LWP, num_experts) == 0)).sum(axis=(1, 2))


def without_twins(load_LE: np.ndarray, physical_LWP: np.ndarray) -> np.ndarray:
    """Where a rank holds an expert twice and need not, the expert with most load per replica takes the second place."""
    num_experts = load_LE.shape[1]
    twins_LWE = count_experts(physical_LWP, num_experts) > 1
    if not twins_LWE.any() or physical_LWP.shape[2] > num_experts:
        return physical_LWP
    physical_LWP = physical_LWP.copy()
    counts_LE = count_experts(physical_LWP.reshape(len(physical_LWP), -1), num_experts)
    for layer, rank in np.argwhere(twins_LWE.any(axis=2)).tolist():
        held = physical_LWP[layer, rank]
        for lane in range(1, held.size):
            if held[lane] in held[:lane]:
                counts_LE[layer, held[lane]] -= 1
                per_replica_E = np.round(load_LE[layer] / counts_LE[layer], 9)
                per_replica_E[held] = -1.0
                held[lane] = per_replica_E.argmax()
                counts_LE[layer, held[lane]] += 1
    return physical_LWP


def overload_is_significant(
    load_LNE: np.ndarray, physical_LWP: np.ndarray, rank_load_LW: np.ndarray, bound_L: np.ndarray, confidence: float
) -> np.ndarray:
    """Whether the sub-windows agree that some ranks have to carry more than the bound: bool [L].

    Looked at are the sets of the k most loaded ranks, for every k: one of them explains the maximum. A set must carry the
    experts that have no replica outside it, whatever the shares. It is overloaded if that exceeds `bound_L` per rank by
    `confidence` standard errors beyond what the k largest of W equal normal variables sum up to: the ranks were picked for
    being the worst.

    The variance of a set is the sum of its experts', each from the steps between successive sub-windows: the load of a set
    alone has too few sub-windows to tell, and a drift, which is a reason to act, makes small steps.
    """
    num_layers, num_windows, num_experts = load_LNE.shape
    num_ranks = physical_LWP.shape[1]
    # The part of each expert in the load of its sub-window, in units of what a rank may carry.
    total_LN = load_LNE.sum(axis=2)
    may_LN = np.maximum(total_LN / num_ranks * bound_L[:, None], np.finfo(np.float64).tiny)
    part_LNE = load_LNE / may_LN[:, :, None]
    mean_LE = load_LNE.sum(axis=1) / np.maximum(may_LN.sum(axis=1), np.finfo(np.float64).tiny)[:, None]
    variance_LE = (np.diff(part_LNE, axis=1) ** 2).mean(axis=1) / 2 / num_windows
    # An expert is in the set of the k most loaded ranks if all its ranks are among them.
    position_LW = np.argsort(np.argsort(-rank_load_LW, axis=1, kind="stable"), axis=1)
    last_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
    np.maximum.at(last_LE, (np.arange(num_layers)[:, None, None], physical_LWP), position_LW[:, :, None])
    bins = (last_LE + np.arange(num_layers)[:, None] * num_ranks).ravel()

    def inside(value_LE: np.ndarray) -> np.ndarray:
        sums = np.bincount(bins, weights=value_LE.ravel(), minlength=num_layers * num_ranks)
        return sums.reshape(num_layers, num_ranks).cumsum(axis=1)

    # What the largest, second largest, … of W normal variables are expected to be (Blom 1958).
    worst_W = [NormalDist().inv_cdf((num_ranks - i - 0.375) / (num_ranks + 0.25)) for i in range(num_ranks)]
    chance_W = np.cumsum(worst_W) / np.sqrt(np.arange(1, num_ranks + 1))
    over_LW = inside(mean_LE) - np.arange(1, num_ranks + 1)
    error_LW = np.sqrt(inside(variance_LE))
    return (over_LW > np.maximum((chance_W + confidence) * error_LW, 1e-6)).any(axis=1)
