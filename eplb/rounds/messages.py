"""Rebalance, window and plan between ranks: what the long rounds carry, as int64 words.

Legend: N sub-windows of a window, A all layers' logical experts side by side, G pools, W ranks.
"""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Moves, Plan, Wave

_HEADER_WORDS = 3  # of a plan: number of waves, hash, bytes of the rest


@dataclass(frozen=True)
class Loads:
    """What a round of loads tells: the window summed over ranks, and the free slots of every pool on every rank."""

    load_NA: np.ndarray
    free_slots_GW: np.ndarray


def encode_loads(free_slots: list[int], window_NA: np.ndarray) -> np.ndarray:
    """One rank's message."""
    return np.concatenate([np.array(free_slots, dtype=np.int64), window_NA.ravel()])


def decode_loads(messages: list[np.ndarray], num_pools: int, num_columns: int) -> Loads:
    """What the messages of all ranks, by rank, say together."""
    table = np.stack(messages)
    load_NA = table[:, num_pools:].sum(axis=0).reshape(-1, num_columns)
    return Loads(load_NA, np.ascontiguousarray(table[:, :num_pools].T))


def encode_plan(plan: Plan) -> np.ndarray:
    """A plan for all ranks, wave by wave: a rank reads each when it comes to it. Tables are made here, once for all."""
    waves = [zlib.compress(_encode_wave(wave), level=1) for wave in plan.waves]
    body = b"".join([np.cumsum([0, *map(len, waves)]).astype("<i8").tobytes(), *waves])
    header = np.array([len(waves), _hash(body), len(body)], dtype=np.int64)
    return np.concatenate([header, np.frombuffer(body + bytes(-len(body) % 8), dtype="<i8")])


class PlanReader:
    """A plan that was heard.

    Args:
        words: as `encode_plan()` made them.

    Attributes:
        num_waves: how many it has.
        plan_hash: of all of it.

    Raises:
        ValueError: the words are not those that were sent.
    """

    def __init__(self, words: np.ndarray) -> None:
        self.num_waves, self.plan_hash, num_bytes = words[:_HEADER_WORDS].tolist()
        self._body = words[_HEADER_WORDS:].astype("<i8", copy=False).view(np.uint8)[:num_bytes]
        if _hash(self._body.data) != self.plan_hash:
            raise ValueError("the plan that was broadcast does not have the hash in its header")
        self._waves_at = (self.num_waves + 1) * 8
        self._ends = self._body[: self._waves_at].view("<i8").tolist()

    def wave(self, number: int, breathe: Callable[[], None] = lambda: None) -> Wave:
        """One of the waves. `breathe` is called between its layers."""
        first, end = (self._waves_at + at for at in self._ends[number : number + 2])
        return _decode_wave(zlib.decompress(self._body[first:end].data), breathe)


_NUM_SIZES = 6  # of an update: layer, experts, ranks, lanes, moves, words of its table


def _encode_wave(wave: Wave) -> bytes:
    """int64: number of updates, their sizes, their moves by column. Then of each: shares (float64), lanes and table (int32)."""
    tables = [update.table_words() for update in wave.updates]
    sizes = [
        (u.layer, u.placement.num_experts, *u.placement.lanes_WS.shape, len(u.moves), len(table))
        for u, table in zip(wave.updates, tables, strict=True)
    ]
    parts = [np.array([len(sizes), *sum(sizes, ())], dtype="<i8").tobytes()]
    parts += [Moves.of(update.moves).columns_5M.astype("<i8").tobytes() for update in wave.updates]
    for update, table in zip(wave.updates, tables, strict=True):
        parts += [
            update.shares_WS.astype("<f8").tobytes(),
            update.placement.lanes_WS.astype("<i4").tobytes(),
            table.astype("<i4").tobytes(),
        ]
    return b"".join(parts)


def _decode_wave(data: bytes, breathe: Callable[[], None]) -> Wave:
    num_updates = int(np.frombuffer(data, "<i8", 1)[0])
    sizes = np.frombuffer(data, "<i8", num_updates * _NUM_SIZES, 8).reshape(-1, _NUM_SIZES)
    at = 8 + sizes.nbytes
    moves = np.frombuffer(data, "<i8", 5 * int(sizes[:, 4].sum()), at)
    at += moves.nbytes
    updates = []
    for layer, num_experts, num_ranks, num_lanes, of_layer, num_words in sizes.tolist():
        breathe()
        lanes = num_ranks * num_lanes
        shares_WS = np.frombuffer(data, "<f8", lanes, at).reshape(num_ranks, num_lanes)
        lanes_WS = np.frombuffer(data, "<i4", lanes, at + 8 * lanes).reshape(num_ranks, num_lanes)
        table = np.frombuffer(data, "<i4", num_words, at + 12 * lanes)
        at += 12 * lanes + 4 * num_words
        own, moves = Moves(moves[: 5 * of_layer].reshape(5, -1)), moves[5 * of_layer :]
        updates.append(LayerUpdate(layer, own, Placement(lanes_WS, num_experts), shares_WS, table))
    return Wave(tuple(updates))


def _hash(body: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(body, digest_size=7).digest(), "little")
