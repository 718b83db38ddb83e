"""Policy "adaptive", settled layers: spare replicas go to the hottest experts, so that what is to come matters less.

Levelling W ranks takes some W - 1 replicas. Where there are more, the others are free to make the layer *steady*. The load
of an expert changes by some part of itself, from batch to batch and from window to window, and each rank feels that by the
load that it has of the expert. So what counts is the *exposure*: the sum of the squares of what the replicas carry. An expert
of load l on n ranks in equal parts makes l² / n of it. An expert that is on every rank makes no rank differ from another: so
l² / W cannot be avoided and does no harm.

The policy of the hottest experts on every rank has this for its aim; here it comes in small steps, and balance comes first.

Shape letters: L layers, E experts, W ranks, P physical experts per rank, Q = W · P lanes counted over ranks, K experts and M
changes of a layer that are looked at, T placements that are tried.
"""

from __future__ import annotations

import numpy as np

from eplb.planning.levelling import level_loads
from eplb.planning.placement import count_experts

EXPERTS_TRIED = 4
"""Experts of a layer that may get a replica: those whose exposure it would lessen most."""

CHANGES_TRIED = 4
"""Of all single moves, and of all pairs of moves, of a layer, so many are tried exactly."""

LEAST_GAIN = 0.02
"""The part of a layer's avoidable exposure that a change has to take off for each expert that it moves."""

STEADY = 3.0
"""A change must promise so many times what the replica that it gives up is worth: noise alone should not move experts."""

ITER, NEAR = 4, 1e-3
"""Iterations and nearness of the levelled loads."""


def spread(
    load_LE: np.ndarray,
    physical_LWP: np.ndarray,
    limit_L: np.ndarray,
    max_moves: int,
    max_moves_L: np.ndarray | None = None,
) -> np.ndarray:
    """At most one change in each layer, of one or two moves: those that take off the largest parts of exposures.

    Args:
        load_LE: float64 [L, E], tokens of each expert.
        physical_LWP: int64 [L, W, P]; every expert has a replica.
        limit_L: largest rank load that a change may lead to, in units of the layer's mean rank load; or what it is without
            the change, if that is more.
        max_moves: in all layers together.
        max_moves_L: in each layer.

    Returns:
        int64 [L, W, P]. Equal input gives equal output.
    """
    _, num_ranks, per_rank = physical_LWP.shape
    num_experts = load_LE.shape[1]
    found_LWP = physical_LWP.copy()
    mean_L = load_LE.sum(axis=1) / num_ranks
    if num_ranks * per_rank - num_experts <= num_ranks or per_rank > num_experts or max_moves < 1:
        return found_LWP  # all replicas are needed for levelling, or every rank can have every expert
    load_LE = load_LE / np.where(mean_L > 0, mean_L, 1.0)[:, None]
    exposure_L, highest_L = _exposure(load_LE, physical_LWP)
    avoidable_L = np.maximum(exposure_L - (load_LE**2).sum(axis=1) / num_ranks, 1e-9)
    layer_T, moves_T, tried_TWP = _changes(load_LE, physical_LWP, LEAST_GAIN * avoidable_L)
    if max_moves_L is not None:
        fits = moves_T <= max_moves_L[layer_T]
        layer_T, moves_T, tried_TWP = layer_T[fits], moves_T[fits], tried_TWP[fits]
    if not layer_T.size:
        return found_LWP
    exposure_T, highest_T = _exposure(load_LE[layer_T], tried_TWP)
    gain_T = np.round((exposure_L[layer_T] - exposure_T) / avoidable_L[layer_T] / moves_T, 9)
    fits_T = (gain_T >= LEAST_GAIN) & (highest_T <= np.maximum(limit_L, highest_L)[layer_T] + 1e-9)
    order = np.argsort(-gain_T, kind="stable")
    order = order[fits_T[order]]
    _, first = np.unique(layer_T[order], return_index=True)  # the best of each layer
    chosen = order[np.sort(first)]
    chosen = chosen[np.cumsum(moves_T[chosen]) <= max_moves]
    found_LWP[layer_T[chosen]] = tried_TWP[chosen]
    return found_LWP


