"""Steps 2 to 6 of a forward as one op, where all experts are on this device and no gradient is needed.

It computes what the separate ops compute, without their checks and registrations, which take the host longer than the
kernels run for few tokens.
T tokens, K experts per token, E logical experts, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import functools

import torch

from moe_kernels.base.backend import has_tma, resolve_backend
from moe_kernels.base.checks import FLOATS, check_kind, check_tensor
from moe_kernels.base.integers import next_power_of_2
from moe_kernels.base.registered import registered_op
from moe_kernels.gemms.combine import combine_torch, combine_triton
from moe_kernels.gemms.expert_mlp import expert_mlp_torch
from moe_kernels.gemms.expert_mlp_triton import expert_mlp_triton
from moe_kernels.local_schedule import local_schedule_triton
from moe_kernels.operands.config import gemm_configs
from moe_kernels.operands.load import LoadCounter
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.replicas.replicas import select_replicas_torch
from moe_kernels.tiles.schedule import build_schedule_torch


def local_experts_torch(
    x_TH: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    expert_weights_TK: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
) -> torch.Tensor:
    """Reference of `local_experts`: those of the separate ops."""
    slots = table.lane_to_slot_L
    lanes_TK, counts_L = select_replicas_torch(expert_ids_TK, table, load, 0, num_lanes=slots.numel())
    schedule = build_schedule_torch(lanes_TK.view(-1), counts_L, block_m=16)
    rows_NH = expert_mlp_torch(x_TH, matrices, slots, schedule, expert_weights_TK.view(-1), expert_ids_TK.shape[1])
    return combine_torch(rows_NH, lanes_TK)


_gemm_configs = functools.cache(gemm_configs)  # asked at each forward


def local_experts_triton(
    x_TH: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    expert_weights_TK: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
) -> torch.Tensor:
    top_k, slots = expert_ids_TK.shape[1], table.lane_to_slot_L
    # By the bucket of tokens, because each number of tokens would fill the cache with an entry of its own.
    batch = (x_TH.dtype, next_power_of_2(x_TH.shape[0]), top_k, load.load_E.shape[0])
    sizes = (matrices.hidden_size, matrices.intermediate_size)
    up, down = _gemm_configs(*sizes, *batch, tma=has_tma(x_TH.device), scheme=matrices.scheme)
    lanes_TK, schedule = local_schedule_triton(
        expert_ids_TK,
        table,
        load,
        num_lanes=slots.shape[0],
        block_m=up.block_m,
        extra_m=up.schedule_extra_m,
        with_places=down.sorts_rows and x_TH.dtype.itemsize == 2,
    )
    rows_NH = expert_mlp_triton(x_TH, matrices, slots, schedule, expert_weights_TK.view(-1), top_k, up, down)
    return combine_triton(rows_NH, lanes_TK, schedule.places_N)


@registered_op("moe_kernels::local_experts", mutates_args=("load_load_E",))
def _local_experts(
    x_TH: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    expert_weights_TK: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
    backend: str,
) -> torch.Tensor:
    assert table.offsets_E1 is None, "each expert must have one replica"
    forward = local_experts_triton if backend == "triton" else local_experts_torch
    return forward(x_TH, expert_ids_TK, expert_weights_TK, matrices, table, load.counted_once())


@_local_experts.register_fake
def _local_experts_fake(x_TH, *_):
    return torch.empty_like(x_TH)


def check_local(x_TH: torch.Tensor, matrices: ExpertMatrices, table: ReplicaTable, load: LoadCounter) -> None:
    check_tensor("x_TH", x_TH, (None, None), FLOATS)
    check_kind("matrices", matrices, ExpertMatrices)
    check_kind("table", table, ReplicaTable)
    check_kind("load", load, LoadCounter)
    matrices.check(x_TH.shape[1], x_TH.dtype, x_TH.device)
    load.check(x_TH.device)
    table.check_local(load.load_E.shape[0], x_TH.device)


def local_experts(
    x_TH: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    expert_weights_TK: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
    *,
    backend: str = "auto",
    validate: bool = True,
) -> torch.Tensor:
    """`local_forward` after the routing: for ids and weights from the model's own router.

    The same bits as by the separate ops and the same counts in `load.load_E`; the result depends neither on the slots nor
    on the lanes. Not differentiable.

    Args:
        x_TH, matrices, table, load, backend, validate: as of `local_forward`.
        expert_ids_TK: [T, K] int32, contiguous; -1 (or what names no expert) is skipped.
        expert_weights_TK: [T, K] float32, contiguous.

    Returns:
        y_TH, of the dtype of x.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    if validate:
        check_local(x_TH, matrices, table, load)
        check_tensor("expert_ids_TK", expert_ids_TK, (x_TH.shape[0], None), torch.int32, x_TH.device)
        shape = (x_TH.shape[0], expert_ids_TK.shape[1])
        check_tensor("expert_weights_TK", expert_weights_TK, shape, torch.float32, x_TH.device)
        if not 1 <= shape[1] <= load.load_E.shape[0]:
            raise ValueError(f"expert_ids_TK has shape {shape}: dimension 1 must be in [1, {load.load_E.shape[0]}]")
        backend = resolve_backend(backend, x_TH.device)
    return _local_experts(x_TH, expert_ids_TK, expert_weights_TK, matrices, table, load, backend)
