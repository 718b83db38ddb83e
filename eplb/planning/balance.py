"""Rebalance, plan: how even a load is. Pure functions of loads, placements and shares.

Shape letters: L layers, E logical experts, W ranks, P (or S) physical experts (lanes) per rank.
"""

from __future__ import annotations

import numpy as np

from eplb.planning.placement import EMPTY, Placement


def max_over_mean(rank_load_W: np.ndarray) -> np.ndarray:
    """Largest rank load over the mean one, over the last axis: [..., W] → float64 [...]; 1 where there is no load."""
    rank_load_W = np.asarray(rank_load_W, dtype=np.float64)
    mean = rank_load_W.mean(axis=-1)
    return np.where(mean > 0, rank_load_W.max(axis=-1) / np.where(mean > 0, mean, 1.0), 1.0)


def balancedness(rank_load_W: np.ndarray) -> np.ndarray:
    """Mean rank load over the largest one, in (0, 1]: [..., W] → float64 [...]; 1 where there is no load."""
    return 1.0 / max_over_mean(rank_load_W)


def rank_loads(load_LE: np.ndarray, physical_LWP: np.ndarray, shares_LWP: np.ndarray) -> np.ndarray:
    """Load of each rank: float64 [L, W]. Empty lanes (-1) carry nothing."""
    num_layers = physical_LWP.shape[0]
    ids = np.where(physical_LWP == EMPTY, 0, physical_LWP).reshape(num_layers, -1)
    load_LWP = np.take_along_axis(np.asarray(load_LE, dtype=np.float64), ids, axis=1).reshape(physical_LWP.shape)
    return (load_LWP * np.where(physical_LWP == EMPTY, 0.0, shares_LWP)).sum(axis=2)


def layer_balancedness(load_E: np.ndarray, placement: Placement, shares_WS: np.ndarray) -> float:
    """Balancedness of one layer's ranks under `load_E` (tokens per logical expert)."""
    return float(balancedness(rank_loads(np.asarray(load_E)[None], placement.lanes_WS[None], shares_WS[None])[0]))


def per_batch_imbalance(load_BLE: np.ndarray, physical_LWP: np.ndarray, shares_LWP: np.ndarray) -> np.ndarray:
    """Max/mean of every batch (or sub-window) by its own counts: [B, L, E] → float64 [B, L].

    A batch is never as even as the window: the shares fit the window's mean, not the batch.
    """
    return np.stack([max_over_mean(rank_loads(load_LE, physical_LWP, shares_LWP)) for load_LE in load_BLE])


def free_placement_bound(load_LE: np.ndarray, num_ranks: int, num_physical: int) -> np.ndarray:
    """B*: no placement of `num_physical` replicas, with any shares, has a smaller largest rank load.

    B* = max(total / W, the least B with Σ_e max(1, ⌈load_e / B⌉) ≤ num_physical): to keep every rank at B or below, expert
    e needs ⌈load_e / B⌉ ranks, each with a replica. It is a lower bound; that it can be reached is not promised.

    Args:
        load_LE: [L, E], tokens per expert.
        num_ranks: W.
        num_physical: replicas of a layer, at least E.

    Returns:
        float64 [L], in units of the load. With more ranks needed than there are (⌈load_e / B⌉ > W) it is total / W anyway.

    Raises:
        ValueError: fewer replicas than experts.
    """
    load_LE = np.asarray(load_LE, dtype=np.float64)
    num_experts = load_LE.shape[1]
    if num_physical < num_experts:
        raise ValueError(f"num_physical={num_physical}: must be at least the {num_experts} experts")
    mean_L = load_LE.sum(axis=1) / num_ranks

    def needed(bound_L: np.ndarray) -> np.ndarray:
        safe = np.where(bound_L > 0, bound_L, 1.0)
        # A hair off, so that load / bound = 3.0000000000000004 needs three replicas.
        return np.maximum(1.0, np.ceil(load_LE / safe[:, None] * (1 - 1e-12))).sum(axis=1)

    short_L = needed(mean_L) > num_physical
    if short_L.any():
        # Replicas by the greedy rule give the least B: the largest load per replica once all are dealt out.
        counts_LE = np.ones_like(load_LE)
        rows = np.arange(load_LE.shape[0])
        for _ in range(num_physical - num_experts):
            counts_LE[rows, (load_LE / counts_LE).argmax(axis=1)] += 1
        mean_L = np.where(short_L, np.maximum(mean_L, (load_LE / counts_LE).max(axis=1)), mean_L)
    return mean_L
