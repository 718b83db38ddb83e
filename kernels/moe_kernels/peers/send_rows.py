"""Dispatch between several GPUs: each token's hidden state goes once to every rank that has one of its experts.

T tokens, K experts per token, H hidden, S lanes of a rank, W ranks, L = W * S lanes, B: see `peers`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.checks import FLOATS, check_tensor
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import to_e4m3, widen
from moe_kernels.peers.peers import (
    ARRIVED,
    EPOCH,
    FP8_GROUP,
    PeerArea,
    PeerLayout,
    is_last_program,
    peer_at,
    raise_flags,
    rank_options,
)
from moe_kernels.tiles.tiles import TileSchedule

ANY_BLOCK_M = 128
"""Of `by_lane`: only its order of rows and where lanes begin are used, so its tiles may be as large as they like."""
_BLOCK = 128  # of list entries, or of lanes, that a program takes at once
_NUM_WARPS = 4
# As many threads as 32 of an H100's multiprocessors have: the rest is left to what else runs.
MOST_PROGRAMS = 32 * 2048 // (32 * _NUM_WARPS)
_BLOCK_H = 1024  # columns of a token that a program copies at once


@triton.jit
def _load_columns(
    x_ptr, lanes_ptr, item, num_items, num_lanes, hidden_size,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_H columns of a token's hidden state, and the rank of each of its choices (-1: none)."""
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    token, k = (item // blocks).to(tl.int64), tl.arange(0, BLOCK_K)
    column = item % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = item < num_items
    lane = tl.load(lanes_ptr + token * TOP_K + k, mask=exists & (k < TOP_K), other=-1)
    x = tl.load(x_ptr + token * hidden_size + column, mask=exists & (column < hidden_size), other=0.0)
    return x, tl.where(lane >= 0, lane // num_lanes, -1)


@triton.jit
def _quantised(x, GROUP: tl.constexpr):
    """e4m3 values of x and a scale for each group of columns: the largest of it is 448, as far as e4m3 reaches."""
    groups = widen(x).reshape(x.shape[0] // GROUP, GROUP)
    scale = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-30) / 448.0
    return to_e4m3(groups / scale[:, None]).reshape(x.shape[0]), scale


@triton.jit
def _send_columns(
    x, target, like_ptr, scales_ptr, addresses_ptr, item, rank, bound, hidden_size, rows_at, scales_at,
    BLOCK_H: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """To every rank that is a target."""
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    row = rank.to(tl.int64) * bound + item // blocks
    if scales_ptr is not None:
        x, scale = _quantised(x, GROUP)
        group = item % blocks * (BLOCK_H // GROUP) + tl.arange(0, BLOCK_H // GROUP)
        num_groups = tl.cdiv(hidden_size, GROUP)
    column = item % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    place = row * hidden_size + column
    for turn in tl.static_range(W):
        peer = (rank + 1 + turn) % W  # each rank begins with another, or all would crowd one's links
        wanted = tl.max((target == peer).to(tl.int32), axis=0) > 0
        at = peer_at(addresses_ptr, peer, rows_at, like_ptr) + place
        tl.store(at, x, mask=(column < hidden_size) & wanted)
        if scales_ptr is not None:
            scale_at = peer_at(addresses_ptr, peer, scales_at, scales_ptr) + row * num_groups + group
            tl.store(scale_at, scale, mask=(group < num_groups) & wanted)


@triton.jit
def send_tokens(
    x_ptr, lanes_ptr, rows_ptr, scales_ptr, addresses_ptr, first, programs,
    rank, num_tokens, bound, hidden_size, num_lanes, rows_at, scales_at,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Blocks of columns of all tokens, from `first` on each `programs`-th, to every rank that has an expert of the token."""
    items = num_tokens * tl.cdiv(hidden_size, BLOCK_H)
    x, target = _load_columns(x_ptr, lanes_ptr, first, items, num_lanes, hidden_size, TOP_K, BLOCK_K, BLOCK_H)
    for item in range(first, items, programs):
        later, later_target = _load_columns(  # ahead of the stores
            x_ptr, lanes_ptr, item + programs, items, num_lanes, hidden_size, TOP_K, BLOCK_K, BLOCK_H
        )  # fmt: skip
        _send_columns(
            x, target, rows_ptr, scales_ptr, addresses_ptr, item, rank, bound, hidden_size, rows_at, scales_at,
            BLOCK_H, W, GROUP,
        )  # fmt: skip
        x, target = later, later_target


@triton.jit
def say_rows_are_sent(addresses_ptr, flags_at, rank, flags_ptr, state_ptr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The last program to have done its part raises this rank's flag on every rank: an exchange has begun."""
    if is_last_program(state_ptr):
        epoch = tl.load(state_ptr + EPOCH) + 1
        raise_flags(addresses_ptr, flags_at, ARRIVED, rank, epoch, flags_ptr, W, BLOCK_W)
        tl.store(state_ptr + EPOCH, epoch)


@triton.jit
def _send_list(
    weights_ptr, order_ptr, offsets_ptr, addresses_ptr, block, rank, num_lanes, bound, weights_at, lists_at,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """BLOCK of the rows in the order of their lanes: which they are, and their routing weights."""
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < tl.load(offsets_ptr + W * num_lanes)
    row = tl.load(order_ptr + position, mask=inside, other=0)
    weight = tl.load(weights_ptr + row, mask=inside)
    target = tl.zeros_like(position)
    first = tl.zeros_like(position)
    for peer in tl.static_range(1, W):
        begin = tl.load(offsets_ptr + peer * num_lanes)
        beyond = position >= begin
        target = tl.where(beyond, peer, target)
        first = tl.where(beyond, begin, first)
    address = tl.load(addresses_ptr + target, mask=inside, other=0)
    flat = rank * (bound * TOP_K) + row
    tl.store((address + weights_at).to(weights_ptr.dtype) + flat, weight, mask=inside)
    listed = rank * (bound * TOP_K) + position - first
    tl.store((address + lists_at).to(order_ptr.dtype) + listed, flat, mask=inside)


@triton.jit
def _send_counts(
    offsets_ptr, addresses_ptr, block, rank, num_tokens, num_lanes, told, counts_at,
    BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """BLOCK of what the ranks are told: of each of their lanes, how many rows; then how many tokens, and `told`."""
    width = num_lanes + 2
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < W * width
    target, part = index // width, index % width
    is_lane = inside & (part < num_lanes)
    lane = target * num_lanes + part
    begin = tl.load(offsets_ptr + lane, mask=is_lane, other=0)
    count = tl.load(offsets_ptr + lane + 1, mask=is_lane, other=0) - begin
    said = tl.where(is_lane, count, tl.where(part == num_lanes, num_tokens, told))
    address = tl.load(addresses_ptr + target, mask=inside, other=0)
    tl.store((address + counts_at).to(offsets_ptr.dtype) + rank * width + part, said, mask=inside)


# Unspecialized, or serving would compile when one is a multiple of 16.
@Launcher
@triton.jit(do_not_specialize=["rank", "num_tokens", "bound", "told"])
def _send_rows_kernel(
    # inputs
    x_ptr,
    weights_ptr,
    lanes_ptr,
    order_ptr,
    offsets_ptr,
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
    told,
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
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Programs share the work; the last to have done its part raises this rank's flag on every rank.

    Tokens are copied before the wait for the kernel before, `build_schedule`: only the lists need what that writes. It has
    waited for its own predecessor itself, so x and the lanes are there.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    send_tokens(
        x_ptr, lanes_ptr, rows_ptr, scales_ptr, addresses_ptr, program, programs,
        rank, num_tokens, bound, hidden_size, num_lanes, rows_at, scales_at, TOP_K, BLOCK_K, BLOCK_H, W, GROUP,
    )  # fmt: skip
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    other = programs - 1 - program  # of few items, those of different kinds fall to different programs
    for block in range(other, tl.cdiv(W * (num_lanes + 2), BLOCK), programs):
        _send_counts(offsets_ptr, addresses_ptr, block, rank, num_tokens, num_lanes, told, counts_at, BLOCK, W)
    for block in range(other, tl.cdiv(num_tokens * TOP_K, BLOCK), programs):
        _send_list(
            weights_ptr, order_ptr, offsets_ptr, addresses_ptr, block, rank, num_lanes, bound, weights_at, lists_at,
            TOP_K, BLOCK, W,
        )  # fmt: skip
    say_rows_are_sent(addresses_ptr, flags_at, rank, flags_ptr, state_ptr, W, BLOCK_W)


def block_columns(layout: PeerLayout) -> int:
    """Of a token that a program copies at once."""
    return max(FP8_GROUP if layout.fp8 else 1, min(_BLOCK_H, next_power_of_2(layout.hidden_size)))


def check_sending(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    lanes_TK: torch.Tensor,
    of_lanes_L: torch.Tensor,
    area: PeerArea,
    bound: int,
) -> int:
    """T; raises ValueError unless all is as `send_rows` says. of_lanes_L: int32, something of each lane."""
    layout = area.layout
    check_tensor("x_TH", x_TH, (None, layout.hidden_size), layout.dtype, area.own.device)
    num_tokens, top_k = x_TH.shape[0], layout.top_k
    check_tensor("weights_TK", weights_TK, (num_tokens, top_k), torch.float32, x_TH.device)
    check_tensor("lanes_TK", lanes_TK, (num_tokens, top_k), torch.int32, x_TH.device)
    check_tensor("counts_L, or what by_lane has of lanes,", of_lanes_L, (None,), torch.int32, x_TH.device)
    num_lanes, rest = divmod(of_lanes_L.shape[0], layout.num_ranks)
    if rest or num_lanes > layout.num_lanes:
        raise ValueError(
            f"counts_L, or by_lane, has {of_lanes_L.shape[0]} lanes: must be num_ranks={layout.num_ranks} times at most "
            f"{layout.num_lanes}"
        )
    if not num_tokens <= bound <= layout.max_tokens:
        raise ValueError(f"bound={bound}: must be in [{num_tokens}, {layout.max_tokens}], the tokens and their maximum")
    assert layout.dtype in FLOATS
    return num_tokens


def send_rows(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    lanes_TK: torch.Tensor,
    by_lane: TileSchedule,
    area: PeerArea,
    bound: int,
    told: int | None = None,
) -> None:
    """Write each token's hidden state, and which of whose lanes want it, into the buffers of the ranks concerned.

    Every rank calls it, then `receive_rows`, then computes, then `combine_home`, in this order and equally often. So when a
    rank writes, everybody has read what it wrote before. No rank waits here.

    The kernel enqueued just before it is the last one of `build_schedule`, of which x_TH and lanes_TK are older: on GPUs with
    programmatic dependent launch, tokens are copied while that one still runs.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous; T at most `bound`.
        weights_TK: [T, K] float32, contiguous.
        lanes_TK: [T, K] int32, contiguous: the global lane (rank * S + own lane) of each choice, -1 for none.
        by_lane: `build_schedule` of these lanes, over all L.
        area: the ranks' buffers.
        bound: B of this forward, equal on all ranks.
        told: int32, what this exchange is (`exchange_word`), equal on all ranks; None: `bound`, a forward's.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    layout = area.layout
    num_tokens = check_sending(x_TH, weights_TK, lanes_TK, by_lane.offsets_L1[1:], area, bound)
    num_lanes, top_k = (by_lane.offsets_L1.shape[0] - 1) // layout.num_ranks, layout.top_k
    block_h = block_columns(layout)
    items = num_tokens * cdiv(layout.hidden_size, block_h)
    items += cdiv(num_tokens * top_k, _BLOCK) + cdiv(layout.num_ranks * (num_lanes + 2), _BLOCK)
    at = layout.offsets
    _send_rows_kernel[(min(items, MOST_PROGRAMS),)](
        *(x_TH, weights_TK, lanes_TK, by_lane.order_N, by_lane.offsets_L1, area.addresses_W),
        *(
            area.part("flags", torch.int64, 1),
            area.part("rows", torch.float8_e4m3fn if layout.fp8 else layout.dtype, 1),
        ),
        *(area.part("scales", torch.float32, 1) if layout.fp8 else None, area.state),
        *(area.rank, num_tokens, bound, bound if told is None else told, layout.hidden_size, num_lanes),
        *(at["flags"], at["counts"], at["weights"], at["lists"], at["rows"], at["scales"]),
        TOP_K=top_k,
        **rank_options(area),
        BLOCK=_BLOCK,
        BLOCK_K=next_power_of_2(top_k),
        BLOCK_H=block_h,
        GROUP=FP8_GROUP,
        num_warps=_NUM_WARPS,
    )
