"""Steps 4 and 5 of a forward: the order in which the programs of a grouped GEMM take the tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_and_column_block(program, num_tiles, num_column_blocks, GROUP_M):
    """Up to GROUP_M tiles take one column block before the next one begins, so that tiles of one lane find its weights
    in L2.

    Example (GROUP_M = 2, 3 tiles, 2 column blocks): programs 0 to 5 → (tile, column block) (0, 0), (1, 0), (0, 1),
    (1, 1), (2, 0), (2, 1).
    """
    per_group = GROUP_M * num_column_blocks
    first = program // per_group * GROUP_M
    size = tl.minimum(num_tiles - first, GROUP_M)
    within = program % per_group
    return first + within % size, within // size


@triton.jit
def load_own_tile(num_column_blocks, tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M: tl.constexpr):
    """`load_tile` in a grid that has a program for each possible tile and each column block."""
    most_tiles = tl.num_programs(0) // num_column_blocks
    return load_tile(
        tl.program_id(0), most_tiles, num_column_blocks, tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M
    )


@triton.jit
def load_tile(
    program,
    num_tiles,
    num_column_blocks,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    GROUP_M: tl.constexpr,
):
    """What a program computes: its column block, the lane (-1: there is no such tile) and the tile's sorted positions
    [start, end). Loads that don't depend on each other, as a tile begins with a chain of them."""
    tile, column_block = tile_and_column_block(program, num_tiles, num_column_blocks, GROUP_M)
    return column_block, tl.load(tile_lane_ptr + tile), tl.load(tile_start_ptr + tile), tl.load(tile_end_ptr + tile)


@triton.jit
def choose_tile(
    program,
    num_tiles,
    num_column_blocks,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    BY_LANE: tl.constexpr,
):
    """`load_tile`, or `load_lane_tile` if BY_LANE."""
    if BY_LANE:
        return load_lane_tile(
            program, num_column_blocks, offsets_ptr, tile_lane_ptr, tile_start_ptr, BLOCK_M, EXTRA_M, GROUP_M
        )
    else:
        return load_tile(program, num_tiles, num_column_blocks, tile_lane_ptr, tile_start_ptr, tile_end_ptr, GROUP_M)


@triton.jit
def load_lane_tile(
    program,
    num_column_blocks,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As `load_tile`, but a group has tiles of one lane only, and the groups of a lane are about equally long.

    So a lane's weights are read from memory once for each of its groups, and by no group of its neighbours. The schedule may
    have been built with `extra_m` of 0: then the last tile of a lane with extra rows is not there (-1).

    Example (BLOCK_M = 16, GROUP_M = 2, 2 column blocks, lanes of 40 and 16 rows, no extra rows): programs 0 to 7 → (start,
    column block) (0, 0), (16, 0), (0, 1), (16, 1), (32, 0), (32, 1), (40, 0), (40, 1). With up to 8 extra rows, the rows from
    16 to 40 are one tile, and programs 4 and 5 have none.
    """
    tile = program // num_column_blocks
    lane = tl.load(tile_lane_ptr + tile)
    tile_start = tl.load(tile_start_ptr + tile)
    first_row = tl.load(offsets_ptr + lane, mask=lane >= 0, other=0)
    last_row = tl.load(offsets_ptr + lane + 1, mask=lane >= 0, other=0)
    own_program = program - (tile - (tile_start - first_row) // BLOCK_M) * num_column_blocks
    rows = last_row - first_row
    num_tiles = tl.maximum((rows - EXTRA_M + BLOCK_M - 1) // BLOCK_M, 1)
    num_groups = (num_tiles + GROUP_M - 1) // GROUP_M
    per_group = (num_tiles + num_groups - 1) // num_groups
    exists = own_program < num_tiles * num_column_blocks
    own_program = tl.where(exists, own_program, 0)
    own_tile, column_block = tile_and_column_block(own_program, num_tiles, num_column_blocks, per_group)
    start = first_row + own_tile * BLOCK_M
    end = tl.where(own_tile + 1 == num_tiles, last_row, start + BLOCK_M)
    return column_block, tl.where(exists, lane, -1), start, end
