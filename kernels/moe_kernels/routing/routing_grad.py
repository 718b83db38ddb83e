"""Backward of the routing: the gradient of the router logits, in one kernel.

T tokens, E logical experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import narrow, widen
from moe_kernels.operands.rule import RoutingRule
from moe_kernels.routing.routing_triton import scored, tokens_and_warps


@Launcher
@triton.jit(do_not_specialize=["num_tokens"])
def _topk_routing_grad_kernel(
    # inputs
    logits_ptr,
    ids_ptr,
    grad_weights_ptr,
    scale,
    epsilon,
    # outputs
    grad_ptr,
    # shapes
    num_tokens,
    num_experts,
    # constants
    TOP_K: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """TOKENS tokens, each within a warp. A token whose first id is -1 gets zeros.

    Example: logits [0, 0], K = 1, softmax, not renormalized, id 0, gradient 1 of its weight 0.5 → [0.25, -0.25].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    is_token = token < num_tokens
    exists = is_token & (expert < num_experts)
    at = token * num_experts + expert
    logits = widen(tl.load(logits_ptr + at, mask=exists, other=0.0))
    scores = scored(tl.where(expert < num_experts, logits, float("-inf")), SCORE_FUNCTION)
    scores = tl.where(expert < num_experts, scores, 0.0)
    grad = tl.zeros((TOKENS, BLOCK_E), dtype=tl.float32)
    is_chosen = grad != grad  # nowhere
    for k in range(TOP_K):
        chosen = expert == tl.load(ids_ptr + token * TOP_K + k, mask=is_token, other=-1)
        grad = tl.where(chosen, tl.load(grad_weights_ptr + token * TOP_K + k, mask=is_token, other=0.0), grad)
        is_chosen = is_chosen | chosen
    grad *= scale
    if RENORMALIZE:
        total = tl.sum(tl.where(is_chosen, scores, 0.0), axis=1, keep_dims=True) + epsilon
        shared = tl.sum(tl.where(is_chosen, grad * (scores / total), 0.0), axis=1, keep_dims=True)
        grad = tl.where(is_chosen, (grad - shared) / total, 0.0)
    if SCORE_FUNCTION == "softmax":
        grad = scores * (grad - tl.sum(grad * scores, axis=1, keep_dims=True))
    elif SCORE_FUNCTION == "sigmoid":
        grad = grad * scores * (1.0 - scores)
    else:
        tl.static_assert(SCORE_FUNCTION == "sqrtsoftplus")
        grad = grad * (1.0 / (1.0 + tl.exp(-logits))) / (2.0 * tl.maximum(scores, 1.1754943508222875e-38))
    kept = tl.load(ids_ptr + token * TOP_K, mask=is_token, other=-1) >= 0
    tl.store(grad_ptr + at, narrow(tl.where(kept, grad, 0.0), grad_ptr.dtype.element_ty), mask=exists)


def topk_routing_grad_triton(
    logits_TE: torch.Tensor, ids_TK: torch.Tensor, grad_weights_TK: torch.Tensor, rule: RoutingRule
) -> torch.Tensor:
    """The gradient of the logits, in their dtype, from that of the weights, float32. As of `_topk_routing_grad_torch`."""
    (num_tokens, num_experts), top_k = logits_TE.shape, ids_TK.shape[1]
    grad_TE = torch.empty_like(logits_TE)
    tokens, warps = tokens_and_warps(num_experts)
    if num_tokens:
        _topk_routing_grad_kernel[(cdiv(num_tokens, tokens),)](
            logits_TE,
            ids_TK,
            grad_weights_TK,
            float(rule.scale),
            float(rule.epsilon),
            grad_TE,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            SCORE_FUNCTION=rule.score_function,
            RENORMALIZE=rule.renormalize,
            TOKENS=tokens,
            BLOCK_E=next_power_of_2(num_experts),
            num_warps=warps,
        )
    return grad_TE
