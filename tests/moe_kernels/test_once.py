"""Derivatives that there are not: second ones of the experts, and those of forward mode. They are errors, not wrong numbers."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from moe_kernels import (
    ExpertMatrices,
    LoadCounter,
    ReplicaTable,
    RoutingRule,
    combine,
    local_forward,
    moe_experts,
    topk_routing,
)

T, K, E, H, I = 5, 2, 4, 32, 16  # noqa: E741
ONCE = "expert_rows is differentiable once"


def random(*shape: int, seed: int, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def inputs_of(device: str) -> dict[str, torch.Tensor]:
    shapes = {"x": (T, H), "weights": (T, K), "gate_up": (E, 2 * I, H), "down": (E, H, I)}
    return {name: random(*shape, seed=seed, device=device) for seed, (name, shape) in enumerate(shapes.items())}


def experts(x, weights, gate_up, down, backend):
    ids = (torch.arange(T * K, device=x.device) % E).view(T, K)
    return moe_experts(x, ids, weights, ExpertMatrices(gate_up, down), backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wanted", [("x",), ("x", "weights"), ("down",), ("x", "weights", "gate_up", "down")])
def test_gradients_of_gradients_are_refused(device, backend, wanted):
    """The gradients themselves are those without `create_graph=True`."""
    inputs = inputs_of(device)
    leaves = [inputs[name].requires_grad_() for name in wanted]
    upstream = random(T, H, seed=9, device=device)
    grads = torch.autograd.grad(experts(**inputs, backend=backend), leaves, upstream, create_graph=True)
    plain = torch.autograd.grad(experts(**inputs, backend=backend), leaves, upstream)
    assert all(torch.equal(one, other) for one, other in zip(grads, plain, strict=True))
    with pytest.raises(RuntimeError, match=ONCE):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_of_some_of_the_terms_is_refused(device, backend):
    """As the layer before it has one, the experts' term would be missing without a word."""
    inputs = inputs_of(device) | {"gate_up": inputs_of(device)["gate_up"].requires_grad_()}
    before = inputs.pop("x").requires_grad_()
    y = experts(before.tanh(), **inputs, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), before, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.grad(grad.square().sum(), before)


def forward_ops(backend, device):
    inputs = inputs_of(device)
    slots = torch.arange(E, dtype=torch.int32, device=device)
    operands = (ExpertMatrices(inputs["gate_up"], inputs["down"]), ReplicaTable(slots, slots))
    load = LoadCounter(torch.zeros(E, dtype=torch.int64, device=device))
    logits, lanes = random(T, E, seed=5, device=device), torch.zeros(T, K, dtype=torch.int32, device=device)
    return (
        (lambda x: experts(x, inputs["weights"], inputs["gate_up"], inputs["down"], backend), inputs["x"]),
        (lambda weight: experts(inputs["x"], inputs["weights"], weight, inputs["down"], backend), inputs["gate_up"]),
        (lambda logits: topk_routing(logits, K, RoutingRule(), backend=backend)[0], logits),
        (lambda rows: combine(rows, lanes, backend=backend), random(T * K, H, seed=6, device=device)),
        (lambda x: local_forward(x, logits, *operands, load, K, RoutingRule(), backend=backend), inputs["x"]),
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forward_mode_is_refused(device, backend):
    for op, value in forward_ops(backend, device):
        with pytest.raises(RuntimeError, match="has no derivative in forward mode"):
            torch.func.jvp(op, (value,), (torch.ones_like(value),))
        for is_leaf in (False, True):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(value.detach().requires_grad_(is_leaf), torch.ones_like(value))
                with pytest.raises(RuntimeError, match="has no derivative in forward mode"):
                    op(dual)
                op(value)  # has no tangent
        op(value)
