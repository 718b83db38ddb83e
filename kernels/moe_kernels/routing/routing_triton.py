"""Step 1 of a forward: the kernel of `topk_routing` and its launch.

T tokens, E logical experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import narrow, widen
from moe_kernels.operands.rule import RoutingRule

_TAKEN = tl.constexpr(-(2**31))


@triton.jit
def _ordered(value):
    """int32 in the order of the float32 `value`; above `_TAKEN`. A NaN is like -inf, -0 like 0.

    A warp reduces 32-bit integers in one instruction, but floats in five rounds of shuffles.
    """
    bits = tl.where(value == value, value + 0.0, float("-inf")).to(tl.int32, bitcast=True)  # -0 + 0 is 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def scored(logits, SCORE_FUNCTION: tl.constexpr):
    """float32 scores [TOKENS, BLOCK_E]; logits are -inf where there is no expert."""
    if SCORE_FUNCTION == "softmax":
        scores = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
        return scores / tl.sum(scores, axis=1, keep_dims=True)
    elif SCORE_FUNCTION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logits))
    else:
        tl.static_assert(SCORE_FUNCTION == "sqrtsoftplus")
        small = tl.exp(-tl.abs(logits))  # softplus(x) = max(x, 0) + log(1 + exp(-|x|))
        sum = 1.0 + small
        # log(sum) without the digits that the sum has lost (W. Kahan): exact to a few units in the last place.
        log = tl.where(sum == 1.0, small, tl.log(sum) * (small / tl.where(sum == 1.0, 1.0, sum - 1.0)))
        return tl.sqrt(tl.maximum(logits, 0.0) + log)


@triton.jit
def _in_kept_groups(
    choice, exists, expert, group_size, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SUM: tl.constexpr
):
    """Whether each expert is in one of its token's best TOP_GROUPS groups; of equal groups the lowest is better.

    `choice`: float32 [TOKENS, BLOCK_E], what experts are chosen by. Groups need not be powers of two in size
    (DeepSeek-V2 has 8 of 20), so each takes reductions of its own over all experts.
    """
    group = expert // group_size
    choice = tl.where(choice == choice, choice, float("-inf"))
    lowest = tl.full(choice.shape, float("-inf"), dtype=tl.float32)
    score = lowest  # of each expert's group
    for g in tl.static_range(GROUPS):
        inside = exists & (group == g)
        mine = tl.where(inside, choice, lowest)
        best = tl.max(mine, axis=1, keep_dims=True)
        if GROUP_SUM:
            first = tl.min(tl.where(inside & (mine == best), expert, 2**30), axis=1, keep_dims=True)
            best += tl.max(tl.where(expert == first, lowest, mine), axis=1, keep_dims=True)
        score = tl.where(inside, best, score)
    key = tl.where(exists, _ordered(score), _TAKEN)
    kept = key != key
    for _ in tl.static_range(TOP_GROUPS):
        best_key = tl.max(key, axis=1, keep_dims=True)
        chosen = tl.min(tl.where(key == best_key, group, 2**30), axis=1, keep_dims=True)
        kept = kept | (exists & (group == chosen))
        key = tl.where(group == chosen, _TAKEN, key)
    return kept


@triton.jit
def _logit_of(key):
    """The float32 logit of a key of 31 bits; -inf of a NaN."""
    bits = ((key << 1) & 0xFFFF0000).to(tl.int32, bitcast=True) ^ _TAKEN
    return tl.where(bits < 0, bits ^ 0x7FFF0000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _the_one(where, value):
    """The value of each token at the one place where it is; [TOKENS, 1] float32."""
    bits = tl.sum(tl.where(where, value.to(tl.int32, bitcast=True), 0), axis=1, keep_dims=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pack(values, STRIDE: tl.constexpr):
    """Every STRIDE-th column; the others are zeros."""
    if STRIDE > 1:
        values = tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // STRIDE, STRIDE)), axis=2)
    return values


@triton.jit
def choose_experts(
    logits_ptr,
    bias_ptr,
    num_tokens,
    num_experts,
    scale,
    epsilon,
    TOP_K: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SUM: tl.constexpr,
    ROUND_TO: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STRIDE: tl.constexpr = 1,
):
    """Weights and ids [TOKENS, BLOCK_K // STRIDE] of the tokens whose logits begin at `logits_ptr`; zeros from TOP_K on.

    The choice takes K rounds of three integer reductions. Keys of bfloat16 logits have the id beside the logit: then a round
    takes two, and with the softmax one, as the weight follows from the key; K more add the weights up. (To count, for every
    expert, those before it would take no rounds, but E * E comparisons: as long for one token, and several times as long for
    many.)

    Results are collected in every STRIDE-th of BLOCK_K columns: a thread with STRIDE experts has one to look after.
    """
    token, expert = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK_E)[None, :]
    exists = expert < num_experts
    logits = tl.load(logits_ptr + token * num_experts + expert, mask=(token < num_tokens) & exists, other=0.0)
    logits = tl.where(exists, widen(logits), float("-inf"))
    scores = scored(logits, SCORE_FUNCTION)
    key = logits
    if bias_ptr is not None:
        # For each token anew, or Triton would spread one load over all warps, and the tokens with it.
        key = scores + tl.load(bias_ptr + tl.broadcast_to(expert, key.shape), mask=exists, other=0.0)
    is_choice = exists
    if GROUPS > 1:
        choice = scores if bias_ptr is None else key
        is_choice = _in_kept_groups(choice, exists, expert, num_experts // GROUPS, GROUPS, TOP_GROUPS, GROUP_SUM)
    PACKS: tl.constexpr = (bias_ptr is None) and logits_ptr.dtype.element_ty == tl.bfloat16 and BLOCK_E <= 32768
    # A key tells the weight; but that of a NaN, with which all of the token's weights are NaN.
    TELLS: tl.constexpr = PACKS and SCORE_FUNCTION == "softmax"
    key = tl.where(is_choice, _ordered(key), _TAKEN)
    if PACKS:  # into 31 bits: of a bfloat16, the upper half says all
        key = ((key ^ _TAKEN).to(tl.uint32, bitcast=True) >> 1) & 0x7FFF8000 | (0x7FFF - expert).to(tl.uint32)
        best = tl.full((TOKENS, 1), 1 << 31, dtype=tl.uint32)

    slot = tl.arange(0, BLOCK_K)[None, :]
    weights = tl.zeros((TOKENS, BLOCK_K), dtype=tl.float32)
    ids = tl.zeros((TOKENS, BLOCK_K), dtype=tl.int32)
    chosen_keys = tl.zeros((TOKENS, BLOCK_K), dtype=tl.uint32)
    total = tl.zeros((TOKENS, 1), dtype=tl.float32)
    for k in range(TOP_K):
        if PACKS:  # the largest of the smaller ones: minus `best`, unsigned, these are larger than all others
            best += tl.max(key - best, axis=1, keep_dims=True)
            chosen = 0x7FFF - (best & 0x7FFF).to(tl.int32)
        else:
            best = tl.max(key, axis=1, keep_dims=True)
            chosen = tl.min(tl.where(key == best, expert, BLOCK_E), axis=1, keep_dims=True)
            key = tl.where(expert == chosen, _TAKEN, key)
        if TELLS:
            chosen_keys = tl.where(slot == k * STRIDE, best, chosen_keys)
        else:
            ids = tl.where(slot == k * STRIDE, chosen, ids)
            weight = _the_one(expert == chosen, scores)
            weights = tl.where(slot == k * STRIDE, weight, weights)
            total += weight
    weights, ids, chosen_keys = _pack(weights, STRIDE), _pack(ids, STRIDE), _pack(chosen_keys, STRIDE)
    if TELLS:
        slot = tl.arange(0, BLOCK_K // STRIDE)[None, :]
        largest = tl.max(logits, axis=1, keep_dims=True)
        sum = tl.sum(tl.exp(logits - largest), axis=1, keep_dims=True)
        weights = tl.where(slot < TOP_K, tl.exp(_logit_of(chosen_keys) - largest) / sum, 0.0)  # the bits of `scored`
        ids = tl.where(slot < TOP_K, 0x7FFF - (chosen_keys & 0x7FFF).to(tl.int32), 0)
        for k in range(TOP_K if RENORMALIZE else 0):
            total += _the_one(slot == k, weights)
    if RENORMALIZE:
        weights = weights / (total + epsilon)
    weights = weights * scale
    if ROUND_TO == "bfloat16":
        weights = widen(narrow(weights, tl.bfloat16))
    elif ROUND_TO == "float16":
        weights = widen(narrow(weights, tl.float16))
    return weights, ids


@Launcher
@triton.jit(do_not_specialize=["num_tokens"])  # or serving would compile when it is a multiple of 16
def _topk_routing_kernel(
    # inputs
    logits_ptr,
    bias_ptr,  # None: no bias
    mask_ptr,  # None: every token counts
    scale,
    epsilon,
    # outputs
    weights_ptr,
    ids_ptr,
    # shapes
    num_tokens,
    num_experts,
    # constants
    TOP_K: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SUM: tl.constexpr,
    ROUND_TO: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """TOKENS tokens, each within a warp.

    Example: logits [1, 3, 3, 2], K = 2, softmax, renormalized → ids [1, 2], weights [0.5, 0.5].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    # So that a thread has one result; where a warp reads a row at once (`tokens_and_warps`), as it may not change the layout.
    STRIDE: tl.constexpr = max(1, BLOCK_E // 32) if TOKENS > 1 and TOP_K <= 32 else 1
    first = tl.program_id(0).to(tl.int64) * TOKENS
    logits_ptr += first * num_experts
    weights, ids = choose_experts(
        *(logits_ptr, bias_ptr, num_tokens - first, num_experts, scale, epsilon),
        *(TOP_K, SCORE_FUNCTION, RENORMALIZE, GROUPS, TOP_GROUPS, GROUP_SUM, ROUND_TO),
        *(TOKENS, BLOCK_E, BLOCK_E, STRIDE),
    )
    token, slot = first + tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK_E // STRIDE)[None, :]
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + token, mask=token < num_tokens, other=0) != 0
        weights = tl.where(counts, weights, 0.0)
        ids = tl.where(counts, ids, -1)
    inside = (token < num_tokens) & (slot < TOP_K)
    tl.store(weights_ptr + token * TOP_K + slot, weights, mask=inside)
    tl.store(ids_ptr + token * TOP_K + slot, ids, mask=inside)


def rule_constants(rule: RoutingRule) -> dict[str, Any]:
    """What a kernel that calls `choose_experts` is compiled for."""
    return {
        "SCORE_FUNCTION": rule.score_function,
        "RENORMALIZE": rule.renormalize,
        "GROUPS": rule.num_groups,
        "TOP_GROUPS": rule.top_groups,
        "GROUP_SUM": rule.group_sum,
        "ROUND_TO": rule.round_to,
    }


def tokens_and_warps(num_experts: int) -> tuple[int, int]:
    """Tokens and warps of a program. The same for any T, as the order of the sum over experts decides bits.

    A program of one warp leaves half of a multiprocessor's warps unused. Up to 32 experts a thread has one logit, so the tokens
    fill the warps. Of more, Triton gives each token a warp of its own if a warp reads a row of float32 at once, 16 bytes a
    thread; else it would spread a token over several.
    """
    if num_experts <= 32:
        return 4 * (32 // next_power_of_2(num_experts)), 4
    return (4, 4) if num_experts % 16 == 0 and num_experts <= 128 else (1, 1)


def topk_routing_triton(
    logits_TE: torch.Tensor,
    top_k: int,
    rule: RoutingRule,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty((num_tokens, top_k), dtype=torch.float32)
    ids_TK = logits_TE.new_empty((num_tokens, top_k), dtype=torch.int32)
    tokens, warps = tokens_and_warps(num_experts)
    if num_tokens:
        _topk_routing_kernel[(cdiv(num_tokens, tokens),)](
            logits_TE,
            bias_E,
            token_mask_T,
            float(rule.scale),
            float(rule.epsilon),
            weights_TK,
            ids_TK,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            **rule_constants(rule),
            TOKENS=tokens,
            BLOCK_E=next_power_of_2(num_experts),
            num_warps=warps,
        )
    return weights_TK, ids_TK
