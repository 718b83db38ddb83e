"""Shares: how the tokens of an expert are split over its replicas.

Shape letters: L layers, E logical experts, W ranks, P physical experts (or lanes, some empty) per rank; F experts with more
than one replica ("split" experts) and C replicas of the one that has most, both padded to the largest layer.

New shares move no byte: they are the cheap lever, and for a given placement the best ones are found exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eplb.placement import EMPTY, Placement

SHARE_BITS = 30
"""Shares become integers in units of 2**-30."""

GAP = 1e-5
"""Largest rank load over its lower bound, minus one, at which `balanced_shares` stops: 0.001 %. (It ends far below mostly.)"""

MAX_ITERATIONS = 200
"""Bound of the iteration; 1 to 8 are usual, and no layer seen needs more than some dozens."""


def equal_shares(placement: Placement) -> np.ndarray:
    """The same share for each replica of an expert: float64 [W, S], 0 at empty lanes."""
    return equal_shares_of(placement.lanes_WS[None], placement.num_experts)[0]


def equal_shares_of(physical_LWP: np.ndarray, num_experts: int) -> np.ndarray:
    """`equal_shares` over layers: int [L, W, P] → float64 [L, W, P]; an entry of -1 is an empty lane."""
    ids, counts = _count(physical_LWP, num_experts)
    return np.where(physical_LWP == EMPTY, 0.0, 1.0 / np.maximum(counts.ravel()[ids].reshape(physical_LWP.shape), 1))


def balanced_shares(load_LE: np.ndarray, physical_LWP: np.ndarray) -> np.ndarray:
    """The shares that minimise the largest rank load of each layer.

    Args:
        load_LE: [L, E], tokens per logical expert; not negative.
        physical_LWP: int [L, W, P], the expert of each lane, -1 for an empty one. Two replicas of an expert may share a rank.

    Returns:
        float64 [L, W, P]; sums to 1 over the replicas of each expert that has one, 0 at empty lanes. Experts without load
        have equal shares. The largest rank load is within `GAP` of the exact optimum, and the loads below the largest are
        levelled too: no load could go from a rank to a less loaded one.

    Raises:
        ValueError: shapes that do not go together, or a load that is negative or not finite.

    Example: experts 0, 1, 2 of loads 6, 2, 4 on ranks `[[0, 1], [0, 2]]` give expert 0 the shares 2/3 on rank 0 and 1/3 on
    rank 1, so that both carry 6.
    """
    load_LE, physical_LWP = np.asarray(load_LE, dtype=np.float64), np.asarray(physical_LWP)
    if load_LE.ndim != 2 or physical_LWP.ndim != 3 or len(load_LE) != len(physical_LWP):
        raise ValueError(
            f"load_LE, physical_LWP have shapes {load_LE.shape}, {physical_LWP.shape}: must be [L, E] and [L, W, P]"
        )
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise ValueError("load_LE: must be finite and not negative")
    shares_LWP = equal_shares_of(physical_LWP, load_LE.shape[1])
    problem, flow_LFC, _ = level_loads(load_LE, physical_LWP)
    total_LF = flow_LFC.sum(axis=2)
    loaded_LF = total_LF > 0
    part_LFC = flow_LFC / np.where(loaded_LF, total_LF, 1.0)[:, :, None]
    use_LFC = problem.valid_LFC & loaded_LF[:, :, None]
    layer, _, _ = np.nonzero(use_LFC)
    shares_LWP.reshape(len(load_LE), -1)[layer, problem.lane_LFC[use_LFC]] = part_LFC[use_LFC]
    return shares_LWP


def cumulative_shares(placement: Placement, shares_WS: np.ndarray) -> np.ndarray:
    """The shares as the table holds them: running sums inside each expert, in units of 2**-SHARE_BITS.

    Args:
        placement: S lanes on each of W ranks.
        shares_WS: float [W, S].

    Returns:
        int64 [num_physical], aligned with the lanes of `placement.logical_to_lanes()`: not falling inside an expert, the
        last of each exactly 2**SHARE_BITS. N tokens of an expert split at round(value · N / 2**SHARE_BITS).

    Raises:
        ValueError: another shape, a share that is negative or not finite, or an expert's shares that do not sum to 1.
    """
    shares_WS = np.asarray(shares_WS, dtype=np.float64)
    if shares_WS.shape != placement.lanes_WS.shape:
        raise ValueError(f"shares_WS has shape {shares_WS.shape}: must be {placement.lanes_WS.shape}, as the placement")
    offsets_E1, lanes = placement.logical_to_lanes()
    shares = shares_WS.ravel()[lanes]
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise ValueError("shares_WS: must be finite and not negative")
    counts_E = np.diff(offsets_E1)
    expert = np.repeat(np.arange(placement.num_experts), counts_E)
    sums_E = np.bincount(expert, weights=shares, minlength=placement.num_experts)
    wrong = np.flatnonzero((counts_E > 0) & (np.abs(sums_E - 1) > 1e-6))
    if wrong.size:
        raise ValueError(f"shares_WS: the shares of expert {wrong[0]} sum to {sums_E[wrong[0]]}: must sum to 1")
    # Rounded first and summed as integers: no running float sum that depends on the experts before.
    units = np.rint(shares * 2.0**SHARE_BITS).astype(np.int64)
    running = np.cumsum(units)
    before_E = np.concatenate([[0], running])[offsets_E1[:-1]]
    inside = np.minimum(running - before_E[expert], 1 << SHARE_BITS)
    inside[offsets_E1[1:][counts_E > 0] - 1] = 1 << SHARE_BITS
    return inside


def _count(physical_LWP: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
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
        expert_LF: int64, the split experts; padding repeats expert 0 with no valid replica.
        load_LF: float64, their loads; 0 where padded.
        valid_LFC: bool, where a replica is.
        rank_LFC, lane_LFC: int64, its rank, and its lane counted over ranks (rank · P + lane); 0 where padded.
    """

    base_LW: np.ndarray
    expert_LF: np.ndarray
    load_LF: np.ndarray
    valid_LFC: np.ndarray
    rank_LFC: np.ndarray
    lane_LFC: np.ndarray

    @staticmethod
    def of(load_LE: np.ndarray, physical_LWP: np.ndarray) -> SplitLoads:
        num_layers, num_ranks, per_rank = physical_LWP.shape
        num_experts = load_LE.shape[1]
        ids, counts = _count(physical_LWP, num_experts)
        load = np.zeros((num_layers, num_experts + 1))
        load[:, :num_experts] = load_LE
        load /= np.maximum(load.sum(axis=1) / num_ranks, np.finfo(np.float64).tiny)[:, None]
        count_of_lane, load_of_lane = counts.ravel()[ids], load.ravel()[ids]
        base_LW = np.where(count_of_lane == 1, load_of_lane, 0.0).reshape(physical_LWP.shape).sum(axis=2)
        layer, lane = np.nonzero((count_of_lane > 1) & (physical_LWP.reshape(num_layers, -1) != EMPTY))
        order = np.argsort(ids[layer, lane], kind="stable")
        layer, lane = layer[order], lane[order]
        id_of = ids[layer, lane]
        is_first = np.diff(id_of, prepend=-1) != 0
        first = np.flatnonzero(is_first)
        split = np.cumsum(is_first) - 1  # of all split experts of all layers, the number of this one
        replica = np.arange(layer.size) - first[split]
        per_layer = np.bincount(layer[first], minlength=num_layers)
        number = np.arange(first.size) - (np.cumsum(per_layer) - per_layer)[layer[first]]  # … and in its layer
        shape = (num_layers, int(per_layer.max(initial=0)), int(replica.max(initial=0)) + 1)
        expert_LF, load_LF = np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2])
        expert_LF[layer[first], number] = id_of[first] % (num_experts + 1)
        load_LF[layer[first], number] = load.ravel()[id_of[first]]
        at = (layer, number[split], replica)
        valid_LFC = np.zeros(shape, dtype=bool)
        rank_LFC, lane_LFC = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        valid_LFC[at], rank_LFC[at], lane_LFC[at] = True, lane // per_rank, lane
        return SplitLoads(base_LW, expert_LF, load_LF, valid_LFC, rank_LFC, lane_LFC)

    def take(self, layers: np.ndarray) -> SplitLoads:
        """Only these layers."""
        return SplitLoads(
            self.base_LW[layers],
            self.expert_LF[layers],
            self.load_LF[layers],
            self.valid_LFC[layers],
            self.rank_LFC[layers],
            self.lane_LFC[layers],
        )

    @cached_property
    def _bins_LFC(self) -> np.ndarray:
        num_layers, num_ranks = self.base_LW.shape
        return self.rank_LFC + (np.arange(num_layers) * num_ranks)[:, None, None]

    def per_rank(self, value_LFC: np.ndarray) -> np.ndarray:
        """Sums over the replicas of each rank: [L, F, C] → [L, W]. Padding must be 0."""
        size = self.base_LW.size
        sums = np.bincount(self._bins_LFC.ravel(), weights=value_LFC.ravel(), minlength=size)
        return sums.reshape(self.base_LW.shape)

    def at_replicas(self, value_LW: np.ndarray) -> np.ndarray:
        """What a rank's value is at each replica: [L, W] → [L, F, C]."""
        return value_LW.ravel()[self._bins_LFC]


