"""Policy "adaptive", settled layers: spare replicas go to the hottest experts, so that what is to come matters less.

Levelling W ranks takes some W - 1 replicas. Where there are more, the others are free to make the layer *steady*. The load
of an expert changes by some part of itself, from batch to batch and from window to window, and each rank feels that by the
load that it has of the expert. So what counts is the *exposure*: the sum of the squares of what the replicas carry. An expert
of load l on n ranks in equal parts makes l² / n of it. An expert that is on every rank makes no rank differ from another.

The policy of the hottest experts on every rank has this for its aim; here it comes in small steps, and balance comes first.

Shape letters: L layers, E experts, W ranks, P physical experts per rank, Q = W · P lanes counted over ranks, K experts and M
moves of a layer that are looked at, T placements that are tried.
"""

from __future__ import annotations

import numpy as np

from eplb.planning.levelling import level_loads
from eplb.planning.placement import count_experts

EXPERTS_TRIED = 4
"""Experts of a layer that may get a replica: those whose exposure it would lessen most."""

MOVES_TRIED = 8
"""Of all moves of a layer, so many are tried exactly."""

LEAST_GAIN = 0.02
"""The part of a layer's exposure that a move has to take off."""

ITER, NEAR = 4, 1e-3
"""Iterations and nearness of the levelled loads."""


def spread(load_LE: np.ndarray, physical_LWP: np.ndarray, limit_L: np.ndarray, max_moves: int) -> np.ndarray:
    """At most one move in each layer and `max_moves` in all: those that take off the largest parts of exposures.

    Args:
        load_LE: float64 [L, E], tokens of each expert.
        physical_LWP: int64 [L, W, P]; every expert has a replica.
        limit_L: largest rank load that a move may lead to, in units of the layer's mean rank load; or what it is without the
            move, if that is more.

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
    layer_T, tried_TWP = _moves(load_LE, physical_LWP, LEAST_GAIN * exposure_L)
    if not layer_T.size:
        return found_LWP
    exposure_T, highest_T = _exposure(load_LE[layer_T], tried_TWP)
    gain_T = np.round(1 - exposure_T / exposure_L[layer_T], 9)
    fits_T = (gain_T >= LEAST_GAIN) & (highest_T <= np.maximum(limit_L, highest_L)[layer_T] + 1e-9)
    order = np.argsort(-gain_T, kind="stable")
    order = order[fits_T[order]]
    _, first = np.unique(layer_T[order], return_index=True)  # the best of each layer
    chosen = order[np.sort(first)[:max_moves]]
    found_LWP[layer_T[chosen]] = tried_TWP[chosen]
    return found_LWP


def _exposure(load_LE: np.ndarray, physical_LWP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [L] each: the exposure, and the largest rank load, with level loads."""
    num_layers = len(physical_LWP)
    split, flow_R, rank_load_LW = level_loads(load_LE, physical_LWP, ITER, NEAR)
    counts_LE = count_experts(physical_LWP.reshape(num_layers, -1), load_LE.shape[1])
    whole_L = (np.where(counts_LE == 1, load_LE, 0.0) ** 2).sum(axis=1)
    return whole_L + np.bincount(split.layer_R, weights=flow_R**2, minlength=num_layers), rank_load_LW.max(axis=1)


def _moves(load_LE: np.ndarray, physical_LWP: np.ndarray, least_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves that promise to take off at least `least_L`, were all parts equal: layers [T] and placements [T, W, P]."""
    num_layers, num_ranks, per_rank = physical_LWP.shape
    num_lanes = num_ranks * per_rank
    rows = np.arange(num_layers)[:, None]
    physical_LQ = physical_LWP.reshape(num_layers, num_lanes)
    holds_LWE = count_experts(physical_LWP, load_LE.shape[1]) > 0
    counts_LE = count_experts(physical_LQ, load_LE.shape[1])
    gain_LE = np.where(counts_LE < num_ranks, load_LE**2 / (counts_LE * (counts_LE + 1)), -np.inf)
    loss_LE = np.where(counts_LE > 1, load_LE**2 / np.maximum(counts_LE * (counts_LE - 1), 1), np.inf)
    expert_LK = np.argsort(-np.round(gain_LE, 9), axis=1, kind="stable")[:, :EXPERTS_TRIED]
    score_LKQ = gain_LE[rows, expert_LK][:, :, None] - loss_LE[rows, physical_LQ][:, None]
    is_there_LKW = np.take_along_axis(holds_LWE.transpose(0, 2, 1), expert_LK[:, :, None], axis=1)
    score_LKQ[np.repeat(is_there_LKW, per_rank, axis=2)] = -np.inf
    score_LM = np.round(score_LKQ.reshape(num_layers, -1), 9)
    best_LM = np.argsort(-score_LM, axis=1, kind="stable")[:, :MOVES_TRIED]
    layer_T, place_T = np.nonzero(np.take_along_axis(score_LM, best_LM, axis=1) > np.maximum(least_L, 1e-9)[:, None])
    number_T, lane_T = np.divmod(best_LM[layer_T, place_T], num_lanes)
    tried_TQ = physical_LQ[layer_T]
    tried_TQ[np.arange(layer_T.size), lane_T] = expert_LK[layer_T, number_T]
    return layer_T, tried_TQ.reshape(-1, num_ranks, per_rank)
