"""The layer against the dense float64 reference, forward and gradients, on one rank."""

import pytest
import torch

from moe_kernels import resolve_backend
from moe_layer import ROUTER_RULES, MoELayer, RouterRule
from tests.moe_layer.reference import Weights, clear_tokens, dense_forward, give_unit_scale, logical_grad

SEED = 1  # gives every shape outputs of some size
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RULES = {**ROUTER_RULES, "scaled": RouterRule("sigmoid", renormalize=True, scale=2.5, correction_bias=True)}

# (T, H, I, E, K): the edge that each covers.
SHAPES = {
    "plain": (12, 32, 16, 8, 2),
    "one token": (1, 32, 16, 8, 2),
    "odd sizes": (13, 19, 7, 5, 3),
    "K = 1": (9, 24, 8, 6, 1),
    "K = E": (6, 16, 8, 4, 4),
    "one expert": (5, 16, 8, 1, 1),
    "sizes of 1": (4, 1, 1, 3, 2),
    "more rows than a block": (70, 16, 8, 2, 2),
}


def make_layer(shape: str, device: str, dtype: torch.dtype = torch.float32, **options) -> MoELayer:
    _, hidden_size, intermediate_size, num_experts, top_k = SHAPES[shape]
    layer = MoELayer(hidden_size, intermediate_size, num_experts, top_k, device=device, dtype=dtype, **options)
    return give_unit_scale(layer, seed=SEED)


def reference_of(layer: MoELayer, x_TH: torch.Tensor, weights: Weights, mask: torch.Tensor | None = None):
    return dense_forward(
        x_TH.cpu(),
        weights,
        layer.gate.rule,
        layer.gate.top_k,
        layer.experts.format.activation.name,
        None if mask is None else mask.cpu(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_equals_the_dense_reference(shape, dtype, device, assert_close):
    layer = make_layer(shape, device, dtype)
    x = clear_tokens(layer, SHAPES[shape][0])
    with torch.no_grad():
        y = layer(x)
    assert y.shape == x.shape and y.dtype == dtype and y.device == x.device
    expected = reference_of(layer, x, Weights.of(layer))
    assert_close(y.cpu(), expected, scale=2.0)
    assert expected.abs().max() > 0.1  # the tolerance is absolute near 0: there must be something to see


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("rule", RULES)
def test_every_router_rule_and_activation(rule, activation, device, assert_close):
    layer = make_layer("plain", device, router=RULES[rule], activation=activation)
    x = clear_tokens(layer, 12)
    assert_close(layer(x).detach().cpu(), reference_of(layer, x, Weights.of(layer)))


def test_rules_by_name_are_the_ones_of_the_table(device):
    layer = MoELayer(8, 4, 4, 2, router="minimax_m2", device=device)
    assert layer.gate.rule == ROUTER_RULES["minimax_m2"]
    assert layer.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_both_backends(backend, device, assert_close):
    layer = make_layer("odd sizes", device, backend=backend)
    assert resolve_backend(backend, device) == backend
    x = clear_tokens(layer, 13)
    with torch.no_grad():
        assert_close(layer(x).cpu(), reference_of(layer, x, Weights.of(layer)))


@pytest.mark.parametrize("leading", [(), (3, 4), (2, 1, 3)], ids=str)
def test_leading_dimensions(leading, device):
    layer = make_layer("plain", device)
    x = clear_tokens(layer, torch.Size(leading).numel())
    with torch.no_grad():
        assert torch.equal(layer(x.reshape(*leading, -1)), layer(x).reshape(*leading, -1))


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)], ids=str)
def test_no_tokens(shape, device):
    layer = make_layer("plain", device)
    x = torch.empty(shape, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert layer.resident.load_E.sum() == 0


def test_input_that_is_not_contiguous(device, assert_close):
    layer = make_layer("plain", device)
    x = clear_tokens(layer, 12)
    columns_first = x.T.contiguous().T
    every_other = torch.stack([x, -x], dim=2).flatten(1)[:, ::2]
    rows_apart = torch.cat([x, x], dim=1)[:, :32]
    with torch.no_grad():
        for same in (columns_first, every_other, rows_apart):
            assert not same.is_contiguous() and torch.equal(same, x)
            assert_close(layer(same), layer(x))


def test_masked_tokens_are_not_routed_not_counted_and_come_back_as_0(device, assert_close):
    layer = make_layer("plain", device)
    x = clear_tokens(layer, 12).reshape(3, 4, 32)
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4], device=device)
    garbage = torch.where(mask[..., None], x, float("nan"))  # what is in padding must not matter
    with torch.no_grad():
        y = layer(garbage, mask)
    expected = reference_of(layer, x.reshape(12, 32), Weights.of(layer), mask.reshape(12))
    assert_close(y.reshape(12, 32).cpu(), expected)
    assert (y[~mask] == 0).all()
    assert layer.resident.load_E.sum() == 2 * mask.sum()


