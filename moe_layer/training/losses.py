"""Auxiliary losses of a router: for an even load, and for small logits. Pure functions; nothing here waits for the device.

Legend: T tokens, E logical experts, K top-k, W ranks.
"""

import torch
import torch.distributed as dist

from eplb.groups import check_member
from moe_kernels import count_experts
from moe_kernels.base.checks import FLOATS, check_kind
from moe_layer.arguments import as_rows, check_choice
from moe_layer.collectives import all_gather_rows

_SCORES = ("softmax", "sigmoid")


def load_balancing_loss(
    router_logits: torch.Tensor,
    expert_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    score_function: str = "softmax",
) -> torch.Tensor:
    """E · Σ_e f_e · P_e: small where all experts are chosen equally often.

    f_e is the number of tokens that chose e, over the number of tokens; P_e the mean of e's score, and gradients flow
    through it alone. An even load gives K. Source: Switch Transformers, arXiv:2101.03961, equations 4 to 6, and for K > 1 as
    Mixtral's in transformers (`load_balancing_loss_func`), which this equals. Of several layers, either sum their losses,
    or, as transformers does, concatenate their tokens.

    With `group` the balance asked for is that of all ranks' tokens together, which lets experts specialise: the global-batch
    loss of arXiv:2501.11873. Then each rank's value is its own tokens' part, times W: the mean over the ranks, and so what DDP
    and FSDP2 make of the gradients, is the loss of the whole batch, however many tokens each rank has.

    Args:
        router_logits: ``[..., E]``, float32, float16 or bfloat16; computed in float32.
        expert_ids: int32 or int64 ``[..., K]``, what was chosen. Ids outside [0, E), like -1, count as nothing.
        mask: bool or 0 and 1, ``[...]``; False or 0 is padding, which counts nowhere.
        group: the ranks whose tokens are balanced together. Collective, also for a rank without tokens.
        score_function: what makes scores of logits: "softmax", or "sigmoid", divided by the token's sum of all scores
            (DeepSeek-V3, arXiv:2412.19437, equation 19).

    Returns:
        float32 scalar; 0 without tokens.

    Raises:
        ValueError: an argument does not fit, naming it.
    """
    check_choice("score_function", score_function, _SCORES)
    logits_TE, mask_T = _rows(router_logits, mask)
    num_tokens, num_experts = logits_TE.shape
    check_kind("expert_ids", expert_ids, torch.Tensor)
    integers = (torch.int32, torch.int64)
    if expert_ids.dtype not in integers or expert_ids.dim() != router_logits.dim():
        raise ValueError(
            f"expert_ids must be int32 or int64 with {router_logits.dim()} dimensions, as router_logits has, got "
            f"{expert_ids.dtype} {tuple(expert_ids.shape)}"
        )
    if expert_ids.shape[:-1] != router_logits.shape[:-1] or expert_ids.device != router_logits.device:
        raise ValueError(
            f"expert_ids must be of the tokens of router_logits, {tuple(router_logits.shape[:-1])} on "
            f"{router_logits.device}, got {tuple(expert_ids.shape)} on {expert_ids.device}"
        )
    ids_TK = as_rows(expert_ids)
    exists_TK = (ids_TK >= 0) & (ids_TK < num_experts)  # before int64 is narrowed
    if mask_T is not None:
        exists_TK = exists_TK & mask_T[:, None]
    counts_E = count_experts(ids_TK.masked_fill(~exists_TK, -1).int(), num_experts)
    tokens_1, counts_E, num_ranks = _over_ranks(_count(num_tokens, mask_T, counts_E), counts_E, group)
    scores_TE = logits_TE.float()
    if score_function == "softmax":
        scores_TE = scores_TE.softmax(dim=1)
    else:
        scores_TE = scores_TE.sigmoid()
        scores_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp(min=1e-20)
    if mask_T is not None:
        scores_TE = scores_TE.masked_fill(~mask_T[:, None], 0)
    share_E = counts_E.float() / tokens_1
    return (share_E * scores_TE.sum(dim=0)).sum() * (num_experts * num_ranks) / tokens_1.squeeze(0)


def router_z_loss(
    router_logits: torch.Tensor, mask: torch.Tensor | None = None, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The mean over tokens of logsumexp(logits)², which keeps logits small. Source: ST-MoE, arXiv:2202.08906, equation 5.

    Args:
        router_logits: ``[..., E]``, float32, float16 or bfloat16; computed in float32.
        mask: as of `load_balancing_loss`.
        group: the ranks whose tokens the mean is over; as of `load_balancing_loss`, so is the value. Collective.

    Returns:
        float32 scalar; 0 without tokens.

    Raises:
        ValueError: an argument does not fit, naming it.
    """
    logits_TE, mask_T = _rows(router_logits, mask)
    tokens_1 = _count(len(logits_TE), mask_T, logits_TE)
    tokens_1, _, num_ranks = _over_ranks(tokens_1, tokens_1.new_empty(0), group)
    squares_T = logits_TE.float().logsumexp(dim=1).square()
    if mask_T is not None:
        squares_T = squares_T.masked_fill(~mask_T, 0)
    return squares_T.sum() * num_ranks / tokens_1.squeeze(0)


def _rows(router_logits: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """logits_TE, 0 where the mask says padding, and the mask, bool [T].

    Raises:
        ValueError: they do not fit.
    """
    check_kind("router_logits", router_logits, torch.Tensor)
    if router_logits.dtype not in FLOATS or router_logits.dim() < 2:
        raise ValueError(
            f"router_logits must be [..., experts] in float32, float16 or bfloat16, got {router_logits.dtype} "
            f"{tuple(router_logits.shape)}"
        )
    logits_TE = as_rows(router_logits)
    if mask is None:
        return logits_TE, None
    check_kind("mask", mask, torch.Tensor)
    if mask.shape != router_logits.shape[:-1] or mask.device != router_logits.device:
        raise ValueError(
            f"mask must be of the tokens of router_logits, {tuple(router_logits.shape[:-1])} on {router_logits.device}, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    mask_T = mask.reshape(-1) != 0
    # What padding holds, a NaN even, changes neither the loss nor a gradient.
    return logits_TE.masked_fill(~mask_T[:, None], 0), mask_T


def _count(num_tokens: int, mask_T: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """int64 [1]: the tokens that are no padding."""
    if mask_T is None:
        return torch.full((1,), num_tokens, dtype=torch.int64, device=like.device)
    return mask_T.sum().view(1)


def _over_ranks(
    tokens_1: torch.Tensor, counts_E: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Tokens (float32, at least 1) and counts of all ranks together, and W. Collective with a group."""
    num_ranks = 1
    if group is not None:
        check_member(group)
        num_ranks = dist.get_world_size(group)
        sums = all_gather_rows(torch.cat([tokens_1, counts_E.long()])[None], group).sum(dim=0)
        tokens_1, counts_E = sums[:1], sums[1:]
    return tokens_1.clamp(min=1).float(), counts_E, num_ranks
