"""All of a forward as one op, against the separate ops. A single token has kernels of its own."""

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import (
    SHARE_BITS,
    build_schedule,
    combine,
    expert_down,
    expert_up,
    gemm_configs,
    has_tma,
    local_forward,
    select_replicas,
    topk_routing,
)
from moe_kernels.local_forward import _local_forward


def arguments(
    make_experts,
    num_experts,
    top_k,
    hidden_size,
    intermediate,
    dtype=torch.float32,
    seed=0,
    num_tokens=1,
    spare_lanes=0,
):
    """Lane by lane in the reverse order of the experts, and before them lanes of no expert."""
    num_lanes = num_experts + spare_lanes
    experts = make_experts(num_tokens, top_k, num_lanes, hidden_size, intermediate, dtype, seed)
    device = experts.x_RH.device
    random = torch.Generator().manual_seed(seed)
    return {
        "x_TH": experts.x_RH,
        "logits_TE": torch.randn(num_tokens, num_experts, generator=random).to(device),
        "gate_up_SNH": experts.gate_up_SNH,
        "down_SHI": experts.down_SHI,
        "table_lanes_E": torch.arange(spare_lanes, num_lanes, dtype=torch.int32, device=device).flip(0),
        "lane_to_slot_L": experts.lane_to_slot_L,
        "load_E": torch.randint(0, 10**12, (num_experts,), generator=random).to(device),
        "increment_1": torch.ones(1, dtype=torch.int64, device=device),
        "top_k": top_k,
    }


def separate(arguments, backend="torch", activation="silu", configs=None, **rule):
    """The output and the counters by the separate ops."""
    a = dict(arguments)
    load, mask = a["load_E"].clone(), rule.pop("token_mask_T", None)
    weights, ids = topk_routing(a["logits_TE"], a["top_k"], token_mask_T=mask, backend=backend, **rule)
    lanes_E = a["table_lanes_E"]
    offsets = torch.arange(lanes_E.numel() + 1, dtype=torch.int32, device=lanes_E.device)
    shares = torch.full_like(lanes_E, 1 << SHARE_BITS)
    lanes, counts = select_replicas(
        *(ids, offsets, lanes_E, shares, load, 0),
        num_lanes=a["lane_to_slot_L"].numel(),
        increment_1=a["increment_1"],
        backend=backend,
    )
    up, down = configs or gemm_configs(64, 64, torch.float32, 1, 1, 1)
    schedule = build_schedule(lanes.view(-1), counts, block_m=up.block_m, extra_m=up.extra_m, backend=backend)
    hidden = expert_up(
        a["x_TH"],
        a["gate_up_SNH"],
        a["lane_to_slot_L"],
        schedule,
        fanout=a["top_k"],
        activation=activation,
        config=up,
        backend=backend,
    )
    rows = expert_down(
        hidden, a["down_SHI"], a["lane_to_slot_L"], schedule, weights.view(-1), config=down, backend=backend
    )
    return combine(rows, lanes, backend=backend), load


def in_float32(arguments):
    names = ("x_TH", "gate_up_SNH", "down_SHI")
    return arguments | {name: arguments[name].float() for name in names}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@settings(max_examples=12)
@given(
    num_experts=st.integers(1, 9),
    spare_lanes=st.integers(0, 2),
    data=st.data(),
    hidden_size=st.integers(1, 40),
    intermediate=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(["silu", "gelu"]),
    score_function=st.sampled_from(["softmax", "sigmoid"]),
    renormalize=st.booleans(),
    num_tokens=st.sampled_from([0, 1, 1, 1, 2, 7, 40]),
    masked=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_the_separate_ops(
    make_experts, assert_close, backend, num_experts, spare_lanes, data, hidden_size, intermediate, dtype, activation,
    score_function, renormalize, num_tokens, masked, seed,
):  # fmt: skip
    top_k = data.draw(st.integers(1, num_experts))
    sizes = (num_experts, top_k, hidden_size, intermediate)
    given_arguments = arguments(make_experts, *sizes, dtype, seed, num_tokens, spare_lanes)
    device, random = given_arguments["x_TH"].device, torch.Generator().manual_seed(seed)
    rule = {
        "score_function": score_function,
        "renormalize": renormalize,
        "scale": 1.5,
        "bias_E": torch.randn(num_experts, generator=random).to(device),
        "token_mask_T": torch.randint(2, (num_tokens,), generator=random).bool().to(device) if masked else None,
    }
    expected, load = separate(in_float32(given_arguments), activation=activation, **rule)
    y = local_forward(**given_arguments, **rule, activation=activation, backend=backend)
    assert_close(y, expected, scale=4)
    assert torch.equal(given_arguments["load_E"], load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(2, 2), (100, 2), (300, 4)])
