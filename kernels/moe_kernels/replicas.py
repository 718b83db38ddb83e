# mypy: allow-incomplete-defs
"""Replica choice: each replica of an expert gets its share of the expert's tokens, exactly and without randomness.

T tokens, E logical experts, K experts per token, L lanes, P replicas of all experts together (entries of the table).
"""

from __future__ import annotations

import torch

from moe_kernels.backend import registered_op, resolve_backend
from moe_kernels.checks import check_tensor
from moe_kernels.replicas_triton import GOLDEN, SHARE_BITS, SHARE_ONE, select_replicas_triton


def select_replicas_torch(
    expert_ids_TK: torch.Tensor,
    table_offsets_E1: torch.Tensor | None,
    table_lanes_P: torch.Tensor,
    table_cumulative_P: torch.Tensor | None,
    load_E: torch.Tensor,
    rank_start: int,
    *,
    num_lanes: int,
    increment_1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `select_replicas`."""
    num_experts = load_E.numel()
    if table_offsets_E1 is None:
        table_offsets_E1 = torch.arange(num_experts + 1, device=load_E.device)
    if table_cumulative_P is None:
        table_cumulative_P = torch.full_like(table_lanes_P, SHARE_ONE)
    ids = expert_ids_TK.flatten().long()
    valid = (ids >= 0) & (ids < num_experts)
    bins = torch.where(valid, ids, num_experts)
    counts_E1 = _counts(bins, num_experts + 1)
    # How many earlier elements have the same id: from the places in a stable sort.
    order = torch.argsort(bins, stable=True)
    rank = torch.empty_like(ids)
    rank[order] = torch.arange(ids.numel(), device=ids.device) - (counts_E1.cumsum(0) - counts_E1)[bins[order]]
    expert = torch.where(valid, ids, 0)
    start = rank_start + load_E[expert] * GOLDEN  # wraps modulo 2**64, which the mask below makes exact
    step = (rank << SHARE_BITS) // counts_E1[expert].clamp(min=1)
    position = (start + step) & (SHARE_ONE - 1)
    # One search for all: the entries of expert e, shifted by e whole turns, are one ascending sequence.
    entries = table_offsets_E1.long()
    owner = torch.searchsorted(entries[1:], torch.arange(table_lanes_P.numel(), device=ids.device), right=True)
    boundaries = (owner << SHARE_BITS) + table_cumulative_P
    entry = torch.searchsorted(boundaries, (expert << SHARE_BITS) + position, right=True)
    found = valid & (entry < entries[expert + 1])
    lanes = torch.where(found, table_lanes_P[torch.where(found, entry, 0)] if table_lanes_P.numel() else -1, -1)
    counts_L1 = _counts(torch.where(found, lanes, num_lanes), num_lanes + 1)
    if increment_1 is not None:
        load_E.add_(counts_E1[:num_experts] * increment_1)
    return lanes.to(torch.int32).view(expert_ids_TK.shape), counts_L1[:num_lanes].to(torch.int32)


def check_counter(load_E: torch.Tensor, increment_1: torch.Tensor | None, device: torch.device) -> None:
    """What every op that records the load asks of the counter."""
    check_tensor("load_E", load_E, (None,), torch.int64, device)
    if increment_1 is not None:
        check_tensor("increment_1", increment_1, (1,), torch.int64, device)


def _counts(bins: torch.Tensor, num_bins: int) -> torch.Tensor:
    """int64 [num_bins]; `bincount` would take a host sync."""
    return bins.new_zeros(num_bins, dtype=torch.int64).index_add_(0, bins.long(), torch.ones_like(bins).long())


@registered_op("moe_kernels::select_replicas", mutates_args=("load_E",))
def _select_replicas(
    expert_ids_TK: torch.Tensor,
    table_offsets_E1: torch.Tensor | None,
    table_lanes_P: torch.Tensor,
    table_cumulative_P: torch.Tensor | None,
    load_E: torch.Tensor,
    rank_start: int,
    num_lanes: int,
    increment_1: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    select = select_replicas_triton if backend == "triton" else select_replicas_torch
    return select(
        expert_ids_TK,
        table_offsets_E1,
        table_lanes_P,
        table_cumulative_P,
        load_E,
        rank_start,
        num_lanes=num_lanes,
        increment_1=increment_1,
    )


@_select_replicas.register_fake
def _select_replicas_fake(
    ids_TK, offsets_E1, lanes_P, cumulative_P, load_E, rank_start, num_lanes, increment_1, backend
):
    return torch.empty_like(ids_TK), ids_TK.new_empty(num_lanes)


def select_replicas(
    expert_ids_TK: torch.Tensor,
    table_offsets_E1: torch.Tensor | None,
    table_lanes_P: torch.Tensor,
    table_cumulative_P: torch.Tensor | None,
    load_E: torch.Tensor,
    rank_start: int,
    *,
    num_lanes: int,
    increment_1: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lane that computes each (token, expert) pair, and how many each lane has; records the load if asked to.

    Element i (in flat order) of the N that this batch has for expert e stands at the position
    `(start_e + floor(i * 2**30 / N)) mod 2**30` of a circle which the replicas of e divide by their shares; so each
    replica gets floor or ceil of share * N elements. `start_e = rank_start + load_e * GOLDEN` turns from batch to
    batch, so that batches of one token honour the shares over time. All in integers.

    Args:
        expert_ids_TK: [T, K] int32, contiguous; -1 for a masked token.
        table_offsets_E1: [E + 1] int32; the replicas of e are the entries offsets[e] to offsets[e + 1]. None, with
            `table_cumulative_P`: each expert has one, entry e is that of e.
        table_lanes_P: [P] int32; the lane of each entry, each in [0, num_lanes) and in one entry only; with others the
            behaviour is undefined.
        table_cumulative_P: [P] int32; running sum of an expert's shares in units of 2**-30; its last is 2**30.
        load_E: [E] int64, contiguous; the load counter. The choice reads what it was before this batch.
        rank_start: in [0, 2**30); different on each rank, so that ranks do not all begin with the same replica.
        num_lanes: L.
        increment_1: [1] int64, on the device; added to `load_E[e]`, in place, for every occurrence of e: 1 counts, 0
            does not (warm-up), without a new graph capture. None: `load_E` is left alone.
        backend: see `resolve_backend`.

    Returns:
        lanes_TK [T, K] int32; -1 where the id is -1 (or names no expert or one without replicas).
        counts_L [L] int32; the number of elements of each lane.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    device = expert_ids_TK.device
    check_tensor("expert_ids_TK", expert_ids_TK, (None, None), torch.int32)
    check_counter(load_E, increment_1, device)
    if table_offsets_E1 is None or table_cumulative_P is None:
        if table_offsets_E1 is not table_cumulative_P:
            raise ValueError("table_offsets_E1 and table_cumulative_P: must both be None, or neither")
        check_tensor("table_lanes_P", table_lanes_P, (load_E.shape[0],), torch.int32, device)
    else:
        check_tensor("table_offsets_E1", table_offsets_E1, (load_E.shape[0] + 1,), torch.int32, device)
        check_tensor("table_lanes_P", table_lanes_P, (None,), torch.int32, device)
        check_tensor("table_cumulative_P", table_cumulative_P, (table_lanes_P.shape[0],), torch.int32, device)
    if not 0 <= rank_start < SHARE_ONE:
        raise ValueError(f"rank_start={rank_start}: must be in [0, 2**{SHARE_BITS})")
    if num_lanes < 1:
        raise ValueError(f"num_lanes={num_lanes}: must be at least 1")
    return _select_replicas(
        expert_ids_TK,
        table_offsets_E1,
        table_lanes_P,
        table_cumulative_P,
        load_E,
        rank_start,
        num_lanes,
        increment_1,
        resolve_backend(backend, device),
    )
