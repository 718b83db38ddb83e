"""Layers with quantised experts: formats, forwards, casts, state dicts, writing single experts, `quantize_experts`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eplb import EplbConfig, EplbController
from eplb.relocation.pool import SlotState
from moe_layer import MoELayer, Quantisation, make_pool, quantize_experts
from moe_layer.weights.expert_format import Activation, expert_format
from tests.moe_layer.quantised import CLOSE, SCHEMES, E, H, I, K, as_floats, make_quantised, records, same_bytes
from tests.moe_layer.relocation import Relocator, poison, settle
from tests.moe_layer.test_graphs import captured

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def test_the_tensors_of_a_record():
    """Sizes by hand, of experts with blocks that end inside a matrix; each byte is in one record of a slot."""
    kinds = {
        "fp8_block": [("gate_up_proj", (400, 160)), ("gate_up_proj_scale", (4, 2)), ("down_proj", (160, 200)),
                      ("down_proj_scale", (2, 2))],
        "mxfp4": [("gate_up_proj", (384, 80)), ("gate_up_proj_scale", (5, 384)), ("down_proj", (160, 96)),
                  ("down_proj_scale", (6, 160))],
        "int4_zeros": [("gate_up_proj", (384, 80)), ("gate_up_proj_scale", (5, 384)), ("gate_up_proj_zero", (5, 384)),
                       ("down_proj", (160, 96)), ("down_proj_scale", (6, 160)), ("down_proj_zero", (6, 160))],
    }  # fmt: skip
    for scheme, wanted in kinds.items():
        inner = 200 if scheme == "fp8_block" else 192
        activation = Activation("silu", limit=7.0, up_offset=1.0)
        format = expert_format(160, inner, torch.bfloat16, activation, has_bias=True, quantisation=SCHEMES[scheme])
        wanted = [*wanted, ("gate_up_proj_bias", (2 * inner,)), ("down_proj_bias", (160,))]
        assert [(spec.name, spec.shape) for spec in format.specs] == wanted
        assert (format.hidden_size, format.intermediate_size, format.has_bias) == (160, inner, True)
        assert {one.role for one in format.tensors if one.follows_casts} == {"bias"}
        assert format.group == SCHEMES[scheme].group and format.scheme == scheme.removesuffix("_zeros")
    ungated = expert_format(
        160, 200, torch.bfloat16, Activation("relu2", gated=False), quantisation=SCHEMES["fp8_block"]
    )
    assert ungated.specs[1].shape == (2, 2) and ungated.parts[0].num_parts == 1
    text = expert_format(160, 192, torch.bfloat16, activation, quantisation=SCHEMES["int4_zeros"]).describe()
    assert text == "silu gated, limit 7, up_offset 1, 160 × 192, bfloat16, int4 in groups of 32, zero points weights"


@every_scheme
def test_forward(scheme, device):
    layer = make_quantised(scheme, device)
    plain, x = as_floats(layer), torch.randn(13, H, device=device).bfloat16()
    with torch.no_grad():
        for rows in (x, x[:1], x[:0]):
            logits = layer.gate(rows)
            found, wanted = layer(rows), plain(rows.float(), router_logits=logits.float())
            assert found.dtype == torch.bfloat16
            if len(rows):
                assert ((found - wanted).abs().max() / wanted.abs().max()).item() < CLOSE[scheme]
                assert wanted.abs().max() > 0.1
    with pytest.raises(RuntimeError, match=rf"{scheme.removesuffix('_zeros')}.* experts have no gradients.*no_grad"):
        layer(x.requires_grad_())


@pytest.mark.parametrize("scheme", ["fp8_block", "int4_zeros"])
def test_kernels_and_references(scheme, device):
    """Through the whole layer; the kernels natively or in the interpreter, which have tests of their own."""
    layer, reference = (make_quantised(scheme, device, backend=backend) for backend in ("triton", "torch"))
    reference.load_state_dict(layer.state_dict())
    for num_tokens in (1, 3):
        x = torch.randn(num_tokens, H, device=device).bfloat16()
        with torch.no_grad():
            found, wanted = layer(x), reference(x)
        # One token's kernels leave the rows as they are, which the reference rounds to e4m3.
        bound = 6e-2 if scheme == "fp8_block" and num_tokens == 1 else 2e-2
        assert wanted.any() and ((found - wanted).abs().max() / wanted.abs().max()).item() < bound


@every_scheme
def test_casts_leave_quantised_tensors_alone(scheme, device):
    layer = make_quantised(scheme, device)
    before, x = layer.experts.state_dict(), torch.randn(5, H, device=device)
    other = copy.deepcopy(layer).half()
    assert other.experts.format.dtype == other.gate.weight.dtype == torch.float16
    with torch.no_grad():
        assert other(x.half()).isfinite().all()
    for one in (layer, other):
        assert all(same_bytes(value, before[name]) for name, value in one.experts.state_dict().items())


def test_biases_are_cast_and_their_matrices_are_not():
    activation = Activation("silu")
    format = expert_format(H, I, torch.bfloat16, activation, has_bias=True, quantisation=SCHEMES["mxfp4"])
    dtypes = {tensor.name: tensor.dtype for tensor in format.cast(torch.float32).tensors}
    assert dtypes.pop("gate_up_proj_bias") == dtypes.pop("down_proj_bias") == torch.float32
    assert set(dtypes.values()) == {torch.uint8}


@every_scheme
def test_state_dicts_bit_for_bit(scheme, device):
    layer, other = make_quantised(scheme, device), make_quantised(scheme, device, seed=1)
    saved = layer.state_dict()
    names = {key.removeprefix("experts.") for key in saved if key.startswith("experts.")}
    assert names == {spec.name for spec in layer.experts.format.specs}
    assert not same_bytes(other.state_dict()["experts.down_proj"], saved["experts.down_proj"])
    other.load_state_dict(saved)
    assert all(same_bytes(value, saved[name]) for name, value in other.state_dict().items())
    x = torch.randn(9, H, device=device).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), other(x))

    for change, reason in (
        ({"experts.down_proj": None}, "experts.down_proj_scale must come with experts.down_proj"),
        ({"experts.gate_up_proj_scale": None}, "experts.gate_up_proj must come with experts.gate_up_proj_scale"),
        (
            {"experts.down_proj": saved["experts.down_proj"].half()},
            r"dtype mismatch for experts.down_proj: torch.float16",
        ),
    ):
        state = {
            name: change.get(name, value) for name, value in make_quantised(scheme, device, 2).state_dict().items()
        }
        with pytest.raises(RuntimeError, match=reason):
            other.load_state_dict({name: value for name, value in state.items() if value is not None}, strict=False)
        assert all(same_bytes(value, saved[f"experts.{name}"]) for name, value in other.experts.state_dict().items())


@every_scheme
def test_a_state_dict_of_another_order_of_codes_is_refused(scheme):
    layer, other = make_quantised(scheme, "cpu"), make_quantised(scheme, "cpu", seed=1)
    saved, before = layer.state_dict(), other.state_dict()
    assert saved._metadata["experts"]["version"] == 2
    saved._metadata["experts"]["version"] = 1
    if scheme == "mxfp4":
        with pytest.raises(RuntimeError, match="experts was saved with another order of mxfp4's codes"):
            other.load_state_dict(saved)
        assert all(same_bytes(value, before[name]) for name, value in other.state_dict().items())
    else:
        other.load_state_dict(saved)
    other.load_state_dict(dict(layer.state_dict()))  # whoever drops the version is believed
    assert all(same_bytes(value, layer.state_dict()[name]) for name, value in other.state_dict().items())


@every_scheme
def test_single_experts(scheme, device):
    layer, other = make_quantised(scheme, device), make_quantised(scheme, device, seed=1)
    new = records(other)
    layer.load_experts({3: new[3], 5: new[5]})
    for expert, record in enumerate(records(layer)):
        is_new = {name: same_bytes(value, new[expert][name]) for name, value in record.items()}
        assert is_new["gate_up_proj"] == is_new["down_proj"] == (expert in (3, 5))
    with pytest.raises(ValueError, match="down_proj of expert 1 must come with its down_proj_scale"):
        layer.load_experts({1: {"down_proj": new[1]["down_proj"]}})
    wrong = {**new[1], "gate_up_proj": new[1]["gate_up_proj"].to(torch.float32)}
    with pytest.raises(ValueError, match=r"gate_up_proj of expert 1 must have dtype torch\..*, got torch.float32"):
        layer.load_experts({1: wrong})


@every_scheme
def test_quantize_experts(scheme, device):
    """In place, with the error that it makes; the same numbers as a layer that was drawn so."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: MoELayer(H, I, E, K, device=device, dtype=torch.bfloat16) for name in "ab"})
    x = torch.randn(17, H, device=device).bfloat16()
    with torch.no_grad():
        before, state = {name: model[name](x) for name in "ab"}, model["a"].experts.state_dict()
        report = quantize_experts(model, SCHEMES[scheme])
        for name in "ab":
            found = model[name](x)
            assert 0 < (found - before[name]).norm() / before[name].norm() < (0.25 if scheme != "fp8_block" else 0.08)
    record = records(model["a"])
    for matrix in ("gate_up_proj", "down_proj"):
        rounded = torch.stack([model["a"].experts.format.dequantise(one)[matrix] for one in record])
        error = (rounded - state[matrix].float()).norm() / state[matrix].float().norm()
        assert report.errors["a.experts"][matrix] == pytest.approx(error.item(), rel=1e-4)
        assert 0 < error < {"fp8_block": 0.03, "mxfp4": 0.16}.get(scheme, 0.1)
    assert set(report.errors) == {"a.experts", "b.experts"}
    assert report.bytes_after < report.bytes_before and "relative error" in str(report)
    assert model["a"].experts.pool.slot_bytes * 2 == report.bytes_after
    assert "memory" not in model["a"].state_dict() and model["a"].resident.live_slots().keys() == set(range(E))


