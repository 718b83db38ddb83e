"""Steps 4 and 5 of a forward: the order in which the programs of a grouped GEMM take the tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_and_column_block(program, num_tiles, num_column_blocks, GROUP_M: tl.constexpr):
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
