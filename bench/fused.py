"""The fused forward of expert matrices in any format, and the same in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.providers import sum_over_experts
from moe_kernels import ExpertMatrices, LoadCounter, ReplicaTable, RoutingRule, local_forward
from moe_kernels.operands.activation import gated

GPT_OSS = "silu limit=7.0 alpha=1.702 up_offset=1.0"
"""The activation of GPT-OSS's experts, whose matrices have biases too."""


def fused_forward(
    x_TH: torch.Tensor, logits_TE: torch.Tensor, top_k: int, matrices: ExpertMatrices
) -> Callable[[], torch.Tensor]:
    """The forward on one rank, ready to be called often; expert e is in lane and slot e. It counts its load."""
    device, num_experts = x_TH.device, logits_TE.shape[1]
    numbers_E = torch.arange(num_experts, dtype=torch.int32, device=device)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
    load = LoadCounter(counts_E, torch.ones(1, dtype=torch.int64, device=device))
    table, rule = ReplicaTable(numbers_E, numbers_E), RoutingRule()
    return lambda: local_forward(x_TH, logits_TE, matrices, table, load, top_k, rule)


def reference(x_TH: torch.Tensor, logits_TE: torch.Tensor, top_k: int, matrices: ExpertMatrices) -> torch.Tensor:
    """[T, H] in float32, without TF32: with dequantised weights, and rows that are not quantised."""
    up_bias, down_bias = matrices.gate_up_bias_SN, matrices.down_bias_SH

    def expert_rows(expert: int, rows: torch.Tensor) -> torch.Tensor:
        product = rows @ matrices.gate_up_of(expert, torch.float32).float().T
        product = product if up_bias is None else product + up_bias[expert].float()
        rows = gated(matrices.activation, *product.chunk(2, dim=-1)) @ matrices.down_of(expert, torch.float32).float().T
        return rows if down_bias is None else rows + down_bias[expert].float()

    return sum_over_experts(x_TH, logits_TE, top_k, expert_rows)
