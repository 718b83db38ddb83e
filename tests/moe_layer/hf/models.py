"""Tiny random transformers models with experts, one for each family that can be made so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from moe_layer.hf import experts_on_meta

# What a field is set to, in any config that has it.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPS = {"n_routed_experts": 16, "num_local_experts": 16, "n_group": 4, "topk_group": 2}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}

PLAIN = (
    *("afmoe", "aria_text", "axk2", "cohere2_moe", "deepseek_v3", "deepseek_v32", "dots3_note_text"),
    *("ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe"),
    *("granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "hy_v4", "inkling2_loop_text", "inkling2_text"),
    *("inkling_text", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lara_mini", "llama4_text", "longcat_flash"),
    *("mellum", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe"),
    *("qwen3_moe", "solar_open"),
)

# model_type → what else it needs. The name before a colon is the model_type.
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN},
    "deepseek_v3:groups": GROUPS,
    "deepseek_v2": {"topk_method": "greedy", "n_routed_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2:groups": {
        "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 3,
        **GROUPS,
        "num_experts": 16,
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "axk1": GROUPS,
    "beam": SPARSE,
    "flint": {"mlp_only_layers": []},
    "hy_v3": SPARSE,
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "qwen3_moe:normalized": {"norm_topk_prob": True},
    **{name: {"num_hidden_layers": 4} for name in ("qwen3_next", "qwen3_5_moe_text", "jamba", "bailing_hybrid")},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "num_hidden_layers": 4},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {
        "vocab_size_per_layer_input": 64,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
}

# Made tiny they have no layer whose cache knows its length, which `generate` asks for.
NO_CACHE = {"bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear"}

# Families that are not swapped, or not all of them, and a part of the reason.
REFUSED: dict[str, str] = {
    "inkling2_loop_text": "computes none of the activations",
    "inkling2_text": "computes none of the activations",
    "jetmoe": "not on transformers' experts interface",
    "llama4_text": "not on transformers' experts interface",
    "longcat_flash": "not on transformers' experts interface",
}

# Swapped families of which not all routers choose in our kernel, and a part of the reason.
NOT_FUSED: dict[str, str] = {
    "deepseek_v4": "its block cannot be run on hidden states alone",  # of layers that choose by the input ids
    "gemma4_text": "its block cannot be run on hidden states alone",  # a decoder layer
    "inkling_text": "no module of its block returns",
    "kolibri1": "of no rule that the kernel has",
    "phimoe": "of no rule that the kernel has",
    "zaya": "no module with just one matrix",
}


def make_config(family: str) -> Any:
    """The config of one of `FAMILIES`.

    Raises:
        KeyError: this version of transformers has no such family.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family.partition(":")[0]]
    proto, values = kind(), {}
    for name, value in SMALL.items():
        try:
            is_there = hasattr(proto, name) and (getattr(proto, name) is not None or name in ("n_group", "topk_group"))
        except Exception:  # a field that layers have of their own
            is_there = True
        if is_there:
            values[name] = value
    return kind(**{**values, **FAMILIES[family]})


def make_model(
    family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, config: Any = None
) -> nn.Module:
    """A random model, the same for each seed, whose experts and routers matter: of unit scale, with all biases."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or make_config(family)).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            last = name.rpartition(".")[2]
            is_matrix = ".experts." in name and tensor.dim() >= 2
            is_bias = "correction_bias" in last or last == "expert_bias"
            is_router = (".gate." in name or ".router." in name) and last != "balancing_biases"
            if is_matrix or is_bias or is_router:
                tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.3)
    return model.to(device=device, dtype=dtype)


def make_tokens(device: str = "cpu", shape: tuple[int, int] = (2, 9)) -> torch.Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1)).to(device)


VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# In 5.17 the routers of these return something else.
FUSED_SINCE = dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared", "jamba"), (5, 18))
ON_INTERFACE_SINCE = {"aria_text": (5, 18)}  # not in 5.17; in 5.24 it is


def families(names: list[str]) -> list:
    """Parameters of a test; those that this version of transformers lacks are skipped."""
    old = pytest.mark.skip(reason="this version of transformers does not have it, or not on the experts interface")
    known = [
        one.partition(":")[0] in transformers.CONFIG_MAPPING and ON_INTERFACE_SINCE.get(one, (5, 0)) <= VERSION
        for one in names
    ]
    return [pytest.param(one, marks=[] if is_known else [old]) for one, is_known in zip(names, known, strict=True)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the largest element."""
    return float((found - expected).abs().max() / expected.abs().max())


def logits_of(model: nn.Module, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False, **options).logits


def without_experts(model: nn.Module, folder: Any, device: Any) -> nn.Module:
    """What `from_pretrained` makes of `model`, saved in `folder`, with its experts on the meta device."""
    with experts_on_meta():
        made, info = type(model).from_pretrained(folder, output_loading_info=True)
        made.to(device)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return made.eval()
