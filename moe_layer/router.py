"""How tokens choose experts: the rules of the model families as data, one implementation.

Legend: T tokens, E logical experts, K top-k, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_kernels import RoutingRule, topk_routing
from moe_kernels.rule import SCORE_FUNCTIONS
from moe_layer.arguments import check_choice


@dataclass(frozen=True)
class RouterRule:
    """A routing rule.

    Attributes:
        score_function: "softmax" over all experts, or "sigmoid" of each.
        renormalize: whether the chosen experts' weights are divided by their sum.
        scale: what the weights are multiplied with last (DeepSeek-V3's `routed_scaling_factor`).
        correction_bias: whether a learned bias per expert, `e_score_correction_bias`, is added to the scores for the
            choice, but not to the weights (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """

    score_function: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    correction_bias: bool = False

    def for_kernels(self) -> RoutingRule:
        return RoutingRule(self.score_function, self.renormalize, self.scale)


ROUTER_RULES = {
    "softmax": RouterRule(renormalize=False),
    "softmax_renormalized": RouterRule(),
    "sigmoid": RouterRule(score_function="sigmoid", renormalize=False),
    "sigmoid_renormalized": RouterRule(score_function="sigmoid"),
    # Softmax over the chosen logits, as Mixtral and gpt-oss do it, is the softmax over all of them, renormalised.
    "mixtral": RouterRule(),
    "qwen3_moe": RouterRule(),
    "olmoe": RouterRule(renormalize=False),
    "minimax_m2": RouterRule(score_function="sigmoid", correction_bias=True),
}


def resolve_rule(rule: str | RouterRule) -> RouterRule:
    """The rule behind a name.

    Raises:
        ValueError: unknown name, or a rule with an unknown score function.
    """
    if isinstance(rule, str) and rule in ROUTER_RULES:
        return ROUTER_RULES[rule]
    if not isinstance(rule, RouterRule):
        raise ValueError(f"router must be a RouterRule or one of {', '.join(ROUTER_RULES)}; got {rule!r}")
    check_choice("router.score_function", rule.score_function, SCORE_FUNCTIONS)
    return rule


class Router(nn.Module):
    """Scores every expert for every token and chooses the best `top_k`; ties go to the lowest id.

    Attributes:
        weight: ``[E, H]``.
        e_score_correction_bias: float32 ``[E]``, if the rule has one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        rule: str | RouterRule,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        rule = resolve_rule(rule)
        self.rule = rule
        self.top_k = top_k
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        bias_E = torch.zeros(num_experts, device=device, dtype=torch.float32) if rule.correction_bias else None
        self.e_score_correction_bias: torch.Tensor | None
        self.register_buffer("e_score_correction_bias", bias_E)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias_E is not None and self.e_score_correction_bias is not None:
            # A cast of the layer is none of the bias: float32 is part of the rule.
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The logits [T, E]."""
        return F.linear(x_TH, self.weight)

    def choose(
        self, logits_TE: torch.Tensor, token_mask_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """weights_TK (float32) and expert_ids_TK (int32); tokens whose mask is False get id -1 and weight 0."""
        return topk_routing(
            logits_TE,
            self.top_k,
            self.rule.for_kernels(),
            bias_E=self.e_score_correction_bias,
            token_mask_T=token_mask_T,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.weight.shape[0]}, top_k={self.top_k}, rule={self.rule}"
