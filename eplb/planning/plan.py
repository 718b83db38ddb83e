"""Rebalance, plan: waves of moves from the live placements to the proposed ones, each safe to publish.

Shape letters: L layers, E logical experts, W ranks, P physical experts and S lanes of a rank, G pools.

A wave fills free slots, publishes the new tables of its layers and waits for grace; only then are the slots of the dropped
lanes free again. So in one wave a rank gives a layer as many experts as it takes from it, within the free slots of the pool
on that rank, and every expert keeps a replica (I2). `eplb.planning.waves` chooses what goes into which wave.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np

from eplb.planning.balance import free_placement_bound, max_over_mean, rank_loads
from eplb.planning.placement import EMPTY, Placement, count_experts
from eplb.planning.policy import Proposal, Topology
from eplb.planning.shares import balanced_shares, cumulative_shares, equal_shares
from eplb.planning.waves import LayerWork, Move, schedule_waves

__all__ = ["LayerUpdate", "Move", "Plan", "PlanSummary", "Wave", "make_plan"]

GAP_BETWEEN = 1e-3
"""How near to the optimum the shares of placements between two waves are: they serve for one wave."""

SHARE_TOLERANCE = 1e-6
"""Shares that differ by less than this are the same: a millionth of an expert's tokens is worth no flip."""


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """What a wave does to one layer; its table is published when all of the wave's moves have arrived.

    Attributes:
        layer: index into the planned layers.
        moves: copies to make; empty for new shares alone.
        placement: after the wave; filled lanes included, dropped lanes empty.
        shares_WS: float64 [W, S], aligned with `placement.lanes_WS`; 0 at empty lanes.
    """

    layer: int
    moves: tuple[Move, ...]
    placement: Placement
    shares_WS: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerUpdate):
            return NotImplemented
        return (
            (self.layer, self.moves, self.placement) == (other.layer, other.moves, other.placement)
        ) and np.array_equal(self.shares_WS, other.shares_WS)


@dataclass(frozen=True)
class Wave:
    """Updates that are filled and published together; each layer occurs at most once."""

    updates: tuple[LayerUpdate, ...]


@dataclass(frozen=True)
class PlanSummary:
    """What the plan costs and brings, known before it starts. Balances are max/mean of the rank loads, averaged over layers.

    Attributes:
        num_moves: experts copied.
        num_bytes: bytes copied.
        layers_moved: layers with at least one move.
        max_over_mean_now: with the shares that are live.
        max_over_mean_after: after each wave, in order.
        bound: no placement has less (`eplb.planning.balance.free_placement_bound` over the mean rank load).
        gain_per_move: (now − after the last wave) / moves, 0 without moves.
        fewest_waves: no schedule has fewer: the most moves into one rank of one pool, over its free slots.
        degraded: layers that got no move although they should: a rank of their pool has no free slot, or no empty lane.
    """

    num_moves: int = 0
    num_bytes: int = 0
    layers_moved: int = 0
    max_over_mean_now: float = 1.0
    max_over_mean_after: tuple[float, ...] = ()
    bound: float = 1.0
    gain_per_move: float = 0.0
    fewest_waves: int = 0
    degraded: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Waves, to be run strictly one after another; none when there is nothing to do."""

    waves: tuple[Wave, ...]
    summary: PlanSummary = field(default_factory=PlanSummary)

    def to_json(self) -> str:
        """Text that `from_json` turns into an equal plan; equal plans give equal text.

        Small, as every rank gets it: of a placement only what differs from the layer's update before (at first: from empty
        lanes), of shares only those that are not 1 (0 at empty lanes); the bytes of these arrays, little-endian, in base64.
        """
        heads, moves, changes, shares = [], [], [], []
        held: dict[int, np.ndarray] = {}
        for number, wave in enumerate(self.waves):
            for update in wave.updates:
                lanes_WS = update.placement.lanes_WS
                changed = np.flatnonzero(lanes_WS != held.get(update.layer, EMPTY))
                split = np.flatnonzero(update.shares_WS != (lanes_WS != EMPTY))
                sizes = (len(update.moves), changed.size, split.size)
                heads.append([number, update.layer, update.placement.num_experts, *lanes_WS.shape, *sizes])
                moves += [[m.expert, m.src_rank, m.src_lane, m.dst_rank, m.dst_lane] for m in update.moves]
                changes.append(np.stack([changed, lanes_WS.ravel()[changed]], axis=1))
                shares.append((split, update.shares_WS.ravel()[split]))
                held[update.layer] = lanes_WS
        raw = {
            "num_waves": len(self.waves),
            "updates": heads,
            "moves": moves,
            "lanes": _pack(changes, "<i4"),
            "shared": _pack([lanes for lanes, _ in shares], "<i4"),
            "shares": _pack([values for _, values in shares], "<f8"),
            "summary": asdict(self.summary),
        }
        return json.dumps(raw, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: `text` is no such text.
        """
        try:
            raw = json.loads(text)
            moves = iter([Move(*move) for move in raw["moves"]])
            changes, shared = _unpack(raw["lanes"], "<i4").reshape(-1, 2), _unpack(raw["shared"], "<i4")
            shares = _unpack(raw["shares"], "<f8")
            waves: list[list[LayerUpdate]] = [[] for _ in range(raw["num_waves"])]
            held: dict[int, np.ndarray] = {}
            for number, layer, num_experts, num_ranks, num_lanes, num_moves, num_changed, num_shared in raw["updates"]:
                lanes = held.setdefault(layer, np.full(num_ranks * num_lanes, EMPTY))
                (changed, experts), changes = changes[:num_changed].T, changes[num_changed:]
                lanes[changed] = experts
                shares_WS = (lanes != EMPTY).astype(np.float64)
                shares_WS[shared[:num_shared]] = shares[:num_shared]
                shared, shares = shared[num_shared:], shares[num_shared:]
                placement = Placement(lanes.reshape(num_ranks, num_lanes), num_experts)
                update_moves = tuple(islice(moves, num_moves))
                waves[number].append(
                    LayerUpdate(layer, update_moves, placement, shares_WS.reshape(num_ranks, num_lanes))
                )
            summary = raw["summary"]
            for name in ("max_over_mean_after", "degraded"):
                summary[name] = tuple(summary[name])
            return Plan(tuple(Wave(tuple(updates)) for updates in waves), PlanSummary(**summary))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"text={text[:40]!r}…: is no plan written by Plan.to_json ({error})") from error


def _pack(arrays: Sequence[np.ndarray], dtype: str) -> str:
    return b64encode(b"".join(array.astype(dtype).tobytes() for array in arrays)).decode()


def _unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(b64decode(text, validate=True), dtype=dtype)


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
            shares_WS = _shares_in_lanes(current[index].lanes_WS, proposal, index)
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
        shares = iter(balanced_shares(load_LE[list(layers)], np.stack(lanes), GAP_BETWEEN))
    waves = []
    for wave in scheduled:
        updates = []
        for layer, moves, lanes_WS, last in wave:
            shares_WS = _shares_in_lanes(lanes_WS, proposal, layer) if last else next(shares)
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
    for wave in waves:
        layers = [update.layer for update in wave.updates]
        lanes = np.stack([update.placement.lanes_WS for update in wave.updates])
        shares = np.stack([update.shares_WS for update in wave.updates])
        balance_L[layers] = max_over_mean(rank_loads(load_LE[layers], lanes, shares))
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


def _shares_in_lanes(lanes_WS: np.ndarray, proposal: Proposal, layer: int) -> np.ndarray:
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
