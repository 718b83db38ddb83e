"""Rebalance, window and plan between ranks: what the long rounds carry, as int64 words.

Legend: N sub-windows of a window, A all layers' logical experts side by side, G pools, W ranks.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from eplb.planning.plan import Plan

_HEADER_WORDS = 3  # of a plan: number of waves, hash, bytes of JSON


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
    text = plan.to_json().encode()
    header = np.array([len(plan.waves), _hash(text), len(text)], dtype=np.int64)
    return np.concatenate([header, np.frombuffer(text + bytes(-len(text) % 8), dtype="<i8")])


def decode_plan(words: np.ndarray) -> tuple[Plan, int]:
    _, expected_hash, num_bytes = words[:_HEADER_WORDS].tolist()
    text = words[_HEADER_WORDS:].astype("<i8").tobytes()[:num_bytes]
    if _hash(text) != expected_hash:
        raise ValueError("the plan that was broadcast does not have the hash in its header")
    return Plan.from_json(text.decode()), expected_hash


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
