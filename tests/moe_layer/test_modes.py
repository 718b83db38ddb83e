"""Layers made or used in modes that change what their tensors may be."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from eplb import EplbConfig, EplbController
from moe_layer import AllToAllDispatcher, MoELayer

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
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_a_device_that_cannot_be_leaves_every_part_where_it_was(device):
    layer = MoELayer(16, 8, 4, 2, device=device)
    x = torch.randn(5, 16, device=device)
    with torch.no_grad():
        expected = layer(x)
        with pytest.raises(ValueError, match=r"device must be one of this machine's, .*index=99"):
            layer._apply(lambda tensor: SimpleNamespace(device=torch.device("cuda:99"), dtype=tensor.dtype))
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
        dispatch = combine = AllToAllDispatcher.combine
        max_tokens = None

    class WithoutABound:
        backend = dispatch = combine = AllToAllDispatcher.combine

    for make, lacks in ((Half, "backend"), (WithoutABound, "max_tokens")):
        with pytest.raises(ValueError, match=rf"dispatcher must have the methods backend, .* lacks \['{lacks}'\]"):
            MoELayer(16, 8, 4, 2, dispatcher=make())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("default", ["meta", "cuda"])
def test_a_default_device_that_is_not_the_layers(default, trainable, device):
    """Every host buffer names its device: of the constructor, of loading and saving, of controllers."""
    if default == "cuda" and device == "cpu":
        default = "meta"
    with torch.device(default):
        layer = MoELayer(16, 8, 4, 2, device=device, trainable=trainable)
        state = layer.state_dict()
        layer.load_state_dict(state)
        x = torch.randn(5, 16, device=device)
        y = layer(x).detach()
        if not trainable:
            with EplbController(EplbConfig(step_interval=2, window_size=2, window_samples=1)) as controller:
                controller.register(layer)
                for _ in range(4):
                    assert torch.equal(layer(x), y)
                    controller.step()
                assert controller.health().last_error is None
            copy.deepcopy(layer)
    assert all(tensor.device.type == device for tensor in state.values())
    with torch.device(default):
        assert MoELayer(16, 8, 4, 2).experts.device.type == default


@pytest.mark.parametrize("trainable", [False, True])
def test_a_layer_without_memory_is_given_some_and_loaded(trainable, device):
    source = MoELayer(16, 8, 4, 2, router="minimax_m2", device=device, trainable=trainable)
    layer = MoELayer(16, 8, 4, 2, router="minimax_m2", device="meta", trainable=trainable)
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers(), layer.experts.matrices().down_SHI))
    x = torch.randn(5, 16, device=device)
    with pytest.raises(ValueError, match=r"the layer is on the meta device: give it memory with to_empty\(\)"):
        layer(x)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        layer.to(device)
    with pytest.raises(ValueError, match="meta device" if not trainable else "are parameters"):
        EplbController().register(layer)
    layer.to_empty(device=device).load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))
    assert layer.resident.load_E.sum() == 10 and layer.experts.device == source.experts.device
    layer.reset_parameters()
    assert torch.isfinite(layer(x)).all()
    assert layer.to("meta").experts.device.type == "meta"


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("convert", ["double", "float8", "complex", "share_memory"])
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_conversion_that_cannot_be_is_refused_and_nothing_changed(convert, trainable, device):
    layer = MoELayer(16, 8, 4, 2, device=device, trainable=trainable)
    x = torch.randn(5, 16, device=device)
    before, y = layer.state_dict(), layer(x).detach()
    action = {
        "double": lambda: layer.double(),
        "float8": lambda: layer.to(torch.float8_e4m3fn),
        "complex": lambda: layer.to(torch.complex64),
        "share_memory": lambda: layer.share_memory(),
    }[convert]
    if convert == "share_memory" and device == "cuda":
        return  # memory of a GPU is shared anyway
    with pytest.raises((ValueError, RuntimeError), match=r"dtype must be float32|share_memory.. is refused"):
        action()
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == before[name].dtype and not (tensor.device.type == "cpu" and tensor.is_shared())
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("save", [pickle.dumps, copy.copy, lambda layer: torch.save(layer, io.BytesIO())])
@pytest.mark.parametrize("part", ["layer", "experts", "model"])
def test_pickling_says_what_to_save(part, save, device):
    layer = MoELayer(16, 8, 4, 2, device=device)
    whole = {"layer": layer, "experts": layer.experts, "model": nn.Sequential(layer)}[part]
    if part == "model" and save is copy.copy:
        assert copy.copy(whole)[0] is layer
        return
    with pytest.raises(RuntimeError, match=r"cannot be pickled.*state_dict\(\)"):
        save(whole)


# ---- autocast and the router's dtype


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, trainable, device):
    """As for `nn.Linear`: x in any of the dtypes is taken, and the output has the autocast dtype."""
    layer = MoELayer(16, 8, 4, 2, dtype=dtype, device=device, trainable=trainable)
    linear = nn.Linear(16, 16, device=device)
    x = torch.randn(5, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(linear(x))
        assert y.dtype == linear(x).dtype == torch.bfloat16
        for other in (torch.float32, torch.float16):
            assert layer(x.to(other)).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="x must have the layer's dtype"):
            layer(x.double())
        with torch.autocast(device, enabled=False), pytest.raises(ValueError, match="x must have the layer's dtype"):
            layer(x.to(torch.float16))
        z = linear(x).to(dtype)
    assert torch.equal(y, layer(z).to(torch.bfloat16)), "router or experts computed in another dtype"
    y.float().sum().backward()
    assert linear.weight.grad.abs().sum() > 0


def test_a_router_in_float32_inside_a_layer_in_bfloat16(device):
    def make(**options):
        torch.manual_seed(0)
        return MoELayer(64, 8, 128, 4, dtype=torch.bfloat16, device=device, **options)

    layer = make(router_dtype=torch.float32, router="minimax_m2")
    x = torch.randn(400, 64, device=device, dtype=torch.bfloat16)
    assert layer.gate.weight.dtype == layer.gate(x).dtype == torch.float32
    weight = layer.gate.weight.detach()
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(layer.gate(x).double(), exact, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x, router_logits=layer.gate(x)))
    plain = make(router="minimax_m2")
    assert plain.gate.weight.dtype == plain.gate(x).dtype == torch.bfloat16
    for cast in (layer.bfloat16, layer.half, layer.float):
        cast()
        assert torch.equal(layer.gate.weight, weight) and layer.gate.weight.dtype == torch.float32
    assert layer.to_empty(device=device).gate.weight.dtype == torch.float32
    plain.gate.float()  # by hand
    assert plain.gate(x).dtype == torch.float32 and plain(x).dtype == torch.bfloat16


def test_pins_do_not_pile_up_where_nothing_is_relocated(device):
    layer = MoELayer(16, 8, 4, 2, device=device)
    EplbController(EplbConfig(use_async=False)).register(layer)
    for _ in range(20):
        layer(torch.randn(3, 16, device=device, requires_grad=True)).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    pins = layer.resident.pins
    assert len(pins.held) + len(pins.dropped) + len(pins._running) < 6


@pytest.mark.parametrize("trainable", [False, True])
def test_a_layer_is_not_made_of_fake_tensors(trainable, device):
    """Its tables have values. A layer that is there computes with fakes, as shapes are all that counts."""
    layer = MoELayer(16, 8, 4, 2, trainable=trainable, device=device)
    x = torch.randn(5, 16, device=device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(ValueError, match="device must hold values, not those of FakeTensorMode"):
            MoELayer(16, 8, 4, 2, trainable=trainable, device=device)
        assert layer(mode.from_tensor(x)).shape == (5, 16)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_layer_made_under_init_empty_weights(trainable, device):
    """It puts parameters on the meta device as they are registered; slots are none."""
    accelerate = pytest.importorskip("accelerate")
    layer = MoELayer(16, 8, 4, 2, trainable=trainable, device=device)
    with accelerate.init_empty_weights():
        empty = MoELayer(16, 8, 4, 2, trainable=trainable, device=device)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty.to_empty(device=device).load_state_dict(layer.state_dict())
    x = torch.randn(5, 16, device=device)
    assert torch.equal(empty(x), layer(x))
