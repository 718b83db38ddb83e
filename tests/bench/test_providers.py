"""The registry, modules of one's own, and the built-in providers against float64."""

from __future__ import annotations

import pytest
import torch

from bench import providers
from bench.cases import Case, Shape, make_logits

SHAPE = Shape("tiny", 8, 2, 64, 32)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", dict(providers.PROVIDERS))
    return providers.PROVIDERS


def problem(num_tokens=20, dtype=torch.bfloat16):
    weights = providers.make_weights(SHAPE, dtype, torch.device("cpu"))
    return providers.make_problem(SHAPE, weights, make_logits(Case(SHAPE, num_tokens)))


def float64(given):
    x, logits = given.x_TH.double(), given.logits_TE.double()
    y = torch.zeros_like(x)
    for token in range(x.shape[0]):
        scores, experts = logits[token].exp().topk(given.top_k)
        for score, expert in zip(scores / scores.sum(), experts, strict=True):
            gate, up = (given.weights.gate_up_ENH[expert].double() @ x[token]).chunk(2)
            y[token] += score * (given.weights.down_EHI[expert].double() @ (gate.sigmoid() * gate * up))
    return y


def test_names(registry):
    assert [provider.name for provider in providers.find(None)][:2] == ["moe_layer", "torch_grouped_mm"]
    assert [provider.name for provider in providers.find(["torch_grouped_mm"])] == ["torch_grouped_mm"]
    with pytest.raises(ValueError, match="nobody"):
        providers.find(["moe_layer", "nobody"])
    with pytest.raises(ValueError, match="registered already"):
        providers.register(registry["moe_layer"])


def test_a_module_of_ones_own(registry, tmp_path, monkeypatch):
    (tmp_path / "my_peer_module.py").write_text(
        "from bench.providers import register\n"
        "class Mine:\n"
        "    name = 'mine'\n"
        "    def prepare(self, problem):\n"
        "        return lambda: problem.x_TH\n"
        "register(Mine())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (mine,) = providers.find(["mine"], ["my_peer_module"])
    given = problem()
    assert mine.prepare(given)() is given.x_TH


def test_reference():
    given = problem(dtype=torch.float32)
    torch.testing.assert_close(providers.reference(given).double(), float64(given), rtol=1e-5, atol=1e-5)
    # and in float32 also of bf16 weights
    given = problem()
    assert providers.reference(given).dtype == torch.float32
    torch.testing.assert_close(providers.reference(given).double(), float64(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["moe_layer", "torch_grouped_mm", "transformers_grouped_mm"])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_built_in(name, num_tokens):
    given = problem(num_tokens)
    try:
        forward = providers.PROVIDERS[name].prepare(given)
    except providers.Unavailable as reason:
        assert name != "moe_layer"
        pytest.skip(str(reason))
    expected = float64(given)
    output = forward()
    assert output.dtype == torch.bfloat16 and output.shape == given.x_TH.shape
    assert (output.double() - expected).norm() / expected.norm() < 1e-2
    assert torch.equal(forward(), output)


def test_the_layer_is_made_once_for_all_problems_of_a_shape(monkeypatch):
    made = []
    make_layer = providers.make_layer
    monkeypatch.setattr(providers, "make_layer", lambda given: made.append(None) or make_layer(given))
    given = problem()
    for num_tokens in (1, 2):
        logits_TE = make_logits(Case(SHAPE, num_tokens))
        providers.PROVIDERS["moe_layer"].prepare(providers.make_problem(SHAPE, given.weights, logits_TE))
    assert len(made) == 1


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(providers.Unavailable, match="pip install"):
        providers.PROVIDERS["transformers_grouped_mm"].prepare(problem())


def test_a_transformers_that_cannot_be_imported_is_no_missing_one(monkeypatch, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('needs another PyTorch\\nand so on')")
    monkeypatch.delitem(__import__("sys").modules, "transformers", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(providers.Unavailable, match=r"^needs another PyTorch$"):
        providers.PROVIDERS["transformers_grouped_mm"].prepare(problem())
