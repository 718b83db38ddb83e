"""What PyTorch does around a layer: activation checkpointing, `torch.compile`, offloading of saved tensors."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eplb import EplbConfig, EplbController
from moe_layer import MoELayer
from moe_layer.weights.versions import _pins
from tests.moe_layer.reference import give_unit_scale
from tests.moe_layer.relocation import Relocator, make_pair, poison

BACKENDS = ["torch", "triton"]  # of the kernels; the second in the interpreter where there is no GPU


def make_layer(device: str, **options) -> MoELayer:
    layer = give_unit_scale(MoELayer(32, 16, 8, 2, device=device, **options))
    layer.gate.requires_grad_()
    return layer


def gradients(layer: MoELayer, x: torch.Tensor, run) -> list[torch.Tensor]:
    """Of x and of all parameters that want one. By `.backward()`: reentrant checkpointing knows no `autograd.grad`."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    layer.zero_grad()
    x.grad = None
    run(x).backward(direction)
    return [x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)]


def compiled_whole(layer, compiler="aot_eager"):
    return torch.compile(layer, fullgraph=True, backend=compiler, dynamic=False)


WRAPPINGS = {
    "plain": lambda layer: layer,
    "checkpoint, reentrant": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=True),
    "checkpoint": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=False),
    "compile": compiled_whole,
    "compile without a backend": lambda layer: compiled_whole(layer, "eager"),
    "checkpoint of compile, reentrant": lambda layer: WRAPPINGS["checkpoint, reentrant"](compiled_whole(layer)),
    "checkpoint of compile": lambda layer: WRAPPINGS["checkpoint"](compiled_whole(layer)),
    "compile of checkpoint, reentrant": lambda layer: compiled_whole(WRAPPINGS["checkpoint, reentrant"](layer)),
    "compile of checkpoint": lambda layer: compiled_whole(WRAPPINGS["checkpoint"](layer)),
    "checkpoint of checkpoint": lambda layer: WRAPPINGS["checkpoint"](WRAPPINGS["checkpoint"](layer)),
}


CASES = [
    *((wrapping, kind, "torch") for wrapping in WRAPPINGS for kind in ("registered", "trainable")),
    *(
        (wrapping, "registered", "triton")
        for wrapping in ("checkpoint", "checkpoint of compile", "compile of checkpoint")
    ),
    ("compile", "trainable", "triton"),
]


@pytest.mark.parametrize(("wrapping", "kind", "backend"), CASES)
def test_load_is_counted_once_and_gradients_are_those_of_the_plain_layer(wrapping, kind, backend, device):
    torch._dynamo.reset()
    layer = make_layer(device, trainable=kind == "trainable", backend=backend)
    if kind == "registered":
        EplbController(EplbConfig()).register(layer)
    x = torch.randn(3, 32, device=device, requires_grad=True)
    expected = gradients(layer, x, layer)
    counted = layer.resident.load_E.clone()
    assert counted.sum() == 6

    layer.resident.load_E.zero_()
    wrapped = WRAPPINGS[wrapping](layer)
    for number in (1, 2):
        actual = gradients(layer, x, wrapped)
        assert torch.equal(layer.resident.load_E, number * counted)
        assert len(actual) == len(expected) == (4 if kind == "trainable" else 2)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
    if kind == "registered":
        assert not layer.resident.is_pinned_before(1) and not _pins


def test_a_forward_after_a_backward_is_counted(device):
    """That a recomputation is told apart must not swallow what comes later."""
    layer = make_layer(device)
    x = torch.randn(4, 32, device=device, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    layer(x)
    assert layer.resident.load_E.sum() == 16


# ---- versions under torch.compile: what `test_flips.py` says of eager forwards


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "eager"), ("torch", "aot_eager"), ("triton", "aot_eager")])
def test_i3_a_flip_between_a_compiled_forward_and_its_backward(backend, compiler, device):
    torch._dynamo.reset()
    layer, twin = make_pair(device, backend=backend)
    relocator = Relocator([layer])
    fast = compiled_whole(layer, compiler)
    x = torch.randn(3, 32, device=device)
    expected = torch.autograd.grad(twin(leaf := x.clone().requires_grad_()).square().sum(), leaf)
    for expert in (5, 0):
        leaf = x.clone().requires_grad_()
        y = fast(leaf)
        fill = relocator.fill(0, expert)
        handoff = relocator.publish(fill)
        relocator.flip(handoff)
        assert layer.resident.is_pinned_before(handoff.version), "its backward is to come"
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, retain_graph=True)
        torch.testing.assert_close(grad, expected[0])
        assert layer.resident.is_pinned_before(handoff.version), "it may come again"
        y.square().sum().backward()
        torch.testing.assert_close(leaf.grad, expected[0])
        relocator.release(fill, handoff)  # although y is kept


