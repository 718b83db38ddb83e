"""Policy "adaptive", `objective="decode"`: what a batch of few tokens costs a rank, and the shares that cost least.

With t tokens on average, an expert gets any with probability 1 − exp(−t), if tokens choose independently. A rank's cost is
the sum of that over its experts, + `token_cost` · its tokens. To split an expert over two ranks makes both read it, so
shares are 0 or 1, except where computing a heavy expert's tokens is worth reading it twice.

Shape letters: L layers, E logical experts, W ranks, P physical experts per rank.
"""

from __future__ import annotations

import numpy as np

from eplb.planning.shares import balanced_shares

PARTS = (1.0, 0.5, 0.25, 0.75)
"""Parts of what a replica has that are tried on another one; the first alone where tokens cost nothing."""


def per_batch(load: np.ndarray, batch_assignments: float) -> np.ndarray:
    """Tokens of each expert in a batch of so many assignments: [..., E]."""
    total = load.sum(axis=-1, keepdims=True)
    return load / np.where(total > 0, total, 1.0) * batch_assignments


def expert_costs(tokens: np.ndarray, token_cost: float) -> np.ndarray:
    """What experts cost with so many tokens per batch, in units of reading one expert."""
    return -np.expm1(-tokens) + token_cost * tokens


def rank_costs(
    tokens_LE: np.ndarray, physical_LWP: np.ndarray, shares_LWP: np.ndarray, token_cost: float
) -> np.ndarray:
    """float64 [L, W]: what a batch costs each rank."""
    tokens = np.take_along_axis(tokens_LE, physical_LWP.reshape(len(tokens_LE), -1), axis=1).reshape(physical_LWP.shape)
    return expert_costs(tokens * shares_LWP, token_cost).sum(axis=2)


def decode_shares(tokens_LE: np.ndarray, physical_LWP: np.ndarray, token_cost: float) -> np.ndarray:
    """Shares that level the ranks' costs: from whole experts, and from even splits, parts leave the most expensive rank.

    Args:
        tokens_LE: tokens of each expert per batch.
        physical_LWP: int64 [L, W, P].

    Returns:
        float64 [L, W, P].
    """
    cost_LE = expert_costs(tokens_LE, token_cost)
    starts = [one_replica_shares(cost_LE, physical_LWP)]
    if token_cost > 0:  # tokens may count for more than reading: then split experts are a better start
        starts.append(balanced_shares(cost_LE, physical_LWP))
        starts.append(balanced_shares(tokens_LE, physical_LWP))
    for shares_LWP in starts:
        for tokens_E, physical_WP, shares_WP in zip(tokens_LE, physical_LWP, shares_LWP, strict=True):
            _move_parts(tokens_E, physical_WP, shares_WP, token_cost)
    highest = [rank_costs(tokens_LE, physical_LWP, shares_LWP, token_cost).max(axis=1) for shares_LWP in starts]
    best_L = np.round(highest, 9).argmin(axis=0)
    return np.stack(starts)[best_L, np.arange(len(best_L))]


def _move_parts(tokens_E: np.ndarray, physical_WP: np.ndarray, shares_WP: np.ndarray, token_cost: float) -> None:
    """Moves parts of experts from the rank with the highest cost to others, as long as that lowers it. Changes `shares_WP`."""
    tokens_WP = tokens_E[physical_WP]
    cost_W = expert_costs(tokens_WP * shares_WP, token_cost).sum(axis=1)
    parts = PARTS if token_cost > 0 else PARTS[:1]
    for _ in range(4 * len(cost_W)):
        rank = int(np.round(cost_W, 9).argmax())
        best, best_highest = None, cost_W[rank] * (1 - 1e-6)
        for lane in np.flatnonzero(shares_WP[rank] > 0).tolist():
            expert, share = physical_WP[rank, lane], shares_WP[rank, lane]
            if not tokens_E[expert] > 0:
                continue
            for other, there in np.argwhere(physical_WP == expert).tolist():
                if other == rank:
                    continue
                for part in parts:
                    before = np.array([share, shares_WP[other, there]]) * tokens_E[expert]
                    moved = part * share * tokens_E[expert]
                    change = expert_costs(before + np.array([-moved, moved]), token_cost) - expert_costs(
                        before, token_cost
                    )
                    highest = round(float(max(cost_W[rank] + change[0], cost_W[other] + change[1])), 9)
                    if highest < best_highest:
                        best, best_highest = (lane, other, there, part * share, change), highest
        if best is None:
            return
        lane, other, there, moved, change = best
        shares_WP[rank, lane] -= moved
        shares_WP[other, there] += moved
        cost_W[rank] += change[0]
        cost_W[other] += change[1]


def one_replica_shares(load_LE: np.ndarray, physical_LWP: np.ndarray) -> np.ndarray:
    """Shares of 0 and 1 that level the rank loads: heaviest expert first, each to the least loaded of its ranks, then better
    places as long as there are any. A split expert would be read by several ranks."""
    shares_LWP = np.zeros(physical_LWP.shape)
    for load_E, physical_WP, shares_WP in zip(load_LE, physical_LWP, shares_LWP, strict=True):
        lanes: dict[int, list[tuple[int, int]]] = {}
        for rank, experts in enumerate(physical_WP.tolist()):
            for lane, expert in enumerate(experts):
                lanes.setdefault(expert, []).append((rank, lane))
        rank_load = [0.0] * len(physical_WP)
        chosen: dict[int, tuple[int, int]] = {}
        by_choice = sorted(lanes, key=lambda e: (len(lanes[e]) > 1, -float(load_E[e]), e))
        for _ in range(4):
            before = dict(chosen)
            for expert in by_choice:
                load = float(load_E[expert])
                if expert in chosen:
                    rank_load[chosen[expert][0]] -= load
                best = min(lanes[expert], key=lambda at: (round(rank_load[at[0]], 12), at))
                chosen[expert] = best
                rank_load[best[0]] += load
            if chosen == before:
                break
        for rank, lane in chosen.values():
            shares_WP[rank, lane] = 1.0
    return shares_LWP
