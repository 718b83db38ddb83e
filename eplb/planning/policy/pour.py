"""Policy "adaptive", stuck layers: a placement made in one go. What is too much on a rank is poured into others.

A rank above the limit keeps its experts but splits its heaviest one: the part above the limit is poured into ranks below it,
the largest room first. Each pour empties a part or fills a room, so W ranks need at most W - 1 more replicas, and the
result is as even as the limit allows wherever slots suffice. It moves more than a repair does where little is wrong, but
ties and zeros do not stop it.

Shape letters: E experts, W ranks, P physical experts per rank.
"""

from __future__ import annotations

import numpy as np

TINY = 1e-9
"""Loads below this part of the mean rank load are none."""


def pour(load_E: np.ndarray, live_WP: np.ndarray, limit: float, merge: bool) -> np.ndarray:
    """A placement near the live one whose rank loads (with the best shares) can be at most `limit`, if slots suffice.

    Args:
        load_E: float64 [E], in units of the mean rank load.
        live_WP: int64 [W, P], no expert twice on a rank.
        limit: rank load to reach, at least 1.
        merge: pour small parts together before they take the last slot of a rank. Neither way is better always.

    Returns:
        int64 [W, P]; every expert has a replica, no expert is twice on a rank. Where slots do not suffice, the best so far.
    """
    ranks = _Ranks(load_E.tolist(), live_WP.tolist(), limit)
    ranks.cut_parts()
    while ranks.parts and ranks.pour_once(merge):
        pass
    return ranks.placement()


