"""Construction: where a layer's experts are at first, if a file says it (`eplb.load_placements`)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch.distributed as dist

from eplb.planning.placement import Placement
from eplb.planning.placement_file import SavedLayer
from eplb.planning.shares import table_words
from moe_layer.weights.meeting import meet

TIMEOUT = 60.0
"""Seconds to wait for ranks that were not given a placement."""


def starting_point(
    saved: Any,
    num_experts: int,
    num_redundant_experts: int,
    num_ranks: int,
    num_lanes: int,
    process_group: dist.ProcessGroup | None,
    name: str = "placement",
) -> tuple[Placement | None, np.ndarray | None]:
    """Placement and shares that a layer begins with; None and None for the usual ones. Collective where `saved` is given.

    Args:
        saved: a `SavedLayer`, or None.
        num_lanes: S of the layer.
        name: of the argument, for errors.

    Raises:
        ValueError: it is something else, was saved of a layer of other sizes, or differs between ranks.
        TimeoutError: some ranks were given none.
    """
    if saved is None:
        return None, None
    if not isinstance(saved, SavedLayer):
        raise ValueError(f"{name} must be one of the list that eplb.load_placements() returns, or None; got {saved!r}")
    num_physical = (num_experts + num_redundant_experts) // num_ranks
    wanted = (num_experts, num_ranks, num_physical)
    got = (saved.placement.num_experts, saved.placement.num_ranks, saved.num_physical_per_rank)
    if got != wanted:
        told = "{} logical experts on {} ranks with {} physical experts each".format
        raise ValueError(f"{name} is of {told(*got)}, but the layer has {told(*wanted)}")
    start = saved.with_lanes(num_lanes)
    if process_group is not None and num_ranks > 1:
        _check_equal(start, process_group, name)
    return start.placement, start.shares_WS


def _check_equal(start: SavedLayer, group: dist.ProcessGroup, name: str) -> None:
    """Raises ValueError on all ranks if they start differently: they would compute tokens with wrong experts."""
    words = table_words(start.placement, start.shares_WS).astype("<i4").tobytes()
    digest = hashlib.blake2b(words + start.placement.digest().to_bytes(8, "little"), digest_size=8).hexdigest()
    digests = meet(group, f"a layer with {name}", TIMEOUT, say=digest)
    ranks = dist.get_process_group_ranks(group)
    others = [rank for rank, other in zip(ranks, digests, strict=True) if other != digests[0]]
    if others:
        raise ValueError(f"{name} must be the same on all ranks: that of the ranks {others} is not rank {ranks[0]}'s")
