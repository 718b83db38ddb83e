"""What the tests of quantised experts share: the schemes, layers, and these in float32 by what their records mean."""

from __future__ import annotations

import torch

from moe_layer import MoELayer, Quantisation

SCHEMES = {
    "fp8_block": Quantisation("fp8_block"),
    "mxfp4": Quantisation("mxfp4"),
    "int4": Quantisation("int4"),
    "int4_zeros": Quantisation("int4", zero_points=True),
}
H, I, E, K = 64, 32, 8, 2  # noqa: E741 - the letters of the legend
"""Hidden, intermediate (blocks of fp8_block are partial), experts, top-k."""

# Relative to the largest output. fp8_block rounds activations twice to 4 bits; others' weights are exact, the rest is of bf16.
CLOSE = {"fp8_block": 8e-2, "mxfp4": 2e-2, "int4": 2e-2, "int4_zeros": 2e-2}


def make_quantised(scheme: str, device: str | torch.device = "cpu", seed: int = 0, **options) -> MoELayer:
    torch.manual_seed(seed)
    options = {"dtype": torch.bfloat16, "num_shadow_slots": 2, **options}
    layer = MoELayer(H, I, E, K, quantisation=SCHEMES[scheme], device=device, **options)
    with torch.no_grad():  # so that experts matter, and differ
        layer.gate.weight.mul_(4)
    return layer


def records(layer: MoELayer) -> list[dict[str, torch.Tensor]]:
    """Each expert's tensors, of a layer whose state dict has them all."""
    state = layer.experts.state_dict()
    return [{name: tensor[expert] for name, tensor in state.items()} for expert in range(layer.resident.num_experts)]


def as_floats(layer: MoELayer) -> MoELayer:
    """The layer in float32 with the values that the quantised weights stand for."""
    plain = MoELayer(H, I, E, K, device=layer.experts.device, dtype=torch.float32)
    plain.gate.load_state_dict(layer.gate.state_dict())
    plain.load_experts(
        {expert: layer.experts.format.dequantise(record) for expert, record in enumerate(records(layer))}
    )
    return plain


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """`torch.equal` of bytes: of NaN and −0 too, and of dtypes that it does not know."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
