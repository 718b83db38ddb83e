"""Rebalance, plan: the most even rank loads that a placement allows, for `eplb.planning.shares.balanced_shares`.

Shape letters: L layers, E logical experts, W ranks, P physical experts (or lanes, some empty) per rank; F experts with more
than one replica ("split" experts) of all layers together, and R their replicas, in the order of layer, expert and lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eplb.planning.placement import EMPTY

GAP = 1e-5
"""The iteration stops when the largest rank load is within this part (0.001 %) of its lower bound, and when no rank could hand
more than a tenth of this part of the mean rank load to a rank that is less loaded by more than that."""

MAX_ITERATIONS = 200
"""Bound of the iteration; 1 to 8 are usual, and no layer seen needs more than some dozens."""


def count_replicas(physical_LWP: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids into a flat [L, E + 1] (empty lanes in the last column), int64 [L, W·P], and the replicas, int64 [L, E + 1]."""
    num_layers = physical_LWP.shape[0]
    flat = physical_LWP.reshape(num_layers, -1)
    ids = np.where(flat == EMPTY, num_experts, flat) + np.arange(num_layers)[:, None] * (num_experts + 1)
    counts = np.bincount(ids.ravel(), minlength=num_layers * (num_experts + 1))
    return ids, counts.reshape(num_layers, num_experts + 1)


@dataclass
class SplitLoads:
    """The part of the problem that shares can change: experts with several replicas. Loads in units of the mean rank load.

    Attributes:
        base_LW: float64, load of each rank by experts with one replica.
        layer_F: int64, the layer of each split expert, ascending.
        load_F: float64, its load.
        first_F: int64, the number of its first replica; its replicas follow each other.
        expert_R: int64, the split expert of each replica (0 … F-1).
        bin_R: int64, its rank, counted over layers: layer · W + rank.
        lane_R: int64, its lane, counted over the ranks of its layer: rank · P + lane.
    """

    base_LW: np.ndarray
    layer_F: np.ndarray
    load_F: np.ndarray
    first_F: np.ndarray
    expert_R: np.ndarray
    bin_R: np.ndarray
    lane_R: np.ndarray

    @staticmethod
    def of(load_LE: np.ndarray, physical_LWP: np.ndarray) -> SplitLoads:
        num_layers, num_ranks, per_rank = physical_LWP.shape
        num_experts = load_LE.shape[1]
        ids, counts = count_replicas(physical_LWP, num_experts)
        load = np.zeros((num_layers, num_experts + 1))
        load[:, :num_experts] = load_LE
        load /= np.maximum(load_LE.sum(axis=1) / num_ranks, np.finfo(np.float64).tiny)[:, None]
        counts[:, num_experts] = 0  # the empty lanes
        ids, counts = ids.ravel(), counts.ravel()
        base_LW = np.where(counts == 1, load.ravel(), 0.0)[ids].reshape(physical_LWP.shape).sum(axis=2)
        at_R = np.flatnonzero((counts > 1)[ids])
        at_R = at_R[np.argsort(ids[at_R], kind="stable")]
        id_F = np.flatnonzero(counts > 1)
        count_F = counts[id_F]
        layer_R, lane_R = np.divmod(at_R, num_ranks * per_rank)
        return SplitLoads(
            base_LW=base_LW,
            layer_F=id_F // (num_experts + 1),
            load_F=load.ravel()[id_F],
            first_F=np.cumsum(count_F) - count_F,
            expert_R=np.repeat(np.arange(id_F.size), count_F),
            bin_R=layer_R * num_ranks + lane_R // per_rank,
            lane_R=lane_R,
        )

    @cached_property
    def layer_R(self) -> np.ndarray:
        return self.layer_F[self.expert_R]

    @cached_property
    def count_F(self) -> np.ndarray:
        """Replicas of each split expert."""
        return np.diff(self.first_F, append=self.expert_R.size)

    @cached_property
    def load_per_replica_R(self) -> np.ndarray:
        """The load of its expert, in equal parts."""
        return (self.load_F / self.count_F)[self.expert_R]

    @cached_property
    def number_F(self) -> np.ndarray:
        """0, 1, 2, … in each layer."""
        return np.arange(self.layer_F.size) - np.searchsorted(self.layer_F, self.layer_F)

    def take(self, keep_L: np.ndarray) -> SplitLoads:
        """Only the layers of this boolean mask."""
        layer_L = np.cumsum(keep_L) - 1
        keep_F, keep_R = keep_L[self.layer_F], keep_L[self.layer_R]
        expert_F, count_F = np.cumsum(keep_F) - 1, self.count_F[keep_F]
        layer_R, num_ranks = self.layer_R[keep_R], self.base_LW.shape[1]
        return SplitLoads(
            base_LW=self.base_LW[keep_L],
            layer_F=layer_L[self.layer_F[keep_F]],
            load_F=self.load_F[keep_F],
            first_F=np.cumsum(count_F) - count_F,
            expert_R=expert_F[self.expert_R[keep_R]],
            bin_R=self.bin_R[keep_R] + (layer_L[layer_R] - layer_R) * num_ranks,
            lane_R=self.lane_R[keep_R],
        )

    def per_rank(self, value_R: np.ndarray) -> np.ndarray:
        """Sums over the replicas of each rank: [R] → [L, W]."""
        return np.bincount(self.bin_R, weights=value_R, minlength=self.base_LW.size).reshape(self.base_LW.shape)

    def per_expert(self, value_R: np.ndarray) -> np.ndarray:
        """Sums over the replicas of each split expert: [R] → [F]."""
        return np.bincount(self.expert_R, weights=value_R, minlength=self.load_F.size)

    def at_lanes(self, value_LQ: np.ndarray) -> np.ndarray:
        """What a lane's value is at each replica: [L, W·P] → [R]."""
        return value_LQ[self.layer_R, self.lane_R]

    def at_replicas(self, value_LW: np.ndarray) -> np.ndarray:
        """What a rank's value is at each replica: [L, W] → [R]."""
        return value_LW.ravel()[self.bin_R]


def level_loads(
    load_LE: np.ndarray,
    physical_LWP: np.ndarray,
    max_iterations: int = MAX_ITERATIONS,
    gap: float = GAP,
    begin_LQ: np.ndarray | None = None,
    below: bool = True,
) -> tuple[SplitLoads, np.ndarray, np.ndarray]:
    """What `balanced_shares` finds, in its own terms.

    `max_iterations`, `gap`: stop after so many, or so near to the least maximum and to level loads below it, with the best so
    far. `begin_LQ`: float64 [L, W·P], a load of each lane to begin with, in the same units as the result; what an expert's
    replicas have too much or too little of is split evenly. None: equal parts. Near the solution it saves iterations.
    `below`: whether the loads below the maximum must be level too; without, a third of the time.

    Returns:
        split: the experts with several replicas.
        flow_R: float64, the load that each of their replicas carries.
        rank_load_LW: float64, both in units of the layer's mean rank load.
    """
    split = SplitLoads.of(load_LE, physical_LWP)
    begin_R = None if begin_LQ is None else split.at_lanes(begin_LQ)
    flow_R = _level(split, max_iterations, gap, begin_R, below)
    return split, flow_R, split.base_LW + split.per_rank(flow_R)


def _level(problem: SplitLoads, max_iterations: int, gap: float, begin_R: np.ndarray | None, below: bool) -> np.ndarray:
    """Loads of the replicas, [R], that level the rank loads: least squares, hence the least maximum as well.

    Projected Newton: were all replicas in use, equal rank loads would be a linear system (a graph Laplacian over ranks,
    whose hyperedges are the split experts); solve it, cut off negative loads, drop the replicas that stay at zero, repeat.
    A layer is done when a dual bound meets its maximum and no load could go from a rank to a less loaded one (the condition
    of the least squares). Newton may cycle; every other step of a layer that is slow fills its experts one by one
    (`_fill_one_by_one`), which never makes anything worse and converges on its own.
    """
    num_layers = len(problem.base_LW)
    flow = problem.load_per_replica_R
    if not flow.size:
        return flow
    active = np.ones(flow.size, dtype=bool)
    if begin_R is not None:
        flow = _project(problem.expert_R, problem.load_F, begin_R)
        active = _in_use(problem, flow, problem.at_replicas(problem.base_LW + problem.per_rank(flow)))
    best_R, best_L = flow.copy(), np.full(num_layers, np.inf)
    bound_L = np.zeros(num_layers)
    todo, todo_R, part = np.arange(num_layers), np.arange(flow.size), problem
    rank_load = part.base_LW + part.per_rank(flow)
    for iteration in range(max_iterations):
        if iteration % 2 and iteration > 4:
            flow = _fill_one_by_one(part, flow, rank_load)
        else:
            target = _newton_step(part, flow, active, rank_load)
            flow = target if iteration < 2 else _line_search(part, flow, target, rank_load)
        rank_load = part.base_LW + part.per_rank(flow)
        squares = (rank_load * rank_load).sum(axis=1)
        better = squares < best_L[todo]
        better_R = better[part.layer_R]
        best_L[todo[better]], best_R[todo_R[better_R]] = squares[better], flow[better_R]
        if iteration + 1 == max_iterations:
            break
        bound_L[todo] = np.maximum(bound_L[todo], _dual_bound(part, rank_load))
        level = part.at_replicas(rank_load)
        keep = rank_load.max(axis=1) > bound_L[todo] * (1 + gap)
        if below:
            lower_R = level - np.minimum.reduceat(level, part.first_F)[part.expert_R]
            could_move_R = np.minimum(flow, lower_R) > gap / 10
            keep |= np.bincount(part.layer_R, weights=could_move_R, minlength=todo.size) > 0
        if not keep.any():
            break
        if not keep.all():
            keep_R = keep[part.layer_R]
            todo, todo_R, flow, rank_load = todo[keep], todo_R[keep_R], flow[keep_R], rank_load[keep]
            level, part = level[keep_R], part.take(keep)
        active = _in_use(part, flow, level)
    return best_R


