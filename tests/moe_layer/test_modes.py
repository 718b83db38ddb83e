"""Layers made or used in modes that change what their tensors may be."""

import copy

import pytest
import torch
from torch import nn

from eplb import EplbConfig, EplbController
from moe_layer import LocalDispatcher, MoELayer

IN_INFERENCE_MODE = {
    "built": lambda layer: MoELayer(16, 8, 4, 2, device=layer.gate.weight.device),
    "copied": copy.deepcopy,
    "cast": lambda layer: layer.to(torch.bfloat16),
    "inside a model": lambda layer: copy.deepcopy(nn.Sequential(layer)).half()[0],
}


@pytest.mark.parametrize("made", IN_INFERENCE_MODE)
def test_a_layer_made_in_inference_mode_serves_loads_warms_up_and_learns_outside(made, device):
    layer = MoELayer(16, 8, 4, 2, device=device)
    with torch.inference_mode():
        layer = IN_INFERENCE_MODE[made](layer)
    x = torch.randn(5, 16, device=device, dtype=layer.gate.weight.dtype)
    with torch.no_grad():
        expected = layer(x)
    layer.load_state_dict(layer.state_dict())
    controller = EplbController(EplbConfig(use_async=False))
    controller.register(layer)
    with controller.warm_up(), torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert layer.resident.load_E.sum() == 10
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.gate.weight.grad is not None


def test_a_device_that_cannot_be_leaves_every_part_where_it_was(device):
    layer = MoELayer(16, 8, 4, 2, device=device)
    x = torch.randn(5, 16, device=device)
    with torch.no_grad():
        expected = layer(x)
        with pytest.raises(ValueError, match=r"device must be a CPU or a CUDA device, got .*meta"):
            layer.to("meta")
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_leaves_the_correction_bias_as_it_is(dtype, device):
    layer = MoELayer(16, 8, 4, 2, router="minimax_m2", device=device)
    bias_E = torch.tensor([0.1, -0.2, 0.3, 1e-6], device=device)
    layer.gate.e_score_correction_bias.copy_(bias_E)
    layer.to(dtype)
    assert torch.equal(layer.gate.e_score_correction_bias, bias_E) and layer.gate.weight.dtype == dtype
    with torch.no_grad():
        layer(torch.randn(3, 16, device=device, dtype=dtype))


def test_a_dispatcher_that_lacks_a_method_is_refused():
    class Half:
        dispatch = combine = LocalDispatcher.combine

    with pytest.raises(ValueError, match=r"dispatcher must have the methods backend, .* lacks \['backend'\]"):
        MoELayer(16, 8, 4, 2, dispatcher=Half())


def test_pins_do_not_pile_up_where_nothing_is_relocated(device):
    layer = MoELayer(16, 8, 4, 2, device=device)
    EplbController(EplbConfig(use_async=False)).register(layer)
    for _ in range(20):
        layer(torch.randn(3, 16, device=device, requires_grad=True)).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    pins = layer.resident.pins
    assert len(pins.held) + len(pins.dropped) + len(pins._running) < 6
