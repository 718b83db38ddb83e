"""Rebalance, plan: how the tokens of an expert are split over its replicas.

Shape letters: L layers, E logical experts, W ranks, P physical experts (or lanes, some empty) per rank.

New shares move no byte: they are the cheap lever, and for a given placement the best ones are found exactly.
"""

from __future__ import annotations

import numpy as np

from eplb.planning.levelling import GAP, count_replicas, level_loads
from eplb.planning.placement import EMPTY, Placement

SHARE_BITS = 30
"""Shares become integers in units of 2**-30."""


def equal_shares(placement: Placement) -> np.ndarray:
    """The same share for each replica of an expert: float64 [W, S], 0 at empty lanes."""
    return equal_shares_of(placement.lanes_WS[None], placement.num_experts)[0]


def equal_shares_of(physical_LWP: np.ndarray, num_experts: int) -> np.ndarray:
    """`equal_shares` over layers: int [L, W, P] → float64 [L, W, P]; an entry of -1 is an empty lane."""
    ids, counts = count_replicas(physical_LWP, num_experts)
    return np.where(physical_LWP == EMPTY, 0.0, 1.0 / np.maximum(counts.ravel()[ids].reshape(physical_LWP.shape), 1))


def balanced_shares(load_LE: np.ndarray, physical_LWP: np.ndarray, gap: float = GAP, below: bool = True) -> np.ndarray:
    """The shares that minimise the largest rank load of each layer.

    Args:
        load_LE: [L, E], tokens per logical expert; not negative.
        physical_LWP: int [L, W, P], the expert of each lane, -1 for an empty one. Two replicas of an expert may share a rank.
        gap: how near to the exact optimum the largest rank load must be: 0.00001 is 0.001 %.
        below: whether the loads below the largest are levelled too.

    Returns:
        float64 [L, W, P]; sums to 1 over the replicas of each expert that has one, 0 at empty lanes. Experts without load
        have equal shares. The largest rank load is within `gap` of the exact optimum. With `below`, no load could go from a
        rank to a less loaded one.

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
    split, flow_R, _ = level_loads(load_LE, physical_LWP, gap=gap, below=below)
    total_R = split.per_expert(flow_R)[split.expert_R]
    loaded_R = total_R > 0
    num_lanes = physical_LWP[0].size if len(physical_LWP) else 0
    at_R = split.layer_R * num_lanes + split.lane_R
    shares_LWP.reshape(-1)[at_R[loaded_R]] = flow_R[loaded_R] / total_R[loaded_R]
    return shares_LWP


def table_words(placement: Placement, shares_WS: np.ndarray) -> np.ndarray:
    """What the device's table of a placement holds, as one array.

    Returns:
        int32 [E + 1 + 2 * num_physical]: offsets and lanes of `placement.logical_to_lanes()`, then `cumulative_shares()`.

    Raises:
        ValueError: as `cumulative_shares()`.
    """
    offsets_E1, lanes = placement.logical_to_lanes()
    return np.concatenate([offsets_E1, lanes, cumulative_shares(placement, shares_WS)]).astype(np.int32)


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