@every_scheme
def test_without_memory_at_first(scheme, device):
    """On the meta device, then `to_empty()`, or quantised there before."""
    loaded = make_quantised(scheme, device)
    meta = MoELayer(H, I, E, K, quantisation=SCHEMES[scheme], num_shadow_slots=2, dtype=torch.bfloat16, device="meta")
    later = MoELayer(H, I, E, K, num_shadow_slots=2, dtype=torch.bfloat16, device="meta")
    assert quantize_experts(later, SCHEMES[scheme]).errors == {"experts": {}}
    for layer in (meta, later):
        layer.to_empty(device=device).load_state_dict(loaded.state_dict())
        x = torch.randn(5, H, device=device).bfloat16()
        with torch.no_grad():
            assert torch.equal(layer(x), loaded(x))


def test_what_is_refused(device):
    for value, reason in (
        ("fp4", r"quantisation must be one of 'fp8_block', 'mxfp4', 'int4' or a Quantisation or None; got 'fp4'"),
        ("int4", "divisible by its group 32: gate_up_proj has 48 columns"),
    ):
        with pytest.raises(ValueError, match=reason):
            MoELayer(48, I, E, K, quantisation=value, device=device)
    for options, reason in (
        ({"scheme": "int4", "group": 64}, "group of int4 must be 32 or 128, got 64"),
        ({"scheme": "mxfp4", "zero_points": True}, "zero_points=True is of int4 alone"),
    ):
        with pytest.raises(ValueError, match=reason):
            Quantisation(**options)
    with pytest.raises(ValueError, match="quantisation='mxfp4' does not go with trainable=True"):
        MoELayer(H, I, E, K, quantisation="mxfp4", trainable=True, device=device)
    with pytest.raises(ValueError, match="trainable: quantised experts do not train"):
        quantize_experts(MoELayer(H, I, E, K, trainable=True, device=device), "mxfp4")
    with pytest.raises(ValueError, match="model: the experts are quantised already"):
        quantize_experts(make_quantised("mxfp4", device).experts, "fp8_block")
    with pytest.raises(ValueError, match="has none"):
        quantize_experts(nn.Linear(2, 2), "fp8_block")

    pool = make_pool(2, H, I, E, device=device)
    pair = nn.ModuleList(MoELayer(H, I, E, K, pool=pool, device=device) for _ in range(2))
    before = pair.state_dict()
    with pytest.raises(RuntimeError, match=r"quantize_experts\(\) is refused: the layer shares its pool"):
        quantize_experts(pair, "mxfp4")
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    pool = make_pool(2, H, I, E, device=device, quantisation="mxfp4", dtype=torch.bfloat16)
    shared = [make_quantised("mxfp4", device, pool=pool, num_shadow_slots=1) for _ in range(2)]
    with torch.no_grad():
        assert all(one(torch.randn(3, H, device=device).bfloat16()).isfinite().all() for one in shared)
    with pytest.raises(ValueError, match="pool holds"):
        make_quantised("fp8_block", device, pool=pool)


