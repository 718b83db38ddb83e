# mypy: allow-incomplete-defs
# Of the arguments of a kernel only the constants are annotated.
"""Top-k routing: which experts a token goes to, and with which weight.

T tokens, E logical experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.backend import registered_op, resolve_backend
from moe_kernels.checks import FLOATS, check_tensor
from moe_kernels.integers import cdiv, next_power_of_2
from moe_kernels.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.numerics import widen

SCORE_FUNCTIONS = ("softmax", "sigmoid")
# Added to the sum that the chosen scores are divided by, as in DeepSeek-V3's published modelling code: it changes no
# bit of any sum above 1e-12, and keeps a row of vanishing scores from becoming NaN.
RENORMALIZE_EPSILON = 1e-20
_RENORMALIZE_EPSILON = tl.constexpr(RENORMALIZE_EPSILON)
_TAKEN = tl.constexpr(-(2**31))


@triton.jit
def _ordered(value):
    """int32 in the order of the float32 `value`; above `_TAKEN`. A NaN is like -inf, -0 like 0.

    A warp reduces 32-bit integers in one instruction, but floats in five rounds of shuffles.
    """
    value = tl.where(value == value, value, float("-inf"))
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value == 0.0, 0, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def choose_experts(
    logits_ptr,
    bias_ptr,
    num_tokens,
    num_experts,
    scale,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights and ids [TOKENS, BLOCK_K] of the tokens whose logits begin at `logits_ptr`; zeros from TOP_K on.

    The choice takes K rounds of three integer reductions. (To count, for every expert, those before it would take no
    rounds, but E * E comparisons: as long for one token, and several times as long for many.)
    """
    token, expert = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK_E)[None, :]
    exists = expert < num_experts
    logits = tl.load(logits_ptr + token * num_experts + expert, mask=(token < num_tokens) & exists, other=0.0)
    logits = tl.where(exists, widen(logits), float("-inf"))
    if SOFTMAX:
        scores = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
        scores = scores / tl.sum(scores, axis=1, keep_dims=True)
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    key = logits
    if bias_ptr is not None:
        # For each token anew, or Triton would spread one load over all warps, and the tokens with it.
        key = scores + tl.load(bias_ptr + tl.broadcast_to(expert, key.shape), mask=exists, other=0.0)
    key = tl.where(exists, _ordered(key), _TAKEN)
    score_bits = scores.to(tl.int32, bitcast=True)

    slot = tl.arange(0, BLOCK_K)[None, :]
    weights = tl.zeros((TOKENS, BLOCK_K), dtype=tl.float32)
    ids = tl.zeros((TOKENS, BLOCK_K), dtype=tl.int32)
    total = tl.zeros((TOKENS, 1), dtype=tl.float32)
    for k in range(TOP_K):
        best = tl.max(key, axis=1, keep_dims=True)
        chosen = tl.min(tl.where(key == best, expert, BLOCK_E), axis=1, keep_dims=True)
        key = tl.where(expert == chosen, _TAKEN, key)
        weight_bits = tl.sum(tl.where(expert == chosen, score_bits, 0), axis=1, keep_dims=True)
        weight = weight_bits.to(tl.float32, bitcast=True)
        total += weight
        weights = tl.where(slot == k, weight, weights)
        ids = tl.where(slot == k, chosen, ids)
    if RENORMALIZE:
        weights = weights / (total + _RENORMALIZE_EPSILON)
    return weights * scale, ids


