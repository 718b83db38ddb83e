"""Combine between several GPUs: waits until what all ranks send back is here, and sums it.

T tokens, K experts per token, H hidden, S lanes of a rank, W ranks.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_kernels.base.checks import check_tensor
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait, num_multiprocessors
from moe_kernels.base.numerics import narrow, widen
from moe_kernels.peers.meet_peers import meet_peers
from moe_kernels.peers.peers import EPOCH, RETURNED, PeerArea, raise_flags, sync_options, wait_for_flags

# Programs that wait keep their place on the device. Of virtual ranks, the last one must find room beside all others': at 64
# registers a thread, a multiprocessor has room for 8 programs of 4 warps.
_MOST_WAITING, _WAITING_PER_SM = 256, 7
_MOST_TURNS = 2  # of a program that waits; if it had more to do, a kernel of one program waits for all


# Unspecialized, or serving would compile when one is a multiple of 16.
@Launcher
@triton.jit(do_not_specialize=["rank", "num_tokens", "patience"])
def _combine_home_kernel(
    # inputs
    rows_ptr,  # [T, K, H], or by rank [T, W, H]
    lanes_ptr,
    addresses_ptr,
    flags_ptr,
    state_ptr,
    # outputs
    error_ptr,
    y_ptr,
    # shapes
    rank,
    num_tokens,
    hidden_size,
    num_lanes,
    flags_at,
    patience,
    # constants
    SAYS: tl.constexpr,
    WAITS: tl.constexpr,
    BY_RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TIMED: tl.constexpr,
    # tunables
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Programs share blocks of columns. The sum is in the order of the choices, or of the ranks, from +0 on.

    Example (K 2, by choice): rows [[1], [2]], lanes [3, -1] → y 1: what a choice of no expert left there is not used.
    """
    # Where the kernel before has told the peers, the flags say more than its end: rows of all ranks, its own too, are there.
    IS_EARLY: tl.constexpr = WAITS and not SAYS
    if PDL and not IS_EARLY:  # see `Launcher`
        gdc_wait()
    program, programs = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(state_ptr + EPOCH)
    if SAYS and program == 0:
        raise_flags(addresses_ptr, flags_at, RETURNED, rank, epoch, flags_ptr, W, BLOCK_W)
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    items = num_tokens * blocks
    k = tl.arange(0, BLOCK_K)
    lane = tl.load(lanes_ptr + program // blocks * TOP_K + k, mask=(program < items) & (k < TOP_K), other=-1)
    if WAITS:
        wait_for_flags(flags_ptr, state_ptr, error_ptr, RETURNED, epoch, patience, W, BLOCK_W, TIMED)
    if PDL:
        if IS_EARLY:
            gdc_wait()
        gdc_launch_dependents()
    for item in range(program, items, programs):
        token = (item // blocks).to(tl.int64)
        column = item % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        total = tl.zeros((BLOCK_H,), dtype=tl.float32)
        # Nobody reads the rows again: L2 lets them go first.
        if BY_RANK:
            owner = tl.where(lane >= 0, lane // num_lanes, -1)
            at = rows_ptr + token * W * hidden_size + column
            for peer in tl.static_range(W):
                has = tl.max((owner == peer).to(tl.int32), axis=0) > 0
                row = tl.load(at + peer * hidden_size, mask=inside & has, other=0.0, eviction_policy="evict_first")
                total += widen(row)
        else:
            at = rows_ptr + token * TOP_K * hidden_size + column
            for choice in tl.static_range(TOP_K):
                # Before it is known whether it is a row: the loads do not wait for each other.
                row = tl.load(at + choice * hidden_size, mask=inside, other=0.0, eviction_policy="evict_first")
                total += tl.where(tl.load(lanes_ptr + token * TOP_K + choice) >= 0, widen(row), 0.0)
        if BY_RANK:
            later = item + programs
            lane = tl.load(lanes_ptr + later // blocks * TOP_K + k, mask=(later < items) & (k < TOP_K), other=-1)
        tl.store(y_ptr + token * hidden_size + column, narrow(total, y_ptr.dtype.element_ty), mask=inside)


@functools.cache
def _most_waiting(num_ranks: int, device: torch.device) -> int:
    """Programs of a rank that may wait."""
    if device.type != "cuda":
        return _MOST_WAITING
    return max(1, min(_MOST_WAITING, _WAITING_PER_SM * num_multiprocessors(device) // num_ranks))


def combine_home(
    lanes_TK: torch.Tensor,
    area: PeerArea,
    num_lanes: int,
    *,
    by_rank: bool = False,
    says: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Say to all ranks that what they wait for from this one is there, wait for theirs, and sum it: y [T, H].

    y[t] is the sum of token t's rows in the order of its choices, the bits of `combine`; or, by rank, of what the ranks have
    summed (`return_sums`), in their order. In float32, rounded once.

    Args:
        lanes_TK: global lanes, as in `send_rows`.
        num_lanes: S.
        says: False where this rank has said so already (`meet_peers`, `return_rows`, `return_sums`).
        out: y, of the layout's dtype, contiguous; None: allocated here.
    """
    layout = area.layout
    num_tokens, hidden_size = lanes_TK.shape[0], layout.hidden_size
    y_TH = torch.empty((num_tokens, hidden_size), dtype=layout.dtype, device=area.own.device) if out is None else out
    check_tensor("out", y_TH, (num_tokens, hidden_size), layout.dtype, area.own.device)
    block = min(1024, next_power_of_2(hidden_size))
    items = num_tokens * cdiv(hidden_size, block)
    most = _most_waiting(layout.num_ranks, area.own.device)
    is_long = items > _MOST_TURNS * most
    if is_long:
        meet_peers(area, says=says)
    programs = items if is_long else max(1, cdiv(items, cdiv(items, most)) if items else 1)
    _combine_home_kernel[(programs,)](
        *(area.part("results", layout.dtype, 1), lanes_TK, area.addresses_W, area.part("flags", torch.int64, 1)),
        *(area.state, area.error, y_TH),
        *(area.rank, num_tokens, hidden_size, num_lanes, layout.offsets["flags"], area.patience),
        SAYS=says and not is_long,
        WAITS=not is_long,
        BY_RANK=by_rank,
        TOP_K=layout.top_k,
        **sync_options(area),
        BLOCK_K=next_power_of_2(layout.top_k),
        BLOCK_H=block,
        num_warps=4,
    )
    return y_TH
