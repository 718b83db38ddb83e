"""Rebalance, plan: a placement says which logical expert each lane of one layer holds.

Shape letters: W ranks, S lanes per rank, P physical experts per rank (P ≤ S), E logical experts.

A *lane* is a layer's own number for one of its slots on a rank. S − P lanes of each rank are empty between relocations; they
are what a fill under way writes to.
"""

from __future__ import annotations

import hashlib
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

EMPTY = -1
"""What an empty lane holds."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The physical-to-logical map of one layer, over lanes. Immutable; equal by content.

    Attributes:
        lanes_WS: int64 [W, S], the logical expert that each lane holds, -1 for an empty lane. Read-only.
        num_experts: E, the logical experts.

    Raises:
        ValueError: `lanes_WS` is no two-dimensional integer array, or `num_experts` is not positive. The rules that span
            lanes are checked by `validate`, as a placement on its way may break them for a moment.

    Example: `Placement([[0, 1, -1], [2, 0, -1]], 3)` has two ranks of three lanes; expert 0 has two replicas.
    """

    lanes_WS: np.ndarray
    num_experts: int

    def __post_init__(self) -> None:
        lanes_WS = np.asarray(self.lanes_WS)
        if lanes_WS.ndim != 2 or lanes_WS.dtype.kind not in "iu" or 0 in lanes_WS.shape:
            raise ValueError(
                f"lanes_WS has shape {lanes_WS.shape} and dtype {lanes_WS.dtype}: must be a non-empty integer array [W, S]"
            )
        _check_integer("num_experts", self.num_experts, 1)
        lanes_WS = np.array(lanes_WS, dtype=np.int64, order="C")  # a copy: nobody else can write it
        lanes_WS.flags.writeable = False
        object.__setattr__(self, "lanes_WS", lanes_WS)
        object.__setattr__(self, "num_experts", int(self.num_experts))

    @staticmethod
    def initial(num_experts: int, num_redundant_experts: int, num_ranks: int, num_lanes: int) -> Placement:
        """The placement a layer starts with: experts 0..E-1 and then the redundant replicas, split contiguously over ranks.

        The redundant replicas repeat 0, 1, 2, … A rank then holds P ids that follow each other modulo E, so no two
        replicas of an expert share a rank unless P > E, where nothing could avoid it.

        Args:
            num_experts: E, logical experts.
            num_redundant_experts: physical experts beyond one per logical expert.
            num_ranks: W; must divide E + redundant.
            num_lanes: S, at least P = (E + redundant) / W.

        Raises:
            ValueError: one of these rules is broken.
        """
        _check_integer("num_experts", num_experts, 1)
        _check_integer("num_redundant_experts", num_redundant_experts, 0)
        _check_integer("num_ranks", num_ranks, 1)
        _check_integer("num_lanes", num_lanes, 1)
        num_physical = num_experts + num_redundant_experts
        if num_physical % num_ranks:
            raise ValueError(
                f"num_redundant_experts={num_redundant_experts}: num_experts + num_redundant_experts = {num_physical} "
                f"must be divisible by num_ranks={num_ranks}"
            )
        per_rank = num_physical // num_ranks
        if num_lanes < per_rank:
            raise ValueError(f"num_lanes={num_lanes}: must be at least the {per_rank} physical experts of a rank")
        lanes_WS = np.full((num_ranks, num_lanes), EMPTY, dtype=np.int64)
        lanes_WS[:, :per_rank] = (np.arange(num_physical) % num_experts).reshape(num_ranks, per_rank)
        return Placement(lanes_WS, num_experts)

    @property
    def num_ranks(self) -> int:
        return int(self.lanes_WS.shape[0])

    @property
    def num_lanes(self) -> int:
        """S, the lanes of a rank, empty ones included."""
        return int(self.lanes_WS.shape[1])

    def replica_counts(self) -> np.ndarray:
        """int64 [E]: how many lanes hold each logical expert."""
        held = self.lanes_WS[self.lanes_WS != EMPTY]
        return np.bincount(held, minlength=self.num_experts)

    def holds_WE(self) -> np.ndarray:
        """int64 [W, E]: how many lanes of each rank hold each expert."""
        return count_experts(self.lanes_WS, self.num_experts)

    def logical_to_lanes(self) -> tuple[np.ndarray, np.ndarray]:
        """The inverse map in CSR form.

        Returns:
            offsets_E1: int64 [E + 1]; the lanes of expert e are `lanes[offsets_E1[e] : offsets_E1[e + 1]]`.
            lanes: int64 [num_physical]; global lane ids, rank * S + lane, ascending within an expert.
        """
        flat = self.lanes_WS.ravel()
        lanes = np.flatnonzero(flat != EMPTY)
        order = np.argsort(flat[lanes], kind="stable")
        offsets_E1 = np.zeros(self.num_experts + 1, dtype=np.int64)
        np.cumsum(self.replica_counts(), out=offsets_E1[1:])
        return offsets_E1, lanes[order].astype(np.int64)

    def validate(self) -> None:
        """Raises ValueError, naming the rule, unless ids lie in [-1, E) and every expert has a replica (I2)."""
        lowest, highest = int(self.lanes_WS.min()), int(self.lanes_WS.max())
        if lowest < EMPTY or highest >= self.num_experts:
            bad = lowest if lowest < EMPTY else highest
            raise ValueError(f"lanes_WS holds {bad}: ids must lie in [-1, {self.num_experts})")
        missing = np.flatnonzero(self.replica_counts() == 0)
        if missing.size:
            raise ValueError(f"lanes_WS: expert {int(missing[0])} has no replica: every expert needs at least one (I2)")

    def compact(self) -> np.ndarray:
        """int64 [W, P]: the experts of each rank, ascending, without the empty lanes.

        Raises:
            ValueError: ranks hold different numbers of experts.
        """
        held_W = (self.lanes_WS != EMPTY).sum(axis=1)
        if (held_W != held_W[0]).any():
            raise ValueError(f"lanes_WS: ranks hold {held_W.tolist()} experts: must be the same number on each rank")
        return np.sort(self.lanes_WS, axis=1)[:, self.num_lanes - int(held_W[0]) :]

    def digest(self) -> int:
        """A hash of 63 bits that is the same in every process and on every platform: ranks compare it."""
        head = np.array([self.num_experts, *self.lanes_WS.shape], dtype="<i8").tobytes()
        digest = hashlib.blake2b(head + self.lanes_WS.astype("<i8").tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little") & (2**63 - 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.num_experts == other.num_experts and np.array_equal(self.lanes_WS, other.lanes_WS)

    def __hash__(self) -> int:
        return self.digest()


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")


def count_experts(physical: np.ndarray, num_experts: int) -> np.ndarray:
    """How many entries of the last axis hold each expert, empty ones left out: int [..., S] → int64 [..., E]."""
    rows = physical.reshape(-1, physical.shape[-1])
    # One bin per (row, expert), and one in front of each row for the empty lanes.
    bins = rows + 1 + np.arange(rows.shape[0])[:, None] * (num_experts + 1)
    counts = np.bincount(bins.ravel(), minlength=rows.shape[0] * (num_experts + 1))
    return counts.reshape(*physical.shape[:-1], num_experts + 1)[..., 1:]
