"""Rebalance, plan: which move goes into which wave.

Each rank of each layer has experts to add and as many to drop. A wave takes, rank by rank,

1. *replacements*: add an expert, drop one that keeps another replica;
2. where every expert to drop is a last copy, *exchanges*: the last copy which a rank wants to drop is wanted by another rank
   (the goal holds every expert), which drops a last copy that a third wants, …; such a path closes a cycle, and one wave
   swaps all of it.

While moves remain and each rank has a free slot, one of the two exists, so every wave gets nearer to the goal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eplb.planning.placement import EMPTY, Placement

FAIR_SENDS = 2
"""A rank sends at most so many experts per free slot in a wave, unless that would leave another rank idle."""


@dataclass(frozen=True)
class Move:
    """One copy: `expert` from a lane that is live into a lane that is empty."""

    expert: int
    src_rank: int
    src_lane: int
    dst_rank: int
    dst_lane: int


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
            seen in them at once.
        spare_bits: the experts with several replicas, in the same way.
        adding: bit w for each rank w that still lacks something.
        live: expert → (rank, lane) that hold it before the wave that is being made.
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
    adding: int
    live: dict[int, list[tuple[int, int]]]

    @staticmethod
    def of(
        layer: int, pool: int, num_bytes: int, placement: Placement, goal_WE: np.ndarray, load_E: np.ndarray
    ) -> LayerWork:
        change_WE = goal_WE - placement.holds_WE()
        per_replica = (load_E / np.maximum(goal_WE.sum(axis=0), 1)).tolist()

        def listed(amount_WE: np.ndarray, sign: int) -> list[list[int]]:
            experts: list[list[int]] = [[] for _ in range(placement.num_ranks)]
            for rank, expert in np.argwhere(amount_WE > 0).tolist():
                experts[rank] += [expert] * int(amount_WE[rank, expert])
            return [sorted(ids, key=lambda e: (sign * per_replica[e], e)) for ids in experts]

        live: dict[int, list[tuple[int, int]]] = {}
        lanes = placement.lanes_WS.tolist()
        adds, drops, counts = listed(change_WE, -1), listed(-change_WE, 1), placement.replica_counts().tolist()
        for rank, experts in enumerate(lanes):
            for lane, expert in enumerate(experts):
                if expert != EMPTY:
                    live.setdefault(expert, []).append((rank, lane))
        return LayerWork(
            layer=layer,
            pool=pool,
            num_bytes=int(num_bytes),
            lanes=lanes,
            adds=adds,
            drops=drops,
            counts=counts,
            empty=[experts.count(EMPTY) for experts in lanes],
            add_bits=[_bits(experts) for experts in adds],
            drop_bits=[_bits(experts) for experts in drops],
            spare_bits=_bits(expert for expert, count in enumerate(counts) if count > 1),
            adding=_bits(rank for rank, experts in enumerate(adds) if experts),
            live=live,
        )

    @property
    def done(self) -> bool:
        return not self.adding

    def take(self, rank: int, added: int, dropped: int) -> None:
        """`rank` gets `added` in place of `dropped`; the lanes change at the end of the wave."""
        for experts, bits, expert in ((self.adds, self.add_bits, added), (self.drops, self.drop_bits, dropped)):
            experts[rank].remove(expert)
            if expert not in experts[rank]:
                bits[rank] ^= 1 << expert
        if not self.adds[rank]:
            self.adding ^= 1 << rank
        self.counts[added] += 1
        self.counts[dropped] -= 1
        for expert in (added, dropped):
            bit = 1 << expert
            self.spare_bits = self.spare_bits | bit if self.counts[expert] > 1 else self.spare_bits & ~bit


def _bits(numbers: Iterable[int]) -> int:
    """The set of these numbers, as bits of an integer."""
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits


def schedule_waves(
    works: Sequence[LayerWork],
    free_slots_GW: np.ndarray,
    max_bytes_in_flight: int | None,
    node_of_rank: np.ndarray,
) -> list[list[tuple[int, tuple[Move, ...], np.ndarray, bool]]]:
    """Packs all moves of `works` (most urgent first; consumed) into waves.

    No rank idles while something that it has to do is possible, so the number of waves is the most moves into one rank
    over its free slots, unless last copies or bytes hold something up.

    Returns:
        For each wave, for each layer in it: layer, moves, int64 [W, S] lanes after the wave, whether it is the layer's last.
    """
    remaining = [work for work in works if not work.done]
    waves = []
    while remaining:
        wave = _Wave(free_slots_GW.tolist(), node_of_rank.tolist(), max_bytes_in_flight)
        fair = FAIR_SENDS * max((work.num_bytes for work in remaining), default=0) * int(free_slots_GW.max(initial=1))
        picked: list[list[_Pair]] = [[] for _ in remaining]
        # First what spares busy senders, then whatever still fits: spreading must not cost a wave.
        for most_sent in (fair, None):
            for work, pairs in zip(remaining, picked, strict=True):
                if not work.done:
                    pairs += _choose(work, wave, most_sent, [pair.rank for pair in pairs])
        if not any(picked):
            raise RuntimeError(
                f"a wave without a move, although layers {[work.layer for work in remaining]} have something to move: "
                "the placements do not lead to their goals"
            )
        waves.append(
            [
                (work.layer, _place(work, pairs), np.array(work.lanes, dtype=np.int64), work.done)
                for work, pairs in zip(remaining, picked, strict=True)
                if pairs
            ]
        )
        remaining = [work for work in remaining if not work.done]
    return waves


@dataclass(frozen=True)
class _Pair:
    """On `rank`, `added` from `source` (rank, lane) comes in place of `dropped`."""

    rank: int
    added: int
    dropped: int
    source: tuple[int, int]


class _Wave:
    """What one wave still has: room [G][W] and the ranks with room (`open`, as bits), bytes, and what each rank sends."""

    def __init__(self, room: list[list[int]], nodes: list[int], max_bytes: int | None) -> None:
        self.room, self.nodes, self.max_bytes = room, nodes, max_bytes
        self.open = [_bits(rank for rank, free in enumerate(free_W) if free > 0) for free_W in room]
        self.ranks = range(len(nodes))
        self.used = 0
        self.sent = [0] * len(nodes)

    def has_bytes(self, num_bytes: int) -> bool:
        """The first thing in a wave always fits: it would fit no other wave either."""
        return self.max_bytes is None or not self.used or self.used + num_bytes <= self.max_bytes

    def source(self, work: LayerWork, expert: int, rank: int) -> tuple[int, int]:
        """The live lane to read from: on the rank itself, in its node, then of the rank that sends least so far."""
        return min(
            work.live[expert],
            key=lambda at: (at[0] != rank, self.nodes[at[0]] != self.nodes[rank], self.sent[at[0]], at),
        )


def _choose(work: LayerWork, wave: _Wave, most_sent: int | None, busy: list[int]) -> list[_Pair]:
    """Takes what this wave can do for one layer out of its lists. `busy`: ranks of pairs that it took before, with repeats.

    With `most_sent`, only replacements whose source then sends no more bytes than that.
    """
    pairs: list[_Pair] = []
    waiting = work.adding & wave.open[work.pool]
    if not waiting:
        return pairs
    ranks = [rank for rank in wave.ranks if waiting >> rank & 1]
    taken_in, given_up = _exchangeable(work, ranks)
    if not given_up & work.spare_bits and (most_sent is not None or not given_up & taken_in):
        return pairs  # most layers in most waves
    room = wave.room[work.pool]
    lanes_free = {rank: work.empty[rank] - busy.count(rank) for rank in ranks}

    def usable(rank: int) -> bool:
        return bool(work.adds[rank]) and room[rank] > 0 and lanes_free[rank] > 0

    def take(rank: int, added: int, dropped: int) -> None:
        source = wave.source(work, added, rank)
        wave.sent[source[0]] += work.num_bytes
        wave.used += work.num_bytes
        work.take(rank, added, dropped)
        room[rank] -= 1
        if not room[rank]:
            wave.open[work.pool] ^= 1 << rank
        lanes_free[rank] -= 1
        pairs.append(_Pair(rank, added, dropped, source))

    # Ranks with most left to do go first: they decide how many waves there are.
    ranks = sorted(filter(usable, ranks), key=lambda r: (-len(work.adds[r]), r))
    progress = bool(ranks)
    while progress:
        progress = False
        # 1. Replacements; an expert added here may free a last copy elsewhere, so until none is left.
        for rank in ranks:
            while work.drop_bits[rank] & work.spare_bits and usable(rank) and wave.has_bytes(work.num_bytes):
                dropped = next((e for e in work.drops[rank] if work.counts[e] > 1), None)
                added = None if dropped is None else _best_add(work, rank, wave, most_sent)
                if dropped is None or added is None:
                    break
                take(rank, added, dropped)
                progress = True
        if progress or most_sent is not None:
            continue
        # 2. Exchanges.
        taken_in, given_up = _exchangeable(work, filter(usable, ranks))
        if not taken_in & given_up:
            continue
        adders = _adders(work, usable)
        for rank in ranks:
            possible = work.drop_bits[rank] & taken_in and work.add_bits[rank] & given_up and usable(rank)
            cycle = _cycle(work, rank, adders) if possible else None
            if cycle and wave.has_bytes(work.num_bytes * len(cycle)):
                for step in cycle:
                    take(*step)
                progress = True
                adders = _adders(work, usable)
    return pairs


def _best_add(work: LayerWork, rank: int, wave: _Wave, most_sent: int | None) -> int | None:
    """The heaviest expert, but first one whose last copy another rank waits to be rid of."""
    able = [
        expert
        for expert in work.adds[rank]
        if most_sent is None or wave.sent[wave.source(work, expert, rank)[0]] + work.num_bytes <= most_sent
    ]
    for expert in able:
        if work.counts[expert] == 1 and any(expert in drops for drops in work.drops):
            return expert
    return able[0] if able else None


def _exchangeable(work: LayerWork, ranks: Iterable[int]) -> tuple[int, int]:
    """What any of `ranks` lacks, and what any of them drops, as bits. A cycle needs both of each expert on it."""
    taken_in = given_up = 0
    for rank in ranks:
        taken_in |= work.add_bits[rank]
        given_up |= work.drop_bits[rank]
    return taken_in, given_up


def _adders(work: LayerWork, usable: Callable[[int], bool]) -> dict[int, list[int]]:
    """expert → the ranks that lack it and can take it in now, ascending."""
    adders: dict[int, list[int]] = {}
    for rank, adds in enumerate(work.adds):
        if adds and usable(rank):
            for expert in dict.fromkeys(adds):
                adders.setdefault(expert, []).append(rank)
    return adders


def _cycle(work: LayerWork, start: int, adders: dict[int, list[int]]) -> list[tuple[int, int, int]] | None:
    """The shortest cycle through `start` of ranks each of which adds what the one before it drops; None if there is none.

    Returns (rank, added, dropped) of each rank on it.
    """
    came: dict[int, tuple[int, int]] = {}  # rank → (rank before it, expert that it gets from there)
    queue = deque([start])
    while queue and start not in came:
        rank = queue.popleft()
        for expert in dict.fromkeys(work.drops[rank]):
            for other in adders.get(expert, ()):
                if other not in came:
                    came[other] = (rank, expert)
                    queue.append(other)
    if start not in came:
        return None
    steps: list[tuple[int, int, int]] = []
    rank, dropped = start, -1
    while not steps or rank != start:  # backwards: what a rank adds, the one before it drops
        before, added = came[rank]
        steps.append((rank, added, dropped))
        rank, dropped = before, added
    steps[0] = (start, steps[0][1], dropped)
    return steps


def _place(work: LayerWork, pairs: list[_Pair]) -> tuple[Move, ...]:
    """Gives each pair its lane, and updates the placement. Fills go to lanes that are empty before the wave."""
    filled: set[tuple[int, int]] = set()
    moves = []
    for pair in sorted(pairs, key=lambda pair: (pair.rank, pair.added)):
        lanes = work.lanes[pair.rank]
        lane = lanes.index(EMPTY)
        lanes[lane] = pair.added
        filled.add((pair.rank, lane))
        moves.append(Move(pair.added, *pair.source, pair.rank, lane))
    for pair in pairs:  # only now: a lane that this wave empties is still read, and must not be filled
        lanes = work.lanes[pair.rank]
        lane = max(i for i, held in enumerate(lanes) if held == pair.dropped and (pair.rank, i) not in filled)
        lanes[lane] = EMPTY
        work.live[pair.dropped].remove((pair.rank, lane))
    for move in moves:
        work.live[move.expert].append((move.dst_rank, move.dst_lane))
    return tuple(moves)
