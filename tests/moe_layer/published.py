"""Quantised checkpoints as they are published: tensors of each layout, written from a description of it and not by our code.

Each returns {name: tensor} of one layer of `E` random experts, the config's quantization_config, and what the experts mean:
{expert: (gate [I, H], up [I, H], down [H, I])} in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Meaning = dict[int, tuple[torch.Tensor, ...]]


def deepseek(
    prefix: str, num_experts: int, hidden: int, inner: int, seed: int = 0, scales: torch.dtype = torch.float32
):
    """e4m3 with `weight_scale_inv`, one for each block of 128 × 128, that multiplies; in Qwen3 the scales may be bfloat16."""
    random, tensors, meaning = torch.Generator().manual_seed(seed), {}, {}
    for expert in range(num_experts):
        held = []
        for word, (rows, columns) in _sizes(hidden, inner).items():
            # Clamped: what is beyond 448 becomes that in some versions of PyTorch, and NaN in others.
            weight = (torch.randn(rows, columns, generator=random) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            blocks = torch.rand(-(-rows // 128), -(-columns // 128), generator=random)
            scale = (0.002 + 0.004 * blocks).to(scales)
            if scales == torch.float8_e8m0fnu:
                scale = torch.full(blocks.shape, 2.0**-8).to(scales)
            name = f"{prefix}.{expert}.{word}.weight"
            tensors |= {name: weight, f"{name}_scale_inv": scale}
            each = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            held.append(weight.float() * each)
        meaning[expert] = tuple(held)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return tensors, config, meaning


def gpt_oss(prefix: str, num_experts: int, hidden: int, inner: int, seed: int = 0, biases: bool = True):
    """Blocks of 32 codes of 4 bits, two in a byte, the first one low; exponents; gate and up rows take turns."""
    random, tensors, meaning = torch.Generator().manual_seed(seed), {}, {}
    values = {}
    for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        codes = torch.randint(16, (num_experts, rows, columns), generator=random)
        exponents = torch.randint(119, 124, (num_experts, rows, columns // 32), generator=random)
        packed = codes[..., 0::2] + 16 * codes[..., 1::2]
        tensors[f"{prefix}.{name}_blocks"] = packed.view(num_experts, rows, columns // 32, 16).to(torch.uint8)
        tensors[f"{prefix}.{name}_scales"] = exponents.to(torch.uint8)
        values[name] = E2M1[codes] * torch.exp2(exponents.float() - 127).repeat_interleave(32, 2)
        if biases:
            tensors[f"{prefix}.{name}_bias"] = torch.randn(num_experts, rows, generator=random).bfloat16()
    for expert in range(num_experts):
        joined = values["gate_up_proj"][expert]
        meaning[expert] = (joined[0::2], joined[1::2], values["down_proj"][expert])
    return tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, meaning


def compressed(
    prefix: str,
    num_experts: int,
    hidden: int,
    inner: int,
    seed: int = 0,
    group: int = 32,
    zeros: torch.dtype | None = None,
):
    """int4 of compressed-tensors, pack-quantized: signed codes plus 8, eight in an int32 from the lowest bits on."""
    random, tensors, meaning = torch.Generator().manual_seed(seed), {}, {}
    for expert in range(num_experts):
        held = []
        for word, (rows, columns) in _sizes(hidden, inner).items():
            code = torch.randint(-8, 8, (rows, columns), generator=random)
            scale = (0.01 + 0.05 * torch.rand(rows, columns // group, generator=random)).bfloat16()
            zero = torch.randint(-8, 8, (rows, columns // group), generator=random)
            name = f"{prefix}.{expert}.{word}.weight"
            tensors |= {
                f"{name}_packed": _packed(code),
                f"{name}_scale": scale,
                f"{name}_shape": torch.tensor([rows, columns]),
            }
            if zeros == torch.int32:  # packed along the rows
                tensors[f"{name}_zero_point"] = _packed(zero.T).T.contiguous()
            elif zeros == torch.int8:
                tensors[f"{name}_zero_point"] = zero.to(torch.int8)
            else:
                zero = torch.zeros_like(zero)
            held.append((code - zero.repeat_interleave(group, 1)) * scale.float().repeat_interleave(group, 1))
        meaning[expert] = tuple(held)
    weights = {"num_bits": 4, "type": "int", "symmetric": zeros is None, "strategy": "group", "group_size": group}
    attention = {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None},
            "group_1": {**attention, "format": "float-quantized"},
        },
    }
    return tensors, config, meaning


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict, shards: int = 1, **others) -> Path:
    """As a folder of safetensors with config.json; `others` beside the quantization_config."""
    import safetensors.torch as st

    folder.mkdir(exist_ok=True, parents=True)
    names = sorted(tensors)
    files = {name: f"model-{place % shards + 1:05d}-of-{shards:05d}.safetensors" for place, name in enumerate(names)}
    for file in sorted(set(files.values())):
        st.save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({**others, "quantization_config": config}))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by its index."""
    import safetensors.torch as st

    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    loaded = {file: st.load_file(folder / file) for file in set(where.values())}
    return {name: loaded[file][name] for name, file in where.items()}


def _sizes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Signed codes [N, K] → int32 [N, K / 8]."""
    shifts = 4 * torch.arange(8, dtype=torch.int64)
    words = ((codes.long() + 8).unflatten(1, (-1, 8)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
