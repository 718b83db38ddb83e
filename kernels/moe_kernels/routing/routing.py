"""Step 1 of a forward, top-k routing: which experts a token goes to, and with which weight.

T tokens, E logical experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import FLOATS, check_integer, check_kind, check_tensor
from moe_kernels.base.registered import registered_op
from moe_kernels.operands.rule import RoutingRule
from moe_kernels.routing.routing_grad import topk_routing_grad_triton
from moe_kernels.routing.routing_triton import topk_routing_triton


def _scores(logits_TE: torch.Tensor, score_function: str) -> torch.Tensor:
    logits = logits_TE.float()
    if score_function == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.sigmoid(logits) if score_function == "sigmoid" else F.softplus(logits).sqrt()


def _in_kept_groups(choice_TE: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    """Whether each expert is in one of its token's best groups; bool, like `choice_TE`, what they are chosen by."""
    groups = choice_TE.unflatten(-1, (rule.num_groups, -1))
    score = groups.topk(2, dim=-1).values.sum(-1) if rule.group_sum else groups.amax(-1)
    kept = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, : rule.top_groups]
    is_kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, kept, True)
    return is_kept[:, :, None].expand_as(groups).flatten(1)


def topk_routing_torch(
    logits_TE: torch.Tensor,
    top_k: int,
    rule: RoutingRule,
    bias_E: torch.Tensor | None = None,
    token_mask_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `topk_routing`."""
    scores = _scores(logits_TE, rule.score_function)
    key = logits_TE.float() if bias_E is None else scores + bias_E
    key = torch.where(torch.isnan(key), float("-inf"), key)
    if rule.num_groups > 1:
        choice = scores if bias_E is None else key
        kept = _in_kept_groups(torch.where(torch.isnan(choice), float("-inf"), choice), rule)
        key = torch.where(kept, key.clamp(min=torch.finfo(key.dtype).min), float("-inf"))
    ids = torch.sort(key, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(-1, ids)
    if rule.renormalize:
        total = torch.zeros_like(weights[:, 0])
        for rank in range(top_k):
            total = total + weights[:, rank]
        weights = weights / (total + rule.epsilon)[:, None]
    weights = (weights * rule.scale).to(getattr(torch, rule.round_to)).float()
    if token_mask_T is not None:
        weights = torch.where(token_mask_T[:, None], weights, 0.0)
        ids = torch.where(token_mask_T[:, None], ids, -1)
    return weights.contiguous(), ids.to(torch.int32).contiguous()


def check_routing(
    top_k: int,
    rule: RoutingRule,
    num_tokens: int,
    num_experts: int,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
    device: torch.device,
) -> int:
    """Raises ValueError if an argument of a routing, beside the logits, is wrong. Returns `top_k` as an int."""
    top_k = check_integer("top_k", top_k)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be in [1, {num_experts}], the number of experts")
    check_kind("rule", rule, RoutingRule)
    rule.check()
    rule.check_experts(num_experts, top_k)
    if bias_E is not None:
        check_tensor("bias_E", bias_E, (num_experts,), torch.float32, device)
    if token_mask_T is not None:
        check_tensor("token_mask_T", token_mask_T, (num_tokens,), torch.bool, device)
    return top_k


@registered_op("moe_kernels::topk_routing", has_gradient=True)
def _topk_routing(
    logits_TE: torch.Tensor,
    top_k: int,
    rule: RoutingRule,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    route = topk_routing_triton if backend == "triton" else topk_routing_torch
    return route(logits_TE, top_k, rule, bias_E, token_mask_T)


@_topk_routing.register_fake
def _topk_routing_fake(logits_TE, top_k, *_):
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape, dtype=torch.float32), logits_TE.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    logits_TE, _, ctx.rule, *_, ctx.backend = inputs
    _, ids_TK = output
    ctx.mark_non_differentiable(ids_TK)
    ctx.save_for_backward(logits_TE, ids_TK)


def _topk_routing_grad_torch(
    logits_TE: torch.Tensor, ids_TK: torch.Tensor, grad_weights_TK: torch.Tensor, rule: RoutingRule
) -> torch.Tensor:
    """Reference of the gradient of the logits, in their dtype: plain row-wise PyTorch."""
    scores = _scores(logits_TE, rule.score_function)
    kept = ids_TK >= 0
    ids = torch.where(kept, ids_TK, 0).long()
    chosen = scores.gather(-1, ids)
    grad_chosen = grad_weights_TK * rule.scale
    if rule.renormalize:
        total = chosen.sum(-1, keepdim=True) + rule.epsilon
        shares = chosen / total
        grad_chosen = (grad_chosen - (grad_chosen * shares).sum(-1, keepdim=True)) / total
    # Ids are distinct within a row, but for masked rows (K times 0), which are cleared below.
    grad_scores = torch.zeros_like(scores).scatter(-1, ids, grad_chosen)
    if rule.score_function == "softmax":
        grad = scores * (grad_scores - (grad_scores * scores).sum(-1, keepdim=True))
    elif rule.score_function == "sigmoid":
        grad = grad_scores * scores * (1 - scores)
    else:
        grad = grad_scores * torch.sigmoid(logits_TE.float()) / (2 * scores).clamp(min=torch.finfo(torch.float32).tiny)
    grad = torch.where(kept[:, :1], grad, 0.0)
    return grad.to(logits_TE.dtype)


@registered_op("moe_kernels::topk_routing_grad")
def _topk_routing_grad(
    logits_TE: torch.Tensor, ids_TK: torch.Tensor, grad_weights_TK: torch.Tensor, rule: RoutingRule, backend: str
) -> torch.Tensor:
    grad_of = topk_routing_grad_triton if backend == "triton" else _topk_routing_grad_torch
    return grad_of(logits_TE, ids_TK, grad_weights_TK, rule)


@_topk_routing_grad.register_fake
def _topk_routing_grad_fake(logits_TE, *_):
    return torch.empty_like(logits_TE)


def _backward(ctx, needs, grad_weights_TK, _grad_ids):
    """Nothing here depends on the placement."""
    del needs  # only of the logits
    logits_TE, ids_TK = ctx.saved_tensors
    inputs = (logits_TE, ids_TK, grad_weights_TK.contiguous(), ctx.rule)
    if torch.is_grad_enabled():  # of a gradient that is to have one itself (create_graph=True), as the reference has
        return {"logits_TE": _topk_routing_grad_torch(*inputs)}
    return {"logits_TE": _topk_routing_grad(*inputs, ctx.backend)}


_topk_routing.register_autograd(_backward, setup_context=_setup_context)


def topk_routing(
    logits_TE: torch.Tensor,
    top_k: int,
    rule: RoutingRule,
    *,
    bias_E: torch.Tensor | None = None,
    token_mask_T: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `top_k` experts per token, in descending order; of equals, the one with the lowest id.

    The scores are the rule's function of the logits, in float32. With `bias_E` (DeepSeek-V3's correction bias) the choice is
    by score + bias, and the weight is the score without it. With groups only experts of the best groups are chosen; of
    equal groups, the lowest. Without a bias the choice is by the logit,
    whose order is the scores': so it is exact, and the same on every backend. A NaN is chosen last. It makes all weights of
    its token NaN with the softmax; with the sigmoid only its own, if it is chosen (and by `renormalize` those chosen with
    it). Differentiable with respect to `logits_TE`.

    Args:
        logits_TE: [T, E] float32, float16 or bfloat16, contiguous.
        top_k: experts per token, in [1, E].
        rule: how logits become weights.
        bias_E: [E] float32, or None.
        token_mask_T: [T] bool, or None; a token with False (padding) gets the ids -1 and the weights 0.
        backend: see `resolve_backend`.

    Returns:
        weights_TK [T, K] float32 and expert_ids_TK [T, K] int32.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("logits_TE", logits_TE, (None, None), FLOATS)
    num_tokens, num_experts = logits_TE.shape
    top_k = check_routing(top_k, rule, num_tokens, num_experts, bias_E, token_mask_T, logits_TE.device)
    return _topk_routing(logits_TE, top_k, rule, bias_E, token_mask_T, resolve_backend(backend, logits_TE.device))