def level_loads(
    load_LE: np.ndarray, physical_LWP: np.ndarray, max_iterations: int = MAX_ITERATIONS, gap: float = GAP
) -> tuple[SplitLoads, np.ndarray, np.ndarray]:
    """What `balanced_shares` finds, in its own terms.

    `max_iterations`, `gap`: stop after so many, or so near to the least maximum, with the best so far.

    Returns:
        split: the experts with several replicas.
        flow_LFC: float64, the load that each of their replicas carries.
        rank_load_LW: float64, both in units of the layer's mean rank load.
    """
    split = SplitLoads.of(load_LE, physical_LWP)
    flow_LFC = _level(split, max_iterations, gap)
    return split, flow_LFC, split.base_LW + split.per_rank(flow_LFC)


def _level(problem: SplitLoads, max_iterations: int, gap: float) -> np.ndarray:
    """Loads of the replicas, [L, F, C], that level the rank loads: least squares, hence the least maximum as well.

    Projected Newton: were all replicas in use, equal rank loads would be a linear system (a graph Laplacian over ranks,
    whose hyperedges are the split experts); solve it, cut off negative loads, drop the replicas that stay at zero, repeat.
    A dual bound says which layers are done. Newton may cycle; every other step of a layer that is slow fills its experts one
    by one (`_fill_one_by_one`), which never makes anything worse and converges on its own.
    """
    num_layers = len(problem.rank_LFC)
    flow_LFC = np.where(
        problem.valid_LFC, (problem.load_LF / np.maximum(problem.valid_LFC.sum(axis=2), 1))[:, :, None], 0.0
    )
    if not flow_LFC.size:
        return flow_LFC
    best_LFC, best_L = flow_LFC.copy(), np.full(num_layers, np.inf)
    bound_L = np.zeros(num_layers)
    todo, part, flow = np.arange(num_layers), problem, flow_LFC
    rank_load = part.base_LW + part.per_rank(flow)
    active = part.valid_LFC
    for iteration in range(max_iterations):
        if iteration % 2 and iteration > 4:
            flow = _fill_one_by_one(part, flow, rank_load)
        else:
            target = _newton_step(part, flow, active, rank_load)
            flow = target if iteration < 2 else _line_search(part, flow, target, rank_load)
        rank_load = part.base_LW + part.per_rank(flow)
        highest = rank_load.max(axis=1)
        better = highest < best_L[todo]
        best_L[todo[better]], best_LFC[todo[better]] = highest[better], flow[better]
        bound_L[todo] = np.maximum(bound_L[todo], _dual_bound(part, rank_load))
        keep = best_L[todo] > bound_L[todo] * (1 + gap)
        if not keep.any():
            break
        if not keep.all():
            todo, flow, rank_load = todo[keep], flow[keep], rank_load[keep]
            part = part.take(keep)
        # In use: what carries load, and what would take some because its rank is below the expert's mean level.
        level = part.at_replicas(rank_load)
        mean_level = (flow * level).sum(axis=2) / np.maximum(flow.sum(axis=2), np.finfo(np.float64).tiny)
        active = part.valid_LFC & ((flow > 0) | (level < mean_level[:, :, None]))
    return best_LFC