class _Ranks:
    """What each rank holds while the parts are poured.

    Attributes:
        whole: [W], the experts that have their only replica, or their first, on the rank.
        poured: [W], experts of which the rank got a part.
        room: [W], load that it can still take; negative while it is too full.
        parts: expert → load that has no place yet.
        source: expert with a part → the rank that keeps another part of it, and is full; -1 if there is none.
        kept: expert with a source → the load that it keeps there.
    """

    def __init__(self, load: list[float], live: list[list[int]], limit: float) -> None:
        self.load, self.live = load, live
        self.per_rank = len(live[0])
        self.holders: dict[int, list[int]] = {}
        for rank, experts in enumerate(live):
            for expert in experts:
                self.holders.setdefault(expert, []).append(rank)
        self.whole: list[list[int]] = [[] for _ in live]
        self.poured: list[list[int]] = [[] for _ in live]
        self.room = [limit] * len(live)
        self.parts: dict[int, float] = {}
        self.source: dict[int, int] = {}
        self.kept: dict[int, float] = {}
        for expert in sorted(self.holders, key=lambda e: (len(self.holders[e]) > 1, -load[e], e)):
            home = max(self.holders[expert], key=lambda rank: (round(self.room[rank], 9), -rank))
            self.whole[home].append(expert)
            self.room[home] -= load[expert]

    def cut_parts(self) -> None:
        """Takes off each rank what is above the limit: from its heaviest expert; whole experts where that is not enough."""
        for rank, experts in enumerate(self.whole):
            for expert in sorted(experts, key=lambda e: (-self.load[e], e)):
                if self.room[rank] >= -TINY:
                    break
                part = min(-self.room[rank], self.load[expert])
                self.room[rank] += part
                self.parts[expert], self.kept[expert] = part, self.load[expert] - part
                self.source[expert] = rank
                if self.kept[expert] <= TINY:
                    experts.remove(expert)
                    self.source[expert] = -1

    def pour_once(self, merge: bool) -> bool:
        """Pours one part into the rank with most room; False if nothing fits."""
        for rank in sorted(range(len(self.room)), key=lambda r: (-round(self.room[r], 9), r)):
            if self.room[rank] <= TINY:
                return False
            expert = self._best_part(rank)
            if expert is None:
                continue
            small = self.parts[expert] < self.room[rank] - TINY
            if merge and small and self._free(rank) <= 1 and self._merge(rank):
                return True
            if self._free(rank) or self._evict(rank):
                amount = min(self.parts[expert], self.room[rank])
                self.poured[rank].append(expert)
                self.room[rank] -= amount
                self.parts[expert] -= amount
                if self.source[expert] == -1:
                    self.source[expert], self.kept[expert] = rank, amount
                if self.parts[expert] <= TINY:
                    del self.parts[expert]
                return True
        return False

    def _best_part(self, rank: int) -> int | None:
        """The smallest part that fills the rank, else the largest; one that the rank holds anyway first."""
        room = self.room[rank]
        best, best_key = None, None
        for expert, part in self.parts.items():
            if expert in self.whole[rank] or expert in self.poured[rank]:
                continue
            fills = part >= room - TINY
            key = (not fills, rank not in self.holders[expert], round(part if fills else -part, 9), expert)
            if best_key is None or key < best_key:
                best, best_key = expert, key
        return best

    def _merge(self, rank: int) -> bool:
        """Pours a small part into the source of a large one, which grows by as much: it then fills the last slot of `rank`
        better. Parts whose sources have no free slot go first: nothing can be poured into those. False if nothing fits."""

        def slots(expert: int) -> int:
            return 0 if self.source[expert] == -1 else self._free(self.source[expert])

        by_size = sorted(self.parts, key=lambda e: (slots(e), round(self.parts[e], 9), e))
        for grown in sorted(self.parts, key=lambda e: (-round(self.parts[e], 9), e)):
            other = self.source[grown]
            if other == -1 or not self._free(other) or grown in self.whole[rank] or grown in self.poured[rank]:
                continue
            for expert in by_size:
                part = self.parts[expert]
                fits = part < self.kept[grown] - TINY
                if fits and expert != grown and expert not in self.whole[other] and expert not in self.poured[other]:
                    self.poured[other].append(expert)
                    self.parts[grown] += part
                    self.kept[grown] -= part
                    del self.parts[expert]
                    return True
        return False

    def _free(self, rank: int) -> int:
        return self.per_rank - len(self.whole[rank]) - len(self.poured[rank])

    def _evict(self, rank: int) -> bool:
        """Moves the lightest whole expert of the rank to one with a free slot: one whose own part can grow by as much, or
        one with room for it."""
        for expert in sorted(self.whole[rank], key=lambda e: (self.load[e], e)):
            if expert in self.parts:
                continue
            load = self.load[expert]
            for other in sorted(
                range(len(self.whole)), key=lambda r: (round(self.room[r], 9), r)
            ):  # full ranks need no slot
                if other == rank or not self._free(other) or expert in self.poured[other]:
                    continue
                cut = next((e for e in self.parts if self.source[e] == other), None)
                grows = cut is not None and self.kept[cut] > load + TINY
                if not grows and self.room[other] < load - TINY:
                    continue
                self.whole[rank].remove(expert)
                self.whole[other].append(expert)
                self.room[rank] += load
                if grows and cut is not None:
                    self.parts[cut] += load
                    self.kept[cut] -= load
                else:
                    self.room[other] -= load
                return True
        return False

    def placement(self) -> np.ndarray:
        """Free slots keep what is live there, else get the expert with most load per replica."""
        held = [whole + poured for whole, poured in zip(self.whole, self.poured, strict=True)]
        counts = [0] * len(self.load)
        for experts in held:
            for expert in experts:
                counts[expert] += 1
        for expert in (e for e in self.parts if not counts[e]):  # it found no place
            rank = max(range(len(held)), key=lambda r: (len(held[r]) < self.per_rank, round(self.room[r], 9), -r))
            if len(held[rank]) == self.per_rank:  # all slots are taken: some expert has two
                rank, other = next((r, e) for r, experts in enumerate(held) for e in experts if counts[e] > 1)
                held[rank].remove(other)
                counts[other] -= 1
            held[rank].append(expert)
            counts[expert] += 1
        for rank, experts in enumerate(held):
            spare = sorted(set(self.live[rank]) - set(experts), key=lambda e: (-self.load[e] / max(counts[e], 1), e))
            for expert in spare[: self.per_rank - len(experts)]:
                experts.append(expert)
                counts[expert] += 1
            while len(experts) < self.per_rank:
                expert = max(
                    (e for e in range(len(self.load)) if e not in experts), key=lambda e: (self.load[e] / counts[e], -e)
                )
                experts.append(expert)
                counts[expert] += 1
        return np.array(held, dtype=np.int64)
