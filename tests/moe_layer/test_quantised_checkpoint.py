"""Quantised checkpoints into layers and back: every layout means what its description says, and comes out as the same bytes."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("safetensors")

from moe_layer import MoELayer, Quantisation, load_experts_from, quantisation_of, quantize_experts, save_experts_to
from moe_layer.checkpoint import CheckpointError
from moe_layer.checkpoint.stored import stored_of
from tests.moe_layer import published
from tests.moe_layer.quantised import SCHEMES, E, K, make_quantised, records, same_bytes

HIDDEN, INNER = 160, 96  # blocks of 128 end inside both
LAYOUTS = {
    "deepseek": (published.deepseek, {}, Quantisation("fp8_block")),
    "qwen3": (published.deepseek, {"scales": torch.bfloat16}, Quantisation("fp8_block")),
    "ue8m0": (published.deepseek, {"scales": torch.float8_e8m0fnu}, Quantisation("fp8_block")),
    "gpt_oss": (published.gpt_oss, {"biases": False}, Quantisation("mxfp4")),
    "int4": (published.compressed, {}, Quantisation("int4")),
    "int4_zeros": (published.compressed, {"zeros": torch.int32}, Quantisation("int4", 32, True)),
    "int4_zeros_int8": (published.compressed, {"zeros": torch.int8}, Quantisation("int4", 32, True)),
}


def make_layer(quantisation: Quantisation, **options) -> MoELayer:
    return MoELayer(HIDDEN, INNER, E, K, quantisation=quantisation, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_and_save(layout, device, tmp_path):
    make, options, quantisation = LAYOUTS[layout]
    tensors, config, meaning = make("model.layers.3.mlp.experts", E, HIDDEN, INNER, **options)
    source = published.write(tmp_path / "source", tensors, config, shards=3, model_type="any")
    assert quantisation_of(source) == quantisation
    layer = make_layer(quantisation, device=device)
    assert load_experts_from(layer, source, prefix="model.layers.3.mlp", progress=False) == E
    for expert, record in enumerate(records(layer)):
        gate, up, down = meaning[expert]
        found = layer.experts.format.dequantise(record)
        assert torch.equal(found["gate_up_proj"].cpu(), torch.cat([gate, up])) and torch.equal(
            found["down_proj"].cpu(), down
        )

    assert save_experts_to(layer, tmp_path / "saved", like=source, prefix="model.layers.3.mlp") == E
    back = published.read(tmp_path / "saved")
    assert back.keys() == tensors.keys()
    assert all(same_bytes(tensor, tensors[name]) for name, tensor in back.items())
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"] == config and saved["model_type"] == "any"
    with pytest.raises(
        CheckpointError, match=r"holds model\.layers\.3\.mlp.experts.* already, in experts-00001-of-00001"
    ):
        save_experts_to(layer, tmp_path / "saved", like=source, prefix="model.layers.3.mlp")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_of_our_own(scheme, device, tmp_path):
    """Without one to be like: the usual names, and a config that says what they are."""
    layer = make_quantised(scheme, device)
    save_experts_to(layer, tmp_path, prefix="mlp")
    assert quantisation_of(tmp_path) == SCHEMES[scheme]
    other = make_quantised(scheme, device, seed=1)
    load_experts_from(other, tmp_path, prefix="mlp", progress=False)
    for left, right in zip(records(layer), records(other), strict=True):
        assert all(same_bytes(value, right[name]) for name, value in left.items())


def test_plain_layers_are_saved_too(device, tmp_path):
    layer = MoELayer(32, 16, E, K, device=device, dtype=torch.bfloat16)
    save_experts_to(layer, tmp_path, prefix="mlp")
    assert quantisation_of(tmp_path) is None
    assert published.read(tmp_path).keys() == {
        f"mlp.experts.{e}.{word}_proj.weight" for e in range(E) for word in ("gate", "up", "down")
    }
    other = MoELayer(32, 16, E, K, device=device, dtype=torch.float32)
    load_experts_from(other, tmp_path, prefix="mlp", progress=False)
    state = other.state_dict()
    assert all(
        torch.equal(value.float(), state[name]) for name, value in layer.state_dict().items() if "experts" in name
    )
    with pytest.raises(ValueError, match="trainable experts are saved by"):
        save_experts_to(MoELayer(32, 16, E, K, device=device, trainable=True), tmp_path / "other")


def test_scales_that_would_be_rounded_are_refused(tmp_path):
    """Experts quantised here have float32 scales, for which a checkpoint with bfloat16 ones has no place."""
    tensors, config, _ = published.deepseek("mlp.experts", E, HIDDEN, INNER, scales=torch.bfloat16)
    source = published.write(tmp_path / "source", tensors, config)
    layer = MoELayer(HIDDEN, INNER, E, K, dtype=torch.bfloat16)
    quantize_experts(layer, "fp8_block")
    with pytest.raises(
        CheckpointError, match=r"torch.float32 values cannot be saved as torch.bfloat16.*without rounding"
    ):
        save_experts_to(layer, tmp_path / "saved", like=source, prefix="mlp")
    assert not any((tmp_path / "saved").glob("*.safetensors"))


def _no_scales(tensors, config):
    del tensors["mlp.experts.5.down_proj.weight_scale_inv"]


def _float_weights(tensors, config):
    for name in [name for name in tensors if name.endswith("up_proj.weight")]:
        tensors[name] = tensors[name].float()


def _half_scales(tensors, config):
    for name in [name for name in tensors if name.endswith("scale_inv")]:
        tensors[name] = tensors[name].half()


def _other_blocks(tensors, config):
    config["weight_block_size"] = [64, 64]


def _static(tensors, config):
    config["activation_scheme"] = "static"


def _nobody_says(tensors, config):
    config.clear()


def _gptq(tensors, config):
    config["quant_method"] = "gptq"


def _int4(tensors, config):
    config.update(published.compressed("x", 1, 32, 32)[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_no_scales, r"down_proj_scale: the checkpoint lacks 1 tensors: mlp\.experts\.5\.down_proj\.weight_scale_inv"),
        (_float_weights, r"up_proj\.weight must be float8_e4m3fn, is F32"),
        (_half_scales, r"weight_scale_inv must be float32 or bfloat16 or float8_e8m0fnu, is F16"),
        (_other_blocks, r"must have weight_block_size=\[128, 128\], has \[64, 64\]"),
        (_static, "must have activation_scheme='dynamic', has 'static'"),
        (_nobody_says, "the layer's experts are fp8_block, but config.json in .* has no quantization_config"),
        (_gptq, "quant_method='gptq'; experts can be fp8"),
        (_int4, "experts are fp8_block, those of .* are int4 in groups of 32 by its quantization_config"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, reason, tmp_path):
    tensors, config, _ = published.deepseek("mlp.experts", E, HIDDEN, INNER)
    change(tensors, config)
    published.write(tmp_path, tensors, config)
    layer = make_layer(Quantisation("fp8_block"))
    before = layer.state_dict()
    with pytest.raises(CheckpointError, match=reason):
        load_experts_from(layer, tmp_path, prefix="mlp", progress=False)
    assert all(same_bytes(value, before[name]) for name, value in layer.state_dict().items())


def test_quantised_experts_into_a_plain_layer(tmp_path):
    tensors, config, _ = published.deepseek("mlp.experts", E, HIDDEN, INNER)
    published.write(tmp_path, tensors, config)
    layer = MoELayer(HIDDEN, INNER, E, K, dtype=torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"is F8_E4M3: quantized experts .*quantisation=moe_layer.quantisation_of"
    ):
        load_experts_from(layer, tmp_path, prefix="mlp", progress=False)
    for make, reason in (
        (published.gpt_oss, "says mxfp4: give quantisation="),
        (None, "quant_method='awq'; experts can be"),
    ):
        tensors, config, _ = (make or published.compressed)("mlp.experts", E, HIDDEN, INNER)
        published.write(tmp_path / reason[:8], tensors, config if make else {"quant_method": "awq"})
        with pytest.raises(CheckpointError, match=rf"0 of the known ways .*{reason}"):
            load_experts_from(layer, tmp_path / reason[:8], prefix="mlp", progress=False)


def test_what_compressed_tensors_may_say():
    def config(**changes):
        whole = published.compressed("x", 1, 32, 32)[1]
        whole["config_groups"]["group_0"]["weights"].update(changes)
        return {"text_config": {"quantization_config": whole}}

    assert stored_of({}) is None
    assert stored_of(config(group_size=128)).quantisation == Quantisation("int4", 128)
    for changes, reason in (
        ({"num_bits": 8}, "must have one kind of 4-bit integer weights in format pack-quantized, have 0"),
        ({"strategy": "channel"}, "must have strategy='group'.*'channel'"),
        ({"group_size": 64}, "group of int4 must be 32 or 128, got 64"),
        ({"actorder": "group"}, "actorder='group' have their columns in another order"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            stored_of(config(**changes))