def _newton_step(part: SplitLoads, flow: np.ndarray, active: np.ndarray, rank_load: np.ndarray) -> np.ndarray:
    num_layers, num_split, _ = flow.shape
    num_ranks = part.base_LW.shape[1]
    used = active.sum(axis=2)
    weight = np.where(active, 1.0 / np.sqrt(np.maximum(used, 1))[:, :, None], 0.0)
    bins = part.rank_LFC + (np.arange(num_layers * num_split) * num_ranks).reshape(num_layers, num_split, 1)
    incidence = np.bincount(bins.ravel(), weights=weight.ravel(), minlength=num_layers * num_split * num_ranks)
    incidence = incidence.reshape(num_layers, num_split, num_ranks)
    laplacian = -(incidence.transpose(0, 2, 1) @ incidence)
    diagonal = np.arange(num_ranks)
    # The small term makes it regular; with it the solution levels every connected set of ranks to one part in 10^7.
    laplacian[:, diagonal, diagonal] = (
        laplacian[:, diagonal, diagonal] + part.per_rank(active.astype(np.float64)) + 1e-7
    )
    potential = part.at_replicas(np.linalg.solve(laplacian, rank_load[:, :, None])[:, :, 0])
    mean = np.where(active, potential, 0.0).sum(axis=2) / np.maximum(used, 1)
    return _project(part, flow + np.where(active, mean[:, :, None] - potential, 0.0))


