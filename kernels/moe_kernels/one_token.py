"""Steps 1 to 6 of a forward of a single token: `local_forward` in three launches, with little host time.

A plan holds the launches of one kind of layer, so that a forward makes one key, not one for each launch.
K experts per token, E logical experts, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels.integers import cdiv, next_power_of_2
from moe_kernels.launch import PreparedLaunch, on_device, raw_stream
from moe_kernels.load import LoadCounter
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.one_token_triton import _choice_kernel, _down_kernel, _up_kernel
from moe_kernels.routing_triton import rule_constants
from moe_kernels.rule import RoutingRule
from moe_kernels.table import ReplicaTable


@dataclass(frozen=True)
class _Plan:
    """The three launches for layers of one kind, and where the choice begins behind hidden (in elements)."""

    choice: PreparedLaunch
    up: PreparedLaunch
    down: PreparedLaunch
    scratch: int


def _make_plan(
    x_1H: torch.Tensor,
    down_SHI: torch.Tensor,
    num_experts: int,
    top_k: int,
    rule: RoutingRule,
    activation: str,
) -> _Plan:
    _, hidden_size, intermediate = down_SHI.shape
    device_index, block_k = x_1H.get_device(), next_power_of_2(top_k)
    scratch = cdiv(top_k * intermediate, 16) * 16
    num_bytes = 3 * top_k * hidden_size * intermediate * x_1H.element_size()
    eviction = "evict_first" if num_bytes <= _MOST_TO_STREAM else ""
    return _Plan(
        choice=_choice_kernel.prepare(
            device_index,
            SCRATCH=scratch,
            TOP_K=top_k,
            **rule_constants(rule),
            BLOCK_E=next_power_of_2(num_experts),
            BLOCK_K=block_k,
            num_warps=1,
        ),
        up=_up_kernel.prepare(
            device_index,
            SCRATCH=scratch,
            HIDDEN_SIZE=hidden_size,
            INTERMEDIATE=intermediate,
            ACTIVATION=activation,
            EVICTION=eviction,
            BLOCK_H=_block(hidden_size),
            num_warps=2,
        ),
        down=_down_kernel.prepare(
            device_index,
            SCRATCH=scratch,
            HIDDEN_SIZE=hidden_size,
            INTERMEDIATE=intermediate,
            TOP_K=top_k,
            EVICTION=eviction,
            BLOCK_K=block_k,
            BLOCK_I=min(next_power_of_2(intermediate), max(_ELEMENTS // block_k, 16)),
            num_warps=1,
        ),
        scratch=scratch,
    )


_plans: dict[Any, _Plan] = {}
_MOST_PLANS = 256  # kinds of layers; a process has few


def one_token_triton(
    x_1H: torch.Tensor,
    logits_1E: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
    top_k: int,
    rule: RoutingRule,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
) -> torch.Tensor:
    gate_up_SNH, down_SHI = matrices.gate_up_SNH, matrices.down_SHI
    up_bias, down_bias = matrices.gate_up_bias_SN, matrices.down_bias_SH
    up_stride = 0 if up_bias is None else up_bias.stride(0)
    down_stride = 0 if down_bias is None else down_bias.stride(0)
    load_E, increment_1, lane_to_slot_L = load.load_E, load.increment_1, table.lane_to_slot_L
    _, hidden_size, intermediate = down_SHI.shape
    num_experts, num_lanes = load_E.numel(), lane_to_slot_L.numel()
    stride_up, stride_down = gate_up_SNH.stride(0), down_SHI.stride(0)
    device_index = x_1H.get_device()
    key = (
        *(device_index, x_1H.dtype, logits_1E.dtype, gate_up_SNH.dtype, down_SHI.dtype),
        *(hidden_size, intermediate, stride_up, stride_down, num_experts, num_lanes, top_k),
        *(rule.score_function, rule.renormalize, rule.num_groups, rule.top_groups, rule.group_score, rule.round_to),
        *(matrices.activation, up_bias is None, up_stride, down_bias is None, down_stride),
        *(None if bias_E is None else bias_E.dtype, token_mask_T is None, increment_1 is None),
    )
    aligned = not (x_1H.data_ptr() | gate_up_SNH.data_ptr() | down_SHI.data_ptr()) % 16
    plan = _plans.get(key) if aligned else None
    if plan is None:
        plan = _make_plan(x_1H, down_SHI, num_experts, top_k, rule, matrices.activation)
        if aligned:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            _plans[key] = plan
    # hidden, and behind it the choice: one allocation, which takes the host as long as a launch.
    scratch = x_1H.new_empty(plan.scratch + 8 * top_k // x_1H.element_size())
    y_1H = torch.empty_like(x_1H)
    with on_device(device_index):
        stream = raw_stream(device_index)
        plan.choice(
            (1, 1, 1),
            stream,
            logits_1E,
            bias_E,
            token_mask_T,
            float(rule.scale),
            float(rule.epsilon),
            table.lanes_P,
            lane_to_slot_L,
            increment_1,
            load_E,
            scratch,
            num_experts,
            num_lanes,
        )
        plan.up((intermediate, top_k, 1), stream, x_1H, gate_up_SNH, up_bias, scratch, stride_up, up_stride)
        plan.down((hidden_size, 1, 1), stream, scratch, down_SHI, down_bias, y_1H, stride_down, down_stride)
    return y_1H


# Weights up to this size (bytes) take each other's places in L2, and not those of dirty lines, which would have to be written
# first; more of them take longer so (measured on an H200, docs/log.md).
_MOST_TO_STREAM = 256 << 20
_ELEMENTS = 2048  # weights that a program of the down projection reads at once


def _block(size: int) -> int:
    """The widest block that divides the size; else 1024, or what holds it all."""
    return next((block for block in (1024, 512) if size % block == 0), min(1024, next_power_of_2(size)))
