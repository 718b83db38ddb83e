"""Replica choice by batch, between several GPUs: every rank learns how many tokens each rank has for each expert.

W ranks, E logical experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.checks import check_tensor
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.peers.peers import COUNTED, EPOCH, PeerArea, raise_flags, sync_options, wait_for_flags

_BLOCK = 1024


@Launcher
@triton.jit(do_not_specialize=["rank", "patience"])
def _gather_counts_kernel(
    # inputs
    counts_ptr,
    addresses_ptr,
    flags_ptr,
    state_ptr,
    # outputs
    error_ptr,
    # shapes
    rank,
    num_experts,
    flags_at,
    experts_at,
    patience,
    # constants
    SAYS: tl.constexpr,
    WAITS: tl.constexpr,
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TIMED: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
):
    """One program: few numbers travel."""
    if PDL:  # see `Launcher`
        gdc_wait()
    epoch = tl.load(state_ptr + EPOCH) + 1
    if SAYS:
        for first in range(0, num_experts, BLOCK):
            expert = first + tl.arange(0, BLOCK)
            count = tl.load(counts_ptr + expert, mask=expert < num_experts)
            for peer in tl.static_range(W):
                to = (tl.load(addresses_ptr + peer) + experts_at).to(counts_ptr.dtype) + rank * num_experts
                tl.store(to + expert, count, mask=expert < num_experts)
        raise_flags(addresses_ptr, flags_at, COUNTED, rank, epoch, flags_ptr, W, BLOCK_W)
    if WAITS:
        wait_for_flags(flags_ptr, state_ptr, error_ptr, COUNTED, epoch, patience, W, BLOCK_W, TIMED)
    if PDL:
        gdc_launch_dependents()


def gather_counts(counts_E: torch.Tensor, area: PeerArea, *, says: bool = True, waits: bool = True) -> torch.Tensor:
    """Tell every rank this rank's counts, wait on the device for theirs: counts_WE, int32, a part of the own buffer.

    Every rank calls it, once at most, before `send_rows` of the same forward; the result lasts until the forward is over.

    Args:
        counts_E: [E] int32, contiguous.
        says, waits: as in `meet_peers`.
    """
    layout = area.layout
    check_tensor("counts_E", counts_E, (layout.num_experts,), torch.int32, area.own.device)
    at = layout.offsets
    _gather_counts_kernel[(1,)](
        *(counts_E, area.addresses_W, area.part("flags", torch.int64, 1), area.state, area.error),
        *(area.rank, layout.num_experts, at["flags"], at["experts"], area.patience),
        SAYS=says,
        WAITS=waits,
        **sync_options(area),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return area.part("experts", torch.int32, layout.num_ranks, layout.num_experts)
