"""Combine between several GPUs: computed rows go home to the ranks of their tokens, each on its own or summed by rank.

W ranks, K experts per token, H hidden, B and flat rows: see `peers`. N = W * B * K flat rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.checks import check_tensor
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import narrow, widen
from moe_kernels.peers.peers import (
    EPOCH,
    RETURNED,
    PeerArea,
    find_token,
    is_last_program,
    raise_flags,
    rank_options,
    token_ends,
)
from moe_kernels.tiles.homes import row_at
from moe_kernels.tiles.tiles import TileSchedule

_MOST_PROGRAMS = 512  # of 4 warps: as many threads as 32 of an H100's multiprocessors have


def _programs(rows: int, hidden_size: int, block: int) -> tuple[int]:
    """For as many rows as come in the mean."""
    return (max(1, min(_MOST_PROGRAMS, rows * cdiv(hidden_size, block))),)


@triton.jit
def _say(addresses_ptr, flags_at, rank, flags_ptr, state_ptr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The last program to have done its part tells every rank that this rank's results are there."""
    if is_last_program(state_ptr):
        raise_flags(addresses_ptr, flags_at, RETURNED, rank, tl.load(state_ptr + EPOCH), flags_ptr, W, BLOCK_W)


@Launcher
@triton.jit(do_not_specialize=["rank", "rows_per_home"])
def _return_rows_kernel(
    # inputs
    rows_ptr,
    order_ptr,
    num_rows_ptr,
    homes_ptr,
    addresses_ptr,
    flags_ptr,
    # input and output
    state_ptr,
    # shapes
    rank,
    rows_per_home,
    hidden_size,
    flags_at,
    # constants
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    # tunables
    BLOCK_H: tl.constexpr,
):
    """Programs share the rows that came, as many as there are."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    for item in range(tl.program_id(0), tl.load(num_rows_ptr) * blocks, tl.num_programs(0)):
        flat = tl.load(order_ptr + item // blocks)
        column = item % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        # Nobody reads it again: L2 lets it go first, and keeps what goes home.
        at = rows_ptr + flat.to(tl.int64) * hidden_size + column
        row = tl.load(at, mask=inside, eviction_policy="evict_first")
        tl.store(row_at(rows_ptr, flat, hidden_size, homes_ptr, rows_per_home) + column, row, mask=inside)
    _say(addresses_ptr, flags_at, rank, flags_ptr, state_ptr, W, BLOCK_W)


@Launcher
@triton.jit(do_not_specialize=["rank", "bound"])
def _return_sums_kernel(
    # inputs
    rows_ptr,
    here_ptr,
    counts_ptr,
    homes_ptr,
    addresses_ptr,
    flags_ptr,
    # input and output
    state_ptr,
    # shapes
    rank,
    bound,
    hidden_size,
    num_lanes,
    flags_at,
    # constants
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    # tunables
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Programs share the tokens of all ranks, as many as there are."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(state_ptr + EPOCH)
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    program, programs = tl.program_id(0), tl.num_programs(0)
    # Each rank begins with another home, or all would crowd one's links.
    ends = token_ends(counts_ptr, rank + 1, num_lanes, W, BLOCK_W)
    items = tl.max(ends, axis=0) * blocks
    home, token = find_token(ends, program // blocks, rank + 1, W, BLOCK_W)
    seen = tl.load(here_ptr + (home * bound + token) * TOP_K + k, mask=(program < items) & (k < TOP_K), other=0)
    for item in range(program, items, programs):
        column = item % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        here = seen == epoch
        row = (home * bound + token) * TOP_K + k
        rows = rows_ptr + row.to(tl.int64)[:, None] * hidden_size + column[None, :]
        rows = tl.load(rows, mask=here[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")  # as above
        to = tl.multiple_of(tl.load(homes_ptr + home).to(rows_ptr.dtype), 16)
        to += (token.to(tl.int64) * W + rank) * hidden_size + column
        later = item + programs  # ahead of the stores
        home, token = find_token(ends, later // blocks, rank + 1, W, BLOCK_W)
        seen = tl.load(here_ptr + (home * bound + token) * TOP_K + k, mask=(later < items) & (k < TOP_K), other=0)
        total = tl.sum(widen(rows), axis=0)
        wanted = tl.max(here.to(tl.int32), axis=0) > 0
        tl.store(to, narrow(total, rows_ptr.dtype.element_ty), mask=inside & wanted)
    _say(addresses_ptr, flags_at, rank, flags_ptr, state_ptr, W, BLOCK_W)


def return_rows(rows_NH: torch.Tensor, schedule: TileSchedule, area: PeerArea, bound: int) -> None:
    """Write each computed row to its place among the results of its token's rank, [B * K, H] there, and say so to all ranks.

    Args:
        rows_NH: [N, H], contiguous, in flat order, as `expert_down` returns them.
        schedule: of `receive_rows`.
        bound: B.
    """
    layout = area.layout
    check_tensor("rows_NH", rows_NH, (schedule.order_N.shape[0], layout.hidden_size), layout.dtype, area.own.device)
    block = min(1024, next_power_of_2(layout.hidden_size))
    _return_rows_kernel[_programs(bound * layout.top_k, layout.hidden_size, block)](
        *(rows_NH, schedule.order_N, schedule.offsets_L1[-1:], area.results_W),
        *(area.addresses_W, area.part("flags", torch.int64, 1), area.state),
        *(area.rank, bound * layout.top_k, layout.hidden_size, layout.offsets["flags"]),
        **rank_options(area),
        BLOCK_H=block,
        num_warps=4,
    )


def return_sums(rows_NH: torch.Tensor, area: PeerArea, bound: int, num_lanes: int) -> None:
    """Sum what this rank has computed for a token, in float32, rounded once, and write it home: [B, W, H]. Say so to all ranks.

    Fewer bytes travel, but the result depends on which experts share a rank, to rounding.

    Args:
        rows_NH: as in `return_rows`; `receive_rows` ran with `note_here`.
        num_lanes: S.
    """
    layout = area.layout
    per_rank = bound * layout.top_k
    check_tensor("rows_NH", rows_NH, (layout.num_ranks * per_rank, layout.hidden_size), layout.dtype, area.own.device)
    block = min(1024, next_power_of_2(layout.hidden_size))
    _return_sums_kernel[_programs(bound * layout.num_ranks, layout.hidden_size, block)](
        *(rows_NH, area.here, area.part("counts", torch.int32, 1), area.results_W),
        *(area.addresses_W, area.part("flags", torch.int64, 1), area.state),
        *(area.rank, bound, layout.hidden_size, num_lanes, layout.offsets["flags"]),
        TOP_K=layout.top_k,
        **rank_options(area),
        BLOCK_K=next_power_of_2(layout.top_k),
        BLOCK_H=block,
        num_warps=4,
    )
