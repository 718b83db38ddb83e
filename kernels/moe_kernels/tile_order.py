# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""In which order the programs of a grouped GEMM take the tiles."""

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
def load_tile(
    program,
    num_tiles,
    num_column_blocks,
    lane_to_slot_ptr,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    GROUP_M: tl.constexpr,
):
    """What a program computes: its column block, the sorted positions [start, end) that are its tile's and what is left of
    the lane behind it, and the slot of the lane's weights."""
    tile, column_block = tile_and_column_block(program, num_tiles, num_column_blocks, GROUP_M)
    lane = tl.load(tile_lane_ptr + tile)
    start = tl.load(tile_start_ptr + tile)
    end = tl.load(offsets_ptr + lane + 1)
    slot = tl.load(lane_to_slot_ptr + lane)
    return column_block, start, end, slot