@every_scheme
def test_i4_i5_bits_through_flips(scheme, device):
    """By hand, at every stage of a move; old slots are poisoned after grace."""
    layer, twin = (make_quantised(scheme, device) for _ in range(2))
    EplbController(EplbConfig(use_async=False)).register(layer)
    settle(device)
    relocator, x = Relocator([layer]), torch.randn(17, H, device=device).bfloat16()
    with torch.no_grad():
        wanted = [twin(rows) for rows in (x, x[:1])]

        def is_right() -> bool:
            return all(torch.equal(layer(rows), one) for rows, one in zip((x, x[:1]), wanted, strict=True))

        assert is_right()
        for expert in range(E):
            old = layer.resident.live_slots()[expert][0]
            fill = relocator.fill(0, expert)
            assert is_right()
            handoff = relocator.publish(fill)
            assert is_right()
            relocator.flip(handoff)
            assert is_right()
            relocator.release(fill, handoff)
            poison(layer, old, device)
            assert is_right()
    saved = twin.state_dict()
    assert all(same_bytes(value, saved[name]) for name, value in layer.state_dict().items())


@every_scheme
def test_i4_weights_torn_from_scales_show(scheme, device):
    """What the tests of flips would see if a move took the weights and left the scales, or zero points, behind."""
    layer, twin = (make_quantised(scheme, device) for _ in range(2))
    EplbController(EplbConfig(use_async=False)).register(layer)
    settle(device)
    relocator, x = Relocator([layer]), torch.randn(17, H, device=device).bfloat16()
    pool = layer.resident.pool
    for tensor in layer.experts.format.tensors:
        if tensor.role == "weight":
            continue
        with torch.no_grad():
            busiest = layer.gate.choose(layer.gate(x))[1].flatten().mode().values.item()
            fill = relocator.fill(0, busiest)
            (target,) = (slot for slot in range(pool.num_slots) if pool.state(slot) is SlotState.FILLING)
            left = pool.tensors[tensor.name][target]
            moved = left.clone()
            left.copy_(moved + moved)  # as another expert has left it there
            handoff = relocator.publish(fill)
            relocator.flip(handoff)
            assert not torch.equal(layer(x), twin(x)), f"{tensor.name} was not missed"
            left.copy_(moved)
            settle(device)
            assert torch.equal(layer(x), twin(x))
            relocator.release(fill, handoff)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24])
@every_scheme
def test_i5_graph_replays_across_flips(scheme, num_tokens):
    layer, twin = (make_quantised(scheme, "cuda") for _ in range(2))
    EplbController(EplbConfig(use_async=False)).register(layer)
    settle("cuda")
    relocator, x = Relocator([layer]), torch.zeros(num_tokens, H, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        graph, y = captured(layer, x)
        for expert in range(E):
            x.copy_(torch.randn(num_tokens, H, device="cuda"))
            wanted, old = twin(x), layer.resident.live_slots()[expert][0]
            fill = relocator.fill(0, expert)
            graph.replay()
            assert torch.equal(y, wanted)
            handoff = relocator.publish(fill)
            relocator.flip(handoff)
            graph.replay()
            assert torch.equal(y, wanted)
            relocator.release(fill, handoff)
            poison(layer, old, "cuda")
            y.zero_()
            graph.replay()
            assert torch.equal(y, wanted)
