# mypy: allow-incomplete-defs
"""The whole layer where all experts are here and nobody needs a gradient: one op.

What the separate ops compute, without their checks and registrations, which take the host longer than the kernels run for
few tokens; and a single token has kernels of its own. Nor shares: experts that are all on one device have one replica each.
T tokens, K experts per token, E logical experts, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from moe_kernels.activation import check_activation
from moe_kernels.backend import registered_op, resolve_backend
from moe_kernels.checks import FLOATS, check_gate_up, check_slots, check_tensor
from moe_kernels.combine import combine_torch, combine_triton
from moe_kernels.config import gemm_configs, has_tma
from moe_kernels.expert_down import expert_down_torch, expert_down_triton
from moe_kernels.expert_up import expert_up_torch, expert_up_triton
from moe_kernels.integers import next_power_of_2
from moe_kernels.one_token import one_token_triton
from moe_kernels.replicas import check_counter, select_replicas_torch
from moe_kernels.replicas_triton import select_replicas_triton
from moe_kernels.routing import check_rule, topk_routing_torch, topk_routing_triton
from moe_kernels.schedule import build_schedule_torch, build_schedule_triton


def local_forward_torch(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    down_SHI: torch.Tensor,
    table_lanes_E: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    load_E: torch.Tensor,
    increment_1: torch.Tensor | None,
    top_k: int,
    *,
    score_function: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    token_mask_T: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Reference of `local_forward`: those of the separate ops."""
    weights_TK, ids_TK = topk_routing_torch(
        logits_TE,
        top_k,
        score_function=score_function,
        renormalize=renormalize,
        scale=scale,
        bias_E=bias_E,
        token_mask_T=token_mask_T,
    )
    table = (None, table_lanes_E, None)
    num_lanes = lane_to_slot_L.numel()
    lanes_TK, counts_L = select_replicas_torch(ids_TK, *table, load_E, 0, num_lanes=num_lanes, increment_1=increment_1)
    schedule = build_schedule_torch(lanes_TK.view(-1), counts_L, block_m=16)
    hidden_NI = expert_up_torch(x_TH, gate_up_SNH, lane_to_slot_L, schedule, fanout=top_k, activation=activation)
    rows_NH = expert_down_torch(hidden_NI, down_SHI, lane_to_slot_L, schedule, weights_TK.view(-1))
    return combine_torch(rows_NH, lanes_TK)


_gemm_configs = functools.cache(gemm_configs)  # asked at each forward


def _local_forward_triton(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    down_SHI: torch.Tensor,
    table_lanes_E: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    load_E: torch.Tensor,
    increment_1: torch.Tensor | None,
    top_k: int,
    *,
    activation: str,
    **rule: Any,  # and the mask: what `topk_routing` is told
) -> torch.Tensor:
    _, hidden_size, intermediate = down_SHI.shape
    # By the bucket of tokens, as others would fill the cache.
    batch = (x_TH.dtype, next_power_of_2(x_TH.shape[0]), top_k, load_E.shape[0])
    up, down = _gemm_configs(hidden_size, intermediate, *batch, tma=has_tma(x_TH.device))
    weights_TK, ids_TK = topk_routing_triton(logits_TE, top_k, **rule)
    table = (None, table_lanes_E, None)
    lanes_TK, counts_L = select_replicas_triton(
        ids_TK, *table, load_E, 0, num_lanes=lane_to_slot_L.shape[0], increment_1=increment_1
    )
    schedule = build_schedule_triton(lanes_TK.view(-1), counts_L, block_m=up.block_m, extra_m=up.extra_m)
    tiles = (schedule.order_N, schedule.tile_lane, schedule.tile_start, schedule.tile_end)
    hidden_NI = expert_up_triton(x_TH, gate_up_SNH, lane_to_slot_L, *tiles, top_k, activation, up)
    rows_NH = expert_down_triton(
        hidden_NI, down_SHI, lane_to_slot_L, weights_TK.view(-1), *tiles, schedule.num_tiles, down
    )
    del hidden_NI  # so much less memory at the peak
    return combine_triton(rows_NH, lanes_TK)


