"""`moe_experts`: outputs and gradients of a dense formula, whatever the ids; bad arguments; tracing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_kernels import ExpertMatrices, moe_experts

BACKENDS = ["torch", "triton"]


def problem(device, num_tokens=7, top_k=2, num_experts=5, hidden_size=24, intermediate=16, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(device, dtype).requires_grad_()

    x, weights = normal(num_tokens, hidden_size), normal(num_tokens, top_k)
    gate_up, down = normal(num_experts, 2 * intermediate, hidden_size), normal(num_experts, hidden_size, intermediate)
    # Expert 4 gets none; -1 and the 5 of expert parallelism are computed nowhere.
    ids = torch.randint(0, 4, (num_tokens, top_k), generator=random)
    if num_tokens:
        ids[0], ids[-1, 0] = torch.tensor([-1, num_experts])[:top_k], num_experts
    return x, weights, gate_up, down, ids.to(device)


def dense(x, weights, gate_up, down, ids):
    y = torch.zeros_like(x)
    for token, choices in enumerate(ids.tolist()):
        for k, expert in enumerate(choices):
            if 0 <= expert < len(down):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                y = y.index_add(
                    0,
                    torch.tensor([token], device=x.device),
                    (weights[token, k] * (down[expert] @ (F.silu(gate) * up)))[None],
                )
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients(device, backend, num_tokens, recompute):
    x, weights, gate_up, down, ids = problem(device, num_tokens)
    leaves, grad = (
        (x, weights, gate_up, down),
        torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device),
    )
    expected = dense(*leaves, ids) + 0 * sum(leaf.sum() for leaf in leaves)  # also where nothing is computed
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    y = moe_experts(x, ids, weights, ExpertMatrices(gate_up, down), recompute=recompute, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(torch.autograd.grad(y, leaves, grad), expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        again = moe_experts(x, ids.int(), weights, ExpertMatrices(gate_up, down), backend=backend)
    assert torch.equal(again, y)


def test_weights_of_another_dtype(device):
    """As routers of half-precision models return them."""
    x, weights, gate_up, down, ids = problem(device, dtype=torch.bfloat16)
    y = moe_experts(x, ids, weights, ExpertMatrices(gate_up, down), backend="torch")
    (grad,) = torch.autograd.grad(y.float().sum(), weights)
    assert y.dtype == grad.dtype == torch.bfloat16 and grad[0].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(device, backend):
    x, weights, gate_up, down, ids = problem(device)

    def run(x, weights, gate_up, down):
        return moe_experts(x, ids, weights, ExpertMatrices(gate_up, down), backend=backend)

    expected = run(x, weights, gate_up, down)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weights, gate_up, down)
    assert torch.equal(compiled, expected)
    leaves = (x, weights, gate_up, down)
    for one, other in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 25)}, "must be 25"),
        ({"ids": torch.zeros(7, 2)}, "expert_ids_TK has dtype torch.float32"),
        ({"ids": torch.zeros(6, 2, dtype=torch.int32)}, "expert_ids_TK has shape"),
        ({"weights": torch.zeros(7, 3)}, r"expert_weights_TK has shape \(7, 3\)"),
        ({"weights": torch.zeros(7, 2, dtype=torch.int32)}, "must be floating"),
    ],
)
def test_bad_arguments(change, message):
    x, weights, gate_up, down, ids = problem("cpu")
    values = {"x": x, "ids": ids, "weights": weights} | change
    with pytest.raises(ValueError, match=message):
        moe_experts(values["x"], values["ids"], values["weights"], ExpertMatrices(gate_up, down))
