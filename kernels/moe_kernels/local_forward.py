"""The whole layer where all experts are on this device and nobody needs a gradient: one op.

It computes what the separate ops compute, without their checks and registrations, which take the host longer than the
kernels run for few tokens. A single token has kernels of its own. `local_experts` is the same without routing.
T tokens, K experts per token, E logical experts, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import functools

import torch

from moe_kernels.backend import resolve_backend
from moe_kernels.checks import FLOATS, check_tensor
from moe_kernels.combine import combine_torch, combine_triton
from moe_kernels.config import gemm_configs, has_tma
from moe_kernels.expert_down import expert_down_torch
from moe_kernels.expert_down_triton import expert_down_triton
from moe_kernels.expert_up import expert_up_torch
from moe_kernels.expert_up_triton import expert_up_triton
from moe_kernels.integers import next_power_of_2
from moe_kernels.load import LoadCounter
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.one_token import one_token_triton
from moe_kernels.registered import registered_op
from moe_kernels.replicas import select_replicas_torch
from moe_kernels.replicas_triton import select_replicas_triton
from moe_kernels.routing import check_routing, topk_routing_torch
from moe_kernels.routing_triton import topk_routing_triton
from moe_kernels.rule import RoutingRule
from moe_kernels.schedule import build_schedule_torch, build_schedule_triton
from moe_kernels.table import ReplicaTable


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
    hidden_NI = expert_up_torch(x_TH, matrices, slots, schedule, fanout=expert_ids_TK.shape[1])
    rows_NH = expert_down_torch(hidden_NI, matrices, slots, schedule, expert_weights_TK.view(-1))
    return combine_torch(rows_NH, lanes_TK)


def local_forward_torch(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
    top_k: int,
    rule: RoutingRule,
    bias_E: torch.Tensor | None = None,
    token_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `local_forward`: those of the separate ops."""
    weights_TK, ids_TK = topk_routing_torch(logits_TE, top_k, rule, bias_E, token_mask_T)
    return local_experts_torch(x_TH, ids_TK, weights_TK, matrices, table, load)


_gemm_configs = functools.cache(gemm_configs)  # asked at each forward


def _local_experts_triton(
    x_TH: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    expert_weights_TK: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
) -> torch.Tensor:
    (_, hidden_size, intermediate), top_k, slots = matrices.down_SHI.shape, expert_ids_TK.shape[1], table.lane_to_slot_L
    # By the bucket of tokens, because each number of tokens would fill the cache with an entry of its own.
    batch = (x_TH.dtype, next_power_of_2(x_TH.shape[0]), top_k, load.load_E.shape[0])
    up, down = _gemm_configs(hidden_size, intermediate, *batch, tma=has_tma(x_TH.device))
    lanes_TK, counts_L = select_replicas_triton(expert_ids_TK, table, load, 0, num_lanes=slots.shape[0])
    schedule = build_schedule_triton(lanes_TK.view(-1), counts_L, block_m=up.block_m, extra_m=up.extra_m)
    hidden_NI = expert_up_triton(x_TH, matrices, slots, schedule, top_k, up)
    rows_NH = expert_down_triton(hidden_NI, matrices, slots, schedule, expert_weights_TK.view(-1), down)
    del hidden_NI  # so much less memory at the peak
    return combine_triton(rows_NH, lanes_TK)


def _local_forward_triton(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
    top_k: int,
    rule: RoutingRule,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
) -> torch.Tensor:
    if x_TH.shape[0] == 1:
        return one_token_triton(x_TH, logits_TE, matrices, table, load, top_k, rule, bias_E, token_mask_T)
    weights_TK, ids_TK = topk_routing_triton(logits_TE, top_k, rule, bias_E, token_mask_T)
    return _local_experts_triton(x_TH, ids_TK, weights_TK, matrices, table, load)


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
    forward = _local_experts_triton if backend == "triton" else local_experts_torch
    return forward(x_TH, expert_ids_TK, expert_weights_TK, matrices, table, load.counted_once())


@registered_op("moe_kernels::local_forward", mutates_args=("load_load_E",))
def _local_forward(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
    top_k: int,
    rule: RoutingRule,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    assert table.offsets_E1 is None, "each expert must have one replica"
    forward = _local_forward_triton if backend == "triton" else local_forward_torch
    return forward(x_TH, logits_TE, matrices, table, load.counted_once(), top_k, rule, bias_E, token_mask_T)


@_local_experts.register_fake
@_local_forward.register_fake
def _like_x(x_TH, *_):
    return torch.empty_like(x_TH)


def _check(x_TH: torch.Tensor, matrices: ExpertMatrices, table: ReplicaTable, load: LoadCounter) -> None:
    check_tensor("x_TH", x_TH, (None, None), FLOATS)
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
    """`local_forward` after the routing: for ids and weights that a router of the model's own has chosen.

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
        _check(x_TH, matrices, table, load)
        check_tensor("expert_ids_TK", expert_ids_TK, (x_TH.shape[0], None), torch.int32, x_TH.device)
        shape = (x_TH.shape[0], expert_ids_TK.shape[1])
        check_tensor("expert_weights_TK", expert_weights_TK, shape, torch.float32, x_TH.device)
        if not 1 <= shape[1] <= load.load_E.shape[0]:
            raise ValueError(f"expert_ids_TK has shape {shape}: dimension 1 must be in [1, {load.load_E.shape[0]}]")
        backend = resolve_backend(backend, x_TH.device)
    return _local_experts(x_TH, expert_ids_TK, expert_weights_TK, matrices, table, load, backend)


def local_forward(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
    top_k: int,
    rule: RoutingRule,
    *,
    bias_E: torch.Tensor | None = None,
    token_mask_T: torch.Tensor | None = None,
    backend: str = "auto",
    validate: bool = True,
) -> torch.Tensor:
    """All ops of one forward, for tokens whose experts are all on this device, once each; without gradients.

    The same bits as by the separate ops and the same counts in `load.load_E`; but for a single token with Triton: there the
    experts' contributions are not rounded before they are summed. The result depends neither on the slots nor on the lanes.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous.
        logits_TE, top_k, rule, bias_E, token_mask_T: as of `topk_routing`.
        matrices: of the dtype of x.
        table: of one replica for each expert; lanes in [0, L).
        load: see `LoadCounter`.
        backend: see `resolve_backend`.
        validate: False for a caller whose arguments keep these rules by construction and whose `backend` is resolved: the
            checks take the host as long as a launch.

    Returns:
        y_TH, of the dtype of x.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    if validate:
        _check(x_TH, matrices, table, load)
        num_tokens, num_experts, device = x_TH.shape[0], load.load_E.shape[0], x_TH.device
        check_tensor("logits_TE", logits_TE, (num_tokens, num_experts), FLOATS, device)
        check_routing(top_k, rule, num_tokens, num_experts, bias_E, token_mask_T, device)
        backend = resolve_backend(backend, device)
    return _local_forward(x_TH, logits_TE, matrices, table, load, top_k, rule, bias_E, token_mask_T, backend)