def test_what_a_masked_token_holds_reaches_no_gradient(device):
    layer = MoELayer(16, 8, 4, 2, trainable=True, device=device)
    x = torch.randn(6, 16, device=device)
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    found = []
    for padding in (0.0, float("nan")):
        layer.zero_grad()
        y = layer(torch.where(mask[:, None], x, padding), mask)
        y.square().sum().backward()
        found.append([parameter.grad for parameter in layer.parameters()])
    for with_zeros, with_nan in zip(*found, strict=True):
        assert with_nan.isfinite().all() and with_nan.any()
        torch.testing.assert_close(with_nan, with_zeros)


def test_masked_tokens_are_not_computed_for_ids_from_outside(device):
    layer = make_layer("plain", device)
    x = clear_tokens(layer, 6)
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    ids = torch.arange(12, device=device).view(6, 2) % 8
    weights = torch.full((6, 2), 0.5, device=device)
    with torch.no_grad():
        y = layer(x, mask, expert_ids=ids, expert_weights=weights)
    assert (y[~mask] == 0).all() and y[mask].any(dim=1).all()
    assert layer.resident.load_E.sum() == 2 * mask.sum()


def test_load_counts_the_tokens_of_each_logical_expert(device):
    layer = make_layer("plain", device)
    x = clear_tokens(layer, 12)
    with torch.no_grad():
        _, ids_TK = layer.gate.choose(layer.gate(x))
        layer(x)
        layer(x[:5])
    expected = ids_TK.flatten().bincount(minlength=8) + ids_TK[:5].flatten().bincount(minlength=8)
    assert torch.equal(layer.resident.load_E, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("leading", [(1,), (1, 1), ()])
def test_one_token_alone(backend, leading, device, assert_close):
    """It has kernels of its own; without a graph only, and with the same experts, counts and masks."""
    layer = make_layer("plain", device, backend=backend)
    x = clear_tokens(layer, 1).reshape(*leading, 32)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == x.shape
    assert_close(y.reshape(1, 32).cpu(), reference_of(layer, x.reshape(1, 32), Weights.of(layer)), scale=2.0)
    assert layer.resident.load_E.sum() == 2
    with_grad = layer(x.clone().requires_grad_())
    assert with_grad.requires_grad
    assert_close(with_grad.detach(), y)
    masked = torch.zeros(leading, dtype=torch.bool, device=device)
    with torch.no_grad():
        assert (layer(x, masked) == 0).all()
    assert layer.resident.load_E.sum() == 4


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_hooks_on_the_gate_are_called_and_their_logits_count(num_tokens, device):
    layer = make_layer("plain", device, backend="triton")
    x = clear_tokens(layer, num_tokens)
    with torch.no_grad():
        upside_down = layer(x, router_logits=-layer.gate(x))
        layer.gate.register_forward_hook(lambda module, inputs, logits: -logits)
        assert torch.equal(layer(x), upside_down)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:, 1:],
        lambda logits: torch.cat([logits, logits]),
        lambda logits: logits.double(),
        lambda logits: logits.int(),
        lambda logits: logits.to("meta"),
    ],
)
def test_a_gate_whose_logits_do_not_fit_is_refused(change, device):
    layer = make_layer("plain", device, backend="triton")
    layer.gate.register_forward_hook(lambda module, inputs, logits: change(logits))
    with torch.no_grad(), pytest.raises(ValueError, match="the gate's output must"):
        layer(clear_tokens(layer, 5))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_new_bias_and_a_new_gate_are_seen(num_tokens, device):
    layer = make_layer("plain", device, router="minimax_m2", backend="triton")
    x = clear_tokens(layer, num_tokens)
    with torch.no_grad():
        before = layer(x)
        layer.gate.e_score_correction_bias = torch.linspace(1, -1, 8, device=device)
        biased = layer(x)
        assert not torch.allclose(biased, before, atol=1e-3)
        layer.gate = make_layer("plain", device, router="softmax").gate
        assert not torch.allclose(layer(x), biased, atol=1e-3)
        other = make_layer("plain", device, router="minimax_m2", backend="triton", activation="gelu")
        layer.experts = other.experts
        layer.gate = other.gate
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_masks_of_any_stride_but_on_the_same_device(num_tokens, device):
    layer = make_layer("plain", device)
    x = clear_tokens(layer, num_tokens)
    mask = torch.ones(num_tokens, 2, dtype=torch.bool, device=device)[:, 0]
    with torch.no_grad():
        assert torch.equal(layer(x, mask), layer(x))
        with pytest.raises(ValueError, match="token_mask must be on"):
            layer(x, torch.ones(num_tokens, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("num_tokens", [1, 12])
def test_router_logits_of_the_caller(backend, num_tokens, device):
    layer = make_layer("plain", device, backend=backend)
    x = clear_tokens(layer, num_tokens)
    with torch.no_grad():
        expected, logits = layer(x), layer.gate(x)
        assert torch.equal(layer(x, router_logits=logits), expected)
        assert torch.equal(layer(x[None], router_logits=logits[None])[0], expected)
        assert not torch.equal(layer(x, router_logits=-logits), expected)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(12, 7), torch.zeros(11, 8), torch.zeros(12, 8, dtype=torch.int32)], ids=["E", "T", "dtype"]
)
def test_wrong_router_logits_are_refused(wrong, device):
    layer = make_layer("plain", device)
    with pytest.raises(ValueError, match="router_logits must"):
        layer(torch.zeros(12, 32, device=device), router_logits=wrong.to(device))


