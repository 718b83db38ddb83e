"""Rebalance, plan: what is left to move in one layer, kept so that `eplb.planning.waves` finds at once what a wave can do.

Shape letters: E experts, W ranks, S lanes of a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from eplb.planning.placement import EMPTY, Placement


@dataclass(frozen=True)
class Move:
    """One copy: `expert` from a lane that is live into a lane that is empty."""

    expert: int
    src_rank: int
    src_lane: int
    dst_rank: int
    dst_lane: int


class Moves(Sequence[Move]):
    """Moves as they are sent: a `Move` is made only for who asks for one. Equal to any other sequence of the same moves.

    Attributes:
        columns_5M: int64 ``[5, M]``: the fields of `Move`, in order, of M moves.
    """

    def __init__(self, columns_5M: np.ndarray) -> None:
        self.columns_5M = columns_5M

    @staticmethod
    def of(moves: Sequence[Move]) -> Moves:
        """The same moves."""
        if isinstance(moves, Moves):
            return moves
        rows = [(move.expert, move.src_rank, move.src_lane, move.dst_rank, move.dst_lane) for move in moves]
        return Moves(np.array(rows, dtype=np.int64).reshape(-1, 5).T)

    def __len__(self) -> int:
        return int(self.columns_5M.shape[1])

    @overload
    def __getitem__(self, index: int) -> Move: ...

    @overload
    def __getitem__(self, index: slice) -> Moves: ...

    def __getitem__(self, index: int | slice) -> Move | Moves:
        if isinstance(index, slice):
            return Moves(self.columns_5M[:, index])
        return Move(*self.columns_5M[:, index].tolist())

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Moves({list(self)})"


@dataclass
class LayerWork:
    """What is left to do for one layer.

    Attributes:
        layer, pool: its index, and the pool that it draws from.
        num_bytes: bytes of one move.
        lanes: [W][S], the placement so far.
        adds, drops: [W], experts that each rank still lacks, and holds too many; equally many. Adds: heaviest first. Drops:
            lightest first.
        counts: [E], replicas so far.
        empty: [W], empty lanes before each wave: a wave leaves as many as it finds.
        add_bits, drop_bits: [W], `adds` and `drops` as sets: bit e for expert e. What most layers cannot do in most waves is
            seen in such sets at once.
        spare_bits: the experts with several replicas, in the same way.
        added_by, dropped_by: [E], the ranks that lack each expert, and hold it too often: bit w for rank w.
        adding: the ranks that still lack something, in the same way.
        able: the ranks with something to drop that has another replica.
        live: expert → (rank, lane) that hold it before the wave that is being made.
        stuck: ranks that could do nothing among themselves when they were last looked at; none after `take`.
    """

    layer: int
    pool: int
    num_bytes: int
    lanes: list[list[int]]
    adds: list[list[int]]
    drops: list[list[int]]
    counts: list[int]
    empty: list[int]
    add_bits: list[int]
    drop_bits: list[int]
    spare_bits: int
    added_by: list[int]
    dropped_by: list[int]
    adding: int
    able: int
    live: dict[int, list[tuple[int, int]]]
    stuck: int = 0

    @staticmethod
    def of(
        layer: int, pool: int, num_bytes: int, placement: Placement, goal_WE: np.ndarray, load_E: np.ndarray
    ) -> LayerWork:
        change_WE = goal_WE - placement.holds_WE()
        per_replica = (load_E / np.maximum(goal_WE.sum(axis=0), 1)).tolist()

        def listed(amount_WE: np.ndarray, sign: int) -> list[list[int]]:
            experts: list[list[int]] = [[] for _ in range(placement.num_ranks)]
            at = np.nonzero(amount_WE > 0)
            for rank, expert, amount in zip(*(a.tolist() for a in (*at, amount_WE[at])), strict=True):
                experts[rank] += [expert] * amount
            return [sorted(ids, key=lambda e: (sign * per_replica[e], e)) for ids in experts]

        live: dict[int, list[tuple[int, int]]] = {}
        lanes = placement.lanes_WS.tolist()
        adds, drops, counts = listed(change_WE, -1), listed(-change_WE, 1), placement.replica_counts().tolist()
        for rank, experts in enumerate(lanes):
            for lane, expert in enumerate(experts):
                if expert != EMPTY:
                    live.setdefault(expert, []).append((rank, lane))
        added_by, dropped_by = [0] * len(counts), [0] * len(counts)
        for lists, ranks_of in ((adds, added_by), (drops, dropped_by)):
            for rank, experts in enumerate(lists):
                for expert in experts:
                    ranks_of[expert] |= 1 << rank
        drop_bits = [bits_of(experts) for experts in drops]
        spare_bits = bits_of(expert for expert, count in enumerate(counts) if count > 1)
        return LayerWork(
            layer=layer,
            pool=pool,
            num_bytes=int(num_bytes),
            lanes=lanes,
            adds=adds,
            drops=drops,
            counts=counts,
            empty=[experts.count(EMPTY) for experts in lanes],
            add_bits=[bits_of(experts) for experts in adds],
            drop_bits=drop_bits,
            spare_bits=spare_bits,
            added_by=added_by,
            dropped_by=dropped_by,
            adding=bits_of(rank for rank, experts in enumerate(adds) if experts),
            able=bits_of(rank for rank, bits in enumerate(drop_bits) if bits & spare_bits),
            live=live,
        )

    @property
    def done(self) -> bool:
        return not self.adding

    def take(self, rank: int, added: int, dropped: int) -> None:
        """`rank` gets `added` in place of `dropped`; the lanes change at the end of the wave."""
        for experts, bits, ranks_of, expert in (
            (self.adds, self.add_bits, self.added_by, added),
            (self.drops, self.drop_bits, self.dropped_by, dropped),
        ):
            experts[rank].remove(expert)
            if expert not in experts[rank]:
                bits[rank] ^= 1 << expert
                ranks_of[expert] ^= 1 << rank
        self.stuck = 0
        if not self.adds[rank]:
            self.adding ^= 1 << rank
        self.counts[added] += 1
        self.counts[dropped] -= 1
        for expert in (added, dropped):
            bit = 1 << expert
            self.spare_bits = self.spare_bits | bit if self.counts[expert] > 1 else self.spare_bits & ~bit
        for other in members(self.dropped_by[added] | self.dropped_by[dropped] | 1 << rank):
            bit = 1 << other
            self.able = self.able | bit if self.drop_bits[other] & self.spare_bits else self.able & ~bit


def bits_of(numbers: Iterable[int]) -> int:
    """The set of these numbers, as bits of an integer."""
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits


def members(bits: int) -> Iterator[int]:
    """The numbers of the set, ascending."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
