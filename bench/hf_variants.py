"""The variants that `bench.hf_model` compares: one random transformers model, whose experts are computed in different ways.

All variants share the weights of the model, but those that are swapped have the experts in slots of their own.
"""

import contextlib
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.providers import Unavailable
from moe_layer.hf import register_experts_implementation, swap_experts
from moe_layer.hf.inspect import find_experts

ROUTER_SCALE = 4.0
"""Standard deviation of router logits: the last of a token's experts then weigh little, and where rounding makes a near tie
fall otherwise the output hardly shows it. Which experts are hit does not depend on it."""

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {  # Qwen3-30B-A3B
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}

MOST_GATHERED = 0.25
"""Of a GPU's memory: what batched_mm may gather of weights, a copy of an expert's for each token of its."""


@dataclass(frozen=True)
class Variant:
    """How the experts of the model are computed.

    Attributes:
        name: of the provider.
        make: of the model, the same with experts so computed; it may share all weights.
        is_compiled: whether the whole forward is compiled.
        gathers: whether weights are gathered for each token.
    """

    name: str
    make: Callable[[nn.Module], nn.Module]
    is_compiled: bool = False
    gathers: bool = False

    @property
    def without(self) -> str:
        """The variant that does the same but for the experts."""
        return WITHOUT_COMPILED if self.is_compiled else WITHOUT

    def check(self, num_tokens: int, shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        """Raises Unavailable if it cannot run so many tokens."""
        if not self.gathers or device.type != "cuda":
            return
        pairs = num_tokens * shape["num_experts_per_tok"]
        gathered = pairs * 2 * shape["moe_intermediate_size"] * shape["hidden_size"] * dtype.itemsize
        total = torch.cuda.get_device_properties(device).total_memory
        if gathered > MOST_GATHERED * total:
            raise Unavailable(f"it would gather {gathered / 2**30:.0f} GiB of weights a layer")


def make_model(shape: dict[str, Any], num_layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Qwen3-MoE of this shape with random weights, in evaluation mode.

    Raises:
        Unavailable: transformers is not installed, or too old.
    """
    try:
        from transformers import AutoModelForCausalLM, Qwen3MoeConfig
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"{error}: pip install 'moe-layer[transformers]'") from error
    config = Qwen3MoeConfig(num_hidden_layers=num_layers, norm_topk_prob=True, max_position_embeddings=1 << 15, **shape)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:  # experts that keep the scale of their input, so that they matter in the output
            parameter.normal_(std=parameter.shape[-1] ** -0.5 * (ROUTER_SCALE if ".gate." in name else 1))
    return model.to(device)


def twin(model: nn.Module, experts: Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
    """A model of its own, config included, that shares all tensors; `experts` makes what takes the place of each experts."""
    memo: dict[int, Any] = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    if experts is not None:
        memo |= {id(one): experts(one) for one in find_experts(model).values()}
    return copy.deepcopy(model, memo)


class Free(nn.Module):
    """In the place of experts: gives the hidden states back."""

    def forward(self, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden_states


class NearlyFree(nn.Module):
    """The same for compiled models, which without a use of its result would leave out the router too."""

    def forward(self, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden_states * weights.sum(-1, keepdim=True).to(hidden_states.dtype)


def _swapped(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        made = twin(model, copy.deepcopy)  # the swap takes the weights that it is given
        with contextlib.redirect_stdout(sys.stderr):
            swap_experts(made, **options)
        return made

    return make


def _registered(model: nn.Module) -> nn.Module:
    made = twin(model)
    register_experts_implementation(made)
    return made


def _theirs(name: str) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        made = twin(model)
        made.set_experts_implementation(name)  # type: ignore[operator]
        return made

    return make


WITHOUT, WITHOUT_COMPILED = "without_experts", "without_experts_compiled"
REFERENCE = "transformers_eager"

BASES = {
    WITHOUT: Variant(WITHOUT, lambda model: twin(model, lambda _: Free())),
    WITHOUT_COMPILED: Variant(WITHOUT_COMPILED, lambda model: twin(model, lambda _: NearlyFree()), is_compiled=True),
    REFERENCE: Variant(REFERENCE, _theirs("eager")),
}

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("moe_layer", _swapped()),
        Variant("moe_layer_fused_routing", _swapped(fuse_routing=True)),
        Variant("moe_layer_implementation", _registered),
        Variant("moe_layer_compiled", _swapped(fuse_routing=False), is_compiled=True),
        Variant("transformers_grouped_mm", _theirs("grouped_mm")),
        Variant("transformers_batched_mm", _theirs("batched_mm"), gathers=True),
        Variant("transformers_grouped_mm_compiled", _theirs("grouped_mm"), is_compiled=True),
        Variant("transformers_batched_mm_compiled", _theirs("batched_mm"), is_compiled=True, gathers=True),
    )
}