def test_inference_mode(device):
    layer = make_layer("plain", device)
    x = clear_tokens(layer, 12)
    with torch.no_grad():
        expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    assert layer.resident.load_E.sum() == 48


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["plain", "odd sizes", "K = 1", "K = E", "more rows than a block"])
def test_gradients_equal_those_of_the_dense_reference(shape, dtype, device, assert_close):
    layer = make_layer(shape, device, dtype, trainable=True)
    x = clear_tokens(layer, SHAPES[shape][0]).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    layer(x).backward(direction)

    weights = Weights.of(layer)
    dense_x = x.detach().cpu().double().requires_grad_()
    reference_of(layer, dense_x, weights).backward(direction.cpu().double())
    expected = {"x": dense_x.grad, **weights.grads()}
    actual = {
        "x": x.grad,
        "gate_EH": layer.gate.weight.grad,
        "gate_up_ENH": logical_grad(layer, "gate_up_proj"),
        "down_EHI": logical_grad(layer, "down_proj"),
    }
    for name, grad in actual.items():
        assert grad.dtype == dtype
        # Sums over up to 70 tokens: a tolerance of unit scale goes with the largest entry.
        assert_close(grad.cpu(), expected[name], scale=4.0 * max(1.0, expected[name].abs().max().item()))


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_every_router_rule(rule, device, assert_close):
    layer = make_layer("plain", device, router=RULES[rule])
    layer.gate.requires_grad_()
    x = clear_tokens(layer, 12).requires_grad_()
    mask = torch.arange(12, device=device) % 5 != 0
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    layer(x, mask).backward(direction)
    weights = Weights.of(layer)
    dense_x = x.detach().cpu().double().requires_grad_()
    reference_of(layer, dense_x, weights, mask).backward(direction.cpu().double())
    assert_close(x.grad.cpu(), dense_x.grad, scale=4.0)
    assert_close(layer.gate.weight.grad.cpu(), weights.gate_EH.grad, scale=16.0)
    assert not list(layer.experts.parameters())
    assert not x.grad[~mask].any()


def test_equal_seeds_give_equal_layers(device):
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(MoELayer(16, 8, 4, 2, device=device).state_dict())
    torch.manual_seed(6)
    other = MoELayer(16, 8, 4, 2, device=device).state_dict()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert not torch.equal(tensor, other[name])
