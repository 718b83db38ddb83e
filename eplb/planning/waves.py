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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eplb.planning.layer_work import LayerWork, Move, bits_of, members
from eplb.planning.placement import EMPTY

FAIR_SENDS = 2
"""A rank sends at most so many experts per free slot in a wave, unless that would leave another rank idle."""


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


class _Pair(NamedTuple):
    """On `rank`, `added` from `source` (rank, lane) comes in place of `dropped`."""

    rank: int
    added: int
    dropped: int
    source: tuple[int, int]


class _Wave:
    """What one wave still has: room [G][W] and the ranks with room (`open`, as bits), bytes, and what each rank sends."""

    def __init__(self, room: list[list[int]], nodes: list[int], max_bytes: int | None) -> None:
        self.room, self.nodes, self.max_bytes = room, nodes, max_bytes
        self.open = [bits_of(rank for rank, free in enumerate(free_W) if free > 0) for free_W in room]
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
    # Most layers in most waves can do nothing.
    if not work.able & waiting:
        if most_sent is not None or not waiting & ~work.stuck:
            return pairs
        if not _exchanging(work, waiting):
            work.stuck = waiting
            return pairs
    room = wave.room[work.pool]
    lanes_free = {rank: work.empty[rank] - busy.count(rank) for rank in members(waiting)}
    with_lane = bits_of(rank for rank, free in lanes_free.items() if free > 0)

    def usable() -> int:
        return work.adding & wave.open[work.pool] & with_lane

    def take(rank: int, added: int, dropped: int) -> None:
        nonlocal with_lane
        source = wave.source(work, added, rank)
        wave.sent[source[0]] += work.num_bytes
        wave.used += work.num_bytes
        work.take(rank, added, dropped)
        room[rank] -= 1
        if not room[rank]:
            wave.open[work.pool] ^= 1 << rank
        lanes_free[rank] -= 1
        if not lanes_free[rank]:
            with_lane ^= 1 << rank
        pairs.append(_Pair(rank, added, dropped, source))

    # Ranks with most left to do go first: they decide how many waves there are.
    ranks = sorted(members(usable()), key=lambda r: (-len(work.adds[r]), r))
    progress = bool(ranks)
    while progress:
        progress = False
        # 1. Replacements; an expert added here may free a last copy elsewhere, so until none is left.
        for rank in ranks:
            while work.able & usable() & 1 << rank and wave.has_bytes(work.num_bytes):
                added = _best_add(work, rank, wave, most_sent)
                if added is None:
                    break
                dropped = next(e for e in work.drops[rank] if work.counts[e] > 1)
                take(rank, added, dropped)
                progress = True
        if progress or most_sent is not None:
            continue
        # 2. Exchanges.
        exchanging = _exchanging(work, usable())
        for rank in ranks:
            cycle = _cycle(work, rank, exchanging & usable()) if exchanging & usable() & 1 << rank else None
            if cycle and wave.has_bytes(work.num_bytes * len(cycle)):
                for step in cycle:
                    take(*step)
                progress = True
    return pairs


def _best_add(work: LayerWork, rank: int, wave: _Wave, most_sent: int | None) -> int | None:
    """The heaviest expert, but first one whose last copy another rank waits to be rid of."""
    able = [
        expert
        for expert in work.adds[rank]
        if most_sent is None or wave.sent[wave.source(work, expert, rank)[0]] + work.num_bytes <= most_sent
    ]
    for expert in able:
        if work.counts[expert] == 1 and work.dropped_by[expert]:
            return expert
    return able[0] if able else None


def _exchanging(work: LayerWork, ranks: int) -> int:
    """Those of the set `ranks` of which each adds what another one drops and drops what another one adds: as bits.

    There is a cycle if and only if there are any, and every cycle is among them.
    """
    able = list(members(ranks))
    while able:
        taken_in = given_up = 0
        for rank in able:
            taken_in |= work.add_bits[rank]
            given_up |= work.drop_bits[rank]
        both = taken_in & given_up
        left = [rank for rank in able if work.add_bits[rank] & both and work.drop_bits[rank] & both]
        if len(left) == len(able):
            break
        able = left
    return bits_of(able)


def _cycle(work: LayerWork, start: int, ranks: int) -> list[tuple[int, int, int]] | None:
    """The shortest cycle through `start`, inside the set `ranks`, of ranks each of which adds what the one before it drops.

    Returns (rank, added, dropped) of each rank on it; None if there is none.
    """
    came: dict[int, tuple[int, int]] = {}  # rank → (rank before it, expert that it gets from there)
    queue = deque([start])
    while queue and start not in came:
        rank = queue.popleft()
        for expert in dict.fromkeys(work.drops[rank]):
            for other in members(work.added_by[expert] & ranks):
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
