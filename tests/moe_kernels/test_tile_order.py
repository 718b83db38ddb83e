"""Which tile a program of a grouped GEMM takes."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import build_schedule
from moe_kernels.tiles.tile_order import choose_tile


@triton.jit
def _tiles_kernel(
    out_ptr,
    num_tiles,
    num_column_blocks,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    EXTRA_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    BY_LANE: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = (offsets_ptr, tile_lane_ptr, tile_start_ptr, tile_end_ptr)
    column_block, lane, start, end = choose_tile(
        program, num_tiles, num_column_blocks, *tiles, 16, EXTRA_M, GROUP_M, BY_LANE
    )
    tl.store(out_ptr + 4 * program, column_block)
    tl.store(out_ptr + 4 * program + 1, lane)
    tl.store(out_ptr + 4 * program + 2, start)
    tl.store(out_ptr + 4 * program + 3, end)


def tiles_of(counts, num_column_blocks, extra_m, group_m, by_lane, device):
    """(column block, lane, start, end) of each program that has a tile."""
    counts_L = torch.tensor(counts, dtype=torch.int32, device=device)
    lanes_N = torch.repeat_interleave(counts_L.long()).int()
    built_for = 0 if by_lane else extra_m
    s = build_schedule(lanes_N, counts_L, block_m=16, extra_m=built_for)
    most = s.tile_lane.shape[0]
    out = torch.full((most * num_column_blocks, 4), 77, dtype=torch.int32, device=device)
    arrays = (s.offsets_L1, s.tile_lane, s.tile_start, s.tile_end)
    _tiles_kernel[(len(out),)](out, most, num_column_blocks, *arrays, extra_m, group_m, by_lane)
    return out.tolist()


@pytest.mark.parametrize("extra_m", [0, 8])
def test_example_by_lane(device, extra_m):
    tiles = [tile if tile[1] >= 0 else None for tile in tiles_of([40, 16], 2, extra_m, 2, True, device)]
    middle = 40 if extra_m else 32
    first = [[0, 0, 0, 16], [0, 0, 16, middle], [1, 0, 0, 16], [1, 0, 16, middle]]
    last = [None, None] if extra_m else [[0, 0, 32, 40], [1, 0, 32, 40]]
    unused = [None, None]  # there may be five tiles of 56 rows
    assert tiles == [*first, *last, [0, 1, 40, 56], [1, 1, 40, 56], *unused]


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    num_column_blocks=st.integers(1, 3),
    extra_m=st.sampled_from([0, 8, 16]),
    group_m=st.integers(1, 5),
)
def test_by_lane_the_tiles_are_the_same_in_another_order(device, counts, num_column_blocks, extra_m, group_m):
    of_each = [tiles_of(counts, num_column_blocks, extra_m, group_m, by_lane, device) for by_lane in (False, True)]
    by_group, by_lane = ([tile for tile in tiles if tile[1] >= 0] for tiles in of_each)
    assert sorted(by_group) == sorted(by_lane)
    assert [lane for _, lane, *_ in by_lane] == sorted(lane for _, lane, *_ in by_lane)