def _exposure(load_LE: np.ndarray, physical_LWP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [L] each: the exposure, and the largest rank load, with level loads."""
    num_layers = len(physical_LWP)
    split, flow_R, rank_load_LW = level_loads(load_LE, physical_LWP, ITER, NEAR)
    counts_LE = count_experts(physical_LWP.reshape(num_layers, -1), load_LE.shape[1])
    whole_L = (np.where(counts_LE == 1, load_LE, 0.0) ** 2).sum(axis=1)
    return whole_L + np.bincount(split.layer_R, weights=flow_R**2, minlength=num_layers), rank_load_LW.max(axis=1)


def _changes(
    load_LE: np.ndarray, physical_LWP: np.ndarray, least_L: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What promises to take off at least `least_L` for each expert moved, were all parts equal.

    A replica of a hot expert takes the lane of another expert's replica. Or it takes the lane of the lightest expert that its
    rank alone has, which moves to the lane of a replica on another rank: without that, hot experts would not come to ranks
    that have no replica to give up.

    Returns:
        layers [T], experts moved [T] (1 or 2), placements [T, W, P].
    """
    num_layers, num_ranks, per_rank = physical_LWP.shape
    rows = np.arange(num_layers)[:, None]
    physical_LQ = physical_LWP.reshape(num_layers, -1)
    holds_LWE = count_experts(physical_LWP, load_LE.shape[1]) > 0
    counts_LE = count_experts(physical_LQ, load_LE.shape[1])
    gain_LE = np.where(counts_LE < num_ranks, load_LE**2 / (counts_LE * (counts_LE + 1)), -np.inf)
    loss_LE = STEADY * np.where(counts_LE > 1, load_LE**2 / np.maximum(counts_LE * (counts_LE - 1), 1), np.inf)
    expert_LK = np.argsort(-np.round(gain_LE, 9), axis=1, kind="stable")[:, :EXPERTS_TRIED]
    is_there_LKW = np.take_along_axis(holds_LWE.transpose(0, 2, 1), expert_LK[:, :, None], axis=1)
    gain_LKW = np.where(is_there_LKW, -np.inf, gain_LE[rows, expert_LK][:, :, None])
    loss_LQ = loss_LE[rows, physical_LQ]

    # Single moves: into any lane.
    layer_1, number_1, lane_1 = _best(np.repeat(gain_LKW, per_rank, axis=2) - loss_LQ[:, None], least_L)
    single_TQ = physical_LQ[layer_1]
    single_TQ[np.arange(len(layer_1)), lane_1] = expert_LK[layer_1, number_1]

    # Pairs: each rank's lightest lone expert leaves for the replica elsewhere that costs least.
    lone_LWP = np.where(counts_LE[rows, physical_LQ] == 1, load_LE[rows, physical_LQ], np.inf).reshape(
        physical_LWP.shape
    )
    leaves_LW = lone_LWP.argmin(axis=2) + np.arange(num_ranks) * per_rank
    is_own_WQ = np.arange(num_ranks)[:, None] == np.arange(num_ranks * per_rank) // per_rank
    elsewhere_LWQ = np.where(is_own_WQ, np.inf, loss_LQ[:, None])
    to_LW = elsewhere_LWQ.argmin(axis=2)
    loss_LW = np.where(np.isinf(lone_LWP.min(axis=2)), np.inf, elsewhere_LWQ.min(axis=2))
    is_same_LKW = physical_LQ[rows, to_LW][:, None] == expert_LK[:, :, None]
    layer_2, number_2, rank_2 = _best(np.where(is_same_LKW, -np.inf, gain_LKW - loss_LW[:, None]) / 2, least_L)
    pair_TQ, each, lane_2 = physical_LQ[layer_2], np.arange(len(layer_2)), leaves_LW[layer_2, rank_2]
    pair_TQ[each, to_LW[layer_2, rank_2]] = pair_TQ[each, lane_2]
    pair_TQ[each, lane_2] = expert_LK[layer_2, number_2]

    moves_T = np.repeat([1, 2], [len(layer_1), len(layer_2)])
    tried_TWP = np.concatenate([single_TQ, pair_TQ]).reshape(-1, num_ranks, per_rank)
    return np.concatenate([layer_1, layer_2]), moves_T, tried_TWP


def _best(score_LKM: np.ndarray, least_L: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layer, expert's number and place of the `CHANGES_TRIED` best scores of each layer, where they are above its least."""
    score_LM = np.round(score_LKM.reshape(len(score_LKM), -1), 9)
    best_LM = np.argsort(-score_LM, axis=1, kind="stable")[:, :CHANGES_TRIED]
    is_enough_LM = np.take_along_axis(score_LM, best_LM, axis=1) > np.maximum(least_L, 1e-9)[:, None]
    layer_T, place_T = np.nonzero(is_enough_LM)
    return layer_T, *np.divmod(best_LM[layer_T, place_T], score_LKM.shape[2])
