"""Losses of routers, the correction bias, clipping: on one rank, against transformers, PyTorch, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moe_layer import MoELayer
from moe_layer.training import clip_grad_norm, load_balancing_loss, route, router_z_loss, update_correction_bias
from tests.moe_layer.reference import give_unit_scale


def choice(num_tokens: int, num_experts: int, top_k: int, device: str, seed: int = 0):
    """Logits that require a gradient, and the best experts."""
    random = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(num_tokens, num_experts, generator=random)).to(device).requires_grad_()
    return logits, logits.detach().topk(top_k, dim=1).indices


# ---- losses


def test_load_balancing_loss_by_hand(device):
    """Two of three tokens chose expert 0; scores are 1/2, 3/4 and 1/4 of it: 2 · (2/3 · 1/2 + 1/3 · 1/2)."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, math.log(3.0)]], device=device)
    ids = torch.tensor([[0], [0], [1]], device=device)
    torch.testing.assert_close(load_balancing_loss(logits, ids).item(), 1.0)
    sloped = logits.clone().requires_grad_()
    load_balancing_loss(sloped, ids).backward()
    # Of token 0: 2 / 3 tokens · s0 · s1 · (2/3 - 1/3), for the chosen expert up, for the other down.
    torch.testing.assert_close(sloped.grad[0], torch.tensor([1, -1], device=device) * (2 / 3 * 0.25 / 3))
    # All of one expert: its score's mean, times E.
    torch.testing.assert_close(load_balancing_loss(logits, torch.zeros_like(ids)).item(), 2 * (0.5 + 0.75 + 0.25) / 3)
    even = torch.zeros(4, 4, device=device)
    for score_function in ("softmax", "sigmoid"):
        all_ids = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]], device=device)
        torch.testing.assert_close(load_balancing_loss(even, all_ids, score_function=score_function).item(), 2.0)


@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_loss_is_transformers(padded, device):
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    layers = [choice(12, 8, 2, device, seed) for seed in range(3)]  # 2 sequences of 6 tokens
    mask = None
    if padded:
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], device=device)
    expected = theirs(tuple(logits for logits, _ in layers), 8, 2, mask)
    grads = torch.autograd.grad(expected, [logits for logits, _ in layers])
    found = load_balancing_loss(
        torch.cat([logits for logits, _ in layers]).view(6, 6, 8),
        torch.cat([ids for _, ids in layers]).view(6, 6, 2),
        None if mask is None else mask.repeat(3, 1),
    )
    torch.testing.assert_close(found, expected)
    for one, grad in zip(torch.autograd.grad(found, [logits for logits, _ in layers]), grads, strict=True):
        torch.testing.assert_close(one, grad)
        assert grad.abs().max() > 1e-4


