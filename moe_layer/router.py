"""Forward, route: logits → the experts of each token and their weights. The rules of the model families are data.

Legend: T tokens, E logical experts, K top-k, H hidden.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_kernels import RoutingRule, topk_routing
from moe_kernels.base.checks import FLOATS
from moe_kernels.operands.rule import GROUP_SCORES, SCORE_FUNCTIONS
from moe_layer.arguments import check_choice, check_integer, is_number


@dataclass(frozen=True)
class RouterRule:
    """A routing rule.

    Attributes:
        score_function: "softmax" over all experts, or "sigmoid" or "sqrtsoftplus" (DeepSeek-V4) of each.
        renormalize: whether the chosen experts' weights are divided by their sum.
        scale: what the weights are multiplied with last (DeepSeek-V3's `routed_scaling_factor`).
        correction_bias: whether a learned bias per expert, `e_score_correction_bias`, is added to the scores for the
            choice, but not to the weights (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
        epsilon: added to the sum that the weights are divided by: 1e-20 in DeepSeek-V3's code, 1e-6 in LFM2's.
        num_groups: groups of neighbouring experts, of which a token first chooses `top_groups` (DeepSeek-V3's `n_group` and
            `topk_group`).
        group_score: "sum_of_best_two" scores of a group (DeepSeek-V3) or its "max" (DeepSeek-V2), with the bias.
        weights_dtype: what the weights are rounded to, for models that do so; None: not rounded.

    Raises:
        ValueError: a value of another type, or out of range.
    """

    score_function: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    correction_bias: bool = False
    epsilon: float = 1e-20
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "sum_of_best_two"
    weights_dtype: torch.dtype | None = None
    for_kernels: RoutingRule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("RouterRule.score_function", self.score_function, SCORE_FUNCTIONS)
        check_choice("RouterRule.group_score", self.group_score, GROUP_SCORES)
        for name in ("renormalize", "correction_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"RouterRule.{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("scale", "epsilon"):
            value = getattr(self, name)
            if not is_number(value) or (name == "epsilon" and value < 0):
                rule = "a finite number" if name == "scale" else "a finite number of at least 0"
                raise ValueError(f"RouterRule.{name} must be {rule}, got {value!r}")
        num_groups = check_integer("RouterRule.num_groups", self.num_groups, 1)
        top_groups = check_integer("RouterRule.top_groups", self.top_groups, 1)
        if top_groups > num_groups:
            raise ValueError(
                f"RouterRule.top_groups must be at most num_groups={self.num_groups}, got {self.top_groups}"
            )
        if self.weights_dtype is not None and self.weights_dtype not in FLOATS:
            raise ValueError(
                f"RouterRule.weights_dtype must be float32, float16, bfloat16 or None, got {self.weights_dtype!r}"
            )
        for_kernels = RoutingRule(
            self.score_function,
            self.renormalize,
            float(self.scale),
            float(self.epsilon),
            num_groups,
            top_groups,
            self.group_score,
            str(self.weights_dtype or torch.float32).removeprefix("torch."),
        )
        object.__setattr__(self, "for_kernels", for_kernels)

    @classmethod
    def from_config(cls, config: Any) -> "RouterRule":
        """The rule of a transformers model, given its config. See `moe_layer.hf.fuse.rule_of_config`."""
        from moe_layer.hf.fuse import rule_of_config

        return rule_of_config(config)


ROUTER_RULES = {
    "softmax": RouterRule(renormalize=False),
    "softmax_renormalized": RouterRule(),
    "sigmoid": RouterRule(score_function="sigmoid", renormalize=False),
    "sigmoid_renormalized": RouterRule(score_function="sigmoid"),
    # Softmax over the chosen logits, as Mixtral and gpt-oss do it, is the softmax over all of them, renormalised.
    # (Families whose rule depends on their config have no name: see `RouterRule.from_config`.)
    "mixtral": RouterRule(),
    "minimax_m2": RouterRule(score_function="sigmoid", correction_bias=True),
}


def resolve_rule(rule: str | RouterRule) -> RouterRule:
    """The rule behind a name.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(rule, str) and rule in ROUTER_RULES:
        return ROUTER_RULES[rule]
    if not isinstance(rule, RouterRule):
        raise ValueError(f"router must be None, a RouterRule or one of {', '.join(ROUTER_RULES)}; got {rule!r}")
    return rule


class Router(nn.Module):
    """Scores every expert for every token and chooses the best `top_k`; ties go to the lowest id.

    Attributes:
        weight: ``[E, H]``.
        e_score_correction_bias: float32 ``[E]``, if the rule has one.
        dtype: what logits are computed in, whatever the layer is cast to; None: the dtype of `weight`.
    """

    e_score_correction_bias: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        rule: str | RouterRule,
        backend: str,
        *,
        trainable: bool,
        device: torch.device,
        layer_dtype: torch.dtype,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.rule = rule = resolve_rule(rule)
        rule.for_kernels.check_experts(num_experts, top_k)
        self.top_k = top_k
        self.backend = backend
        self.dtype = dtype
        weight_EH = torch.empty(num_experts, hidden_size, device=device, dtype=dtype or layer_dtype)
        self.weight = nn.Parameter(weight_EH, requires_grad=trainable)
        bias_E = torch.zeros(num_experts, device=device, dtype=torch.float32) if rule.correction_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        fixed = [self.e_score_correction_bias, self.weight if self.dtype is not None else None]

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            """Moves, but does not cast, tensors whose dtype is part of the rule."""
            result = fn(tensor)
            is_cast = result.dtype != tensor.dtype and any(tensor is one for one in fixed)
            return tensor.to(result.device) if is_cast else result

        return super()._apply(apply, recurse)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The logits [T, E], in `dtype`."""
        weight_EH = self.weight
        dtype = self.dtype or weight_EH.dtype
        x_TH = x_TH if x_TH.dtype == dtype else x_TH.to(dtype)
        return F.linear(x_TH, weight_EH if weight_EH.dtype == dtype else weight_EH.to(dtype))

    def choose(
        self, logits_TE: torch.Tensor, token_mask_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """weights_TK (float32) and expert_ids_TK (int32); tokens whose mask is False get id -1 and weight 0."""
        return topk_routing(
            logits_TE,
            self.top_k,
            self.rule.for_kernels,
            bias_E=self.e_score_correction_bias,
            token_mask_T=token_mask_T,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.weight.shape[0]}, top_k={self.top_k}, rule={self.rule}"