def test_bits_are_those_of_the_separate_ops(make_experts, backend, num_tokens, top_k):
    """On a GPU with TMA too."""
    dtype, sizes = torch.bfloat16, (6, top_k, 64, 48)
    given_arguments = arguments(make_experts, *sizes, dtype, num_tokens=num_tokens, spare_lanes=1)
    device = given_arguments["x_TH"].device
    up, down = gemm_configs(64, 48, dtype, num_tokens, top_k, 6, tma=has_tma(device))
    expected, load = separate(given_arguments, backend, configs=(up, down))
    assert torch.equal(local_forward(**given_arguments, backend=backend), expected)
    assert torch.equal(given_arguments["load_E"], load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sizes", [(128, 24), (130, 72), (60, 192), (16, 600)])
def test_several_blocks(make_experts, assert_close, monkeypatch, backend, sizes):
    monkeypatch.setattr("moe_kernels.one_token._block", lambda size: 64)
    monkeypatch.setattr("moe_kernels.one_token._ELEMENTS", 64)
    given_arguments = arguments(make_experts, 3, 2, *sizes, torch.bfloat16)
    expected, _ = separate(in_float32(given_arguments))
    assert_close(local_forward(**given_arguments, backend=backend), expected, scale=4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(33, 3), (64, 64), (128, 8), (256, 8), (1025, 5)])
def test_many_experts(make_experts, assert_close, backend, num_experts, top_k):
    """More than a warp has threads."""
    given_arguments = arguments(make_experts, num_experts, top_k, 16, 8)
    expected, load = separate(in_float32(given_arguments))
    assert_close(local_forward(**given_arguments, backend=backend), expected, scale=4)
    assert torch.equal(given_arguments["load_E"], load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_recorded_without_an_increment(make_experts, backend):
    given_arguments = arguments(make_experts, 2, 1, 16, 8) | {"increment_1": None}
    before = given_arguments["load_E"].clone()
    local_forward(**given_arguments, backend=backend)
    assert torch.equal(given_arguments["load_E"], before)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_bits_do_not_depend_on_slots_and_lanes(make_experts, backend, num_tokens):
    given_arguments = arguments(make_experts, 4, 2, 96, 40, torch.bfloat16, num_tokens=num_tokens)
    expected = local_forward(**given_arguments, backend=backend)
    device = expected.device
    moved = dict(given_arguments)
    slots = given_arguments["lane_to_slot_L"].long()
    for name in ("gate_up_SNH", "down_SHI"):
        moved[name] = torch.full_like(given_arguments[name], float("nan"))
        moved[name][[4, 0, 3, 1]] = given_arguments[name][slots[given_arguments["table_lanes_E"].long()]]
    moved["table_lanes_E"] = torch.tensor([1, 5, 2, 0], dtype=torch.int32, device=device)
    moved["lane_to_slot_L"] = torch.tensor([1, 4, 3, -1, -1, 0], dtype=torch.int32, device=device)
    assert torch.equal(local_forward(**moved, backend=backend), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_TH", lambda a: a["x_TH"][:, ::2]),
        ("gate_up_SNH", lambda a: a["gate_up_SNH"][:, 1:]),
        ("down_SHI", lambda a: a["down_SHI"].half()),
        ("lane_to_slot_L", lambda a: a["lane_to_slot_L"].long()),
        ("logits_TE", lambda a: a["logits_TE"][:, 1:]),
        ("load_E", lambda a: a["load_E"].int()),
        ("table_lanes_E", lambda a: a["table_lanes_E"][1:]),
        ("increment_1", lambda a: a["increment_1"].expand(2)),
        ("top_k", lambda a: 4),
        ("score_function", lambda a: "relu"),
        ("bias_E", lambda a: a["logits_TE"][0, 1:]),
        ("token_mask_T", lambda a: a["logits_TE"][0, :1]),
        ("activation", lambda a: "relu"),
    ],
)
def test_refuses(make_experts, name, change):
    given_arguments = arguments(make_experts, 3, 2, 16, 8)
    with pytest.raises(ValueError, match=name):
        local_forward(**(given_arguments | {name: change(given_arguments)}))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "launches"), [(1, 3), (5, 6)])
def test_hooks_of_a_profiler_see_every_launch(make_experts, num_tokens, launches):
    given_arguments = arguments(make_experts, 3, 2, 16, 8, num_tokens=num_tokens) | {"increment_1": None}
    expected = local_forward(**given_arguments, backend="triton")  # compiles
    seen, hooks = [], triton.knobs.runtime.launch_enter_hook
    assert torch.equal(local_forward(**given_arguments, backend="triton"), expected)
    hooks.add(seen.append)
    try:
        assert torch.equal(local_forward(**given_arguments, backend="triton"), expected)
    finally:
        hooks.remove(seen.append)
    assert len(seen) == launches


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_opcheck(make_experts, backend, num_tokens):
    given_arguments = arguments(make_experts, 2, 2, 16, 8, num_tokens=num_tokens)
    rule = ("softmax", True, 1.0, None, None, "silu")
    torch.library.opcheck(_local_forward.registered, (*given_arguments.values(), *rule, backend))
