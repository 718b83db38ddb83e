"""Policy "adaptive", search: few moves that bring overloaded layers below a limit, all layers in step.

Each step solves the best shares of the layers that are still above their limit, estimates what single moves (and, where those
promise little, exchanges of two) would take off the excess, and applies the best. A step that did not help is taken back, and
the layer's candidates are then tried out exactly, by solving their shares. A layer that is still stuck starts again from a
placement made in one go (`pour`); a tiny one gets the best of all its placements (`exhaustive`).

Shape letters as in `eplb.planning.policy.candidates`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from eplb.planning.levelling import level_loads
from eplb.planning.policy.candidates import TINY, Changes, Situation, doubles, singles
from eplb.planning.policy.exhaustive import best_placement, is_small
from eplb.planning.policy.pour import pour

POOR_SINGLE = 0.05
"""Exchanges are looked at where the best single move promises less than this part of the layer's excess."""

EXACT_TRIES = ((2, 1), (6, 2))
"""Candidates of each kind that are tried exactly, and sources they come from, in a layer's first, second, … step without
progress; then it is given up."""

TRIED_AT_ONCE = 512
"""Bounds memory, and how long the interpreter is kept from other threads."""

IDLE_FLOW = 0.05
"""A lane that carries less than this part of a rank's mean load may not have been worth its move."""

IDLE_ROUNDS = 2
"""Moves of a layer that are taken back at most."""

ITER = 3
NEAR = 1e-3
"""Iterations and nearness for the shares in between: close is good enough, the step after corrects it."""


