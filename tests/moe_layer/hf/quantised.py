"""Tiny transformers models with quantised experts, written to disk as such models are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from moe_layer.hf import experts_on_meta
from tests.moe_layer import published
from tests.moe_layer.hf.models import make_config, make_model

EXPERTS = 8


class Family(NamedTuple):
    """What a family's checkpoints are.

    Attributes:
        sizes: of the config. With blocks of 128, some that end inside a matrix.
        inner: the name of I there.
        make: writes the tensors of one layer.
    """

    name: str
    quantisation: str
    sizes: dict[str, int]
    make: Callable[..., Any]
    inner: str = "moe_intermediate_size"
    is_per_expert: bool = True


FAMILIES = {
    "deepseek_v3": Family(
        "deepseek_v3", "fp8_block", {"hidden_size": 160, "moe_intermediate_size": 136}, published.deepseek
    ),
    "qwen3_moe": Family("qwen3_moe", "int4", {"hidden_size": 64, "moe_intermediate_size": 32}, published.compressed),
    "gpt_oss": Family(
        "gpt_oss", "mxfp4", {"hidden_size": 64, "intermediate_size": 32}, published.gpt_oss, "intermediate_size", False
    ),
}


def write_published(family: Family, folder: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Write a checkpoint; returns the float32 model whose experts have the values that are meant, and all of its tensors."""
    config = make_config(family.name)
    for name, value in family.sizes.items():
        setattr(config, name, value)
    model = make_model(family.name, config=config)
    hidden, inner = (
        family.sizes["hidden_size"],
        family.sizes[family.inner],
    )
    tensors = {name: one.clone() for name, one in model.state_dict().items() if ".experts." not in name}
    said: dict[str, Any] = {}
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}.mlp.experts"
        made, said, meaning = family.make(prefix, EXPERTS, hidden, inner, seed=number)
        tensors |= made
        experts = layer.mlp.experts
        for expert, (gate, up, down) in meaning.items():
            if family.is_per_expert:
                gate_up = torch.cat([gate, up])
            else:  # transposed, and gate and up take turns
                gate_up, down = torch.stack([gate, up], 1).flatten(0, 1).T, down.T
            experts.gate_up_proj.data[expert], experts.down_proj.data[expert] = gate_up, down
        for name in ("gate_up_proj_bias", "down_proj_bias") if not family.is_per_expert else ():
            getattr(experts, name).data.copy_(made[f"{prefix}.{name}"])
    published.write(folder, tensors, said, shards=2, **config.to_dict())
    return model, tensors


def lean_model(folder: Path, device: str | torch.device) -> nn.Module:
    """The model of a checkpoint without its experts, in float32.

    Of MXFP4 as the documentation says. Of the others transformers' quantizers ask for more packages, or for a GPU. Here only
    experts are quantised, so it is not told of it.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    options: dict[str, Any] = {"config": config, "dtype": torch.float32}
    if config.quantization_config["quant_method"] == "mxfp4":
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    else:
        del config.quantization_config
    with experts_on_meta():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(device)
    return model.eval()
