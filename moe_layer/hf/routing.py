"""Fused routing: finds the rule by which a model's router chooses, by trying a copy of it with random weights and inputs.

What a router computes is seen, not guessed from its name: a copy gets random weights and biases, so that nothing hides
behind a bias that is still zero, and is run on tokens whose logits are small, large, and all far below zero.

Legend: T tokens, H hidden, E experts, K top-k.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_kernels import topk_routing_torch
from moe_kernels.operands.rule import GROUP_SCORES, SCORE_FUNCTIONS
from moe_layer.router import RouterRule

_SHIFTS = (0.0, -5.0, -14.0, 5.0)  # of all logits: tiny sums show what is added to them
_TOKENS = 256  # for each shift; enough to see scores that are rounded


class NotFusedError(ValueError):
    """Why a router's rule cannot be had from our kernel."""


@dataclass(frozen=True)
class Routing:
    """What a router computes: ``F.linear(x, weight, bias)``, and `rule` of that.

    Attributes:
        weight: its name in the router.
        logits_dtype: what the linear is computed in; its result is returned in `returned_dtype`.
        top_k: K.
        logits_bias, choice_bias: where the biases are: a name in the router, an index among the further arguments of its
            call, or None for no such bias.
    """

    rule: RouterRule
    top_k: int
    weight: str
    logits_dtype: torch.dtype
    returned_dtype: torch.dtype
    logits_bias: str | int | None
    choice_bias: str | int | None

    @property
    def has_ties(self) -> bool:
        """Whether logits are so coarse that many are equal."""
        return self.logits_dtype != torch.float32

    def logits(self, gate: nn.Module, x_TH: torch.Tensor, extra: tuple[Any, ...]) -> torch.Tensor:
        """What the router's logits are of ``[T, H]``."""
        dtype, bias_E = self.logits_dtype, _tensor(gate, self.logits_bias, extra)
        bias_E = None if bias_E is None else bias_E.reshape(-1).to(dtype)
        weight_EH = _named(gate, self.weight)
        return F.linear(x_TH.to(dtype), weight_EH.to(dtype), bias_E).to(self.returned_dtype)

    def bias_for_choice(self, gate: nn.Module, extra: tuple[Any, ...]) -> torch.Tensor | None:
        """float32 ``[E]``, or None."""
        bias = _tensor(gate, self.choice_bias, extra)
        return None if bias is None else bias.reshape(-1).float().contiguous()


def _tensor(gate: nn.Module, place: str | int | None, extra: tuple[Any, ...]) -> torch.Tensor | None:
    if place is None:
        return None
    return extra[place] if isinstance(place, int) else _named(gate, place)


def _named(gate: nn.Module, place: str) -> torch.Tensor:
    """The live tensor, which may be another one after a cast."""
    module, _, name = place.rpartition(".")
    return getattr(gate.get_submodule(module) if module else gate, name)


def weight_of(gate: nn.Module) -> str | None:
    """The name of the one matrix ``[E, H]`` in `gate`, None if there is none or more than one."""
    names = [name for name, tensor in gate.named_parameters() if tensor.dim() == 2 and tensor.shape[0] > 1]
    return names[0] if len(names) == 1 else None