@Launcher
@triton.jit(do_not_specialize=["num_tokens"])  # or serving would compile when it is a multiple of 16
def _topk_routing_kernel(
    # inputs
    logits_ptr,
    bias_ptr,  # None: no bias
    mask_ptr,  # None: every token counts
    scale,
    # outputs
    weights_ptr,
    ids_ptr,
    # shapes
    num_tokens,
    num_experts,
    # constants
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """TOKENS tokens, a warp for each.

    Example: logits [1, 3, 3, 2], K = 2, softmax, renormalized → ids [1, 2], weights [0.5, 0.5].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    first = tl.program_id(0).to(tl.int64) * TOKENS
    logits_ptr += first * num_experts
    weights, ids = choose_experts(
        *(logits_ptr, bias_ptr, num_tokens - first, num_experts, scale),
        *(TOP_K, SOFTMAX, RENORMALIZE, TOKENS, BLOCK_E, BLOCK_K),
    )
    token, slot = first + tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + token, mask=token < num_tokens, other=0) != 0
        weights = tl.where(counts, weights, 0.0)
        ids = tl.where(counts, ids, -1)
    inside = (token < num_tokens) & (slot < TOP_K)
    tl.store(weights_ptr + token * TOP_K + slot, weights, mask=inside)
    tl.store(ids_ptr + token * TOP_K + slot, ids, mask=inside)


def _tokens_per_program(num_experts: int) -> int:
    """The same for any T, as the order of the sum over experts decides bits.

    Programs of one warp leave half of a multiprocessor's warps unused. Triton gives each token a warp of its own if a
    warp reads a row of float32 at once, 16 bytes a thread; else it would spread a token over several.
    """
    return 4 if num_experts % 16 == 0 and num_experts <= 128 else 1


def topk_routing_triton(
    logits_TE: torch.Tensor,
    top_k: int,
    *,
    score_function: str,
    renormalize: bool,
    scale: float,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty((num_tokens, top_k), dtype=torch.float32)
    ids_TK = logits_TE.new_empty((num_tokens, top_k), dtype=torch.int32)
    tokens = _tokens_per_program(num_experts)
    if num_tokens:
        _topk_routing_kernel[(cdiv(num_tokens, tokens),)](
            logits_TE,
            bias_E,
            token_mask_T,
            scale,
            weights_TK,
            ids_TK,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            SOFTMAX=score_function == "softmax",
            RENORMALIZE=renormalize,
            TOKENS=tokens,
            BLOCK_E=next_power_of_2(num_experts),
            BLOCK_K=next_power_of_2(top_k),
            num_warps=tokens,
        )
    return weights_TK, ids_TK


def _scores(logits_TE: torch.Tensor, score_function: str) -> torch.Tensor:
    logits = logits_TE.float()
    return torch.softmax(logits, dim=-1) if score_function == "softmax" else torch.sigmoid(logits)


def topk_routing_torch(
    logits_TE: torch.Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    token_mask_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `topk_routing`."""
    scores = _scores(logits_TE, score_function)
    key = logits_TE.float() if bias_E is None else scores + bias_E
    key = torch.where(torch.isnan(key), float("-inf"), key)
    ids = torch.sort(key, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(-1, ids)
    if renormalize:
        total = torch.zeros_like(weights[:, 0])
        for rank in range(top_k):
            total = total + weights[:, rank]
        weights = weights / (total + RENORMALIZE_EPSILON)[:, None]
    weights = weights * scale
    if token_mask_T is not None:
        weights = torch.where(token_mask_T[:, None], weights, 0.0)
        ids = torch.where(token_mask_T[:, None], ids, -1)
    return weights.contiguous(), ids.to(torch.int32).contiguous()


def check_rule(
    num_experts: int, top_k: int, score_function: str, bias_E: torch.Tensor | None, device: torch.device
) -> None:
    """What every op that chooses experts asks of the rule."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be in [1, {num_experts}], the number of experts")
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function={score_function!r}: must be one of {SCORE_FUNCTIONS}")
    if bias_E is not None:
        check_tensor("bias_E", bias_E, (num_experts,), torch.float32, device)


@registered_op("moe_kernels::topk_routing")
def _topk_routing(
    logits_TE: torch.Tensor,
    top_k: int,
    score_function: str,
    renormalize: bool,
    scale: float,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    route = topk_routing_triton if backend == "triton" else topk_routing_torch
    return route(
        logits_TE,
        top_k,
        score_function=score_function,
        renormalize=renormalize,
        scale=scale,
        bias_E=bias_E,
        token_mask_T=token_mask_T,
    )


@_topk_routing.register_fake
def _topk_routing_fake(logits_TE, top_k, score_function, renormalize, scale, bias_E, token_mask_T, backend):
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape, dtype=torch.float32), logits_TE.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    logits_TE, _, ctx.score_function, ctx.renormalize, ctx.scale, *_ = inputs
    _, ids_TK = output
    ctx.mark_non_differentiable(ids_TK)
    ctx.save_for_backward(logits_TE, ids_TK)


def _backward(ctx, grad_weights_TK, _grad_ids):
    """Plain row-wise PyTorch: nothing here depends on the placement."""
    logits_TE, ids_TK = ctx.saved_tensors
    scores = _scores(logits_TE, ctx.score_function)
    kept = ids_TK >= 0
    ids = torch.where(kept, ids_TK, 0).long()
    chosen = scores.gather(-1, ids)
    grad_chosen = grad_weights_TK * ctx.scale
    if ctx.renormalize:
        total = chosen.sum(-1, keepdim=True) + RENORMALIZE_EPSILON
        shares = chosen / total
        grad_chosen = (grad_chosen - (grad_chosen * shares).sum(-1, keepdim=True)) / total
    # Ids are distinct within a row, but for masked rows (K times 0), which are cleared below.
    grad_scores = torch.zeros_like(scores).scatter(-1, ids, grad_chosen)
    if ctx.score_function == "softmax":
        grad = scores * (grad_scores - (grad_scores * scores).sum(-1, keepdim=True))
    else:
        grad = grad_scores * scores * (1 - scores)
    grad = torch.where(kept[:, :1], grad, 0.0)
    return grad.to(logits_TE.dtype), None, None, None, None, None, None, None


_topk_routing.register_autograd(_backward, setup_context=_setup_context)


def topk_routing(
    logits_TE: torch.Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    token_mask_T: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `top_k` experts per token, in descending order; of equals, the one with the lowest id.

    The scores are the softmax over all experts, or the sigmoid, in float32. With `bias_E` (DeepSeek-V3's correction
    bias) the choice is by score + bias, and the weight is the score without it. Without it the choice is by the logit,
    whose order is the scores': so it is exact, and the same on every backend. A NaN is chosen last. It makes all weights of
    its token NaN with the softmax; with the sigmoid only its own, if it is chosen (and by `renormalize` those chosen with
    it). Differentiable with respect to `logits_TE`.

    Args:
        logits_TE: [T, E] float32, float16 or bfloat16, contiguous.
        top_k: experts per token, in [1, E].
        score_function: "softmax" or "sigmoid".
        renormalize: divide a token's weights by their sum.
        scale: multiplies the weights, after the renormalization.
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
    check_rule(num_experts, top_k, score_function, bias_E, logits_TE.device)
    if token_mask_T is not None:
        check_tensor("token_mask_T", token_mask_T, (num_tokens,), torch.bool, logits_TE.device)
    resolved = resolve_backend(backend, logits_TE.device)
    return _topk_routing(logits_TE, top_k, score_function, renormalize, float(scale), bias_E, token_mask_T, resolved)
