"""Combine between several GPUs: every rank says that the others have their results, and waits for its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.peers.peers import EPOCH, RETURNED, PeerArea, raise_flags, sync_options, wait_for_flags


@Launcher
@triton.jit(do_not_specialize=["rank", "patience"])
def _meet_peers_kernel(
    # inputs
    addresses_ptr,
    flags_ptr,
    state_ptr,
    # outputs
    error_ptr,
    # shapes
    rank,
    flags_at,
    patience,
    # constants
    SAYS: tl.constexpr,
    WAITS: tl.constexpr,
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TIMED: tl.constexpr,
):
    """One program."""
    if PDL:  # see `Launcher`
        gdc_wait()
    epoch = tl.load(state_ptr + EPOCH)
    if SAYS:
        raise_flags(addresses_ptr, flags_at, RETURNED, rank, epoch, flags_ptr, W, BLOCK_W)
    if WAITS:
        wait_for_flags(flags_ptr, state_ptr, error_ptr, RETURNED, epoch, patience, W, BLOCK_W, TIMED)
    if PDL:
        gdc_launch_dependents()


def meet_peers(area: PeerArea, *, says: bool = True, waits: bool = True) -> None:
    """Say to all ranks that what they wait for from this one is there, then wait for theirs.

    Args:
        says, waits: only the one or the other, where several ranks share a host thread that can't do both (the interpreter).
    """
    _meet_peers_kernel[(1,)](
        *(area.addresses_W, area.part("flags", torch.int64, 1), area.state, area.error),
        *(area.rank, area.layout.offsets["flags"], area.patience),
        SAYS=says,
        WAITS=waits,
        **sync_options(area),
        num_warps=1,
    )
