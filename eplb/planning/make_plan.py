"""`make_plan`: from a proposal to a plan. Packs the moves into waves and gives every placement on the way its best shares.

Shape letters: L layers, E logical experts, W ranks, P physical experts and S lanes of a rank, G pools.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb.planning.balance import free_placement_bound, max_over_mean, rank_loads
from eplb.planning.layer_work import LayerWork, Move
from eplb.planning.placement import EMPTY, Placement, count_experts
from eplb.planning.plan import LayerUpdate, Plan, PlanSummary, Wave
from eplb.planning.policy import Proposal, Topology
from eplb.planning.shares import balanced_shares, cumulative_shares, equal_shares
from eplb.planning.waves import schedule_waves

GAP_BETWEEN = 1e-2
"""How near to the optimum the largest rank load is between two waves: these shares serve for one wave."""

SHARE_TOLERANCE = 1e-6
"""Shares that differ by less than this are the same: a millionth of an expert's tokens is worth no flip."""


def make_plan(
    current: Sequence[Placement],
    proposal: Proposal,
    load_LE: np.ndarray,
    *,
    free_slots_GW: np.ndarray,
    pool_of_layer: Sequence[int],
    bytes_per_expert: Sequence[int],
    max_bytes_in_flight: int | None,
    topology: Topology,
    live_shares: Sequence[np.ndarray] | None = None,
) -> Plan:
    """Waves that lead from the live placements to the proposal.

    The last update of a layer carries the proposal's shares, the ones before it the best shares for the placement at that
    moment. A layer whose placement stays but whose shares change gets them in the first wave; an unchanged layer gets no
    update. Layers that gain most per move come first, so that a plan that is cut short has done the best of it.

    Args:
        current: the live placement of each layer; every rank of a layer holds P experts.
        proposal: where to go.
        load_LE: [L, E], tokens per expert; for the shares in between and for the summary.
        free_slots_GW: int [G, W], free slots of each pool on each rank at the start of every wave.
        pool_of_layer: the pool that each layer draws from.
        bytes_per_expert: bytes that one move of each layer carries.
        max_bytes_in_flight: most bytes of one wave; None: no limit. A single move (or an exchange that no single move can
            begin, as all experts involved are last copies) that is larger goes alone.
        topology: sources in the target's node are preferred.
        live_shares: float64 [W, S] of each layer, the shares in force; None: equal ones.

    Raises:
        ValueError: shapes that do not go together, or a live or proposed placement that breaks a rule.
    """
    load_LE = np.asarray(load_LE, dtype=np.float64)
    free_slots_GW = np.asarray(free_slots_GW)
    _check(current, proposal, load_LE, free_slots_GW, pool_of_layer, bytes_per_expert, max_bytes_in_flight, topology)
    if not current:
        return Plan(())
    num_experts = load_LE.shape[1]
    live = [equal_shares(p) for p in current] if live_shares is None else [np.asarray(s) for s in live_shares]
    now_LWP = np.stack([placement.compact() for placement in current])
    counts_now, counts_goal = count_experts(now_LWP, num_experts), count_experts(proposal.physical_LWP, num_experts)
    moves_L = np.maximum(counts_goal - counts_now, 0).sum(axis=(1, 2))

    lanes_LWS = np.stack([p.lanes_WS for p in current])
    stale_L = max_over_mean(rank_loads(load_LE, lanes_LWS, np.stack(live)))
    goal_L = max_over_mean(rank_loads(load_LE, proposal.physical_LWP, proposal.shares_LWP))
    by_gain = sorted(range(len(current)), key=lambda i: (-(stale_L[i] - goal_L[i]) / max(moves_L[i], 1), i))

    works, degraded, share_only = [], [], []
    for index in by_gain:
        pool = pool_of_layer[index]
        if moves_L[index] == 0:
            shares_WS = shares_in_lanes(current[index].lanes_WS, proposal, index)
        elif (free_slots_GW[pool] < 1).any() or (current[index].lanes_WS != EMPTY).all(axis=1).any():
            degraded.append(index)
            shares_WS = balanced_shares(load_LE[[index]], current[index].lanes_WS[None])[0]
        else:
            works.append(
                LayerWork.of(index, pool, bytes_per_expert[index], current[index], counts_goal[index], load_LE[index])
            )
            continue
        if np.abs(shares_WS - live[index]).max() > SHARE_TOLERANCE:
            share_only.append(LayerUpdate(index, (), current[index], shares_WS))

    into_GW = np.zeros(free_slots_GW.shape, dtype=np.int64)  # moves into each rank of each pool
    for work in works:
        into_GW[work.pool] += [len(adds) for adds in work.adds]
    fewest = int(np.ceil(into_GW / np.maximum(free_slots_GW, 1)).max(initial=0))
    scheduled = schedule_waves(works, free_slots_GW, max_bytes_in_flight, topology.node_of_rank())
    waves = _with_shares(scheduled, proposal, load_LE, num_experts)
    if share_only:
        share_only.sort(key=lambda update: update.layer)
        first = waves[0].updates if waves else ()
        waves = [Wave((*first, *share_only)), *waves[1:]]
    summary = _summarise(waves, stale_L, load_LE, now_LWP.shape[1:], bytes_per_expert, degraded, fewest)
    return Plan(tuple(waves), summary)


