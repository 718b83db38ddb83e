"""What bad input gets: a `ValueError` that names the argument, its value and the rule."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from eplb.relocation.pool import SlotPool, SlotState
from moe_layer import MoELayer, RouterRule, make_pool
from moe_layer.weights.expert_format import gated_format

SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2}
INTEGER = "integer of at least {}"

# (arguments, what the message must name: argument, value, rule)
REFUSED = {
    **{
        f"{name}={value!r}": ({name: value}, (name, repr(value), INTEGER.format(1)))
        for name in SIZES
        for value in (0, -3, 2.0, True, "8", None)
    },
    **{
        f"{name}={value!r}": ({name: value}, (name, repr(value), INTEGER.format(0)))
        for name in ("num_redundant_experts", "num_shadow_slots")
        for value in (-1, 0.5, False, None)
    },
    **{
        f"max_tokens={value!r}": ({"max_tokens": value}, ("max_tokens", repr(value), INTEGER.format(1)))
        for value in (0, -3, 2.0, True, "8")
    },
    "top_k > num_experts": ({"top_k": 5}, ("top_k", "5", "at most num_experts=4")),
    "activation": ({"activation": "relu"}, ("activation", "'relu'", "'silu', 'gelu'")),
    "activation of another type": ({"activation": None}, ("activation", "None", "'silu', 'gelu'")),
    "float64": ({"dtype": torch.float64}, ("dtype", "torch.float64", "float32, float16 or bfloat16")),
    "an integer dtype": ({"dtype": torch.int32}, ("dtype", "torch.int32", "float32, float16 or bfloat16")),
    "a dtype's name": ({"dtype": "float32"}, ("dtype", "float32", "float32, float16 or bfloat16")),
    "unknown backend": ({"backend": "cuda"}, ("backend", "'cuda'", '"auto", "triton" or "torch"')),
    "unknown rule": ({"router": "switch"}, ("router", "'switch'", "RouterRule or one of", "mixtral")),
    "no rule": ({"router": 7}, ("router", "7", "RouterRule or one of", "mixtral")),
    "router_dtype": (
        {"router_dtype": torch.float64},
        ("router_dtype", "torch.float64", "float32, float16 or bfloat16"),
    ),
    "trainable": ({"trainable": "yes"}, ("trainable", "'yes'", "True or False")),
    "recompute": ({"recompute": 1}, ("recompute", "1", "True or False")),
    "trainable with a pool": ({"trainable": True, "pool": 7}, ("pool=7", "trainable=True")),
    "trainable with redundant experts": (
        {"trainable": True, "num_redundant_experts": 1},
        ("num_redundant_experts=1", "at most num_experts"),
    ),
    "unknown dispatcher": ({"dispatcher": "nvlink"}, ("dispatcher", "'nvlink'", "'auto', 'local', 'all_to_all'")),
    "no dispatcher": ({"dispatcher": 7}, ("dispatcher", "7", "'auto', 'local', 'all_to_all'")),
    "all_to_all on its own": ({"dispatcher": "all_to_all"}, ("dispatcher='all_to_all'", "process_group", "None")),
    "all_gather on its own": (
        {"dispatcher": "all_gather", "max_tokens": 8},
        ("dispatcher='all_gather'", "process_group", "None"),
    ),
    "redundant experts on one rank": (
        {"num_redundant_experts": 1},
        ("num_redundant_experts=1", "at most num_experts * (ranks - 1) = 0"),
    ),
    "another kind of device": ({"device": "xpu"}, ("device", "xpu", "CPU or")),
    "unknown device": ({"device": "nowhere"}, ("device", "nowhere", "CPU or")),
    "a GPU that is not there": ({"device": "cuda:99"}, ("device", "cuda:99")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_constructor_names_argument_value_and_rule(case, device):
    arguments, named = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        MoELayer(**{"device": device, **SIZES, **arguments})
    for part in named:
        assert part in str(refusal.value)


def test_integers_of_numpy_are_taken_as_ints(device):
    """Narrow ones too, whose products would overflow."""
    sizes = {name: np.uint8(value) for name, value in SIZES.items()}
    others = {"num_redundant_experts": np.int64(0), "num_shadow_slots": np.uint8(1), "max_tokens": np.uint8(255)}
    rule = RouterRule(score_function="sigmoid", num_groups=np.int64(2), top_groups=np.int8(1))
    layer = MoELayer(**sizes, **others, router=rule, backend="triton", device=device)
    plain = MoELayer(**SIZES, router=replace(rule, num_groups=2, top_groups=1), device=device)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(255, 16, device=device)
    torch.testing.assert_close(layer(x, max_tokens=np.int16(255)), plain(x))
    kept = (layer.hidden_size, layer.intermediate_size, layer.top_k, layer.max_tokens, layer.resident.num_experts)
    assert all(type(one) is int for one in kept)
    tensors = {name: tensor[3] for name, tensor in layer.experts.state_dict().items()}
    layer.load_experts({np.int64(3): tensors})
    assert make_pool(np.uint8(200), *map(np.uint8, (16, 8, 4))).num_slots == 801


def test_triton_on_a_cpu_without_its_interpreter(monkeypatch):
    monkeypatch.setattr("moe_kernels.base.backend.INTERPRETED", False)
    with pytest.raises(ValueError, match='backend="triton" can\'t run on device type "cpu"'):
        MoELayer(**SIZES, backend="triton", device="cpu")


def pool_of(num_slots: int, device: str, hidden_size: int = 16, dtype: torch.dtype = torch.float32) -> SlotPool:
    # As the layer resolves its own device.
    device = torch.empty(0, device=device).device
    return SlotPool(gated_format(hidden_size, 8, dtype, "silu").specs, num_slots, device)


@pytest.mark.parametrize("other", [{"hidden_size": 24}, {"dtype": torch.float16}], ids=str)
def test_pool_of_other_experts(other, device):
    pool = pool_of(9, device, **other)
    with pytest.raises(ValueError, match=r"pool holds .* but the layer's experts are .*; make it with make_pool\(\)"):
        MoELayer(**SIZES, pool=pool, device=device)
    assert pool.count(SlotState.FREE) == 9


def test_pool_on_another_device(device):
    pool = SlotPool(gated_format(16, 8, torch.float32, "silu").specs, 9, "meta")
    with pytest.raises(ValueError, match=r"on meta, but the layer's experts are .* on c"):
        MoELayer(**SIZES, pool=pool, device=device)


def test_pool_that_is_none(device):
    with pytest.raises(ValueError, match=r"pool.*make_pool\(\).*7"):
        MoELayer(**SIZES, pool=7, device=device)


def test_pool_too_small(device):
    pool = pool_of(3, device)
    with pytest.raises(ValueError, match="pool has 3 free slots of 3, but 4 are needed"):
        MoELayer(**SIZES, pool=pool, device=device)
    assert pool.count(SlotState.FREE) == 3


@pytest.mark.parametrize("case", ["unknown rule", "unknown dispatcher", "all_to_all on its own", "trainable"])
def test_a_refused_layer_takes_no_slots_of_a_shared_pool(case, device):
    pool = pool_of(9, device)
    with pytest.raises(ValueError):
        MoELayer(**SIZES, **REFUSED[case][0], pool=pool, device=device)
    assert pool.count(SlotState.FREE) == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score_function", "tanh"),
        ("score_function", None),
        ("renormalize", "false"),
        ("renormalize", 1),
        ("correction_bias", None),
        *(("scale", scale) for scale in (None, "2", True, float("nan"), float("inf"), -float("inf"), 1j)),
    ],
)
def test_a_rule_names_the_field_and_its_value(field, value):
    with pytest.raises(ValueError, match=f"RouterRule.{field} must be .*{re.escape(repr(value))}"):
        RouterRule(**{field: value})


POOL_REFUSED = {
    **{
        f"{name}={value!r}": ({name: value}, (name, repr(value), INTEGER.format(1)))
        for name in (
            *("num_layers", "hidden_size", "intermediate_size", "num_experts"),
            *("num_shadow_slots", "num_ranks"),
        )
        for value in (0, -1, 1.5)
    },
    "num_redundant_experts=-1": (
        {"num_redundant_experts": -1},
        ("num_redundant_experts", "-1", INTEGER.format(0)),
    ),
    "ranks that do not divide": (
        {"num_redundant_experts": 1, "num_ranks": 2},
        ("num_redundant_experts=1", "num_experts=4", "5 physical", "divisible by the 2 ranks"),
    ),
    "float64": ({"dtype": torch.float64}, ("dtype", "torch.float64", "float32, float16 or bfloat16")),
    "a GPU that is not there": ({"device": "cuda:99"}, ("device", "cuda:99")),
}


@pytest.mark.parametrize("case", POOL_REFUSED)
def test_make_pool_names_argument_value_and_rule(case, device):
    arguments, named = POOL_REFUSED[case]
    sizes = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 8, "num_experts": 4}
    with pytest.raises(ValueError) as refusal:
        make_pool(**{"device": device, **sizes, **arguments})
    for part in named:
        assert part in str(refusal.value)


def test_make_pool_holds_what_its_layers_and_their_shadows_need(device):
    pool = make_pool(3, 16, 8, 6, num_redundant_experts=2, num_shadow_slots=2, num_ranks=4, device=device)
    assert pool.num_slots == 3 * (6 + 2) // 4 + 2
    assert pool.count(SlotState.FREE) == pool.num_slots
    assert {name: tuple(tensor.shape) for name, tensor in pool.tensors.items()} == {
        "gate_up_proj": (8, 16, 16),
        "down_proj": (8, 16, 8),
    }


INPUTS = {
    "a scalar": (torch.zeros(()), None, ("x", "hidden_size=16", "()")),
    "another hidden size": (torch.zeros(3, 8), None, ("x", "hidden_size=16", "(3, 8)")),
    "transposed": (torch.zeros(16, 3), None, ("x", "hidden_size=16", "(16, 3)")),
    "another dtype": (torch.zeros(3, 16, dtype=torch.float16), None, ("x", "torch.float32", "torch.float16")),
    "another device": (torch.zeros(3, 16, device="meta"), None, ("x", "meta")),
    "mask of another shape": (torch.zeros(3, 16), torch.ones(4, dtype=torch.bool), ("token_mask", "(3,)", "(4,)")),
    "mask of x's shape": (torch.zeros(3, 16), torch.ones(3, 16).bool(), ("token_mask", "(3,)", "(3, 16)")),
    "mask flattened": (torch.zeros(2, 3, 16), torch.ones(6).bool(), ("token_mask", "(2, 3)", "(6,)")),
    "mask of numbers": (torch.zeros(3, 16), torch.ones(3), ("token_mask", "bool", "torch.float32")),
    "mask on another device": (torch.zeros(3, 16), torch.ones(3, device="meta").bool(), ("token_mask", "meta")),
}


@pytest.mark.parametrize("case", INPUTS)
def test_forward_names_argument_value_and_rule(case, device):
    x, mask, named = INPUTS[case]
    layer = MoELayer(**SIZES, device=device)
    x, mask = (
        tensor.to(device) if tensor is not None and tensor.device.type != "meta" else tensor for tensor in (x, mask)
    )
    with pytest.raises(ValueError) as refusal:
        layer(x, mask)
    for part in named:
        assert re.search(rf"(?<!\w){re.escape(part)}", str(refusal.value)), f"{part!r} in {refusal.value}"
    assert not layer.resident.load_E.any()


GIVEN = {
    "ids alone": ({"expert_ids": torch.zeros(3, 2).int()}, "expert_weights must be given too"),
    "weights alone": ({"expert_weights": torch.zeros(3, 2)}, "expert_ids must be given too"),
    "another K": (
        {"expert_ids": torch.zeros(3, 1).int(), "expert_weights": torch.zeros(3, 1)},
        r"expert_ids .*\(3, 2\)",
    ),
    "ids of a float dtype": (
        {"expert_ids": torch.zeros(3, 2), "expert_weights": torch.zeros(3, 2)},
        "expert_ids .*int64",
    ),
    "integers as weights": (
        {"expert_ids": torch.zeros(3, 2).int(), "expert_weights": torch.zeros(3, 2).int()},
        "expert_weights .*float32",
    ),
    "a list": ({"expert_ids": [[0, 1]] * 3, "expert_weights": torch.zeros(3, 2)}, "expert_ids must"),
}


@pytest.mark.parametrize("case", GIVEN)
def test_ids_and_weights_that_do_not_fit(case, device):
    given, message = GIVEN[case]
    layer = MoELayer(**SIZES, device=device)
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(3, 16, device=device), **given)


def test_without_a_router_ids_are_needed(device):
    layer = MoELayer(**SIZES, router=None, device=device)
    assert layer.gate is None and not list(layer.parameters())
    for given in ({}, {"router_logits": torch.zeros(3, 4, device=device)}):
        with pytest.raises(ValueError, match=r"expert_ids and expert_weights must be given, .* router=None"):
            layer(torch.zeros(3, 16, device=device), **given)


@pytest.mark.gpu
def test_input_on_the_cpu_for_a_layer_on_a_gpu():
    with pytest.raises(ValueError, match="x must be on the layer's device cuda:0, got cpu"):
        MoELayer(**SIZES, device="cuda:0")(torch.zeros(3, 16))
