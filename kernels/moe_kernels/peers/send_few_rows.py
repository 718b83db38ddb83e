"""Dispatch between several GPUs, of few tokens: `send_rows` and the sorting before it in one kernel.

T tokens, K experts per token, H hidden, S lanes of a rank, W ranks, L = W * S lanes, B: see `peers`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.scan import count_hits, first_index, load_bins, num_steps, rank_hits, row_ends, scan_options
from moe_kernels.peers.peers import FP8_GROUP, PeerArea, rank_options
from moe_kernels.peers.send_rows import MOST_PROGRAMS, block_columns, check_sending, say_rows_are_sent, send_tokens

FEW_ROWS = 512
"""T * K, at most: so many keys are sorted in one step by 4 warps, which suit the copying too. More would take more registers
from it."""
_LEAST_COPYING = 128  # programs


@triton.jit
def _send_lane(
    weights_ptr, lanes_ptr, counts_ptr, addresses_ptr, lane, rank, num_tokens, num_lanes, bound,
    counts_at, weights_at, lists_at,
    TOP_K: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """What one lane gets: how many rows, which, and their routing weights. A rank's first lane also says the tokens and B.

    As `build_schedule` sorts, but positions are those in the list of the lane's rank.
    """
    num_rows = num_tokens * TOP_K
    target, part = lane // num_lanes, lane % num_lanes
    every = tl.arange(0, BLOCK_L)
    counts = tl.load(counts_ptr + every, mask=every < W * num_lanes, other=0)
    steps = num_steps(num_rows, BLOCK)
    index = first_index(num_rows, BLOCK, ROWS)
    bins = load_bins(lanes_ptr, index, 0, num_rows, W * num_lanes, BLOCK, ROWS)
    address = tl.load(addresses_ptr + target)
    said = (address + counts_at).to(counts_ptr.dtype) + rank * (num_lanes + 2)
    tl.store(said + part, tl.sum(tl.where(every == lane, counts, 0), axis=0))
    tl.store(said + num_lanes, num_tokens, mask=part == 0)
    tl.store(said + num_lanes + 1, bound, mask=part == 0)
    before = tl.sum(tl.where((every >= lane - part) & (every < lane), counts, 0), axis=0)
    hits = count_hits(bins == lane)
    for step in range(1, steps):
        bins = load_bins(lanes_ptr, index, step, num_rows, W * num_lanes, BLOCK, ROWS)
        hits += count_hits(bins == lane)
    ends = row_ends(hits, before)
    first = rank * (bound * TOP_K)
    for back in range(steps):
        step = steps - 1 - back
        mine = bins == lane
        bins = load_bins(lanes_ptr, index, tl.maximum(step - 1, 0), num_rows, W * num_lanes, BLOCK, ROWS)
        position, ends = rank_hits(mine, ends)
        row = index + step * (BLOCK // ROWS)
        inside = mine & (position.to(tl.uint32) < bound * TOP_K)  # a wrong count must not write out of bounds
        weight = tl.load(weights_ptr + row, mask=inside)
        tl.store((address + weights_at).to(weights_ptr.dtype) + first + row, weight, mask=inside)
        tl.store((address + lists_at).to(counts_ptr.dtype) + first + position, first + row, mask=inside)


# Unspecialized, or serving would compile when one is a multiple of 16.
@Launcher
@triton.jit(do_not_specialize=["rank", "num_tokens", "bound"])
def _send_few_rows_kernel(
    # inputs
    x_ptr,
    weights_ptr,
    lanes_ptr,
    counts_ptr,
    addresses_ptr,
    flags_ptr,
    rows_ptr,  # this rank's; only their type is used, as with the next one
    scales_ptr,  # None: rows travel as they are
    # input and output
    state_ptr,
    # shapes
    rank,
    num_tokens,
    bound,
    hidden_size,
    num_lanes,
    # where the parts of a buffer begin
    flags_at,
    counts_at,
    weights_at,
    lists_at,
    rows_at,
    scales_at,
    # constants
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program for each lane; the others share the tokens. The last to have done its part raises this rank's flag."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    if program < W * num_lanes:
        _send_lane(
            weights_ptr, lanes_ptr, counts_ptr, addresses_ptr, program, rank, num_tokens, num_lanes, bound,
            counts_at, weights_at, lists_at, TOP_K, W, BLOCK, ROWS, BLOCK_L,
        )  # fmt: skip
    else:
        own, copying = program - W * num_lanes, tl.num_programs(0) - W * num_lanes
        send_tokens(
            x_ptr, lanes_ptr, rows_ptr, scales_ptr, addresses_ptr, own, copying,
            rank, num_tokens, bound, hidden_size, num_lanes, rows_at, scales_at, TOP_K, BLOCK_K, BLOCK_H, W, GROUP,
        )  # fmt: skip
    say_rows_are_sent(addresses_ptr, flags_at, rank, flags_ptr, state_ptr, W, BLOCK_W)


def send_few_rows(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    lanes_TK: torch.Tensor,
    counts_L: torch.Tensor,
    area: PeerArea,
    bound: int,
) -> None:
    """As `build_schedule` and `send_rows`, whose bits it writes, of at most `FEW_ROWS` choices.

    Args:
        x_TH, weights_TK, lanes_TK, area, bound: as in `send_rows`.
        counts_L: int32, how many choices each lane has.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    num_tokens = check_sending(x_TH, weights_TK, lanes_TK, counts_L, area, bound)
    if lanes_TK.numel() > FEW_ROWS:
        raise ValueError(f"lanes_TK has {lanes_TK.numel()} choices: must have at most {FEW_ROWS}")
    layout, at = area.layout, area.layout.offsets
    num_lanes = counts_L.numel() // layout.num_ranks
    block_h = block_columns(layout)
    items = num_tokens * cdiv(layout.hidden_size, block_h)
    copying = min(items, max(_LEAST_COPYING, MOST_PROGRAMS - counts_L.numel()))
    _send_few_rows_kernel[(counts_L.numel() + copying,)](
        *(x_TH, weights_TK, lanes_TK, counts_L, area.addresses_W),
        *(
            area.part("flags", torch.int64, 1),
            area.part("rows", torch.float8_e4m3fn if layout.fp8 else layout.dtype, 1),
        ),
        *(area.part("scales", torch.float32, 1) if layout.fp8 else None, area.state),
        *(area.rank, num_tokens, bound, layout.hidden_size, num_lanes),
        *(at["flags"], at["counts"], at["weights"], at["lists"], at["rows"], at["scales"]),
        TOP_K=layout.top_k,
        **rank_options(area),
        BLOCK_L=next_power_of_2(counts_L.numel()),
        BLOCK_K=next_power_of_2(layout.top_k),
        BLOCK_H=block_h,
        GROUP=FP8_GROUP,
        **scan_options(lanes_TK.numel()),
    )
