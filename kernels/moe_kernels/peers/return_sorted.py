"""Between several GPUs: rows in sorted order go home to the ranks of their tokens, each with a number, in their own exchange.

W ranks, S lanes of a rank, K experts per token, H hidden, R rows that this rank has, B and flat rows: see `peers`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.checks import check_tensor
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.peers.peers import (
    ARRIVED,
    EPOCH,
    ERROR,
    NO_RANK,
    PeerArea,
    leave_word,
    raise_flags,
    sync_options,
    wait_for_flags,
)
from moe_kernels.tiles.homes import row_at

_MOST_PROGRAMS = 512  # of 4 warps: as many threads as 32 of an H100's multiprocessors have
_NO_RANK = tl.constexpr(NO_RANK)


@Launcher
@triton.jit(do_not_specialize=["rank", "told", "patience"])
def _begin_return_kernel(
    # inputs
    addresses_ptr,
    counts_ptr,
    flags_ptr,
    # input and output
    state_ptr,
    # outputs
    error_ptr,
    # shapes
    rank,
    num_lanes,
    told,
    flags_at,
    counts_at,
    patience,
    # constants
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TIMED: tl.constexpr,
):
    """One program. The ranks tell each other what comes, where `send_rows` tells it too, and meet."""
    if PDL:  # see `Launcher`
        gdc_wait()
    epoch = tl.load(state_ptr + EPOCH) + 1
    peer = tl.arange(0, BLOCK_W)
    width = num_lanes + 2
    address = tl.load(addresses_ptr + peer, mask=peer < W, other=0)
    at = (address + counts_at).to(counts_ptr.dtype) + rank * width + num_lanes + 1
    tl.store(at, tl.zeros((BLOCK_W,), dtype=tl.int32) + told, mask=peer < W)
    tl.store(state_ptr + EPOCH, epoch)
    raise_flags(addresses_ptr, flags_at, ARRIVED, rank, epoch, flags_ptr, W, BLOCK_W)
    wait_for_flags(flags_ptr, state_ptr, error_ptr, ARRIVED, epoch, patience, W, BLOCK_W, TIMED)
    if PDL:  # not before: programs that wait for this one would keep a peer on the same device from running
        gdc_launch_dependents()
    theirs = tl.load(counts_ptr + peer * width + num_lanes + 1, mask=peer < W, other=told)
    # Of who did not come, an older word is there.
    came = tl.load(state_ptr + ERROR, volatile=True) == 0
    if came & (tl.max((theirs != told).to(tl.int32), axis=0) > 0):
        leave_word(state_ptr, error_ptr, tl.cast(_NO_RANK + 1, tl.int64))


@Launcher
@triton.jit(do_not_specialize=["num_rows", "rows_per_home"])
def _return_sorted_kernel(
    # inputs
    rows_ptr,
    scalars_ptr,  # None: rows go alone
    order_ptr,
    homes_ptr,
    addresses_ptr,
    # shapes
    num_rows,
    rows_per_home,
    hidden_size,
    # where the part of a buffer begins
    scalars_at,
    # constants
    PDL: tl.constexpr,
    # tunables
    BLOCK_H: tl.constexpr,
):
    """Programs share the rows.

    Example (2 ranks, B * K = 4): rows [[a], [b], [c]], order [5, 0, 3] → a is row 1 at rank 1; b is row 0 at rank 0, c row 3.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    for item in range(tl.program_id(0), num_rows * blocks, tl.num_programs(0)):
        position = (item // blocks).to(tl.int64)
        flat = tl.load(order_ptr + position)
        column = item % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        row = tl.load(rows_ptr + position * hidden_size + column, mask=inside)
        tl.store(row_at(rows_ptr, flat, hidden_size, homes_ptr, rows_per_home) + column, row, mask=inside)
        if scalars_ptr is not None:
            address = tl.load(addresses_ptr + flat // rows_per_home) + scalars_at
            scalar = tl.load(scalars_ptr + position)
            tl.store(address.to(scalars_ptr.dtype) + flat % rows_per_home, scalar, mask=item % blocks == 0)


def return_sorted(
    rows_RH: torch.Tensor,
    scalars_R: torch.Tensor | None,
    order_R: torch.Tensor,
    area: PeerArea,
    bound: int,
    num_lanes: int,
    told: int,
) -> None:
    """Meet all ranks, then write each row to its place among the results of its token's rank, [B * K, H] there.

    An exchange of its own: every rank calls it after the end of the one before (`combine_home`, `meet_peers`), and
    `combine_home`, which says so to all ranks, ends it. The first meeting says that all have read what came home before.

    Args:
        rows_RH: of the layout's dtype, contiguous.
        scalars_R: float32, contiguous; to the same places of the part "scalars", [B * K]. None on all ranks or on none.
        order_R: int32, contiguous; the flat row that each is.
        bound, num_lanes: B and S of the forward in which the rows came.
        told: what this exchange is (`exchange_word`), equal on all ranks; else `PeerArea.failure` shows it.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    layout = area.layout
    num_rows, hidden_size, device = order_R.shape[0], layout.hidden_size, area.own.device
    check_tensor("rows_RH", rows_RH, (num_rows, hidden_size), layout.dtype, device)
    check_tensor("order_R", order_R, (None,), torch.int32, device)
    if scalars_R is not None:
        check_tensor("scalars_R", scalars_R, (num_rows,), torch.float32, device)
    at = layout.offsets
    flags = area.part("flags", torch.int64, 1)
    _begin_return_kernel[(1,)](
        *(area.addresses_W, area.part("counts", torch.int32, 1), flags, area.state, area.error),
        *(area.rank, num_lanes, told, at["flags"], at["counts"], area.patience),
        **sync_options(area),
        num_warps=1,
    )
    block = min(1024, next_power_of_2(hidden_size))
    _return_sorted_kernel[(max(1, min(_MOST_PROGRAMS, num_rows * cdiv(hidden_size, block))),)](
        *(rows_RH, scalars_R, order_R, area.results_W, area.addresses_W),
        *(num_rows, bound * layout.top_k, hidden_size, at["scalars"]),
        BLOCK_H=block,
        num_warps=4,
    )