def _line_search(part: SplitLoads, flow: np.ndarray, target: np.ndarray, rank_load: np.ndarray) -> np.ndarray:
    """The point between the two whose rank loads have the least sum of squares: cutting off may overshoot, and cycle."""
    change = part.base_LW + part.per_rank(target) - rank_load
    size = np.maximum((change * change).sum(axis=1), np.finfo(np.float64).tiny)
    step = np.clip(-(rank_load * change).sum(axis=1) / size, 0.0, 1.0)
    return flow + step[:, None, None] * (target - flow)


def _project(part: SplitLoads, flow: np.ndarray) -> np.ndarray:
    """The nearest loads that are not negative and sum to each expert's load (projection on a simplex)."""
    sorted_ = -np.sort(np.where(part.valid_LFC, -flow, np.inf), axis=2)
    finite = np.isfinite(sorted_)
    count = np.arange(1, flow.shape[2] + 1)
    cut = (np.where(finite, sorted_, 0.0).cumsum(axis=2) - part.load_LF[:, :, None]) / count
    kept = np.maximum((finite & (sorted_ > cut)).sum(axis=2), 1)
    threshold = np.take_along_axis(cut, kept[:, :, None] - 1, axis=2)
    return np.where(part.valid_LFC, np.maximum(flow - threshold, 0.0), 0.0)


def _fill_one_by_one(part: SplitLoads, flow: np.ndarray, rank_load: np.ndarray) -> np.ndarray:
    """One sweep: each expert in turn takes its load back and fills the lowest of its ranks evenly, like water."""
    flow, rank_load = flow.copy(), rank_load.copy()
    rows = np.arange(len(flow))[:, None]
    for number in range(flow.shape[1]):
        at = slice(number, number + 1)
        one = SplitLoads(
            part.base_LW,
            part.expert_LF[:, at],
            part.load_LF[:, at],
            part.valid_LFC[:, at],
            part.rank_LFC[:, at],
            part.lane_LFC[:, at],
        )
        rank_load -= one.per_rank(flow[:, at])
        # Filling to a level is projecting minus the levels that are there; replicas on one rank share its level, so they
        # are filled as one and the others of the rank get nothing.
        rank = one.rank_LFC[:, 0]
        twin = np.zeros_like(rank, dtype=bool)
        for c in range(1, rank.shape[1]):
            twin[:, c] = (rank[:, :c] == rank[:, c : c + 1]).any(axis=1) & one.valid_LFC[:, 0, c]
        one.valid_LFC = one.valid_LFC & ~twin[:, None]
        flow[:, at] = _project(one, -rank_load[rows, rank][:, None])
        rank_load += one.per_rank(flow[:, at])
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
    last = np.where(part.valid_LFC, part.at_replicas(position), 0).max(axis=2)
    bins = last + (np.arange(num_layers) * num_ranks)[:, None]
    inside = np.bincount(bins.ravel(), weights=part.load_LF.ravel(), minlength=num_layers * num_ranks)
    inside = inside.reshape(num_layers, num_ranks) + np.take_along_axis(part.base_LW, order, axis=1)
    return (inside.cumsum(axis=1) / np.arange(1, num_ranks + 1)).max(axis=1)