def _in_use(part: SplitLoads, flow: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Replicas that carry load, and those that would take some because their rank is below the expert's mean level."""
    mean_level = part.per_expert(flow * level) / np.maximum(part.load_F, np.finfo(np.float64).tiny)
    return (flow > 0) | (level < mean_level[part.expert_R])


def _newton_step(part: SplitLoads, flow: np.ndarray, active: np.ndarray, rank_load: np.ndarray) -> np.ndarray:
    num_layers, num_ranks = rank_load.shape
    used = np.maximum(part.per_expert(active), 1)
    # Each layer's incidence matrix, split experts × ranks; as many rows as the layer with most has.
    num_rows = int(part.number_F.max()) + 1
    row_F = part.layer_F * (num_rows - 1) + part.number_F  # bin_R brings layer · W as well
    bins = row_F[part.expert_R] * num_ranks + part.bin_R
    weight = active / np.sqrt(used)[part.expert_R]
    incidence = np.bincount(bins, weights=weight, minlength=num_layers * num_rows * num_ranks)
    incidence = incidence.reshape(num_layers, num_rows, num_ranks)
    laplacian = -(incidence.transpose(0, 2, 1) @ incidence)
    diagonal = np.arange(num_ranks)
    # The small term makes it regular; with it the solution levels every connected set of ranks to one part in 10^7.
    laplacian[:, diagonal, diagonal] = laplacian[:, diagonal, diagonal] + part.per_rank(active) + 1e-7
    potential = part.at_replicas(np.linalg.solve(laplacian, rank_load[:, :, None])[:, :, 0])
    mean = part.per_expert(potential * active) / used
    return _project(part.expert_R, part.load_F, flow + (mean[part.expert_R] - potential) * active)


def _line_search(part: SplitLoads, flow: np.ndarray, target: np.ndarray, rank_load: np.ndarray) -> np.ndarray:
    """The point between the two whose rank loads have the least sum of squares: cutting off may overshoot, and cycle."""
    change = part.base_LW + part.per_rank(target) - rank_load
    size = np.maximum((change * change).sum(axis=1), np.finfo(np.float64).tiny)
    step = np.clip(-(rank_load * change).sum(axis=1) / size, 0.0, 1.0)
    return flow + step[part.layer_R] * (target - flow)


def _project(expert_R: np.ndarray, load_F: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The nearest loads that are not negative and sum to each expert's load (projection on simplices).

    All replicas of an expert give up the same amount; those that fall below zero are set to zero and the others share anew,
    until none falls (Michelot 1986).
    """
    num_experts = load_F.size
    kept = np.ones(flow.size)
    while True:
        cut = np.bincount(expert_R, weights=flow * kept, minlength=num_experts) - load_F
        result = flow - (cut / np.maximum(np.bincount(expert_R, weights=kept, minlength=num_experts), 1))[expert_R]
        falls = (result < 0) & (kept > 0)
        if not falls.any():
            return np.maximum(result, 0.0) * kept
        kept[falls] = 0.0


def _fill_one_by_one(part: SplitLoads, flow: np.ndarray, rank_load: np.ndarray) -> np.ndarray:
    """One sweep: each expert in turn takes its load back and fills the lowest of its ranks evenly, like water."""
    flow, rank_load_B, load_L = flow.copy(), rank_load.ravel().copy(), np.zeros(len(rank_load))
    number_R = part.number_F[part.expert_R]
    # Filling to a level is projecting minus the levels that are there; replicas on one rank share its level, so they are
    # filled as one and the others of the rank get nothing.
    twin_R = (np.diff(part.expert_R, prepend=-1) == 0) & (np.diff(part.bin_R, prepend=-1) == 0)
    for number in range(int(part.number_F.max()) + 1):
        at = np.flatnonzero(number_R == number)
        np.subtract.at(rank_load_B, part.bin_R[at], flow[at])
        flow[at] = 0.0
        at = at[~twin_R[at]]
        load_L[:] = 0.0  # at most one expert of each layer
        load_L[part.layer_F[part.number_F == number]] = part.load_F[part.number_F == number]
        flow[at] = _project(part.layer_R[at], load_L, -rank_load_B[part.bin_R[at]])
        rank_load_B[part.bin_R[at]] += flow[at]
    return flow


def _dual_bound(part: SplitLoads, rank_load: np.ndarray) -> np.ndarray:
    """The most that some set of ranks must carry on average: [L].

    For any set of ranks, the load of the experts that have no replica outside it over its size is a lower bound of the largest
    rank load. Tried are the sets of the k most loaded ranks; at the optimum one of them is tight.
    """
    num_layers, num_ranks = rank_load.shape
    order = np.argsort(-rank_load, axis=1, kind="stable")
    position = np.empty_like(order)
    np.put_along_axis(position, order, np.arange(num_ranks)[None], axis=1)
    last_F = np.maximum.reduceat(part.at_replicas(position), part.first_F)
    inside = np.bincount(last_F + part.layer_F * num_ranks, weights=part.load_F, minlength=rank_load.size)
    inside = inside.reshape(num_layers, num_ranks) + np.take_along_axis(part.base_LW, order, axis=1)
    return (inside.cumsum(axis=1) / np.arange(1, num_ranks + 1)).max(axis=1)
