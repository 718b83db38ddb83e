"""Policy "adaptive", stuck layers of very few slots: the best of all their placements.

Small whole loads leave a search with nothing to follow: one move makes nothing better, two do. Up to some 8 slots, all
placements fit in a table.

Shape letters: E experts, W ranks, P physical experts per rank, C placements, K sets of ranks, N sets of P experts.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, combinations_with_replacement, permutations
from math import comb

import numpy as np

LARGEST_TABLE = 4_000_000
"""Entries (placements × sets of ranks × experts) of the largest table; 4 ranks of 2 out of 8 experts need 3.8 million."""

TOLERANCE = 1e-5
"""Rank loads within this part of the least possible one count as the least."""


def is_small(num_experts: int, num_ranks: int, per_rank: int) -> bool:
    """Whether `best_placement` can look at all placements."""
    if per_rank > num_experts:
        return False
    num_sets = comb(num_experts, per_rank)
    return comb(num_sets + num_ranks - 1, num_ranks) * (2**num_ranks - 1) * num_experts <= LARGEST_TABLE


def best_placement(load_E: np.ndarray, live_WP: np.ndarray, limit: float) -> np.ndarray:
    """Of the placements whose largest rank load (with the best shares) is at most `limit`, the one with fewest moves.

    If there is none, of those with the least largest rank load.

    Args:
        load_E: float64 [E].
        live_WP: int64 [W, P], no expert twice on a rank; `is_small` holds.
        limit: in units of the load.

    Returns:
        int64 [W, P].
    """
    num_ranks, per_rank = live_WP.shape
    set_NP, set_of_CW, weight_KCE = _table(load_E.size, num_ranks, per_rank)
    # For any set of ranks: the load that has no replica outside it, over its size, bounds the largest rank load from below;
    # for one of the sets the bound is tight (max-flow min-cut).
    highest_C = (weight_KCE @ load_E.astype(np.float32)).max(axis=0)
    good = np.flatnonzero(highest_C <= max(limit, float(highest_C.min())) * (1 + TOLERANCE))
    common_NW = (set_NP[:, None, :, None] == live_WP[None, :, None]).any(axis=3).sum(axis=2)
    orders = np.array(list(permutations(range(num_ranks))))
    kept = np.stack([common_NW[set_of_CW[good], order].sum(axis=1) for order in orders])
    order, at = np.unravel_index(kept.argmax(), kept.shape)
    found_WP = np.empty_like(live_WP)
    found_WP[orders[order]] = set_NP[set_of_CW[good[at]]]
    return found_WP


@lru_cache(maxsize=4)
def _table(num_experts: int, num_ranks: int, per_rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All placements, up to the order of ranks.

    Returns:
        set_NP: int64, the sets of experts that a rank can hold.
        set_of_CW: int64, the set on each rank of each placement.
        weight_KCE: float32, for every set of k ranks 1 / k for the experts that have no replica outside it, else 0.
    """
    set_NP = np.array(list(combinations(range(num_experts), per_rank)))
    set_of_CW = np.array(list(combinations_with_replacement(range(len(set_NP)), num_ranks)))
    holds_NE = np.zeros((len(set_NP), num_experts), dtype=bool)
    np.put_along_axis(holds_NE, set_NP, True, axis=1)
    set_of_CW = set_of_CW[holds_NE[set_of_CW].any(axis=1).all(axis=1)]
    holds_CWE = holds_NE[set_of_CW]
    weights = []
    for bits in range(1, 2**num_ranks):
        inside_W = (bits >> np.arange(num_ranks)) & 1 == 1
        weights.append(~holds_CWE[:, ~inside_W].any(axis=1) / np.float32(inside_W.sum()))
    return set_NP, set_of_CW, np.stack(weights)