def find_routing(gate: nn.Module, extra: tuple[Any, ...], dtype: torch.dtype, dims: int = 2) -> Routing:
    """What `gate(x, *extra)` computes of x in `dtype`, of `dims` dimensions.

    Args:
        gate: a router with one weight ``[E, H]`` that returns (logits ``[T, E]``, weights ``[T, K]``, ids ``[T, K]``); may
            be on "meta". It is not changed.
        extra: the further arguments of its call; tensors of E numbers.

    Raises:
        NotFusedError: it computes nothing that our kernel computes; says why.
    """
    tensors = dict([*gate.named_parameters(), *gate.named_buffers()])
    weight = weight_of(gate)
    if weight is None:
        raise NotFusedError("it has not one weight [E, H]")
    num_experts = tensors.pop(weight).shape[0]
    biases: list[str | int] = list(tensors)
    for index, value in enumerate(extra):
        if not isinstance(value, torch.Tensor):
            raise NotFusedError(f"its call takes {value!r}")
        biases.append(index)
    sizes = [tensor.numel() for tensor in [*tensors.values(), *extra]]
    if any(size != num_experts for size in sizes) or len(biases) > 2:
        raise NotFusedError(
            f"beside its weight it uses {sorted(tensors)} and {len(extra)} arguments, which are not biases"
        )
    exact = _Probe(gate, weight, extra, torch.float32, dims)
    found = None
    for logits_bias, choice_bias in _roles(biases):
        found = found or exact.match(logits_bias, choice_bias)
    if found is None:
        raise NotFusedError("its weights and ids are those of no rule that the kernel has")
    if dtype == torch.float32:
        return found
    rounded = _Probe(gate, weight, extra, dtype, dims).match(found.logits_bias, found.choice_bias, found.rule)
    if rounded is None:
        raise NotFusedError(f"in {dtype} its scores are rounded, or its logits computed, as our kernel does not")
    return rounded


def _roles(biases: list[str | int]) -> Iterator[tuple[str | int | None, str | int | None]]:
    """(of the logits, for the choice): every way in which all of `biases` have a role."""
    if not biases:
        yield None, None
    elif len(biases) == 1:
        yield from ((None, biases[0]), (biases[0], None))
    else:
        yield from itertools.permutations(biases)


