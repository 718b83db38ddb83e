"""Step 2 of a forward, replica choice: each replica of an expert gets its exact share of tokens, without randomness.

T tokens, E logical experts, K experts per token, L lanes, P replicas of all experts together (entries of the table).
"""

from __future__ import annotations

import threading

import torch

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_integer, check_kind, check_tensor
from moe_kernels.base.registered import registered_op
from moe_kernels.operands.load import LoadCounter
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.replicas.circle import GOLDEN, SHARE_BITS, SHARE_ONE
from moe_kernels.replicas.replicas_triton import select_replicas_triton

_RECORDING = threading.Lock()  # on a CPU, threads may run one layer at once


def select_replicas_torch(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    load: LoadCounter,
    rank_start: int,
    *,
    num_lanes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `select_replicas`."""
    load_E, table_lanes_P = load.load_E, table.lanes_P
    num_experts = load_E.numel()
    table_offsets_E1, table_cumulative_P = table.offsets_E1, table.cumulative_P
    if table_offsets_E1 is None or table_cumulative_P is None:
        table_offsets_E1 = torch.arange(num_experts + 1, device=load_E.device)
        table_cumulative_P = torch.full_like(table_lanes_P, SHARE_ONE)
    expert, valid, rank, counts_E1 = rank_in_experts(expert_ids_TK, num_experts)
    start = rank_start + load_E[expert] * GOLDEN  # wraps modulo 2**64, which the mask below makes exact
    step = (rank << SHARE_BITS) // counts_E1[expert].clamp(min=1)
    position = (start + step) & (SHARE_ONE - 1)
    # One search for all: the entries of expert e, shifted by e whole turns, are one ascending sequence.
    entries = table_offsets_E1.long()
    owner = torch.searchsorted(entries[1:], torch.arange(table_lanes_P.numel(), device=load_E.device), right=True)
    boundaries = (owner << SHARE_BITS) + table_cumulative_P
    entry = torch.searchsorted(boundaries, (expert << SHARE_BITS) + position, right=True)
    found = valid & (entry < entries[expert + 1])
    return lanes_of_entries(expert_ids_TK, table, load, num_lanes, entry, found, counts_E1)


def rank_in_experts(expert_ids_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    """Of each element, in flat order: its expert, whether that exists, how many before have it; and counts_E1 (last: none)."""
    ids = expert_ids_TK.flatten().long()
    valid = (ids >= 0) & (ids < num_experts)
    bins = torch.where(valid, ids, num_experts)
    counts_E1 = _counts(bins, num_experts + 1)
    # How many earlier elements have the same id: from the places in a stable sort.
    order = torch.argsort(bins, stable=True)
    rank = torch.empty_like(ids)
    rank[order] = torch.arange(ids.numel(), device=ids.device) - (counts_E1.cumsum(0) - counts_E1)[bins[order]]
    return torch.where(valid, ids, 0), valid, rank, counts_E1


def lanes_of_entries(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    load: LoadCounter,
    num_lanes: int,
    entry: torch.Tensor,
    found: torch.Tensor,
    counts_E1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lanes_TK and counts_L of the entries of the table that were found for the elements; records the load."""
    lanes_P = table.lanes_P
    lanes = torch.where(found, lanes_P[torch.where(found, entry, 0)] if lanes_P.numel() else -1, -1)
    counts_L1 = _counts(torch.where(found, lanes, num_lanes), num_lanes + 1)
    if load.increment_1 is not None:
        with _RECORDING:
            load.load_E.add_(counts_E1[:-1] * load.increment_1)
    return lanes.to(torch.int32).view(expert_ids_TK.shape), counts_L1[:num_lanes].to(torch.int32)


def _counts(bins: torch.Tensor, num_bins: int) -> torch.Tensor:
    """int64 [num_bins]; `bincount` would take a host sync."""
    return bins.new_zeros(num_bins, dtype=torch.int64).index_add_(0, bins.long(), torch.ones_like(bins).long())


@registered_op("moe_kernels::select_replicas", mutates_args=("load_load_E",))
def _select_replicas(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    load: LoadCounter,
    rank_start: int,
    num_lanes: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    select = select_replicas_triton if backend == "triton" else select_replicas_torch
    return select(expert_ids_TK, table, load.counted_once(), rank_start, num_lanes=num_lanes)


@_select_replicas.register_fake
def _select_replicas_fake(expert_ids_TK, table, load, rank_start, num_lanes, *_):
    return torch.empty_like(expert_ids_TK), expert_ids_TK.new_empty(num_lanes)


def select_replicas(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    load: LoadCounter,
    rank_start: int,
    *,
    num_lanes: int,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lane that computes each (token, expert) pair, and how many each lane has; records the load if asked to.

    Element i (in flat order) of the N that this batch has for expert e stands at the position
    `(start_e + floor(i * 2**30 / N)) mod 2**30` of a circle which the replicas of e divide by their shares; so each
    replica gets floor or ceil of share * N elements. `start_e = rank_start + load_e * GOLDEN` turns from batch to
    batch, so that batches of one token honour the shares over time. All in integers.

    Args:
        expert_ids_TK: [T, K] int32, contiguous; -1 for a masked token.
        table: the replicas of each expert and their shares; lanes in [0, num_lanes).
        load: the choice reads the counts before this batch; then each occurrence of e counts.
        rank_start: in [0, 2**30); different on each rank, so that ranks do not all begin with the same replica.
        num_lanes: L.
        backend: see `resolve_backend`.

    Returns:
        lanes_TK [T, K] int32; -1 where the id is -1 (or names no expert or one without replicas).
        counts_L [L] int32; the number of elements of each lane.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    num_lanes = check_selection(expert_ids_TK, table, load, num_lanes)
    rank_start = check_integer("rank_start", rank_start)
    if not 0 <= rank_start < SHARE_ONE:
        raise ValueError(f"rank_start={rank_start}: must be in [0, 2**{SHARE_BITS})")
    kernels = resolve_backend(backend, expert_ids_TK.device)
    return _select_replicas(expert_ids_TK, table, load, rank_start, num_lanes, kernels)


def check_selection(expert_ids_TK: torch.Tensor, table: ReplicaTable, load: LoadCounter, num_lanes: int) -> int:
    """Raises ValueError if what every choice of replicas takes breaks its rules. Returns `num_lanes` as an int."""
    check_tensor("expert_ids_TK", expert_ids_TK, (None, None), torch.int32)
    check_kind("table", table, ReplicaTable)
    check_kind("load", load, LoadCounter)
    num_lanes = check_integer("num_lanes", num_lanes)
    device = expert_ids_TK.device
    load.check(device)
    table.check(load.load_E.shape[0], device)
    if num_lanes < 1:
        raise ValueError(f"num_lanes={num_lanes}: must be at least 1")
    return num_lanes
