# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""Replica choice: each replica of an expert gets its share of the expert's tokens, exactly and without randomness.

T tokens, E logical experts, K experts per token, P replicas of all experts together (entries of the table).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.backend import on_device, resolve_backend
from moe_kernels.checks import check_tensor
from moe_kernels.counting import BLOCK, bin_of, count_block_ranks, count_ranks_torch

SHARE_BITS = 30
SHARE_ONE = 1 << SHARE_BITS
# round(2**30 / golden ratio): the most even sequence of starts (three-gap theorem), so that a run of small batches
# honours the shares too.
GOLDEN = 663608942

_SHARE_BITS = tl.constexpr(SHARE_BITS)
_SHARE_MASK = tl.constexpr(SHARE_ONE - 1)
_GOLDEN = tl.constexpr(GOLDEN)


@triton.jit(do_not_specialize=["rank_start", "num_elements"])
def _select_replicas_kernel(
    # inputs
    ids_ptr,
    rank_ptr,
    block_starts_ptr,
    batch_counts_ptr,
    offsets_ptr,
    table_lanes_ptr,
    cumulative_ptr,
    count_ptr,
    rank_start,
    # outputs
    lanes_ptr,
    # shapes
    num_elements,
    num_experts,
    # tunables
    BLOCK: tl.constexpr,
):
    """Position of each element on its expert's circle, then the first replica that ends beyond it.

    Example: expert 0 has the lanes 3 and 5 with shares 3/4 and 1/4, count 0, rank_start 0; ids [0, 0, 0, 0] →
    positions [0, 1/4, 1/2, 3/4] of the circle → lanes [3, 3, 3, 5].
    """
    block = tl.program_id(0)
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < num_elements
    bins = bin_of(tl.load(ids_ptr + element, mask=inside, other=-1), num_experts)
    searching = inside & (bins < num_experts)

    rank = tl.load(rank_ptr + element, mask=searching, other=0)
    rank += tl.load(block_starts_ptr + block * (num_experts + 1) + bins, mask=searching, other=0)
    batch_count = tl.load(batch_counts_ptr + bins, mask=searching, other=1)
    step = (rank.to(tl.int64) << _SHARE_BITS) // batch_count
    start = rank_start + tl.load(count_ptr + bins, mask=searching, other=0) * _GOLDEN  # wraps; the mask makes it exact
    position = (start + step) & _SHARE_MASK

    first = tl.load(offsets_ptr + bins, mask=searching, other=0)
    last = tl.load(offsets_ptr + bins + 1, mask=searching, other=0)
    lane = tl.full((BLOCK,), -1, dtype=tl.int32)
    for replica in range(0, tl.max(last - first, axis=0)):
        entry = first + replica
        searching &= entry < last
        found = searching & (position < tl.load(cumulative_ptr + entry, mask=searching, other=0))
        lane = tl.where(found, tl.load(table_lanes_ptr + entry, mask=found, other=-1), lane)
        searching &= ~found
    tl.store(lanes_ptr + element, lane, mask=inside)


def _select_replicas_triton(
    expert_ids_TK: torch.Tensor,
    table_offsets_E1: torch.Tensor,
    table_lanes_P: torch.Tensor,
    table_cumulative_P: torch.Tensor,
    count_E: torch.Tensor,
    rank_start: int,
) -> torch.Tensor:
    lanes_TK = torch.empty_like(expert_ids_TK)
    size, num_experts = expert_ids_TK.numel(), count_E.numel()
    if size:
        with on_device(expert_ids_TK):
            ranks = count_block_ranks(expert_ids_TK.view(-1), num_experts)
            _select_replicas_kernel[(ranks.num_blocks,)](
                expert_ids_TK,
                ranks.rank_N,
                ranks.block_starts_BP,
                ranks.counts_P,
                table_offsets_E1,
                table_lanes_P,
                table_cumulative_P,
                count_E,
                rank_start,
                lanes_TK,
                size,
                num_experts,
                BLOCK=BLOCK,
            )
    return lanes_TK


