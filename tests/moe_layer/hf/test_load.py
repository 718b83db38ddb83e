"""`load_experts_from` for swapped models: a rank reads its own experts alone, and never holds the others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import safetensors.torch as st

from moe_layer.checkpoint.folder import CheckpointError
from moe_layer.hf import experts_on_meta, load_experts_from, swap_experts, unswap_experts
from moe_layer.hf.load import _check_steps
from tests.moe_layer.hf.models import (
    families,
    logits_of,
    make_config,
    make_model,
    make_tokens,
    relative,
    without_experts,
)


# One by one as w1, w3, w2 and as projections; without a gate; fused; fused, transposed and interleaved, with biases; fused
# under other names.
@pytest.mark.parametrize(
    "family",
    families(["mixtral", "qwen3_moe", "nemotron_h", "gemma4_text", "gpt_oss", "granitemoe", "aria_text"]),
)
def test_as_from_pretrained(family, device, tmp_path):
    model, tokens = make_model(family), make_tokens(device)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    lean = without_experts(model, tmp_path, device)
    meta = {name for name, one in lean.named_parameters() if one.is_meta}
    assert meta and all("experts" in name for name in meta)
    report = swap_experts(lean)
    with pytest.raises(RuntimeError, match="the experts have no weights"):
        logits_of(lean, tokens)
    for refused in (lean.state_dict, lambda: unswap_experts(lean)):
        with pytest.raises(RuntimeError, match="the experts have no weights"):
            refused()
    num_experts = sum(one.num_experts for one in report.swapped.values())
    assert load_experts_from(lean, tmp_path, progress=False) == num_experts
    assert relative(logits_of(lean, tokens), logits_of(model.to(device), tokens)) <= 1e-5
    assert unswap_experts(lean) == len(report.swapped)
    assert all(torch.equal(one, lean.state_dict()[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("family", families(["qwen3_moe", "aria_text"]))
def test_trainable(family, device, tmp_path):
    model, tokens = make_model(family), make_tokens(device)
    model.save_pretrained(tmp_path)
    lean = without_experts(model, tmp_path, device)
    swap_experts(lean, trainable=True)
    with pytest.raises(RuntimeError, match="the experts have no weights"):
        logits_of(lean, tokens)
    load_experts_from(lean, tmp_path, progress=False)
    assert relative(logits_of(lean, tokens), logits_of(model.to(device), tokens)) <= 1e-5
    other = without_experts(model, tmp_path, device)
    swap_experts(other, trainable=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other, tokens), logits_of(lean, tokens))
    lean(tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(one.grad is not None for name, one in lean.named_parameters() if ".experts." in name)


def test_other_ways_to_the_weights(device, tmp_path):
    """`load_state_dict()` after the swap; names as in memory, not as transformers saves them; a model already swapped."""
    model, tokens = make_model("mixtral", device=device), make_tokens(device)
    model.save_pretrained(tmp_path / "saved")
    expected, weights = logits_of(model, tokens), model.state_dict()
    lean = without_experts(model, tmp_path / "saved", device)
    swap_experts(lean)
    lean.load_state_dict(weights)
    assert relative(logits_of(lean, tokens), expected) <= 1e-5

    (tmp_path / "raw").mkdir()
    st.save_file({name: one.contiguous() for name, one in weights.items()}, tmp_path / "raw" / "model.safetensors")
    other = make_model("mixtral", device=device, seed=1)
    swap_experts(other)
    load_experts_from(other, tmp_path / "raw", progress=False)
    assert all(torch.equal(one, weights[name]) for name, one in other.state_dict().items() if ".experts." in name)


def test_errors(device, tmp_path):
    model = make_model("mixtral", device=device)
    with pytest.raises(ValueError, match=r"swap_experts\(model\) comes first"):
        load_experts_from(model, tmp_path)
    model.save_pretrained(tmp_path)
    swap_experts(model)
    before = model.state_dict()
    file = tmp_path / "model.safetensors"
    saved = st.load_file(file)
    layer = "model.layers.1.block_sparse_moe.experts"
    twice = {f"model.layers.0.mlp.experts.{name}": before[f"model.layers.0.mlp.experts.{name}"].cpu().contiguous()
             for name in ("gate_up_proj", "down_proj")}  # fmt: skip
    for changed, reason in (
        ({name: one for name, one in saved.items() if name != f"{layer}.6.w3.weight"},
         r"layers\.1\.mlp\.experts: gate_up_proj: the checkpoint lacks 1 tensors: .*experts\.6\.w3\.weight"),
        ({name: one for name, one in saved.items() if "w3" not in name}, "but lacks .*w3.weight"),
        ({name: one for name, one in saved.items() if "experts" not in name},
         r"nothing that transformers would load as model\.layers\.0\.mlp\.experts\.\w+: under 'model\.layers\.0\.'"),
        ({**saved, f"{layer}.6.w3.weight": torch.zeros(24, 31)}, r"must be like .*w3\.weight.*is .*\(24, 31\)"),
        ({**saved, **twice}, r"is in the checkpoint more than once"),
    ):  # fmt: skip
        st.save_file(changed, file)
        with pytest.raises(CheckpointError, match=reason):
            load_experts_from(model, tmp_path, progress=False)
        assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_steps_that_are_not_of_one_expert():
    """They would give other weights without a word."""
    loading = pytest.importorskip("transformers.core_model_loading")
    merge, join = loading.MergeModulelist, loading.Concatenate
    for steps, is_merged in (([merge(dim=0), join(dim=1)], True), ([loading.Transpose(1, 2)], False)):
        assert _check_steps("t", loading.WeightConverter(["a.*.x", "b.*.x"][: len(steps)], "c", steps)) is is_merged
    for steps in ([join(dim=0)], [merge(dim=1)], [merge(dim=0), join(dim=0)], [loading.Transpose(0, 1)]):
        with pytest.raises(
            CheckpointError, match="t: the checkpoint stores experts in a way that cannot be read one by"
        ):
            _check_steps("t", loading.WeightConverter("a.*.x", "c", steps))


@pytest.mark.parametrize("family", families(["aria_text"]))
def test_conversions_to_a_transposed_layout(family, device, tmp_path, monkeypatch):
    """One by one, as the model has them; and fused, as `nn.Linear` would."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

    model = make_model(family, device=device)
    before = {name: one.cpu().clone() for name, one in model.state_dict().items() if ".experts." in name}
    saved = {}
    for name, tensor in before.items():
        if "gate_up_proj" in name:
            saved |= {name.replace("gate_up_proj", f"{e}.up"): tensor[e].clone() for e in range(8)}
        else:
            saved[name.replace("down_proj", "turned")] = tensor.transpose(1, 2).contiguous()
    st.save_file(saved, tmp_path / "model.safetensors")
    mapping = [
        WeightConverter("mlp.experts.*.up", "mlp.experts.gate_up_proj", [MergeModulelist(dim=0)]),
        WeightConverter("mlp.experts.turned", "mlp.experts.down_proj", [Transpose(1, 2, check_dims=True)]),
    ]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: mapping)
    swap_experts(model)
    model.load_state_dict({name: torch.zeros_like(one) for name, one in before.items()}, strict=False)
    assert load_experts_from(model, tmp_path, progress=False) == 16
    after = model.state_dict()
    assert all(torch.equal(after[name].cpu(), tensor) for name, tensor in before.items())


def test_models_made_meanwhile():
    """Also one that is not loaded; and what is left in the model is the module that transformers made."""
    from transformers import AutoModelForCausalLM

    with experts_on_meta():
        model = AutoModelForCausalLM.from_config(make_config("mixtral"))
    experts = model.model.layers[0].mlp.experts
    assert type(experts).__name__ == "MixtralExperts" and experts.down_proj.is_meta
    assert not model.model.layers[0].mlp.gate.weight.is_meta
    assert not AutoModelForCausalLM.from_config(make_config("mixtral")).model.layers[0].mlp.experts.down_proj.is_meta
