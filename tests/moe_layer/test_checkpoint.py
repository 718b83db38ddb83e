"""`load_experts_from` for layers: what is read, how names are found, and what is refused before anything is written."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

import safetensors.torch as st

from moe_layer import MoELayer, load_experts_from
from moe_layer.checkpoint.folder import Checkpoint, CheckpointError
from moe_layer.checkpoint.recipe import numbered
from tests.moe_layer.ranks import EXPERTS, HIDDEN, INTERMEDIATE, make_layer

SHAPES = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}


def tensors(layer: str, words: tuple[str, str, str], seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors of one layer, expert by expert, under the names `words` of gate, up and down."""
    random = torch.Generator().manual_seed(seed)
    return {
        f"{layer}.experts.{expert}.{word}.weight": torch.randn(shape, generator=random)
        for expert in range(EXPERTS)
        for word, shape in zip(words, SHAPES.values(), strict=True)
    }


def fused(layer: str, one_by_one: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    every = list(one_by_one.values())
    gate, up, down = (torch.stack(every[first::3]) for first in range(3))
    return {f"{layer}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{layer}.experts.down_proj": down}


def assert_holds(layer: MoELayer, whole: dict[str, torch.Tensor]) -> None:
    found = {name: one.cpu() for name, one in layer.state_dict().items()}
    for name, tensor in whole.items():
        assert torch.equal(found[name.partition(".")[2]], tensor), name


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("way", ["projections", "w123", "fused"])
def test_known_names(way, trainable, device, tmp_path):
    words = ("w1", "w3", "w2") if way == "w123" else ("gate_proj", "up_proj", "down_proj")
    single = tensors("mlp", words)
    whole = fused("mlp", single)
    st.save_file(whole if way == "fused" else single, tmp_path / "model.safetensors")
    layer = make_layer(None, device, trainable=trainable)
    gate = layer.gate.weight.clone()
    assert load_experts_from(layer, tmp_path, prefix="mlp", progress=False) == EXPERTS
    assert_holds(layer, whole)
    assert torch.equal(layer.gate.weight, gate)


def test_a_mapping_of_names_for_a_model_in_shards(device, tmp_path):
    """Two layers of a model, in three files with an index, under names that nobody knows; cast to the layer's dtype."""
    model = nn.ModuleDict({f"block{number}": make_layer(None, device, dtype=torch.bfloat16) for number in range(2)})
    every: dict[str, torch.Tensor] = {}
    for number in range(2):
        for name, tensor in tensors(f"net.block{number}", ("a", "b", "c"), seed=number).items():
            every[name.replace("experts", "ffn").replace(".weight", "")] = tensor
    files = {name: f"part{place % 3}.safetensors" for place, name in enumerate(every)}
    for file in set(files.values()):
        st.save_file({name: one for name, one in every.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    names = {
        "gate_up_proj": ("{layer}.ffn.{expert}.a", "{layer}.ffn.{expert}.b"),
        "down_proj": "{layer}.ffn.{expert}.c",
    }
    assert load_experts_from(model, tmp_path, names=names, prefix="net", progress=False) == 2 * EXPERTS
    for number in range(2):
        whole = fused("x", tensors(f"net.block{number}", ("a", "b", "c"), seed=number))
        assert_holds(model[f"block{number}"], {name: one.bfloat16() for name, one in whole.items()})


def _without_two(every):
    del every["mlp.experts.3.up_proj.weight"], every["mlp.experts.7.up_proj.weight"]


def _wrong_shape(every):
    every["mlp.experts.3.up_proj.weight"] = torch.zeros(INTERMEDIATE, HIDDEN + 1)


def _all_wrong(every):
    for expert in range(EXPERTS):
        every[f"mlp.experts.{expert}.down_proj.weight"] = torch.zeros(HIDDEN, INTERMEDIATE + 1)


def _do_not_join(every):
    for expert in range(EXPERTS):
        every[f"mlp.experts.{expert}.up_proj.weight"] = torch.zeros(INTERMEDIATE, HIDDEN + 1)


def _quantized(every):
    every["mlp.experts.0.down_proj.weight"] = torch.zeros(HIDDEN, INTERMEDIATE).to(torch.float8_e4m3fn)


def _unknown(every):
    for name in list(every):
        every[name.replace("experts", "others")] = every.pop(name)


def _two_ways(every):
    every.update(fused("mlp", tensors("mlp", ("gate_proj", "up_proj", "down_proj"))))


def _few_rows(every):
    whole = fused("mlp", dict(every))
    every.clear()
    every.update({name: one[:-1].contiguous() for name, one in whole.items()})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            _without_two,
            r"mlp: gate_up_proj: the checkpoint lacks 2 tensors: mlp\.experts\.3\.up_proj\.weight, mlp\.exp",
        ),
        (_wrong_shape, r"mlp\.experts\.3\.up_proj\.weight must be like .* \(12, 24\); is torch\.float32 \(12, 25\)"),
        (_all_wrong, r"down_proj of one expert must have the shape \(24, 12\).*give \(24, 13\)"),
        (_do_not_join, r"gate_up_proj cannot be made of tensors of the shapes \(12, 24\), \(12, 25\)"),
        (_quantized, r"mlp\.experts\.0\.down_proj\.weight must be float64.*is F8_E4M3: quantized"),
        (_unknown, r"mlp: 0 of the known ways.*under 'mlp\.' there are mlp\.others\.\*\.down_proj\.weight"),
        (_two_ways, "mlp: 2 of the known ways"),
        (_few_rows, r"gate_up_proj must have one row for each of 8 experts, has the shape \(7, 24, 24\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, reason, device, tmp_path):
    every = tensors("mlp", ("gate_proj", "up_proj", "down_proj"))
    change(every)
    st.save_file(every, tmp_path / "model.safetensors")
    layer = make_layer(None, device)
    before = layer.state_dict()
    with pytest.raises(CheckpointError, match=reason):
        load_experts_from(layer, tmp_path, prefix="mlp", progress=False)
    assert all(torch.equal(one, before[name]) for name, one in layer.state_dict().items())


def test_folders_that_are_refused(tmp_path):
    layer = make_layer(None, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="folder must be a local folder, got 'org/name': download"):
        load_experts_from(layer, "org/name")
    with pytest.raises(CheckpointError, match=r"must hold \*\.safetensors files"):
        load_experts_from(layer, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    st.save_file({"c": torch.zeros(1)}, tmp_path / "1.safetensors")
    with pytest.raises(CheckpointError, match=r"names files that .* lacks: 2\.safetensors"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"1\.safetensors lacks tensors that .* it has: a"):
        Checkpoint(tmp_path)
    index.unlink()
    st.save_file({"c": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"several files of .* hold c"):
        Checkpoint(tmp_path)
    with pytest.raises(ValueError, match="model must hold MoELayers"):
        load_experts_from(nn.Linear(2, 2), tmp_path)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names must be of the tensors \['down_proj', 'gate_up_proj'\]"):
        load_experts_from(layer, tmp_path, names={"down_proj": "c"})


def test_the_experts_number():
    """The last number of a name is the expert's; names that lack are made up."""
    assert numbered(["a.5.b.2.c", "a.5.b.0.c"], 3) == ("a.5.b.0.c", "a.5.b.1.c", "a.5.b.2.c")
    for names, reason in (
        (["a.b"], "no number"),
        (["a.0.b", "c.1.b"], "differ in the expert's number alone"),
        (["a.3.b"], "of no expert: there are 3"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            numbered(names, 3)


@pytest.mark.parametrize("trainable", [False, True])
def test_half_loaded_experts_are_refused(trainable, device, tmp_path, monkeypatch):
    every = tensors("mlp", ("gate_proj", "up_proj", "down_proj"))
    st.save_file(every, tmp_path / "model.safetensors")
    layer, x = make_layer(None, device, trainable=trainable), torch.randn(3, HIDDEN, device=device)
    whole = {name: one.clone() for name, one in layer.state_dict().items()}
    read = Checkpoint.read

    def failing(self, name, row=None):
        if name == "mlp.experts.5.up_proj.weight":
            raise OSError("the disk is gone")
        return read(self, name, row)

    monkeypatch.setattr(Checkpoint, "read", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        load_experts_from(layer, tmp_path, prefix="mlp", progress=False)
    for use in (lambda: layer(x), layer.state_dict)[: 1 if trainable else 2]:
        with pytest.raises(RuntimeError, match="the experts have no weights, or only some"):
            use()
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({name: one for name, one in whole.items() if "down" not in name})
    with pytest.raises(RuntimeError, match="the experts have no weights, or only some"):
        layer(x)
    layer.load_state_dict(whole)
    assert layer(x).isfinite().all()
    monkeypatch.undo()
    load_experts_from(layer, tmp_path, prefix="mlp", progress=False)
    assert layer(x).isfinite().all()
    assert_holds(layer, fused("mlp", every))


def test_the_progress_bar(tmp_path, capsys):
    st.save_file(tensors("mlp", ("w1", "w3", "w2")), tmp_path / "model.safetensors")
    layer = make_layer(None, torch.device("cpu"))
    load_experts_from(layer, tmp_path, prefix="mlp", progress=False)
    assert not capsys.readouterr().err
    load_experts_from(layer, tmp_path, prefix="mlp")
    assert "Loading experts: 100%" in capsys.readouterr().err