def _with_shares(
    scheduled: list[list[tuple[int, tuple[Move, ...], np.ndarray, bool]]],
    proposal: Proposal,
    load_LE: np.ndarray,
    num_experts: int,
) -> list[Wave]:
    """Adds the shares to what the scheduler chose; those of all intermediate placements in one call."""
    between = [(layer, lanes) for wave in scheduled for layer, _, lanes, last in wave if not last]
    shares = iter(())
    if between:
        layers, lanes = zip(*between, strict=True)
        shares = iter(balanced_shares(load_LE[list(layers)], np.stack(lanes), GAP_BETWEEN, below=False))
    waves = []
    for wave in scheduled:
        updates = []
        for layer, moves, lanes_WS, last in wave:
            shares_WS = shares_in_lanes(lanes_WS, proposal, layer) if last else next(shares)
            updates.append(LayerUpdate(layer, moves, Placement(lanes_WS, num_experts), shares_WS))
        waves.append(Wave(tuple(sorted(updates, key=lambda update: update.layer))))
    return waves


def _summarise(
    waves: Sequence[Wave],
    stale_L: np.ndarray,
    load_LE: np.ndarray,
    shape_WP: tuple[int, ...],
    bytes_per_expert: Sequence[int],
    degraded: Sequence[int],
    fewest_waves: int,
) -> PlanSummary:
    updates = [update for wave in waves for update in wave.updates]
    num_moves = sum(len(update.moves) for update in updates)
    balance_L, after = stale_L.copy(), []
    if updates:  # of all waves in one call
        lanes = np.stack([update.placement.lanes_WS for update in updates])
        shares = np.stack([update.shares_WS for update in updates])
        balances = iter(
            max_over_mean(rank_loads(load_LE[[update.layer for update in updates]], lanes, shares)).tolist()
        )
        for wave in waves:
            for update in wave.updates:
                balance_L[update.layer] = next(balances)
            after.append(float(balance_L.mean()))
    num_ranks, per_rank = shape_WP
    mean_L = load_LE.sum(axis=1) / num_ranks
    bound_L = free_placement_bound(load_LE, num_ranks, num_ranks * per_rank)
    bound = float(np.where(mean_L > 0, bound_L / np.where(mean_L > 0, mean_L, 1.0), 1.0).mean())
    now = float(stale_L.mean())
    return PlanSummary(
        num_moves=num_moves,
        num_bytes=sum(len(update.moves) * int(bytes_per_expert[update.layer]) for update in updates),
        layers_moved=len({update.layer for update in updates if update.moves}),
        max_over_mean_now=now,
        max_over_mean_after=tuple(after),
        bound=bound,
        gain_per_move=(now - after[-1]) / num_moves if num_moves else 0.0,
        fewest_waves=fewest_waves,
        degraded=tuple(sorted(degraded)),
    )


