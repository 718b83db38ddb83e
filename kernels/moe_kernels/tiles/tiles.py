"""Step 3 of a forward: the tiles that `build_schedule` makes and that `expert_up` and `expert_down` take.

N flat rows, L lanes, M rows per tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from moe_kernels.operands.config import GemmConfig


@dataclass(frozen=True)
class TileSchedule:
    """The rows that the grouped GEMMs compute together. All tensors are on the device and have static shapes.

    Attributes:
        order_N: [N] int32, sorted position → flat row. A permutation: rows by lane, in their order within a lane;
            rows with lane -1 come last and are in no tile.
        offsets_L1: [L + 1] int32, the sorted position at which each lane starts; the last is the number of rows that
            are computed.
        tile_lane: [max_tiles] int32, the lane of each tile, those of a lane in order; -1 from num_tiles on.
        tile_start, tile_end: [max_tiles] int32, the sorted positions of each tile: the first, and the one after the last;
            -1 from num_tiles on.
        num_tiles: [1] int32, how many tiles there are.
        block_m: M; a tile ends after M rows, or where its lane ends.
        extra_m: if after M rows at most so many are left of the lane, they belong to the tile too. Lanes with such a longer
            tile come first, as what begins last should be short.
        places_N: None, or [N] int32, flat row → sorted position: `expert_down` then stores rows where they are
            sorted (`GemmConfig.sorts_rows`).
    """

    order_N: torch.Tensor
    offsets_L1: torch.Tensor
    tile_lane: torch.Tensor
    tile_start: torch.Tensor
    tile_end: torch.Tensor
    num_tiles: torch.Tensor
    block_m: int
    extra_m: int = 0
    places_N: torch.Tensor | None = None

    def check_config(self, config: GemmConfig) -> None:
        """Raises ValueError unless the schedule was built for `config`."""
        for name, own in (("block_m", self.block_m), ("schedule_extra_m", self.extra_m)):
            value = getattr(config, name)
            if value != own:
                raise ValueError(f"config.{name}={value}: must be the schedule's, {own}")


def max_tiles(num_rows: int, num_lanes: int, block_m: int) -> int:
    """Most tiles that `num_rows` rows can make: every lane that can have a row has one, and the rest fills up.

    (With `extra_m` there are fewer.)
    """
    nonempty = min(num_rows, num_lanes)
    return nonempty + (num_rows - nonempty) // block_m


def new_schedule(
    like: torch.Tensor, num_rows: int, num_lanes: int, block_m: int, extra_m: int, with_places: bool = False
) -> TileSchedule:
    """An unwritten schedule of so many rows and lanes, on the device of `like`."""
    new = partial(like.new_empty, dtype=torch.int32)
    most = max_tiles(num_rows, num_lanes, block_m)
    parts = new(num_rows), new(num_lanes + 1), new(most), new(most), new(most), new(1)
    places_N = new(num_rows) if with_places else None
    return TileSchedule(*parts, block_m=block_m, extra_m=extra_m, places_N=places_N)
