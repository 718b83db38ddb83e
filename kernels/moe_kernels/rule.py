"""Step 1 of a forward: the rule by which tokens choose experts, as data."""

from __future__ import annotations

from dataclasses import dataclass

SCORE_FUNCTIONS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class RoutingRule:
    """How logits become weights.

    Attributes:
        score_function: "softmax" over all experts, or "sigmoid" of each.
        renormalize: divide the weights of a token by their sum.
        scale: multiplies the weights, after the renormalization.
    """

    score_function: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        if self.score_function not in SCORE_FUNCTIONS:
            raise ValueError(f"rule.score_function={self.score_function!r}: must be one of {SCORE_FUNCTIONS}")
        if not isinstance(self.renormalize, bool):
            raise ValueError(f"rule.renormalize={self.renormalize!r}: must be True or False")
        if not isinstance(self.scale, (int, float)) or self.scale - self.scale != 0:  # infinite, or no number
            raise ValueError(f"rule.scale={self.scale!r}: must be a finite number")