@pytest.mark.parametrize("wrap", [lambda layer: layer, compiled_whole, WRAPPINGS["checkpoint"]])
def test_a_loss_that_is_kept_after_its_backward_pins_nothing(wrap, device):
    torch._dynamo.reset()
    layer, _ = make_pair(device)
    y = wrap(layer)(torch.randn(5, 32, device=device, requires_grad=True))
    loss = y.square().sum()
    loss.backward(retain_graph=True)
    assert layer.resident.is_pinned_before(1), "its backward may come again"
    loss.backward()
    assert not layer.resident.is_pinned_before(1) and not _pins
    assert y.grad_fn is not None and loss.grad_fn is not None


def test_a_compiled_forward_that_is_dropped_pins_nothing(device):
    torch._dynamo.reset()
    layer, _ = make_pair(device)
    y = compiled_whole(layer)(torch.randn(5, 32, device=device, requires_grad=True))
    assert layer.resident.is_pinned_before(1)
    del y
    gc.collect()
    assert not layer.resident.is_pinned_before(1) and not _pins


def on_host(tensor):
    return tensor.device, tensor.to("cpu", copy=True)


def from_host(packed):
    device, tensor = packed
    return tensor.to(device)


@pytest.mark.parametrize("wrap", [lambda layer: layer, compiled_whole])
def test_i3_saved_tensors_that_are_offloaded_meanwhile(wrap, device):
    """The pin does not depend on what becomes of saved tensors."""
    torch._dynamo.reset()
    layer, twin = make_pair(device)
    relocator = Relocator([layer])
    x = torch.randn(3, 32, device=device)
    grads = []
    for run in (wrap(layer), twin):
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(on_host, from_host):
            y = run(leaf)
        if run is not twin:
            old = layer.resident.live_slots()[5][0]
            relocator.move_without_grace(5)
            gc.collect()
            assert layer.resident.is_pinned_before(relocator.version)
        y.square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert not layer.resident.is_pinned_before(relocator.version)
    poison(layer, old, device)


def test_a_backward_after_its_version_was_given_up_is_an_error(device):
    torch._dynamo.reset()
    layer, _ = make_pair(device)
    y = compiled_whole(layer)(torch.randn(5, 32, device=device, requires_grad=True))
    _pins.clear()
    with pytest.raises(RuntimeError, match="version was given up before the backward"):
        y.sum().backward()


def test_registering_after_compiling(device):
    torch._dynamo.reset()
    layer, twin = make_layer(device), make_layer(device)
    fast, x = compiled_whole(layer), torch.randn(12, 32, device=device)
    y = fast(x.clone().requires_grad_())
    EplbController(EplbConfig()).register(layer)
    relocator = Relocator([layer])
    for expert in (0, 5, 0):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y = fast(leaves[0])
        relocator.move_without_grace(expert) if expert == 5 else None
        y.sum().backward()
        twin(leaves[1]).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_compiles_without_a_graph_break(num_tokens, trainable, backend, compiled, device):
    layer = make_layer(device, trainable=trainable, backend=backend)
    x = torch.randn(num_tokens, 32, device=device)
    with torch.no_grad():
        expected = layer(x)
        counted = layer.resident.load_E.clone()
        fast = compiled(layer)
        assert torch.equal(fast(x), expected)
        assert torch.equal(fast(x), expected)
    assert torch.equal(layer.resident.load_E, 3 * counted)


GIVEN = ["mask", "logits", "ids", "autocast"]


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_with_all_that_a_forward_may_be_given(backend, given, with_grad, device):
    torch._dynamo.reset()
    layer = make_layer(device, backend=backend)
    x = torch.randn(3, 32, device=device)
    weights_TK, ids_TK = layer.gate.choose(layer.gate(x))
    arguments = {
        "mask": {"token_mask": torch.arange(3, device=device) % 3 != 0},
        "logits": {"router_logits": torch.randn(3, 8, device=device)},
        "ids": {"expert_ids": ids_TK.long(), "expert_weights": weights_TK.detach().bfloat16()},
        "autocast": {},
    }[given]
    results = []
    for run in (layer, compiled_whole(layer)):
        leaf = x.clone().requires_grad_(with_grad)
        with torch.set_grad_enabled(with_grad), torch.autocast(device, torch.bfloat16, enabled=given == "autocast"):
            y = run(leaf, **arguments)
        if with_grad:
            y.float().square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        if one is not None:
            # Compiled code runs the gate's backward under the forward's autocast, as it does that of any `nn.Linear`.
            error = 2e-2 if given == "autocast" else 1e-5
            torch.testing.assert_close(one, other, rtol=0, atol=error * one.abs().max().item())


def test_a_flip_does_not_recompile_and_changes_no_output(compiled, device):
    layer = make_layer(device)
    EplbController(EplbConfig()).register(layer)
    relocator = Relocator([layer])
    x = torch.randn(3, 32, device=device)
    with torch.no_grad():
        expected = layer(x)
        fast = compiled(layer)
        for expert in (0, 5, 0, 7):
            assert torch.equal(fast(x), expected)
            relocator.move(expert)
        assert torch.equal(fast(x), expected)
    assert layer.resident.current.number == 4
