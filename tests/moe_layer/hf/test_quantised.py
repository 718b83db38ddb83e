"""Swapped models with quantised experts: published checkpoints in and out, `FP8Experts`, and floats that are quantised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from moe_layer import Quantisation, quantisation_of, quantize_experts
from moe_layer.checkpoint import CheckpointError
from moe_layer.hf import load_experts_from, save_experts_to, swap_experts, unswap_experts
from moe_layer.hf.swapped import Swapped
from tests.moe_layer import published
from tests.moe_layer.hf.models import families, logits_of, make_config, make_model, make_tokens, relative
from tests.moe_layer.hf.quantised import EXPERTS, FAMILIES, lean_model, write_published
from tests.moe_layer.quantised import same_bytes

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Of fp8_block the activations are rounded too. Others' experts are exactly those of the float model.
CLOSE = {"fp8_block": 0.1, "mxfp4": 1e-5, "int4": 1e-5}


def said_by(experts: nn.Module, hidden: int, device: str) -> torch.Tensor:
    """What a block's experts make of random tokens and a random choice, which no router changes."""
    random = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(19, size, generator=random).to(device) for size in (hidden, 2))
    ids = torch.stack([torch.randperm(EXPERTS, generator=random)[:2] for _ in range(19)]).to(device)
    with torch.no_grad():
        return experts(x, ids, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_checkpoints(family, device, tmp_path):
    one, tokens = FAMILIES[family], make_tokens(device)
    meant, tensors = write_published(one, tmp_path / "published")
    quantisation = quantisation_of(tmp_path / "published")
    assert quantisation == Quantisation(one.quantisation)
    model = lean_model(tmp_path / "published", device)
    report = swap_experts(model, quantisation=quantisation)
    assert {kind.format.scheme for kind in report.swapped.values()} == {one.quantisation}
    assert str(quantisation) in str(report)
    with pytest.raises(RuntimeError, match="the experts have no weights"):
        logits_of(model, tokens)
    assert load_experts_from(model, tmp_path / "published", progress=False) == 2 * EXPERTS

    found = logits_of(model, tokens)
    for ours, floats in zip(model.model.layers, meant.to(device).model.layers, strict=True):
        pair = [said_by(layer.mlp.experts, one.sizes["hidden_size"], device) for layer in (ours, floats)]
        assert relative(*pair) < CLOSE[one.quantisation]
    with torch.no_grad():
        said = model.generate(tokens, **GREEDY)
    assert said.shape == (2, 14)
    if one.quantisation != "fp8_block":
        assert relative(found, logits_of(meant, tokens)) < CLOSE[one.quantisation]
        assert torch.equal(said, meant.generate(tokens, **GREEDY))

    save_experts_to(model, tmp_path / "saved", like=tmp_path / "published")
    back = published.read(tmp_path / "saved")
    assert back.keys() == {name for name in tensors if ".experts." in name}
    assert all(same_bytes(value, tensors[name]) for name, value in back.items())
    other = lean_model(tmp_path / "published", device)
    swap_experts(other, quantisation=quantisation)
    load_experts_from(other, tmp_path / "saved", progress=False)
    assert torch.equal(logits_of(other, tokens), found)
    third = lean_model(tmp_path / "published", device)
    swap_experts(third, quantisation=quantisation)
    third.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(third, tokens), found)
    for refused, reason in (
        (lambda: model.save_pretrained(tmp_path / "wrong"), r"save_pretrained\(\) is refused.*save_experts_to"),
        (lambda: unswap_experts(model), "experts are quantised, and the model's were floats"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            refused()


def test_the_wrong_format_is_refused(device, tmp_path):
    write_published(FAMILIES["gpt_oss"], tmp_path)
    for options, reason in (
        ({"quantisation": "fp8_block"}, "are fp8_block, those of .* are mxfp4 by its quantization_config"),
        ({}, r"checkpoint has nothing that transformers would load as .*says mxfp4: give quantisation="),
    ):
        model = lean_model(tmp_path, device)
        swap_experts(model, **options)
        with pytest.raises(CheckpointError, match=reason):
            load_experts_from(model, tmp_path, progress=False)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_floats_that_are_quantised(family, device):
    """By the swap, or after it: the same bytes, and about what the experts said before."""
    config = make_config(family)
    for name, value in FAMILIES[family].sizes.items():
        setattr(config, name, value)
    model, tokens = make_model(family, device=device, config=config), make_tokens(device)
    scheme = FAMILIES[family].quantisation
    at_once, later = model, copy.deepcopy(model)
    wanted = said_by(model.model.layers[1].mlp.experts, config.hidden_size, device)
    with pytest.raises(ValueError, match="trainable=True does not go with quantised experts"):
        swap_experts(model, quantisation=scheme, trainable=True)
    swap_experts(at_once, quantisation=scheme)
    swap_experts(later)
    report = quantize_experts(later, scheme)
    assert all(0 < error < 0.2 for errors in report.errors.values() for error in errors.values())
    assert torch.equal(logits_of(at_once, tokens), logits_of(later, tokens))
    state = at_once.state_dict()
    assert all(same_bytes(value, state[name]) for name, value in later.state_dict().items())
    found = said_by(later.model.layers[1].mlp.experts, config.hidden_size, device)
    assert 0 < relative(found, wanted) < (0.1 if scheme == "fp8_block" else 0.25)
    with pytest.raises(RuntimeError, match=r"save_pretrained\(\) is refused"):
        later.save_pretrained("nowhere")


# Each way in which experts differ: gated or not, activations, clamps, biases, transposed and interleaved layouts.
@pytest.mark.parametrize(
    "family", families(["mixtral", "nemotron_h", "gemma4_text", "gpt_oss", "aria_text", "minimax_m3_vl_text"])
)
def test_every_kind_of_experts(family, device):
    """In e4m3, against floats with the values that these mean."""
    model, meant = make_model(family, device=device), make_model(family, device=device)
    for one, quantisation in ((model, "fp8_block"), (meant, None)):
        swap_experts(one, quantisation=quantisation, fuse_routing=False)
    pairs = [[one for one in each.modules() if isinstance(one, Swapped)] for each in (model, meant)]
    for ours, floats in zip(*pairs, strict=True):
        state, layout = ours.state_dict(), floats.layout
        for expert in range(EXPERTS):
            values = ours.format.dequantise({name: tensor[expert] for name, tensor in state.items()})
            floats.load_experts({expert: {name: layout.to_stored(name, one) for name, one in values.items()}})
        pair = [said_by(one, ours.format.hidden_size, device) for one in (ours, floats)]
        assert relative(*pair) < CLOSE["fp8_block"]


def make_fp8(hidden: int = 160, inner: int = 128, **options):
    """A model whose experts are transformers' `FP8Experts`, as `from_pretrained` makes them on a GPU."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    moe = pytest.importorskip("transformers.integrations.moe")
    config = make_config("qwen3_moe")
    config.hidden_size, config.moe_intermediate_size = hidden, inner
    model, meanings = make_model("qwen3_moe", config=config), []
    made = moe.use_experts_implementation(
        experts_class=type("FP8Experts", (fp8.FP8Experts,), {}), experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    for number, layer in enumerate(model.model.layers):
        tensors, _, meaning = published.deepseek("e", EXPERTS, hidden, inner, seed=number)
        experts = made(config, **{"block_size": (128, 128), **options})
        for expert in range(EXPERTS):
            for end in ("", "_scale_inv"):
                gate, up, down = (tensors[f"e.{expert}.{word}_proj.weight{end}"] for word in ("gate", "up", "down"))
                for name, rows in (("gate_up_proj", [gate, up]), ("down_proj", [down])):
                    start = 0
                    for row in rows:
                        getattr(experts, name + end).data[expert, start : start + len(row)] = row
                        start += len(row)
        layer.mlp.experts = experts
        meanings.append(meaning)
    return model, meanings


def test_fp8_experts_of_transformers(device):
    """Known by their own tensors. Their forward needs kernels that a CPU lacks: the reference is what the values mean."""
    model, meanings = make_fp8()
    meant = make_model("qwen3_moe", config=model.config)
    meant.load_state_dict(
        {name: one for name, one in model.state_dict().items() if ".experts." not in name}, strict=False
    )
    for layer, meaning in zip(meant.model.layers, meanings, strict=True):
        for expert, (gate, up, down) in meaning.items():
            layer.mlp.experts.gate_up_proj.data[expert] = torch.cat([gate, up])
            layer.mlp.experts.down_proj.data[expert] = down
    model.to(device)
    before, tokens = {name: one.clone() for name, one in model.state_dict().items()}, make_tokens(device)
    report = swap_experts(model)
    assert {one.format.scheme for one in report.swapped.values()} == {"fp8_block"}
    assert {one.format.dtype for one in report.swapped.values()} == {torch.float32}
    assert logits_of(model, tokens).isfinite().all()
    for ours, floats in zip(model.model.layers, meant.to(device).model.layers, strict=True):
        assert relative(*(said_by(layer.mlp.experts, 160, device) for layer in (ours, floats))) < CLOSE["fp8_block"]
    assert sum(isinstance(module, Swapped) for module in model.modules()) == 2
    assert unswap_experts(model) == 2
    after = model.state_dict()
    assert after.keys() == before.keys() and all(same_bytes(value, after[name]) for name, value in before.items())
    assert "save_pretrained" not in vars(model)


def test_fp8_experts_without_weights(device, tmp_path):
    """As `from_pretrained` leaves them inside `experts_on_meta()` on a GPU: their format, and the checkpoint's bytes."""
    model, _ = make_fp8()
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        made, said, _ = published.deepseek(f"model.layers.{number}.mlp.experts", EXPERTS, 160, 128, seed=number)
        tensors |= made
        layer.mlp.experts.to("meta")
    for name, child in model.named_modules():
        if not list(child.children()) and ".experts" not in name:
            child.to(device)
    published.write(tmp_path, tensors, said)
    swap_experts(model)
    load_experts_from(model, tmp_path, progress=False)
    whole, _ = make_fp8()
    whole.to(device)
    swap_experts(whole)
    tokens = make_tokens(device)
    assert torch.equal(logits_of(model, tokens), logits_of(whole, tokens))


class TritonsOwn(nn.Module):
    """As transformers' `Mxfp4GptOssExperts` once they are loaded: the matrices are no tensors of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = self.down_proj = object()
        self.gate_up_proj_precision_config = self.down_proj_precision_config = object()
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(8, 64))


def test_quantised_modules_that_are_refused():
    for options, reason in (
        ({"block_size": (64, 64)}, r"its block_size must be \[128, 128\], is \(64, 64\)"),
        ({"activation_scheme": "static"}, "its activation_scheme must be 'dynamic', is 'static'"),
        ({"scale_fmt": "ue8m0"}, "must be float8_e4m3fn or float32, is torch.float8_e8m0fnu"),
    ):
        if options.get("scale_fmt"):
            model, _ = make_fp8(**options)
        else:
            model, _ = make_fp8()
            for layer in model.model.layers:
                vars(layer.mlp.experts).update(options)
        with pytest.raises(ValueError, match=reason):
            swap_experts(model)
    model, _ = make_fp8(inner=96)
    with pytest.raises(ValueError, match="its blocks of 128 rows mix gate and up rows: there are 96 of each"):
        swap_experts(model)
    model, _ = make_fp8()
    with pytest.raises(ValueError, match=r"the experts are quantised already \(fp8_block\)"):
        swap_experts(model, quantisation="mxfp4")
    with pytest.raises(ValueError, match="trainable=True does not go with quantised experts"):
        swap_experts(model, trainable=True)
    model.model.layers[0].mlp.experts = TritonsOwn()
    with pytest.raises(
        ValueError, match=r"in the layout of transformers' own kernels: load the model inside experts_on_meta"
    ):
        swap_experts(model)
