"""Placements in a file: for a start that needs no moves, after a restart or from a plan made offline.

Shape letters: L layers, E logical experts, W ranks, P physical experts per rank, S lanes per rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eplb.planning.placement import EMPTY, Placement
from eplb.planning.shares import cumulative_shares, equal_shares

FORMAT = "eplb placements 1"


@dataclass(frozen=True, eq=False)
class SavedLayer:
    """What a layer starts from.

    Attributes:
        placement: P experts on each rank, in the first lanes; the other S − P lanes are empty.
        shares_WS: float64, aligned with `placement.lanes_WS`, 0 at empty lanes.
    """

    placement: Placement
    shares_WS: np.ndarray

    @property
    def num_physical_per_rank(self) -> int:
        """P."""
        return int((self.placement.lanes_WS[0] != EMPTY).sum())

    def with_lanes(self, num_lanes: int) -> SavedLayer:
        """The same with another S, at least P."""
        per_rank, num_ranks = self.num_physical_per_rank, self.placement.num_ranks
        if num_lanes < per_rank:
            raise ValueError(f"{per_rank} experts on a rank: num_lanes={num_lanes} must be at least as many")
        lanes_WS = np.full((num_ranks, num_lanes), EMPTY, dtype=np.int64)
        lanes_WS[:, :per_rank] = self.placement.lanes_WS[:, :per_rank]
        shares_WS = np.zeros(lanes_WS.shape)
        shares_WS[:, :per_rank] = self.shares_WS[:, :per_rank]
        return SavedLayer(Placement(lanes_WS, self.placement.num_experts), shares_WS)


def save_placements(
    path: str | Path, placements: Sequence[Placement], shares: Sequence[np.ndarray] | None = None
) -> None:
    """Writes the placements of all layers, in order, as JSON. A crash in between leaves an older file as it was.

    Args:
        placements: of each layer; ranks hold equally many experts. Empty lanes are not written.
        shares: float64 [W, S] of each layer; None: equal shares.

    Raises:
        ValueError: no path; a placement or shares that break a rule; or not as many shares as placements.
        OSError: the file cannot be written.
    """
    path = _path_of(path)
    if isinstance(placements, Placement) or not isinstance(placements, Iterable):
        raise ValueError(f"placements must be a list of them, one of each layer, got {placements!r}")
    placements = list(placements)
    for index, placement in enumerate(placements):
        if not isinstance(placement, Placement):
            raise ValueError(f"placements[{index}] must be a Placement, got {placement!r}")
    if shares is None:
        shares = [equal_shares(placement) for placement in placements]
    if len(shares) != len(placements):
        raise ValueError(f"shares has {len(shares)} layers: placements has {len(placements)}")
    layers = []
    for index, (placement, shares_WS) in enumerate(zip(placements, shares, strict=True)):
        try:
            placement.validate()
            physical_WP = placement.compact()
            cumulative_shares(placement, shares_WS)
        except ValueError as error:
            raise ValueError(f"placements[{index}]: {error}") from None
        # In the order of `compact`: ascending experts, empty lanes (-1) left out.
        order_WP = np.argsort(placement.lanes_WS, axis=1, kind="stable")[:, -physical_WP.shape[1] :]
        shares_WP = np.take_along_axis(np.asarray(shares_WS, dtype=np.float64), order_WP, axis=1)
        layers.append(
            {"num_experts": placement.num_experts, "experts": physical_WP.tolist(), "shares": shares_WP.tolist()}
        )
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"format": FORMAT, "layers": layers}, separators=(",", ":")) + "\n")
    os.replace(part, path)


def load_placements(path: str | Path, num_lanes: int | Sequence[int] | None = None) -> list[SavedLayer]:
    """Reads what `save_placements` wrote: for `MoELayer(placement=...)` and `swap_experts(placements=...)`.

    Args:
        num_lanes: S of all layers, or of each: it may differ from what it was. None: as many as are filled.

    Raises:
        ValueError: the file is no such file, breaks a rule of placements or shares, or does not fit `num_lanes`; the message
            names the path and the layer.
        OSError: the file cannot be read.
    """
    path = _path_of(path)
    where = f"path={str(path)!r}"
    text = path.read_text()
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is no JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("layers"), list):
        raise ValueError(f"{where}: must be a JSON object with 'format': {FORMAT!r} and a list 'layers'")
    lanes = list(num_lanes) if isinstance(num_lanes, Sequence) else [num_lanes] * len(raw["layers"])
    if len(lanes) != len(raw["layers"]):
        raise ValueError(f"{where}: holds {len(raw['layers'])} layers, num_lanes has {len(lanes)}")
    return [
        _layer(layer, size, f"{where}: layer {index}")
        for index, (layer, size) in enumerate(zip(raw["layers"], lanes, strict=True))
    ]


def _path_of(path: str | Path) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path must be a file's, got {path!r}")
    return Path(path)


def _layer(raw: object, num_lanes: int | None, where: str) -> SavedLayer:
    try:
        if not isinstance(raw, dict):
            raise ValueError("must be an object")
        num_experts, physical, shares = (raw[key] for key in ("num_experts", "experts", "shares"))
        if type(num_experts) is not int:
            raise ValueError(f"num_experts={num_experts!r}: must be an integer")
        physical_WP, shares_WP = np.array(physical), np.array(shares, dtype=np.float64)
        if physical_WP.ndim != 2 or physical_WP.dtype.kind != "i" or shares_WP.shape != physical_WP.shape:
            raise ValueError(
                "experts and shares must be tables [ranks, experts of a rank] of equal shape, experts of integers"
            )
        if physical_WP.size and physical_WP.min() < 0:
            raise ValueError("experts must not be negative")
        saved = SavedLayer(Placement(physical_WP, num_experts), shares_WP)
        saved.placement.validate()
        cumulative_shares(saved.placement, shares_WP)
        return saved if num_lanes is None else saved.with_lanes(num_lanes)
    except KeyError as error:
        raise ValueError(f"{where}: lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
