"""`Plan`: the way from the live placements to the proposed ones, in waves of moves, each safe to publish.

Shape letters: W ranks, S lanes of a rank.

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

from eplb.planning.layer_work import Move, Moves
from eplb.planning.placement import EMPTY, Placement
from eplb.planning.shares import table_words

__all__ = ["LayerUpdate", "Move", "Moves", "Plan", "PlanSummary", "Wave"]


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """What a wave does to one layer; its table is published when all of the wave's moves have arrived.

    Attributes:
        layer: index into the planned layers.
        moves: copies to make; empty for new shares alone.
        placement: after the wave; filled lanes included, dropped lanes empty.
        shares_WS: float64 [W, S], aligned with `placement.lanes_WS`; 0 at empty lanes.
        table: int32, `table_words()` of these, if somebody has made them already: a plan is sent with them, so that no rank
            has to, beside its forwards.
    """

    layer: int
    moves: Sequence[Move]
    placement: Placement
    shares_WS: np.ndarray
    table: np.ndarray | None = None

    def table_words(self) -> np.ndarray:
        """`table`, made now if need be."""
        return table_words(self.placement, self.shares_WS) if self.table is None else self.table

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
