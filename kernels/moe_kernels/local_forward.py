"""Steps 1 to 6 of a forward as one op, where all experts are on this device and no gradient is needed.

It is the routing and `local_experts`. A single token has kernels of its own (`one_token.py`).
T tokens, K experts per token, E logical experts, H hidden, L lanes.
"""

from __future__ import annotations

import torch

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import FLOATS, check_tensor
from moe_kernels.base.registered import registered_op
from moe_kernels.local_experts import check_local, local_experts_torch, local_experts_triton
from moe_kernels.one_token.one_token import one_token_triton
from moe_kernels.operands.load import LoadCounter
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.operands.rule import RoutingRule
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.routing.routing import check_routing, topk_routing_torch
from moe_kernels.routing.routing_triton import topk_routing_triton


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
    return local_experts_triton(x_TH, ids_TK, weights_TK, matrices, table, load)


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


@_local_forward.register_fake
def _local_forward_fake(x_TH, *_):
    return torch.empty_like(x_TH)


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
    """All steps of one forward, for experts that are all on this device, each in one replica. Not differentiable.

    The same bits as by the separate ops and the same counts in `load.load_E`; but for a single token with Triton: there the
    experts' contributions are not rounded before they are summed, and nothing is quantised with fp8_block. The result depends
    neither on the slots nor on the lanes.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous.
        logits_TE, top_k, rule, bias_E, token_mask_T: as of `topk_routing`.
        matrices: of the dtype of x, or quantised.
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
        check_local(x_TH, matrices, table, load)
        num_tokens, num_experts, device = x_TH.shape[0], load.load_E.shape[0], x_TH.device
        check_tensor("logits_TE", logits_TE, (num_tokens, num_experts), FLOATS, device)
        top_k = check_routing(top_k, rule, num_tokens, num_experts, bias_E, token_mask_T, device)
        backend = resolve_backend(backend, device)
    return _local_forward(x_TH, logits_TE, matrices, table, load, top_k, rule, bias_E, token_mask_T, backend)
