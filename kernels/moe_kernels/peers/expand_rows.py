"""Dispatch between several GPUs: hidden states that came as e4m3 become what the experts compute with.

W ranks, H hidden, B: see `peers`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.checks import check_tensor
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import narrow
from moe_kernels.peers.peers import FP8_GROUP, PeerArea, find_token, rank_options, token_ends

_MOST_PROGRAMS = 1024


@Launcher
@triton.jit(do_not_specialize=["bound"])
def _expand_rows_kernel(
    # inputs
    rows_ptr,
    scales_ptr,
    counts_ptr,
    # outputs
    expanded_ptr,
    # shapes
    bound,
    hidden_size,
    num_lanes,
    # constants
    PDL: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
    # tunables
    BLOCK_H: tl.constexpr,
):
    """Programs share the tokens of all ranks, as many as there are. What did not come is not used."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    num_groups = tl.cdiv(hidden_size, GROUP)
    ends = token_ends(counts_ptr, 0, num_lanes, W, BLOCK_W)
    for item in range(tl.program_id(0), tl.max(ends, axis=0) * blocks, tl.num_programs(0)):
        peer, token = find_token(ends, item // blocks, 0, W, BLOCK_W)
        row = (peer * bound + token).to(tl.int64)
        column = item % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        group = item % blocks * (BLOCK_H // GROUP) + tl.arange(0, BLOCK_H // GROUP)
        x = tl.load(rows_ptr + row * hidden_size + column, mask=inside).to(tl.float32)
        scale = tl.load(scales_ptr + row * num_groups + group, mask=group < num_groups, other=0.0)
        x = (x.reshape(BLOCK_H // GROUP, GROUP) * scale[:, None]).reshape(BLOCK_H)
        tl.store(expanded_ptr + row * hidden_size + column, narrow(x, expanded_ptr.dtype.element_ty), mask=inside)


def expand_rows(expanded: torch.Tensor, area: PeerArea, bound: int, num_lanes: int) -> None:
    """Write the rows that `receive_rows` has waited for, in the layout's dtype.

    An element is off by at most 1/16 of its own size, or, where that is more, 2**-10 of the scale, which is the largest of its
    128 channels over 448 (e4m3 has three bits behind the point, and 2**-9 is its smallest step).

    Args:
        expanded: [W * B, H], contiguous.
        bound: B.
        num_lanes: S.
    """
    layout = area.layout
    num_rows = layout.num_ranks * bound
    check_tensor("expanded", expanded, (num_rows, layout.hidden_size), layout.dtype, area.own.device)
    block = max(FP8_GROUP, min(1024, next_power_of_2(layout.hidden_size)))
    programs = max(1, min(_MOST_PROGRAMS, num_rows * cdiv(layout.hidden_size, block)))
    _expand_rows_kernel[(programs,)](
        *(area.part("rows", torch.float8_e4m3fn, 1), area.part("scales", torch.float32, 1)),
        *(area.part("counts", torch.int32, 1), expanded),
        *(bound, layout.hidden_size, num_lanes),
        **rank_options(area),
        GROUP=FP8_GROUP,
        BLOCK_H=block,
        num_warps=4,
    )