class _Probe:
    """A copy of a router with random weights, in one dtype, and what it says of random tokens."""

    def __init__(
        self, gate: nn.Module, weight: str, extra: tuple[torch.Tensor, ...], dtype: torch.dtype, dims: int
    ) -> None:
        random = torch.Generator().manual_seed(0)
        self.dtype, self.weight = dtype, weight
        self.gate = copy.deepcopy(gate).to_empty(device="cpu").eval()
        self.numbers = {value for value in vars(gate).values() if type(value) in (int, float)}

        def fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
            """A weight's first column is 1: it shifts all logits alike."""
            value = torch.randn(tensor.shape, generator=random) * (1.0 if name == weight else 0.3)
            if name == weight:
                value = value / math.sqrt(tensor.shape[1])
                value[:, 0] = 1.0
            # In float32 all is exact; else a tensor keeps what the model has made of it.
            return value.to(torch.float32 if dtype == torch.float32 else tensor.dtype)

        with torch.no_grad():
            for name, tensor in [*self.gate.named_parameters(), *self.gate.named_buffers()]:
                tensor.data = fill(name, tensor)
            self.extra = tuple(fill("", tensor) for tensor in extra)
            self.num_experts, hidden_size = _named(self.gate, weight).shape
            parts = []
            for shift in _SHIFTS:
                x_TH = 2.0 * torch.randn(_TOKENS, hidden_size, generator=random)
                x_TH[:, 0] = shift
                parts.append(x_TH)
            self.x_TH = torch.cat(parts).to(dtype)
            try:
                x = self.x_TH.clone()
                output = self.gate(x if dims == 2 else x[None], *self.extra)
            except Exception as error:  # the model's own code
                raise NotFusedError(f"it raised {error!r} when it was tried") from error
        self.logits, self.weights, self.ids = self._unpacked(output)
        order = self.ids.argsort(-1)
        self.ids, self.weights = self.ids.gather(-1, order), self.weights.gather(-1, order)

    def _unpacked(self, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (len(self.x_TH), self.num_experts)
        if isinstance(output, tuple) and len(output) == 3 and all(isinstance(one, torch.Tensor) for one in output):
            logits, weights, ids = output
            is_right = logits.shape == shape and weights.shape == ids.shape == (shape[0], ids.shape[-1])
            if is_right and logits.is_floating_point() and weights.is_floating_point() and not ids.is_floating_point():
                return logits, weights, ids.long()
        raise NotFusedError("it does not return (logits [T, E], weights [T, K], ids [T, K])")

    def match(
        self, logits_bias: str | int | None, choice_bias: str | int | None, rule: RouterRule | None = None
    ) -> Routing | None:
        """The routing with these biases, and with `rule` if given, that does what the router did; None if none does."""
        any_rule = rule or RouterRule(correction_bias=choice_bias is not None)
        for dtype in dict.fromkeys((self.dtype, torch.float32)):
            routing = Routing(
                any_rule, self.ids.shape[1], self.weight, dtype, self.logits.dtype, logits_bias, choice_bias
            )
            logits = routing.logits(self.gate, self.x_TH, self.extra)
            if torch.allclose(logits.float(), self.logits.float(), rtol=1e-5, atol=1e-5):
                break
        else:
            return None
        bias_E = routing.bias_for_choice(self.gate, self.extra)
        choices = [_choice_of(rule)] if rule else self._choices(choice_bias is not None)
        for choice in choices:
            found = self._weighed(choice, routing.top_k, bias_E, [rule] if rule else None)
            if found is not None:
                return dataclasses.replace(routing, rule=found)
        return None

    def _choices(self, correction_bias: bool) -> Iterator[RouterRule]:
        """How experts may be chosen, from the plainest on; groups are among the router's own numbers."""
        counts = sorted(one for one in self.numbers if isinstance(one, int) and one > 0)
        groups = [(n, k) for n in counts if n > 1 and self.num_experts % n == 0 for k in counts if k < n]
        for num_groups, top_groups in [(1, 1), *groups]:
            for group_score in GROUP_SCORES if num_groups > 1 else GROUP_SCORES[:1]:
                for score in SCORE_FUNCTIONS:
                    yield RouterRule(*(score, False, 1.0, correction_bias, 0.0, num_groups, top_groups, group_score))

    def _weighed(
        self, choice: RouterRule, top_k: int, bias_E: torch.Tensor | None, rules: list[RouterRule] | None
    ) -> RouterRule | None:
        """The rule that chooses like `choice`, with the weights that make it the router's; of `rules`, if given.

        Of logits that are equal, either may be chosen. Scales are among the router's own numbers.
        """
        kernel_rule = choice.for_kernels
        try:
            kernel_rule.check_experts(self.num_experts, top_k)
        except ValueError:
            return None
        scores, ids = topk_routing_torch(self.logits.contiguous(), top_k, kernel_rule, bias_E)
        ids, order = ids.long().sort(-1)
        is_same = (ids == self.ids).all(-1)
        chosen, wanted = (self.logits.gather(-1, one).sort(-1).values for one in (ids, self.ids))
        is_tie = torch.zeros_like(is_same) if bias_E is not None else (chosen == wanted).all(-1)
        if not (is_same | is_tie).all() or is_same.sum() < len(is_same) // 2:
            return None
        scores, expected = scores.gather(-1, order)[is_same], self.weights[is_same].float()
        rtol = {torch.float32: 1e-5, torch.float16: 2**-10}.get(self.weights.dtype, 2**-7)
        scales = [1.0, *sorted(float(one) for one in self.numbers if one > 0 and one != 1)]
        rules = rules or [
            dataclasses.replace(choice, renormalize=renormalize, epsilon=epsilon, scale=scale)
            for renormalize, epsilon in ((False, 1e-20), (True, 1e-20), (True, 1e-6))
            for scale in scales
        ]
        for rule in rules:
            weights = scores / (scores.sum(-1, keepdim=True) + rule.epsilon) if rule.renormalize else scores
            if torch.allclose(weights * rule.scale, expected, rtol=rtol, atol=1e-30):
                is_exact = self.weights.dtype == torch.float32
                return dataclasses.replace(rule, weights_dtype=None if is_exact else self.weights.dtype)
        return None


def _choice_of(rule: RouterRule) -> RouterRule:
    """`rule`, but the weights are the scores."""
    return dataclasses.replace(rule, renormalize=False, scale=1.0, epsilon=0.0, weights_dtype=None)