def select_replicas_torch(
    expert_ids_TK: torch.Tensor,
    table_offsets_E1: torch.Tensor,
    table_lanes_P: torch.Tensor,
    table_cumulative_P: torch.Tensor,
    count_E: torch.Tensor,
    rank_start: int,
) -> torch.Tensor:
    """Reference of `select_replicas`."""
    num_experts = count_E.numel()
    ids = expert_ids_TK.flatten().long()
    valid = (ids >= 0) & (ids < num_experts)
    rank, counts, _ = count_ranks_torch(ids, num_experts)
    expert = torch.where(valid, ids, 0)
    start = rank_start + count_E[expert] * GOLDEN  # wraps modulo 2**64, which the mask below makes exact
    step = (rank << SHARE_BITS) // counts[expert].clamp(min=1)
    position = (start + step) & (SHARE_ONE - 1)
    # One search for all: the entries of expert e, shifted by e whole turns, are one ascending sequence.
    entries = table_offsets_E1.long()
    owner = torch.searchsorted(entries[1:], torch.arange(table_lanes_P.numel(), device=ids.device), right=True)
    boundaries = (owner << SHARE_BITS) + table_cumulative_P
    entry = torch.searchsorted(boundaries, (expert << SHARE_BITS) + position, right=True)
    found = valid & (entry < entries[expert + 1])
    lanes = torch.where(found, table_lanes_P[torch.where(found, entry, 0)] if table_lanes_P.numel() else -1, -1)
    return lanes.to(torch.int32).view(expert_ids_TK.shape)


@torch.library.custom_op("moe_kernels::select_replicas", mutates_args=())
def _select_replicas(
    expert_ids_TK: torch.Tensor,
    table_offsets_E1: torch.Tensor,
    table_lanes_P: torch.Tensor,
    table_cumulative_P: torch.Tensor,
    count_E: torch.Tensor,
    rank_start: int,
    backend: str,
) -> torch.Tensor:
    select = _select_replicas_triton if backend == "triton" else select_replicas_torch
    return select(expert_ids_TK, table_offsets_E1, table_lanes_P, table_cumulative_P, count_E, rank_start)


@_select_replicas.register_fake
def _select_replicas_fake(ids_TK, offsets_E1, lanes_P, cumulative_P, count_E, rank_start, backend):
    return torch.empty_like(ids_TK)


def select_replicas(
    expert_ids_TK: torch.Tensor,
    table_offsets_E1: torch.Tensor,
    table_lanes_P: torch.Tensor,
    table_cumulative_P: torch.Tensor,
    count_E: torch.Tensor,
    rank_start: int,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """The lane that computes each (token, expert) pair.

    Element i (in flat order) of the N that this batch has for expert e stands at the position
    `(start_e + floor(i * 2**30 / N)) mod 2**30` of a circle which the replicas of e divide by their shares; so each
    replica gets floor or ceil of share * N elements. `start_e = rank_start + count_e * GOLDEN` turns from batch to
    batch, so that batches of one token honour the shares over time. All in integers.

    Args:
        expert_ids_TK: [T, K] int32, contiguous; -1 for a masked token.
        table_offsets_E1: [E + 1] int32; the replicas of e are the entries offsets[e] to offsets[e + 1].
        table_lanes_P: [P] int32; the lane of each entry.
        table_cumulative_P: [P] int32; running sum of an expert's shares in units of 2**-30; its last is 2**30.
        count_E: [E] int64; the load counter before this batch is recorded.
        rank_start: in [0, 2**30); different on each rank, so that ranks do not all begin with the same replica.
        backend: see `resolve_backend`.

    Returns:
        lanes_TK [T, K] int32; -1 where the id is -1 (or names no expert or one without replicas).

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    device = expert_ids_TK.device
    check_tensor("expert_ids_TK", expert_ids_TK, (None, None), torch.int32)
    check_tensor("count_E", count_E, (None,), torch.int64, device)
    check_tensor("table_offsets_E1", table_offsets_E1, (count_E.shape[0] + 1,), torch.int32, device)
    check_tensor("table_lanes_P", table_lanes_P, (None,), torch.int32, device)
    check_tensor("table_cumulative_P", table_cumulative_P, (table_lanes_P.shape[0],), torch.int32, device)
    if not 0 <= rank_start < SHARE_ONE:
        raise ValueError(f"rank_start={rank_start}: must be in [0, 2**{SHARE_BITS})")
    resolved = resolve_backend(backend, device)
    return _select_replicas(
        expert_ids_TK, table_offsets_E1, table_lanes_P, table_cumulative_P, count_E, rank_start, resolved
    )
