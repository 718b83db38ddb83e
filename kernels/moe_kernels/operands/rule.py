"""Step 1 of a forward: the rule by which tokens choose experts, as data."""

from __future__ import annotations

from dataclasses import dataclass

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("sum_of_best_two", "max")
ROUNDINGS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RoutingRule:
    """How logits become weights.

    Attributes:
        score_function: "softmax" over all experts, or "sigmoid" or "sqrtsoftplus" (``sqrt(log(1 + exp(logit)))``,
            DeepSeek-V4) of each.
        renormalize: divide the weights of a token by their sum.
        scale: multiplies the weights, after the renormalization.
        epsilon: added to the sum that the weights are divided by. By default as in DeepSeek-V3's published modelling code:
            it changes no bit of any sum above 1e-12, and keeps a row of vanishing scores from becoming NaN.
        num_groups: into how many groups of neighbours the experts are divided; tokens choose groups first (DeepSeek-V3,
            arXiv:2412.19437, section 2.1.2: node-limited routing).
        top_groups: how many groups a token keeps.
        group_score: what a group is chosen by: the sum of its best two scores (DeepSeek-V3) or the best (DeepSeek-V2), each
            with the bias for the choice.
        round_to: dtype that the weights are rounded to, last. They stay float32 tensors.
    """

    score_function: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    epsilon: float = 1e-20
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "sum_of_best_two"
    round_to: str = "float32"

    @property
    def group_sum(self) -> bool:
        return self.group_score == "sum_of_best_two"

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        for name, choices in (
            ("score_function", SCORE_FUNCTIONS),
            ("group_score", GROUP_SCORES),
            ("round_to", ROUNDINGS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"rule.{name}={getattr(self, name)!r}: must be one of {choices}")
        if not isinstance(self.renormalize, bool):
            raise ValueError(f"rule.renormalize={self.renormalize!r}: must be True or False")
        for name in ("scale", "epsilon"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value - value != 0:  # infinite, or no number
                raise ValueError(f"rule.{name}={value!r}: must be a finite number")
        if self.epsilon < 0:
            raise ValueError(f"rule.epsilon={self.epsilon!r}: must not be negative")
        for name in ("num_groups", "top_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"rule.{name}={value!r}: must be a positive integer")
        if self.top_groups > self.num_groups:
            raise ValueError(f"rule.top_groups={self.top_groups}: must be at most num_groups={self.num_groups}")

    def check_experts(self, num_experts: int, top_k: int) -> None:
        """Raises ValueError if the groups do not go with these experts."""
        if self.num_groups == 1:
            return
        if num_experts % self.num_groups:
            raise ValueError(f"rule.num_groups={self.num_groups}: must divide the {num_experts} experts")
        group_size = num_experts // self.num_groups
        if self.group_sum and group_size < 2:
            raise ValueError(
                f"rule.num_groups={self.num_groups}: a group needs two experts for the sum of its best two"
            )
        if top_k > self.top_groups * group_size:
            raise ValueError(
                f"top_k={top_k}: must be at most {self.top_groups * group_size}, the experts of "
                f"rule.top_groups={self.top_groups} groups"
            )