@registered_op("moe_kernels::local_forward", mutates_args=("load_E",))
def _local_forward(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    down_SHI: torch.Tensor,
    table_lanes_E: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    load_E: torch.Tensor,
    increment_1: torch.Tensor | None,
    top_k: int,
    score_function: str,
    renormalize: bool,
    scale: float,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
    activation: str,
    backend: str,
) -> torch.Tensor:
    forward: Callable[..., torch.Tensor] = local_forward_torch
    if backend == "triton":
        forward = one_token_triton if x_TH.shape[0] == 1 else _local_forward_triton
    return forward(
        x_TH,
        logits_TE,
        gate_up_SNH,
        down_SHI,
        table_lanes_E,
        lane_to_slot_L,
        load_E,
        increment_1,
        top_k,
        score_function=score_function,
        renormalize=renormalize,
        scale=scale,
        bias_E=bias_E,
        token_mask_T=token_mask_T,
        activation=activation,
    )


@_local_forward.register_fake
def _local_forward_fake(x_TH, *_):
    return torch.empty_like(x_TH)


def local_forward(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    down_SHI: torch.Tensor,
    table_lanes_E: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    load_E: torch.Tensor,
    increment_1: torch.Tensor | None,
    top_k: int,
    *,
    score_function: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    token_mask_T: torch.Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
    validate: bool = True,
) -> torch.Tensor:
    """All ops of one forward, for tokens whose experts are all on this device, once each; without gradients.

    The same bits as by the separate ops and the same counts in `load_E`; but for a single token with Triton: there the
    experts' contributions are not rounded before they are summed. The result depends neither on the slots nor on the lanes.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous.
        logits_TE, top_k, score_function, renormalize, scale, bias_E, token_mask_T: as of `topk_routing`.
        gate_up_SNH: [S, 2I, H], down_SHI: [S, H, I], of the dtype of x, as of `expert_up` and `expert_down`.
        table_lanes_E: [E] int32, contiguous; the lane of each expert's only replica, each in [0, L) and different; with others
            the behaviour is undefined.
        lane_to_slot_L: [L] int32, contiguous.
        load_E, increment_1: as of `select_replicas`.
        activation: "silu", or "gelu" (the exact one).
        backend: see `resolve_backend`.
        validate: False for a caller whose arguments keep these rules by construction and whose `backend` is resolved: the
            checks take the host as long as a launch.

    Returns:
        y_TH, of the dtype of x.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    if validate:
        device = x_TH.device
        check_tensor("x_TH", x_TH, (None, None), FLOATS)
        check_gate_up(gate_up_SNH, x_TH.shape[1], x_TH.dtype, device)
        num_slots, double, hidden_size = gate_up_SNH.shape
        check_tensor("down_SHI", down_SHI, (num_slots, hidden_size, double // 2), x_TH.dtype, device, contiguous=False)
        check_slots("down_SHI", down_SHI)
        check_counter(load_E, increment_1, device)
        check_tensor("table_lanes_E", table_lanes_E, (load_E.shape[0],), torch.int32, device)
        check_tensor("lane_to_slot_L", lane_to_slot_L, (None,), torch.int32, device)
        check_tensor("logits_TE", logits_TE, (x_TH.shape[0], load_E.shape[0]), FLOATS, device)
        check_rule(load_E.shape[0], top_k, score_function, bias_E, device)
        if token_mask_T is not None:
            check_tensor("token_mask_T", token_mask_T, (x_TH.shape[0],), torch.bool, device)
        check_activation(activation)
        backend = resolve_backend(backend, device)
    return _local_forward(
        x_TH,
        logits_TE,
        gate_up_SNH,
        down_SHI,
        table_lanes_E,
        lane_to_slot_L,
        load_E,
        increment_1,
        top_k,
        score_function,
        renormalize,
        float(scale),
        bias_E,
        token_mask_T,
        activation,
        backend,
    )
