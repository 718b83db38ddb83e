"""What PyTorch does around a layer: activation checkpointing, `torch.func.functional_call` and `torch.compile`."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eplb import EplbConfig, EplbController
from moe_layer import MoELayer
from tests.moe_layer.reference import give_unit_scale
from tests.moe_layer.relocation import Relocator


def make_layer(device: str, **options) -> MoELayer:
    return give_unit_scale(MoELayer(32, 16, 8, 2, device=device, **options))


def gradients(layer: MoELayer, x: torch.Tensor, run) -> list[torch.Tensor]:
    """Of x and of all parameters that want one. By `.backward()`: reentrant checkpointing knows no `autograd.grad`."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    layer.zero_grad()
    x.grad = None
    run(x).backward(direction)
    return [x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("trainable_experts", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_the_load_once_and_changes_no_gradient(
    use_reentrant, trainable_experts, registered, device
):
    layer = make_layer(device, trainable_experts=trainable_experts)
    controller = EplbController(EplbConfig(use_async=not trainable_experts))
    if registered:
        controller.register(layer)
    x = torch.randn(12, 32, device=device, requires_grad=True)
    expected = gradients(layer, x, layer)
    counted = layer.resident.load_E.clone()
    assert counted.sum() == 24

    layer.resident.load_E.zero_()
    actual = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert torch.equal(layer.resident.load_E, counted)
    assert len(actual) == len(expected) == (4 if trainable_experts else 2)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_a_forward_after_a_backward_is_counted(device):
    """That a recomputation is told apart must not swallow what comes later."""
    layer = make_layer(device)
    x = torch.randn(4, 32, device=device, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    layer(x)
    assert layer.resident.load_E.sum() == 16


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("trainable_experts", [False, True])
def test_parameters_that_were_there_for_the_forward_alone(trainable_experts, name, device):
    """A layer on its own gives their gradient; a registered one, whose backward repeats the forward, says that it cannot."""
    layer = make_layer(device, trainable_experts=trainable_experts)
    x = torch.randn(12, 32, device=device, requires_grad=True)
    doubled = (2 * layer.experts.get_parameter(name).detach()).requires_grad_(trainable_experts)

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {f"experts.{name}": doubled}, x)

    of_x = gradients(layer, x, run)[0]
    assert (doubled.grad is not None) == trainable_experts
    expected = gradients(layer, x, layer)
    assert not torch.equal(of_x, expected[0])
    EplbController(EplbConfig(use_async=False)).register(layer)
    with pytest.raises(RuntimeError, match=r"no longer those of the forward.*functional_call\(\) cannot replace"):
        gradients(layer, x, run)
    for one, other in zip(gradients(layer, x, layer), expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    torch._dynamo.reset()


def test_compiles_without_a_graph_break(compiled, device):
    layer = make_layer(device)
    x = torch.randn(12, 32, device=device)
    with torch.no_grad():
        expected = layer(x)
        counted = layer.resident.load_E.clone()
        fast = compiled(layer)
        assert torch.equal(fast(x), expected)
        assert torch.equal(fast(x), expected)
    assert torch.equal(layer.resident.load_E, 3 * counted)


def test_compiles_with_a_mask(compiled, device):
    layer = make_layer(device)
    x, mask = torch.randn(12, 32, device=device), torch.arange(12, device=device) % 3 != 0
    with torch.no_grad():
        assert torch.equal(compiled(layer)(x, mask), layer(x, mask))


def test_a_flip_does_not_recompile_and_changes_no_output(compiled, device):
    layer = make_layer(device)
    EplbController(EplbConfig()).register(layer)
    relocator = Relocator([layer])
    x = torch.randn(12, 32, device=device)
    with torch.no_grad():
        expected = layer(x)
        fast = compiled(layer)
        for expert in (0, 5, 0, 7):
            assert torch.equal(fast(x), expected)
            relocator.move(expert)
        assert torch.equal(fast(x), expected)
    assert layer.resident.current.number == 4