def shares_in_lanes(lanes_WS: np.ndarray, proposal: Proposal, layer: int) -> np.ndarray:
    """The proposal's shares, moved to the lanes that hold the same experts on the same ranks."""
    physical_WP = proposal.physical_LWP[layer]
    order_WP = np.argsort(physical_WP, axis=1, kind="stable")
    # Sorted, the empty lanes (-1) come first and the rest pairs up with the sorted proposal.
    lane_WP = np.argsort(lanes_WS, axis=1, kind="stable")[:, lanes_WS.shape[1] - physical_WP.shape[1] :]
    shares_WS = np.zeros(lanes_WS.shape)
    np.put_along_axis(shares_WS, lane_WP, np.take_along_axis(proposal.shares_LWP[layer], order_WP, axis=1), axis=1)
    return shares_WS


def _check(
    current: Sequence[Placement],
    proposal: Proposal,
    load_LE: np.ndarray,
    free_slots_GW: np.ndarray,
    pool_of_layer: Sequence[int],
    bytes_per_expert: Sequence[int],
    max_bytes_in_flight: int | None,
    topology: Topology,
) -> None:
    num_layers = len(current)
    for name, value in (
        ("load_LE", load_LE),
        ("proposal.physical_LWP", proposal.physical_LWP),
        ("proposal.shares_LWP", proposal.shares_LWP),
        ("pool_of_layer", pool_of_layer),
        ("bytes_per_expert", bytes_per_expert),
    ):
        if len(value) != num_layers:
            raise ValueError(f"{name} has {len(value)} layers: current has {num_layers}")
    if proposal.physical_LWP.shape != proposal.shares_LWP.shape:
        raise ValueError(
            f"proposal: shares have shape {proposal.shares_LWP.shape}, placements {proposal.physical_LWP.shape}: must agree"
        )
    if max_bytes_in_flight is not None and max_bytes_in_flight < 1:
        raise ValueError(f"max_bytes_in_flight={max_bytes_in_flight}: must be at least 1, or None")
    if free_slots_GW.ndim != 2 or free_slots_GW.shape[1] != topology.num_ranks or (free_slots_GW < 0).any():
        raise ValueError(
            f"free_slots_GW has shape {free_slots_GW.shape}: must be [pools, {topology.num_ranks}], not negative"
        )
    for index, placement in enumerate(current):
        if not 0 <= pool_of_layer[index] < len(free_slots_GW):
            raise ValueError(f"pool_of_layer[{index}]={pool_of_layer[index]}: must lie in [0, {len(free_slots_GW)})")
        if placement.num_experts != load_LE.shape[1] or placement.num_lanes != current[0].num_lanes:
            raise ValueError(
                f"current[{index}] has {placement.num_experts} experts and {placement.num_lanes} lanes: one plan needs "
                f"{load_LE.shape[1]} experts (load_LE) and {current[0].num_lanes} lanes (current[0]) in every layer"
            )
        placement.validate()
        if placement.compact().shape != proposal.physical_LWP.shape[1:]:
            raise ValueError(
                f"proposal.physical_LWP[{index}] has shape {proposal.physical_LWP.shape[1:]}: "
                f"current has {placement.compact().shape}"
            )
        proposed = Placement(proposal.physical_LWP[index], placement.num_experts)
        proposed.validate()
        try:
            cumulative_shares(proposed, proposal.shares_LWP[index])
        except ValueError as error:
            raise ValueError(f"proposal.shares_LWP[{index}]: {error}") from None
