"""Dispatch between several GPUs: waits for the rows of all ranks and makes their tile schedule.

W ranks, S lanes of this rank, B and flat rows: see `peers`. N = W * B * K flat rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.peers.peers import ARRIVED, EPOCH, ERROR, NO_RANK, PeerArea, leave_word, sync_options, wait_for_flags
from moe_kernels.tiles.schedule_triton import write_tiles
from moe_kernels.tiles.tiles import TileSchedule, new_schedule

_BLOCK = 512  # of rows that a program copies in a step
_NO_RANK = tl.constexpr(NO_RANK)


@Launcher
@triton.jit(do_not_specialize=["told", "max_tiles", "patience", "per_rank"])
def _receive_rows_kernel(
    # inputs
    counts_ptr,
    lists_ptr,
    flags_ptr,
    state_ptr,
    # outputs
    error_ptr,
    here_ptr,  # None: nobody asks
    order_ptr,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    # shapes
    num_lanes,
    told,
    per_rank,
    max_tiles,
    patience,
    # constants
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TIMED: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """A program writes the rows and tiles of one own lane. The last program writes the unused tiles.

    What the ranks have listed is sorted by lane already; so the rows of a lane are one piece of each rank's list.

    Example (2 ranks, 2 lanes, B * K = 4): counts [[1, 1], [0, 2]], lists [[3, 1], [5, 4]] → order [3, 1, 5, 4], offsets
    [0, 1, 4].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
    epoch = tl.load(state_ptr + EPOCH)
    wait_for_flags(flags_ptr, state_ptr, error_ptr, ARRIVED, epoch, patience, W, BLOCK_W, TIMED)
    if PDL:  # not before: programs that wait for this one would keep a peer on the same device from running
        gdc_launch_dependents()
    lane = tl.program_id(0)
    is_lane = lane < num_lanes
    lanes = tl.arange(0, BLOCK_L)
    width = num_lanes + 2
    peer = tl.arange(0, BLOCK_W)
    at = counts_ptr + peer[:, None] * width + lanes[None, :]
    counts_WL = tl.load(at, mask=(peer < W)[:, None] & (lanes < num_lanes)[None, :], other=0)
    # Of each rank's list: how many rows are the lane's, and how many are before them. Two sums for the price of one.
    parts = tl.where(lanes < lane, counts_WL, 0).to(tl.int64) + (
        tl.where(lanes == lane, counts_WL, 0).to(tl.int64) << 32
    )
    both = tl.sum(parts, axis=1)
    first, own = both.to(tl.int32), (both >> 32).to(tl.int32)
    count = tl.sum(own, axis=0)
    start = write_tiles(
        tl.sum(counts_WL, axis=0), lanes, count, lane, num_lanes, max_tiles,
        offsets_ptr, tile_lane_ptr, tile_start_ptr, tile_end_ptr, num_tiles_ptr, BLOCK_M, EXTRA_M, BLOCK,
    )  # fmt: skip
    end = tl.cumsum(own, axis=0)
    listed = peer * per_rank + first - (end - own)  # so far is a row of the lane from its place in the lists
    for begin in range(0, count, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        is_theirs = (row[None, :] < end[:, None]) & (row[None, :] >= (end - own)[:, None])
        place = row + tl.sum(tl.where(is_theirs, listed[:, None], 0), axis=0)
        # The masks keep a wrong count from a write out of bounds.
        inside = (row < count) & (start + row < W * per_rank) & (place >= 0) & (place < W * per_rank)
        flat = tl.load(lists_ptr + place, mask=inside, other=0)
        tl.store(order_ptr + start + row, flat, mask=inside)
        if here_ptr is not None:
            known = inside & (flat >= 0) & (flat < W * per_rank)
            tl.store(here_ptr + flat, tl.zeros((BLOCK,), dtype=tl.int64) + epoch, mask=known)
    if is_lane == 0:
        theirs = tl.load(counts_ptr + peer * width + num_lanes + 1, mask=peer < W, other=told)
        # Of who did not come, an older word is there.
        came = tl.load(state_ptr + ERROR, volatile=True) == 0
        if came & (tl.max((theirs != told).to(tl.int32), axis=0) > 0):
            leave_word(state_ptr, error_ptr, tl.cast(_NO_RANK + 1, tl.int64))


def receive_rows(
    area: PeerArea,
    bound: int,
    num_lanes: int,
    *,
    block_m: int,
    extra_m: int = 0,
    note_here: bool = False,
    told: int | None = None,
) -> TileSchedule:
    """Wait on the device until every rank has called `send_rows`; then the schedule of what this rank computes.

    Row n is computed from ``rows[n // K]`` of the area's rows, [W * bound, H], with the weight ``weights[n]``. Every rank's
    rows keep their order within a lane, and lower ranks come first.

    Args:
        bound, told: as in `send_rows`; a peer's other one is an error that `PeerArea.failure` shows.
        num_lanes: S.
        block_m, extra_m: as in `build_schedule`.
        note_here: write down which rows are here, for `return_sums`.

    Returns:
        Of N = W * bound * K flat rows; `order_N` is undefined behind the rows that came.
    """
    layout = area.layout
    per_rank = bound * layout.top_k
    schedule = new_schedule(area.addresses_W, layout.num_ranks * per_rank, num_lanes, block_m, extra_m)
    _receive_rows_kernel[(num_lanes + 1,)](
        *(area.part("counts", torch.int32, 1), area.part("lists", torch.int32, 1), area.part("flags", torch.int64, 1)),
        *(area.state, area.error, area.here if note_here else None),
        *(schedule.order_N, schedule.offsets_L1, schedule.tile_lane, schedule.tile_start, schedule.tile_end),
        schedule.num_tiles,
        *(num_lanes, bound if told is None else told, per_rank, schedule.tile_lane.shape[0], area.patience),
        BLOCK_M=block_m,
        EXTRA_M=extra_m,
        **sync_options(area),
        BLOCK=_BLOCK,
        BLOCK_L=next_power_of_2(num_lanes),
        num_warps=4,
    )
    return schedule
