"""``experts_implementation="moe_layer"``: logits, gradients, generated tokens and compiled graphs as by transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from moe_layer.hf import register_experts_implementation
from moe_layer.hf.implementation import experts_forward
from tests.moe_layer.hf.models import families, make_model, make_tokens, relative


def pair(family, device):
    """A model on transformers' own experts, and the same on ours."""
    model = make_model(family, device=device)
    own = copy.deepcopy(model)
    own.set_experts_implementation("eager")
    register_experts_implementation(model)
    return own, model


@pytest.mark.parametrize("family", families(["qwen3_moe", "deepseek_v3:groups", "nemotron_h", "minimax_m2"]))
def test_logits_gradients_and_generate(device, family):
    own, model = pair(family, device)
    tokens = make_tokens(device)
    expected, found = (one(tokens, labels=tokens) for one in (own, model))
    assert relative(found.logits, expected.logits) <= 1e-5
    expected.loss.backward()
    found.loss.backward()
    grads = dict(own.named_parameters())
    for name, parameter in model.named_parameters():
        if grads[name].grad is not None:
            assert parameter.grad is not None and torch.allclose(
                parameter.grad, grads[name].grad, rtol=1e-3, atol=1e-5
            ), name
    with torch.no_grad():
        ours, theirs = (one.generate(tokens, max_new_tokens=4, do_sample=False) for one in (model, own))
    assert torch.equal(ours, theirs)


def test_compiles_with_gradients(device):
    _, model = pair("qwen3_moe", device)
    tokens = make_tokens(device)
    expected = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, use_cache=False).logits
    assert relative(compiled, expected) <= 1e-6
    compiled.sum().backward()


def test_it_is_not_in_the_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    _, model = pair("mixtral", "cpu")
    model.save_pretrained(tmp_path)
    name = register_experts_implementation()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name).eval()
    assert again.config._experts_implementation == name and name not in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(again(make_tokens()).logits, model(make_tokens()).logits)


def test_experts_of_other_ranks_are_computed_nowhere(device):
    """transformers' expert parallelism gives E for them."""
    _, model = pair("qwen3_moe", device)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(device)
    ids, weights = torch.tensor([[1, 8], [8, 8], [2, 3]], device=device), torch.ones(3, 2, device=device)
    some = experts_forward(experts, x, ids, weights)
    alone = experts_forward(experts, x, ids[:, :1].contiguous(), weights[:, :1])
    assert torch.equal(some[0], alone[0]) and some[1].abs().max() == 0


@pytest.mark.parametrize("family", families(["gpt_oss"]))
def test_what_is_not_computed_is_refused(family):
    model = make_model(family)
    before = model.config._experts_implementation
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: .*transposed or interleaved.*swap_experts"):
        register_experts_implementation(model)
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("family", families(["llama4_text"]))
def test_a_model_that_would_not_use_it(family):
    with pytest.warns(UserWarning, match="changes nothing"):
        register_experts_implementation(make_model(family))


def test_lora_on_experts(device):
    """Adapters on the experts' own parameters, which `swap_experts` would take away."""
    peft = pytest.importorskip("peft")
    tokens, losses = make_tokens(device), []
    for model in pair("qwen3_moe", device):
        torch.manual_seed(0)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=targets, r=4))
        parameters = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
        assert len(parameters) == 8 and all("lora_" in name and ".experts." in name for name in parameters)
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
        for _ in range(3):
            losses.append(adapted(tokens, labels=tokens, use_cache=False).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    expected, found = torch.stack(losses).detach().split(3)
    assert relative(found, expected) <= 1e-4 and found[-1] < found[0] - 1e-3