def test_z_loss(device):
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]], device=device, requires_grad=True)
    loss = router_z_loss(logits)
    torch.testing.assert_close(loss.item(), (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2)
    loss.backward()  # 2 · logsumexp · softmax / tokens
    torch.testing.assert_close(logits.grad[1], torch.full((2,), (1 + math.log(2)) / 2, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_counts_nowhere_whatever_it_holds(dtype, device):
    logits, ids = choice(8, 4, 2, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], device=device).bool()
    whole = logits.detach().to(dtype, copy=True)
    whole[~mask] = float("nan")
    whole.requires_grad_()
    part = logits.detach().to(dtype)[mask].requires_grad_()
    for loss, expected in (
        (load_balancing_loss(whole, ids, mask), load_balancing_loss(part, ids[mask])),
        (router_z_loss(whole, mask), router_z_loss(part)),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)
        (grad,), (grad_of_part,) = torch.autograd.grad(loss, [whole]), torch.autograd.grad(expected, [part])
        torch.testing.assert_close(grad[mask], grad_of_part)
        assert grad[~mask].abs().max() == 0 and grad[mask].abs().max() > 0
    nobody = torch.zeros_like(mask)
    assert load_balancing_loss(whole, ids, nobody) == 0 == router_z_loss(whole, nobody)
    none = whole[:0]
    assert load_balancing_loss(none, ids[:0]) == 0 == router_z_loss(none)
    absent = ids.clone()
    absent[0] = torch.tensor([-1, 2**32])  # count as nothing, yet the token counts
    share = torch.bincount(ids[1:].flatten(), minlength=4) / 8
    torch.testing.assert_close(load_balancing_loss(logits, absent), 4 * share @ logits.softmax(dim=1).mean(dim=0))


def test_wrong_arguments_of_losses_are_named(device):
    logits, ids = choice(6, 4, 2, device)
    for arguments, message in (
        ((logits.double(), ids), r"router_logits must be \[\.\.\., experts\] in float32.*got torch.float64 \(6, 4\)"),
        ((logits, ids.float()), "expert_ids must be int32 or int64 with 2 dimensions.*got torch.float32"),
        ((logits, ids[:, 0]), r"expert_ids must be int32 or int64 with 2 dimensions.*got torch.int64 \(6,\)"),
        ((logits, ids[1:]), r"expert_ids must be of the tokens of router_logits, \(6,\).*got \(5, 2\)"),
        ((logits, ids, ids > 0), r"mask must be of the tokens of router_logits, \(6,\).*got \(6, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_balancing_loss(*arguments)
    with pytest.raises(ValueError, match="score_function must be one of 'softmax', 'sigmoid'; got 'tanh'"):
        load_balancing_loss(logits, ids, score_function="tanh")
    with pytest.raises(ValueError, match=r"mask must be of the tokens"):
        router_z_loss(logits, torch.ones(5, device=device))


# ---- the router's choice


@pytest.mark.parametrize("router", ["softmax_renormalized", "minimax_m2"])
def test_route_is_the_choice_of_the_forward(router, device):
    layer = give_unit_scale(MoELayer(16, 8, 4, 2, router=router, trainable=True, device=device))
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=device).bool()
    with torch.no_grad():
        x[0, 2] = float("nan")
    results = []
    for by_hand in (False, True):
        layer.zero_grad()
        x.grad = None
        if by_hand:
            routed = route(layer, x, mask)
            y = layer(x, mask, expert_ids=routed.expert_ids, expert_weights=routed.expert_weights)
        else:
            y = layer(x, mask)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert routed.logits.shape == (2, 3, 4) and routed.expert_ids[0, 2].tolist() == [-1, -1]
    layer.zero_grad()
    routed = route(layer, x, mask)
    (load_balancing_loss(*routed[:2], mask) + router_z_loss(routed.logits, mask)).backward()
    grad = layer.gate.weight.grad
    assert grad.isfinite().all() and grad.abs().max() > 1e-3
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert route(layer, x.detach(), mask).logits.dtype == torch.float32  # as in the layer's forward
    with pytest.raises(ValueError, match="layer must have a router of its own"):
        route(MoELayer(16, 8, 4, 2, router=None, device=device), x)
    with pytest.raises(ValueError, match="x must have hidden_size=16"):
        route(layer, x[..., 1:])


# ---- the correction bias


def test_correction_bias(device):
    layer = MoELayer(16, 8, 4, 2, router="minimax_m2", trainable=True, device=device)
    bias = layer.gate.e_score_correction_bias
    load = torch.tensor([1, 2, 3, 2], device=device)
    assert update_correction_bias(layer, load, 0.5) is bias
    assert bias.tolist() == [0.5, 0, -0.5, 0]
    update_correction_bias(bias, load.flip(0).float(), 0.25)
    assert bias.tolist() == [0.5, -0.25, -0.5, 0.25]
    # A mean in float32 would be another number than these loads.
    same = torch.full((4,), 2**24 + 1, device=device)
    assert update_correction_bias(torch.zeros(4, device=device), same, 1.0).tolist() == [0, 0, 0, 0]
    for arguments, message in (
        ((MoELayer(16, 8, 4, 2, device=device), load, 0.1), "whose router's rule has correction_bias=True"),
        ((bias.half(), load, 0.1), r"bias must be float32 \[E\], got torch.float16"),
        ((bias, load[1:], 0.1), r"load must be numbers \[4\]"),
        ((bias, load, -0.1), "rate must be a finite number of at least 0, got -0.1"),
        ((bias, load, math.nan), "rate must be"),
    ):
        with pytest.raises(ValueError, match=message):
            update_correction_bias(*arguments)


def test_the_bias_evens_the_load(device):
    """Expert 0 is everybody's favourite; after some steps it is nobody's alone."""
    layer = give_unit_scale(MoELayer(16, 8, 4, 1, router="minimax_m2", trainable=True, device=device))
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        layer.gate.e_score_correction_bias[:] = torch.tensor([1.0, 0, 0, 0])
        largest = []
        for _ in range(100):
            before = layer.resident.load_E.clone()
            layer(x)
            load = layer.resident.load_E - before
            largest.append(int(load.max()))
            update_correction_bias(layer, load, 0.02)
    assert largest[0] == 256 and largest[-1] < 90, largest


# ---- clipping


def grads_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_on_one_rank_is_pytorchs(max_norm, norm_type, device):
    model = nn.Sequential(nn.Linear(16, 16, device=device), MoELayer(16, 8, 4, 2, trainable=True, device=device))
    model[0].bias.requires_grad_(False)
    model(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).to(device)).square().sum().mul(50).backward()
    before = grads_of(model)
    expected = nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
    clipped = grads_of(model)
    for as_model in (True, False):
        for parameter, grad in zip((p for p in model.parameters() if p.grad is not None), before, strict=True):
            parameter.grad.copy_(grad)
        found = clip_grad_norm(model if as_model else model.parameters(), max_norm, norm_type)
        assert torch.equal(found, expected) and 0.5 < found < 1e6
        assert all(torch.equal(one, other) for one, other in zip(grads_of(model), clipped, strict=True))


def test_clipping_of_other_dtypes_buffers_and_nothing(device):
    parameters = [nn.Parameter(torch.zeros(2, device=device)) for _ in range(3)]
    parameters[0].grad = torch.tensor([3.0, 0.0], device=device)
    parameters[1].main_grad = torch.tensor([0.0, 4.0], device=device)
    model = nn.ParameterList(parameters)
    assert clip_grad_norm(model, 1.0) == 5
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0], device=device))
    torch.testing.assert_close(parameters[1].main_grad, torch.tensor([0.0, 0.8], device=device))
    half = nn.Parameter(torch.zeros(1000, device=device, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    assert abs(clip_grad_norm([half], 1.0).item() - 1000**0.5) < 1e-3, "the norm is rounded to bfloat16"
    wide = nn.Parameter(torch.zeros(4, device=device, dtype=torch.float64))
    wide.grad = torch.ones_like(wide)
    assert clip_grad_norm([wide], 1.0) == 2 and wide.grad.sum().item() == pytest.approx(2)
    assert clip_grad_norm(nn.Linear(2, 2, device=device), 1.0) == 0
    for arguments, message in (
        ({"max_norm": -1}, "max_norm must be a number of at least 0, got -1.0"),
        ({"max_norm": math.nan}, "max_norm must be"),
        ({"max_norm": 1, "norm_type": 0}, "norm_type must be a number above 0 or inf, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_grad_norm(model, **arguments)


def test_norms_that_are_not_finite(device):
    model = nn.Linear(2, 1, bias=False, device=device)
    model.weight.grad = torch.tensor([[math.inf, 1.0]], device=device)
    with pytest.raises(RuntimeError, match=r"norm of order 2.0 is inf, so they cannot be clipped"):
        clip_grad_norm(model, 1.0, error_if_nonfinite=True)
    assert model.weight.grad[0, 1] == 1, "they are as they were"
    assert clip_grad_norm(model, 1.0) == math.inf
    assert model.weight.grad[0, 0].isnan() and model.weight.grad[0, 1] == 0  # as PyTorch's
