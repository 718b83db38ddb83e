"""Triton kernels of a mixture-of-experts layer, each with its PyTorch reference: tensors in, tensors out.

They know slots, lanes and rows; neither which expert a slot holds nor what a rank is.
"""

from moe_kernels.backend import resolve_backend
from moe_kernels.combine import combine, combine_torch
from moe_kernels.config import GemmConfig, gemm_config, gemm_configs, has_tma
from moe_kernels.expert_down import expert_down, expert_down_torch
from moe_kernels.expert_up import expert_up, expert_up_torch
from moe_kernels.load import LoadCounter
from moe_kernels.local_forward import local_experts, local_experts_torch, local_forward, local_forward_torch
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.replicas import select_replicas, select_replicas_torch
from moe_kernels.replicas_triton import GOLDEN, SHARE_BITS
from moe_kernels.routing import topk_routing, topk_routing_torch
from moe_kernels.rule import RoutingRule
from moe_kernels.schedule import TileSchedule, build_schedule, build_schedule_torch
from moe_kernels.table import ReplicaTable

__all__ = [
    "GOLDEN",
    "SHARE_BITS",
    "ExpertMatrices",
    "GemmConfig",
    "LoadCounter",
    "ReplicaTable",
    "RoutingRule",
    "TileSchedule",
    "build_schedule",
    "build_schedule_torch",
    "combine",
    "combine_torch",
    "expert_down",
    "expert_down_torch",
    "expert_up",
    "expert_up_torch",
    "gemm_config",
    "gemm_configs",
    "has_tma",
    "local_experts",
    "local_experts_torch",
    "local_forward",
    "local_forward_torch",
    "resolve_backend",
    "select_replicas",
    "select_replicas_torch",
    "topk_routing",
    "topk_routing_torch",
]