def repair(
    load_LE: np.ndarray,
    physical_LWP: np.ndarray,
    limit_L: np.ndarray,
    node_W: np.ndarray,
    max_moves_L: np.ndarray | None = None,
    pause: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Changes lanes until every rank load (with the best shares) is at most the layer's limit, or nothing helps any more.

    Args:
        load_LE: float64 [L, E], tokens of each expert; layers without load are left alone.
        physical_LWP: int64 [L, W, P], the experts of each rank.
        limit_L: float64 [L], in units of the layer's mean rank load.
        node_W: int64 [W], the node of each rank; contiguous.
        max_moves_L: most lanes to change, per layer.
        pause: called once in every step.

    Returns:
        int64 [L, W, P]. Equal input gives equal output; ties go to the lowest lane and expert.
    """
    num_ranks = physical_LWP.shape[1]
    mean_L = load_LE.sum(axis=1) / num_ranks
    load_LE = load_LE / np.where(mean_L > 0, mean_L, 1.0)[:, None]
    found_LWP, left_L = _search(load_LE, physical_LWP, limit_L, node_W, max_moves_L, pause)
    if physical_LWP.shape[2] > load_LE.shape[1]:
        return found_LWP  # a rank has slots for all experts
    for way in ("pour", "pour, merged", "exhaustive"):  # one after another for the layers that are still stuck
        stuck = np.flatnonzero(left_L > TINY)
        if not stuck.size or (way == "exhaustive" and not is_small(load_LE.shape[1], *physical_LWP.shape[1:])):
            break
        load_AE, live_AWP, limit_A = load_LE[stuck], physical_LWP[stuck], limit_L[stuck]
        if way == "exhaustive":
            made_AWP = np.stack([best_placement(*problem) for problem in zip(load_AE, live_AWP, limit_A, strict=True)])
        else:
            merge = way == "pour, merged"
            made_AWP = np.stack([pour(*problem, merge) for problem in zip(load_AE, live_AWP, limit_A, strict=True)])
            budget_A = None
            if max_moves_L is not None:
                budget_A = np.maximum(max_moves_L[stuck] - _num_moved(live_AWP, made_AWP), 0)
            made_AWP, _ = _search(load_AE, made_AWP, limit_A, node_W, budget_A, pause)
        _, _, old_AW = level_loads(load_AE, found_LWP[stuck])
        _, _, new_AW = level_loads(load_AE, made_AWP)
        better_A = new_AW.max(axis=1) < old_AW.max(axis=1) - TINY
        if max_moves_L is not None:
            better_A &= _num_moved(live_AWP, made_AWP) <= max_moves_L[stuck]
        found_LWP[stuck[better_A]] = made_AWP[better_A]
        highest_A = np.where(better_A, new_AW.max(axis=1), old_AW.max(axis=1))
        left_L[stuck] = highest_A - limit_A
    return _without_idle_moves(load_LE, physical_LWP, found_LWP, limit_L, pause)


def _num_moved(old_LWP: np.ndarray, new_LWP: np.ndarray) -> np.ndarray:
    """int64 [L]: experts that a rank holds in the new placement and did not hold in the old one."""
    return (new_LWP[:, :, :, None] != old_LWP[:, :, None]).all(axis=3).sum(axis=(1, 2))


@dataclass
class _Placed:
    """The layers' placements while the search changes them.

    Attributes:
        physical_LQ: int64, the expert of each lane.
        flow_LQ: float64, the load that each lane carried when the shares were last solved; 0 in lanes changed since. Levelling
            begins with it: few replicas differ from step to step.
        budget_L: int64, moves that each layer may still make.
        before: layer → its physical_LQ and flow_LQ before its last change, and the moves of that.
    """

    physical_LQ: np.ndarray
    flow_LQ: np.ndarray
    budget_L: np.ndarray
    before: dict[int, tuple[np.ndarray, np.ndarray, int]] = field(default_factory=dict)

    def change(self, changes: Changes, layers: np.ndarray) -> np.ndarray:
        """Makes the first change of each of `layers` where there is one and the budget has it. Returns where it was made."""
        moves = changes.num_moves_AK[:, 0]
        can = np.isfinite(changes.score_AK[:, 0]) & (moves <= self.budget_L[layers])
        layers = layers[can]
        old = (layers.tolist(), self.physical_LQ[layers], self.flow_LQ[layers], moves[can].tolist())
        for layer, physical_Q, flow_Q, num_moves in zip(*old, strict=True):
            self.before[layer] = (physical_Q, flow_Q, num_moves)
        for i in range(2):
            lane = changes.lane_AKM[can, 0, i]
            self.physical_LQ[layers, lane] = changes.expert_AKM[can, 0, i]
            self.flow_LQ[layers, lane] = 0.0
        self.budget_L[layers] -= moves[can]
        return can

    def take_back(self, layers: np.ndarray) -> None:
        """Undoes the last change of each layer."""
        for layer in layers.tolist():
            self.physical_LQ[layer], self.flow_LQ[layer], num_moves = self.before[layer]
            self.budget_L[layer] += num_moves


def _search(
    load_LE: np.ndarray,
    physical_LWP: np.ndarray,
    limit_L: np.ndarray,
    node_W: np.ndarray,
    max_moves_L: np.ndarray | None,
    pause: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Steps until the limit is reached or nothing helps. Returns the placement, and what is left of each layer's excess."""
    num_layers = len(physical_LWP)
    physical_LQ = physical_LWP.reshape(num_layers, -1).copy()
    budget_L = np.full(num_layers, physical_LQ.shape[1]) if max_moves_L is None else max_moves_L.copy()
    placed = _Placed(physical_LQ, np.zeros(physical_LQ.shape), budget_L)

    def solve(layers: np.ndarray, iterations: int) -> Situation:
        begin_AQ = placed.flow_LQ[layers]
        return _solve(load_LE[layers], physical_LQ[layers], limit_L[layers], node_W, iterations, begin_AQ)

    excess_L = np.full(num_layers, np.inf)
    failed_L = np.zeros(num_layers, dtype=np.int64)
    left_L = np.zeros(num_layers)
    todo = np.flatnonzero((load_LE.sum(axis=1) > 0) & (budget_L > 0))
    while todo.size:
        pause()
        now = solve(todo, ITER)
        placed.flow_LQ[todo] = now.flow_AQ
        excess_A = now.excess_AW.sum(axis=1)
        left_L[todo] = np.minimum(excess_A, excess_L[todo])
        above = excess_A > TINY
        worse = above & (excess_A > excess_L[todo] - TINY)
        better = above & ~worse
        next_todo = []
        if worse.any():  # take the last step of those layers back, and look more closely
            layers = todo[worse]
            placed.take_back(layers)
            failed_L[layers] += 1
            layers = layers[failed_L[layers] <= len(EXACT_TRIES)]  # else what was tried exactly did not hold: given up
            if layers.size:
                again = solve(layers, 0)  # with the loads that were solved before that step
                next_todo.append(_step_exactly(again, placed, layers, failed_L, pause))
        better &= budget_L[todo] > 0
        if better.any():
            layers = todo[better]
            failed_L[layers] = 0
            excess_L[layers] = excess_A[better]
            if not better.all():
                now = now.take(better)
            done_A = placed.change(_by_estimate(now), layers)
            next_todo.append(layers[done_A])
            if not done_A.all():  # nothing that the estimate likes
                now, layers = now.take(~done_A), layers[~done_A]
                next_todo.append(_step_exactly(now, placed, layers, failed_L, pause))
        todo = np.sort(np.concatenate(next_todo)) if next_todo else todo[:0]
    return physical_LQ.reshape(physical_LWP.shape), left_L


def _without_idle_moves(
    load_LE: np.ndarray, live_LWP: np.ndarray, found_LWP: np.ndarray, limit_L: np.ndarray, pause: Callable[[], None]
) -> np.ndarray:
    """Takes back early moves that later ones made needless: those whose lane carries little now, if the limit still holds."""
    num_layers, num_ranks, per_rank = live_LWP.shape
    found_LQ, live_LQ = found_LWP.reshape(num_layers, -1).copy(), live_LWP.reshape(num_layers, -1)
    todo = np.flatnonzero((found_LQ != live_LQ).any(axis=1))
    for _ in range(IDLE_ROUNDS if todo.size else 0):
        pause()
        now = _solve(load_LE[todo], found_LQ[todo], limit_L[todo], np.zeros(num_ranks, dtype=np.int64))
        old_AQ = live_LQ[todo]
        new_AW1P = now.physical_AQ.reshape(len(todo), num_ranks, 1, per_rank)
        still_there = (old_AQ.reshape(len(todo), num_ranks, per_rank, 1) == new_AW1P).any(axis=3)
        fits = (now.physical_AQ != old_AQ) & ~still_there.reshape(old_AQ.shape)
        row, lane = np.nonzero(fits & (now.count_AQ > 1) & (now.flow_AQ < IDLE_FLOW))
        if not row.size:
            break
        tried = now.physical_AQ[row]
        tried[np.arange(row.size), lane] = old_AQ[row, lane]
        _, _, rank_load = level_loads(now.load_AE[row], tried.reshape(row.size, num_ranks, -1), ITER, NEAR)
        highest = np.round(rank_load.max(axis=1) - now.limit_A[row], 9)
        best = np.lexsort((highest, row))
        best = best[np.diff(row[best], prepend=-1) != 0]  # the first of each layer
        best = best[(highest[best] <= 0) & (now.excess_AW.sum(axis=1)[row[best]] <= TINY)]
        found_LQ[todo[row[best]], lane[best]] = old_AQ[row[best], lane[best]]
        todo = todo[row[best]]
        if not todo.size:
            break
    return found_LQ.reshape(live_LWP.shape)


def _solve(
    load_AE: np.ndarray,
    physical_AQ: np.ndarray,
    limit_A: np.ndarray,
    node_W: np.ndarray,
    iterations: int = ITER,
    begin_AQ: np.ndarray | None = None,
) -> Situation:
    """`begin_AQ`: loads of the lanes to begin with (`eplb.planning.levelling.level_loads`)."""
    physical_AWP = physical_AQ.reshape(len(physical_AQ), len(node_W), -1)
    split, flow_R, rank_load_AW = level_loads(load_AE, physical_AWP, iterations, NEAR, begin_AQ)
    return Situation(load_AE, physical_AQ, len(node_W), limit_A, split, flow_R, rank_load_AW, node_W)


def _by_estimate(now: Situation) -> Changes:
    """The most promising change of each layer."""
    excess_A = now.excess_AW.sum(axis=1)
    best = singles(now, 1).best(1)
    poor = ~(best.score_AK[:, 0] >= POOR_SINGLE * excess_A)
    if poor.any():
        pairs = doubles(now.take(poor), 1).best(1)
        better = pairs.score_AK[:, 0] > best.score_AK[poor, 0]
        at = np.flatnonzero(poor)[better]
        for name in ("lane_AKM", "expert_AKM", "score_AK", "num_moves_AK"):
            getattr(best, name)[at, 0] = getattr(pairs, name)[better, 0]
    return best


def _step_exactly(
    now: Situation, placed: _Placed, layers: np.ndarray, failed_L: np.ndarray, pause: Callable[[], None]
) -> np.ndarray:
    """Tries candidates out and applies what takes off most per move. Returns the layers that found something."""
    found_A = np.zeros(len(layers), dtype=bool)
    excess_A = now.excess_AW.sum(axis=1)
    first = int(np.clip(failed_L[layers].min() - 1, 0, len(EXACT_TRIES) - 1))
    for num, num_sources in EXACT_TRIES[first:]:
        left = np.flatnonzero(~found_A)
        if not left.size:
            break
        part = now.take(~found_A)
        tried = singles(part, num).best(num).with_(doubles(part, num, num_sources))
        affordable = tried.num_moves_AK <= placed.budget_L[layers[left]][:, None]
        row, at = np.nonzero(np.isfinite(tried.score_AK) & affordable)
        if not row.size:
            continue
        after = np.empty(row.size)
        for first_tried in range(0, row.size, TRIED_AT_ONCE):
            some = slice(first_tried, first_tried + TRIED_AT_ONCE)
            layer, k = row[some], at[some]
            physical, flow, number = part.physical_AQ[layer], part.flow_AQ[layer], np.arange(layer.size)
            for i in range(2):
                lane = tried.lane_AKM[layer, k, i]
                physical[number, lane], flow[number, lane] = tried.expert_AKM[layer, k, i], 0.0
            physical_WP = physical.reshape(layer.size, now.num_ranks, -1)
            _, _, rank_load = level_loads(part.load_AE[layer], physical_WP, ITER, NEAR, flow)
            after[some] = np.maximum(rank_load - part.limit_A[layer][:, None], 0.0).sum(axis=1)
            pause()
        gain = np.full(tried.score_AK.shape, -np.inf)
        gain[row, at] = (excess_A[left][row] - after) / tried.num_moves_AK[row, at]
        tried.score_AK = np.where(gain > 2 * TINY, gain, -np.inf)
        found_A[left] = placed.change(tried.best(1), layers[left])
    return layers[found_A]
