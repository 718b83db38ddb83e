"""The layer without slots, tables, kernels or ranks: every expert on every token, in float64.

Legend: T tokens, H hidden, E experts, K top-k, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from moe_layer import MoELayer, RouterRule

# How far apart the K-th and the next score of a token must be, that a layer in this dtype cannot choose otherwise.
CLEAR = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass
class Weights:
    """Of a layer, in logical order: float64 leaves that require gradients."""

    gate_EH: torch.Tensor
    gate_up_ENH: torch.Tensor
    down_EHI: torch.Tensor
    bias_E: torch.Tensor

    @staticmethod
    def of(layer: MoELayer) -> Weights:
        state = layer.state_dict()
        bias = state.get("gate.e_score_correction_bias", torch.zeros(len(state["gate.weight"])))
        tensors = (state["gate.weight"], state["experts.gate_up_proj"], state["experts.down_proj"], bias)
        return Weights(*(tensor.detach().cpu().double().requires_grad_() for tensor in tensors))

    def grads(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name).grad for field in fields(self)}


def scores(x_TH: torch.Tensor, weights: Weights, rule: RouterRule) -> tuple[torch.Tensor, torch.Tensor]:
    """What the weights are made of, and what the choice goes by: [T, E] each."""
    logits_TE = x_TH @ weights.gate_EH.T
    scores_TE = logits_TE.softmax(dim=1) if rule.score_function == "softmax" else logits_TE.sigmoid()
    return scores_TE, scores_TE + weights.bias_E if rule.correction_bias else logits_TE


def dense_forward(
    x_TH: torch.Tensor,
    weights: Weights,
    rule: RouterRule,
    top_k: int,
    activation: str = "silu",
    token_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_TH in float64."""
    x_TH = x_TH.double()
    scores_TE, key_TE = scores(x_TH, weights, rule)
    chosen_TE = torch.zeros_like(scores_TE).scatter(1, key_TE.topk(top_k, dim=1).indices, 1.0)
    if token_mask_T is not None:
        chosen_TE = chosen_TE * token_mask_T[:, None]
    weights_TE = scores_TE * chosen_TE
    if rule.renormalize:
        weights_TE = weights_TE / weights_TE.sum(dim=1, keepdim=True).clamp(min=1e-30)
    gate, up = torch.einsum("th,enh->ten", x_TH, weights.gate_up_ENH).chunk(2, dim=2)
    hidden_TEI = (F.silu if activation == "silu" else F.gelu)(gate) * up
    y_TEH = torch.einsum("tei,ehi->teh", hidden_TEI, weights.down_EHI)
    return (y_TEH * weights_TE[:, :, None]).sum(dim=1) * rule.scale


@torch.no_grad()
def clear_tokens(layer: MoELayer, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """x_TH in the layer's dtype, of tokens whose experts are chosen by a clear margin."""
    weight, rule, top_k = layer.gate.weight, layer.gate.rule, layer.gate.top_k
    x = torch.randn(200 + 40 * num_tokens, layer.hidden_size, generator=torch.Generator().manual_seed(seed))
    x = x.to(weight.dtype)
    if top_k < len(weight):
        _, key = scores(x.double(), Weights.of(layer), rule)
        best = key.topk(top_k + 1, dim=1).values
        # A sigmoid is flatter than its logit, by 1/4 at most.
        margin = CLEAR[weight.dtype] * (0.25 if rule.correction_bias else 1.0)
        x = x[best[:, top_k - 1] - best[:, top_k] > margin]
    assert len(x) >= num_tokens, "too few tokens with a clear choice"
    return x[:num_tokens].to(weight.device)


@torch.no_grad()
def give_unit_scale(layer: MoELayer, seed: int = 0) -> MoELayer:
    """Draw all weights of `layer` anew, normal, such that logits and outputs are of the order of 1; on any rank alike."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    if layer.gate is not None:
        state |= {f"gate.{name}": tensor for name, tensor in layer.gate.state_dict().items()}
    num_experts = layer.resident.num_experts
    for tensor in layer.experts.format.tensors:
        state[f"experts.{tensor.name}"] = torch.empty(num_experts, *tensor.shape, dtype=tensor.dtype)
    for name, tensor in state.items():
        scale = 0.3 if name.endswith("bias") else tensor.shape[-1] ** -0.5
        if name.endswith("down_proj"):
            scale *= 3.0  # silu(gate) * up of normal numbers has a standard deviation of about 1/3
        state[name] = (torch.randn(tensor.shape, generator=random) * scale).to(tensor.dtype)
        if name.startswith("experts.") and layer.experts.trainable:
            state[name] = state[name][list(layer.resident.experts)]
    layer.load_state_dict(state)
    return layer


def logical_grad(layer: MoELayer, name: str) -> torch.Tensor:
    """The gradient of an expert parameter in logical order, summed over this rank's replicas; experts elsewhere have 0."""
    grad = layer.experts.get_parameter(name).grad
    assert grad is not None
    logical = grad.new_zeros(layer.resident.num_experts, *grad.shape[1:])
    for expert, slots in layer.resident.live_slots().items():
        logical[expert] = grad[slots].sum(dim=0)
    return logical
