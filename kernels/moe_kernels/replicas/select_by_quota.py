"""Replica choice by batch: each replica of an expert gets as many tokens of all ranks as its quota says.

T tokens, E logical experts, K experts per token, L lanes, P replicas of all experts together (entries of the table).
"""

from __future__ import annotations

import torch

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_tensor
from moe_kernels.base.registered import registered_op
from moe_kernels.operands.load import LoadCounter
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.replicas.replicas import check_selection, lanes_of_entries, rank_in_experts
from moe_kernels.replicas.replicas_triton import launch_selection


def select_by_quota_torch(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    quotas_P: torch.Tensor,
    before_E: torch.Tensor,
    load: LoadCounter,
    *,
    num_lanes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `select_by_quota`."""
    num_experts, num_entries, device = before_E.numel(), table.lanes_P.numel(), before_E.device
    offsets_E1 = table.offsets_E1
    expert, valid, rank, counts_E1 = rank_in_experts(expert_ids_TK, num_experts)
    if offsets_E1 is None:
        return lanes_of_entries(expert_ids_TK, table, load, num_lanes, expert, valid, counts_E1)
    entries = offsets_E1.long()
    position = before_E.long()[expert] + rank
    # One search for all: the ends of expert e, shifted by e times more than any end, are one ascending sequence.
    owner = torch.searchsorted(entries[1:], torch.arange(num_entries, device=device), right=True)
    entry = torch.searchsorted((owner << 32) + quotas_P, (expert << 32) + position, right=True)
    found = valid & (entry < entries[expert + 1])
    return lanes_of_entries(expert_ids_TK, table, load, num_lanes, entry, found, counts_E1)


def select_by_quota_triton(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    quotas_P: torch.Tensor,
    before_E: torch.Tensor,
    load: LoadCounter,
    *,
    num_lanes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    if table.offsets_E1 is None:  # nothing to choose
        return launch_selection(expert_ids_TK, (None, table.lanes_P, None), load, 0, num_lanes, False)
    return launch_selection(expert_ids_TK, (table.offsets_E1, table.lanes_P, quotas_P), load, before_E, num_lanes, True)


@registered_op("moe_kernels::select_by_quota", mutates_args=("load_load_E",))
def _select_by_quota(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    quotas_P: torch.Tensor,
    before_E: torch.Tensor,
    load: LoadCounter,
    num_lanes: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    select = select_by_quota_triton if backend == "triton" else select_by_quota_torch
    return select(expert_ids_TK, table, quotas_P, before_E, load.counted_once(), num_lanes=num_lanes)


@_select_by_quota.register_fake
def _select_by_quota_fake(expert_ids_TK, table, quotas_P, before_E, load, num_lanes, *_):
    return torch.empty_like(expert_ids_TK), expert_ids_TK.new_empty(num_lanes)


def select_by_quota(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    quotas_P: torch.Tensor,
    before_E: torch.Tensor,
    load: LoadCounter,
    *,
    num_lanes: int,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lane that computes each (token, expert) pair, and how many each lane has; records the load if asked to.

    Element i (in flat order) that this rank has for expert e stands at before_e + i among the tokens of e on all ranks;
    `quotas_P` says where the part of each replica ends. So each replica gets exactly its quota.

    Args:
        expert_ids_TK: [T, K] int32, contiguous; -1 for a masked token.
        table: the replicas of each expert, lanes in [0, num_lanes); their shares are not used.
        quotas_P, before_E: [P], [E] int32, contiguous, from `solve_shares` with `count_experts` of these ids. Not used where
            each expert has one replica (`table.offsets_E1` is None).
        load: counted as in `select_replicas`, but not read.
        num_lanes: L.
        backend: see `resolve_backend`.

    Returns:
        lanes_TK [T, K] int32; -1 where the id is -1 (or names no expert or one without replicas).
        counts_L [L] int32; the number of elements of each lane.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    num_lanes = check_selection(expert_ids_TK, table, load, num_lanes)
    device = expert_ids_TK.device
    check_tensor("quotas_P", quotas_P, (table.lanes_P.shape[0],), torch.int32, device)
    check_tensor("before_E", before_E, load.load_E.shape, torch.int32, device)
    return _select_by_quota(expert_ids_TK, table, quotas_P, before_E, load, num_lanes, resolve_backend(backend, device))
