"""Loading and saving quantised experts: which tensors of a checkpoint store a matrix, and how these lie in our slots.

`quantization_config` in the checkpoint's config.json decides, and nothing else. Names are what an unquantised checkpoint would
call the matrix, and an ending. Layouts (N outputs, K inputs of a matrix, g columns of a group):

| quant_method | weights | scales |
|---|---|---|
| fp8 (DeepSeek, Qwen3) | e4m3 [N, K] | `_scale_inv` [⌈N/128⌉, ⌈K/128⌉], float32, bfloat16 or ue8m0 |
| mxfp4 (GPT-OSS) | `_blocks` uint8 [N, K/32, 16], lower nibble first | `_scales` uint8 [N, K/32] |
| compressed-tensors | `_packed` int32 [N, K/8], lowest bits first | `_scale` bfloat16 [N, K/g] |

compressed-tensors also has `_shape` (N, K) and, of asymmetric weights, `_zero_point`: int32 [N/8, K/g], packed along N, or
int8 [N, K/g]. A signed code c is packed as c + 8. Sources: transformers 5.24 (`integrations/finegrained_fp8.py`, `mxfp4.py`),
`pack_to_int32` and the pack-quantized compressor of compressed-tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels import pack_nibbles, pack_words, unpack_nibbles, unpack_words
from moe_layer.checkpoint.exactly import exactly
from moe_layer.checkpoint.folder import CheckpointError
from moe_layer.weights.quantisation import Quantisation

ROLES = ("weight", "scale", "zero")


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores quantised matrices.

    Attributes:
        quantisation: what they are in our slots.
        endings: of the names, by role. "shape": a tensor with N and K, which is written but not needed.
        dtypes: that tensors of a role may have; the first where nothing else is said.
        is_interleaved: whether in a tensor that joins gate and up projection their rows take turns.
        config: the `quantization_config`.
    """

    quantisation: Quantisation
    endings: Mapping[str, str]
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    is_interleaved: bool
    config: Mapping[str, Any]

    def plain_name(self, name: str) -> str | None:
        """What an unquantised checkpoint calls the matrix whose weights are `name`; None for the tensors beside weights."""
        weight = self.endings["weight"]
        beside = [ending for role, ending in self.endings.items() if role != "weight"]
        if any(name.endswith(ending) for ending in beside):
            return None
        return name.removesuffix(weight) if weight else name

    def to_ours(self, role: str, stored: torch.Tensor) -> torch.Tensor:
        """A tensor of one expert's matrix in our codes, row by row; also on the meta device. `laid_out` then lays it out."""
        scheme = self.quantisation.scheme
        if scheme == "mxfp4" and role == "weight":
            return pack_words(unpack_nibbles(stored.flatten(1)), scheme)
        if scheme == "int4" and role == "weight":
            return pack_words(unpack_nibbles(stored.contiguous().view(torch.uint8)), scheme)
        if role == "zero":
            return _zeros_of(stored)
        return stored

    def to_stored(self, role: str, ours: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The reverse, of the dtype that the checkpoint has.

        Raises:
            CheckpointError: not every value can be said in `dtype`.
        """
        scheme = self.quantisation.scheme
        if scheme == "mxfp4" and role == "weight":
            return pack_nibbles(unpack_words(ours, scheme)).unflatten(1, (-1, 16))
        if scheme == "int4" and role == "weight":
            return pack_nibbles(unpack_words(ours, scheme)).view(torch.int32)
        if role == "zero":
            return _stored_zeros(ours, dtype)
        return exactly(ours, dtype)

    def laid_out(self, role: str, rows: torch.Tensor) -> torch.Tensor:
        """A whole tensor of a matrix as our slots hold it, of one that is row by row: [N, …]; and back."""
        is_beside = role in ("scale", "zero") and self.quantisation.scheme != "fp8_block"
        return rows.T.contiguous() if is_beside else rows


def _zeros_of(stored: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[N, K/g]``, of int32 ``[N/8, K/g]`` with row 8r + j in bits 4j, or of signed int8 ``[N, K/g]``."""
    if stored.dtype == torch.int8:
        return (stored + 8).to(torch.uint8)
    if stored.is_meta:
        return stored.new_empty((8 * stored.shape[0], *stored.shape[1:]), dtype=torch.uint8)
    flat = unpack_nibbles(
        stored.T.flatten().view(torch.uint8)
    )  # a dimension of size 1 may have a stride that no view takes
    return flat.view(stored.shape[1], -1).T.contiguous()


def _stored_zeros(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return codes.to(torch.int8) - 8
    if codes.shape[0] % 8:
        raise CheckpointError(
            f"zero points of {codes.shape[0]} rows cannot be packed along them: they must divide by 8"
        )
    return pack_nibbles(codes.T.flatten()).view(torch.int32).view(codes.shape[1], -1).T.contiguous()


def stored_of(config: Mapping[str, Any]) -> Stored | None:
    """What a model's config says of how its experts are stored; None if they are not quantised.

    Raises:
        CheckpointError: they are, in a way that our kernels do not compute; says which.
    """
    places = [config, config.get("text_config") or {}]
    found = [one[key] for one in places for key in ("quantization_config", "compression_config") if one.get(key)]
    if not found:
        return None
    quantization = found[0]
    method = quantization.get("quant_method")
    if method == "fp8":
        return _fp8(quantization)
    if method == "mxfp4":
        u8 = (torch.uint8,)
        endings = {"weight": "_blocks", "scale": "_scales"}
        return Stored(Quantisation("mxfp4"), endings, {"weight": u8, "scale": u8}, True, quantization)
    if method == "compressed-tensors":
        return _compressed(quantization)
    raise CheckpointError(
        f"quantization_config has quant_method={method!r}; experts can be fp8 (in blocks of 128), mxfp4 or compressed-tensors "
        "(int4)"
    )


def _fp8(config: Mapping[str, Any]) -> Stored:
    wanted = {"weight_block_size": ([128, 128],), "activation_scheme": ("dynamic", None), "expert_dtype": ("fp8", None)}
    for key, values in wanted.items():
        value = config.get(key)
        value = list(value) if isinstance(value, tuple) else value
        if value not in values:
            raise CheckpointError(f"quantization_config of fp8 must have {key}={values[0]!r}, has {value!r}")
    scales = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
    dtypes = {"weight": (torch.float8_e4m3fn,), "scale": scales}
    return Stored(Quantisation("fp8_block"), {"weight": "", "scale": "_scale_inv"}, dtypes, False, config)


def _compressed(config: Mapping[str, Any]) -> Stored:
    """Of the groups of a config that has several (attention in fp8, say), the one of 4-bit integers."""
    groups = config.get("config_groups") or {}
    kinds = []
    for group in groups.values():
        weights = group.get("weights") or {}
        is_packed = (group.get("format") or config.get("format")) == "pack-quantized"
        if weights.get("num_bits") == 4 and weights.get("type") == "int" and is_packed:
            if weights.get("strategy") != "group" or group.get("input_activations"):
                raise CheckpointError(
                    "int4 experts of compressed-tensors must have strategy='group' and no input_activations, have "
                    f"strategy={weights.get('strategy')!r}, input_activations={group.get('input_activations')!r}"
                )
            if weights.get("actorder") in ("group", "dynamic", True):
                raise CheckpointError(
                    f"int4 experts with actorder={weights['actorder']!r} have their columns in another order"
                )
            kinds.append((weights.get("group_size"), not weights.get("symmetric", True)))
    if len(set(kinds)) != 1:
        raise CheckpointError(
            f"config_groups of compressed-tensors must have one kind of 4-bit integer weights in format pack-quantized, have "
            f"{len(set(kinds))}"
        )
    try:
        quantisation = Quantisation("int4", *kinds[0])
    except ValueError as error:
        raise CheckpointError(f"config_groups of compressed-tensors: {error}") from error
    endings = {"weight": "_packed", "scale": "_scale", "zero": "_zero_point", "shape": "_shape"}
    dtypes = {"weight": (torch.int32,), "scale": (torch.bfloat16,), "zero": (torch.int32, torch.int8)}
    return Stored(quantisation, endings, dtypes, False, config)


def config_for(quantisation: Quantisation) -> dict[str, Any]:
    """A `quantization_config` that says `quantisation`, for checkpoints of our own."""
    if quantisation.scheme == "fp8_block":
        return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    if quantisation.scheme == "mxfp4":
        return {"quant_method": "mxfp4"}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": not quantisation.zero_points,
        "strategy": "group",
        "group_size": quantisation.group,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }
