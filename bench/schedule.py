"""``python -m bench.schedule``: `build_schedule`, lanes to rows sorted by lane and tiles."""

import sys

import torch

from bench.kernel import Inputs, Work, main
from moe_kernels import TileSchedule, build_schedule, build_schedule_torch


def make_work(inputs: Inputs) -> Work:
    lanes_N, counts_E = inputs.ids_TK.flatten(), inputs.counts_E
    keys_N = lanes_N.short()  # narrow keys, which radix sorts like
    return Work(
        runs={
            "build_schedule": lambda: _tensors(build_schedule(lanes_N, counts_E, **inputs.tiling)),
            "torch.sort alone": lambda: torch.sort(keys_N, stable=True),
        },
        expected=lambda: _tensors(build_schedule_torch(lanes_N, counts_E, **inputs.tiling)),
        num_bytes=2 * lanes_N.nbytes + 2 * counts_E.nbytes + 3 * inputs.schedule.tile_lane.nbytes,
        unchecked=frozenset({"torch.sort alone"}),
    )


def _tensors(schedule: TileSchedule) -> tuple[torch.Tensor, ...]:
    tiles = (schedule.tile_lane, schedule.tile_start, schedule.tile_end, schedule.num_tiles)
    return schedule.order_N, schedule.offsets_L1, *tiles


if __name__ == "__main__":
    sys.exit(main("schedule", __doc__, make_work))
