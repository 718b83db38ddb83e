# mypy: allow-incomplete-defs
"""The whole layer for a single token whose experts are all here, in three launches: choice, up, and down with combine.

Neither schedule nor tiles nor tensor cores: all that counts is how soon the memory is busy, and that it stays so.
Nor shares: experts that are all on one device have one replica each.
K experts per token, E logical experts, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_kernels.activation import check_activation, gated
from moe_kernels.backend import registered_op, resolve_backend
from moe_kernels.checks import FLOATS, check_gate_up, check_slots, check_tensor
from moe_kernels.one_token_triton import one_token_triton
from moe_kernels.replicas import check_counter
from moe_kernels.routing import check_rule, topk_routing_torch
from moe_kernels.row_blocks import without_autocast


@without_autocast
def one_token_torch(
    x_1H: torch.Tensor,
    logits_1E: torch.Tensor,
    gate_up_SNH: torch.Tensor,
    down_SHI: torch.Tensor,
    table_lanes_E: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
    load_E: torch.Tensor,
    increment_1: torch.Tensor | None,
    top_k: int,
    score_function: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    token_mask_1: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Reference of `one_token`."""
    weights_1K, ids_1K = topk_routing_torch(
        logits_1E,
        top_k,
        score_function=score_function,
        renormalize=renormalize,
        scale=scale,
        bias_E=bias_E,
        token_mask_T=token_mask_1,
    )
    ids_K = ids_1K[0].long()
    is_masked_K, ids_K = ids_K < 0, ids_K.clamp(min=0)
    if increment_1 is not None:
        load_E.index_add_(0, ids_K, torch.where(is_masked_K, 0, increment_1))
    lanes_K = torch.where(is_masked_K, -1, table_lanes_E[ids_K])
    slots_K = lane_to_slot_L[lanes_K.clamp(min=0).long()].long()
    total_H = x_1H.new_zeros(x_1H.shape[1], dtype=torch.float32)
    for k in range(top_k):
        # A lane of -1 may lead to a slot of -1, or to weights that nobody ever wrote.
        slot = slots_K[k].clamp(min=0)
        gate_I, up_I = F.linear(x_1H[0].float(), gate_up_SNH[slot].float()).chunk(2)
        hidden_I = gated(activation, gate_I, up_I).to(x_1H.dtype)
        product_H = F.linear(hidden_I.float(), down_SHI[slot].float())
        total_H += torch.where(lanes_K[k] >= 0, product_H * weights_1K[0, k], 0.0)
    return total_H.to(x_1H.dtype)[None]


@registered_op("moe_kernels::one_token", mutates_args=("load_E",))
def _one_token(
    x_1H: torch.Tensor,
    logits_1E: torch.Tensor,
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
    token_mask_1: torch.Tensor | None,
    activation: str,
    backend: str,
) -> torch.Tensor:
    return (one_token_triton if backend == "triton" else one_token_torch)(
        x_1H,
        logits_1E,
        gate_up_SNH,
        down_SHI,
        table_lanes_E,
        lane_to_slot_L,
        load_E,
        increment_1,
        top_k,
        score_function,
        renormalize,
        scale,
        bias_E,
        token_mask_1,
        activation,
    )


@_one_token.register_fake
def _one_token_fake(x_1H, *_):
    return torch.empty_like(x_1H)


def one_token(
    x_1H: torch.Tensor,
    logits_1E: torch.Tensor,
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
    token_mask_1: torch.Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
    validate: bool = True,
) -> torch.Tensor:
    """All ops of one forward, for one token whose experts are all on this device, once each; without gradients.

    The same experts and weights as by the separate ops, and the same counts in `load_E`. hidden is rounded to the dtype
    of x; unlike there, the experts' contributions are not rounded before they are summed. The result depends neither on
    the slots nor on the lanes.

    Args:
        x_1H: [1, H] float32, float16 or bfloat16, contiguous.
        logits_1E, top_k, score_function, renormalize, scale, bias_E, token_mask_1: as of `topk_routing`.
        gate_up_SNH: [S, 2I, H], down_SHI: [S, H, I], of the dtype of x, as of `expert_up` and `expert_down`.
        table_lanes_E: [E] int32, contiguous; the lane of each expert's only replica, -1 for none (it adds nothing).
        lane_to_slot_L: [L] int32, contiguous.
        load_E, increment_1: as of `select_replicas`.
        activation: "silu", or "gelu" (the exact one).
        backend: see `resolve_backend`.
        validate: False for a caller whose arguments keep these rules by construction and whose `backend` is resolved: the
            checks take the host as long as a launch.

    Returns:
        y_1H, of the dtype of x.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    if validate:
        device = x_1H.device
        check_tensor("x_1H", x_1H, (1, None), FLOATS)
        check_gate_up(gate_up_SNH, x_1H.shape[1], x_1H.dtype, device)
        num_slots, double, hidden_size = gate_up_SNH.shape
        check_tensor("down_SHI", down_SHI, (num_slots, hidden_size, double // 2), x_1H.dtype, device, contiguous=False)
        check_slots("down_SHI", down_SHI)
        check_counter(load_E, increment_1, device)
        check_tensor("table_lanes_E", table_lanes_E, (load_E.shape[0],), torch.int32, device)
        check_tensor("lane_to_slot_L", lane_to_slot_L, (None,), torch.int32, device)
        check_tensor("logits_1E", logits_1E, (1, load_E.shape[0]), FLOATS, device)
        check_rule(load_E.shape[0], top_k, score_function, bias_E, device)
        if token_mask_1 is not None:
            check_tensor("token_mask_1", token_mask_1, (1,), torch.bool, device)
        check_activation(activation)
        backend = resolve_backend(backend, device)
    return _one_token(
        x_1H,
        logits_1E,
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
        token_mask_1,
        activation,
        backend,
    )
