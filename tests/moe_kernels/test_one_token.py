"""All of a forward for one token, against the separate ops."""

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
    gemm_config,
    one_token,
    select_replicas,
    topk_routing,
)
from moe_kernels.one_token import _one_token


def arguments(make_experts, has_lane, top_k, hidden_size, intermediate, dtype=torch.float32, seed=0):
    """Of experts that have a lane or none; lane by lane in the reverse order of the experts."""
    num_lanes = max(sum(has_lane), 1)
    experts = make_experts(1, top_k, num_lanes, hidden_size, intermediate, dtype, seed)
    device = experts.x_RH.device
    random = torch.Generator().manual_seed(seed)
    lanes = iter(range(num_lanes)[::-1])
    return {
        "x_1H": experts.x_RH,
        "logits_1E": torch.randn(1, len(has_lane), generator=random).to(device),
        "gate_up_SNH": experts.gate_up_SNH,
        "down_SHI": experts.down_SHI,
        "table_lanes_E": torch.tensor(
            [next(lanes) if has else -1 for has in has_lane], dtype=torch.int32, device=device
        ),
        "lane_to_slot_L": experts.lane_to_slot_L,
        "load_E": torch.randint(0, 10**12, (len(has_lane),), generator=random).to(device),
        "increment_1": torch.ones(1, dtype=torch.int64, device=device),
        "top_k": top_k,
    }


def separate(arguments, activation="silu", **rule):
    """The output, in float32, and the counters by the separate ops' references."""
    a = dict(arguments)
    load, mask = a["load_E"].clone(), rule.pop("token_mask_1", None)
    weights, ids = topk_routing(a["logits_1E"], a["top_k"], token_mask_T=mask, backend="torch", **rule)
    lanes_E = a["table_lanes_E"]
    present = lanes_E >= 0
    offsets = torch.nn.functional.pad(present.cumsum(0), (1, 0)).int()
    shares = torch.full_like(lanes_E[present], 1 << SHARE_BITS)
    lanes, counts = select_replicas(
        *(ids, offsets, lanes_E[present], shares, load, 0),
        num_lanes=a["lane_to_slot_L"].numel(),
        increment_1=a["increment_1"],
        backend="torch",
    )
    config = gemm_config(64, 64, torch.float32, 1, 1, 1)
    schedule = build_schedule(lanes.view(-1), counts, block_m=config.block_m, backend="torch")
    common = {"config": config, "backend": "torch"}
    hidden = expert_up(
        a["x_1H"].float(),
        a["gate_up_SNH"].float(),
        a["lane_to_slot_L"],
        schedule,
        fanout=a["top_k"],
        activation=activation,
        **common,
    )
    rows = expert_down(hidden, a["down_SHI"].float(), a["lane_to_slot_L"], schedule, weights.view(-1), **common)
    return combine(rows, lanes, backend="torch"), load


@pytest.mark.parametrize("backend", ["torch", "triton"])
@settings(max_examples=12)
@given(
    has_lane=st.lists(st.booleans(), min_size=1, max_size=9),
    data=st.data(),
    hidden_size=st.integers(1, 40),
    intermediate=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(["silu", "gelu"]),
    score_function=st.sampled_from(["softmax", "sigmoid"]),
    renormalize=st.booleans(),
    masked=st.sampled_from([None, True, False]),
    seed=st.integers(0, 100),
)
def test_equals_the_separate_ops(
    make_experts, assert_close, backend, has_lane, data, hidden_size, intermediate, dtype, activation, score_function,
    renormalize, masked, seed,
):  # fmt: skip
    top_k = data.draw(st.integers(1, len(has_lane)))
    given_arguments = arguments(make_experts, has_lane, top_k, hidden_size, intermediate, dtype, seed)
    device = given_arguments["x_1H"].device
    rule = {
        "score_function": score_function,
        "renormalize": renormalize,
        "scale": 1.5,
        "bias_E": torch.randn(len(has_lane), generator=torch.Generator().manual_seed(seed)).to(device),
        "token_mask_1": None if masked is None else torch.tensor([masked], device=device),
    }
    expected, load = separate(given_arguments, activation, **rule)
    y = one_token(**given_arguments, **rule, activation=activation, backend=backend)
    assert_close(y, expected, scale=4)
    assert torch.equal(given_arguments["load_E"], load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sizes", [(128, 24), (130, 72), (60, 192), (16, 600)])
def test_several_blocks(make_experts, assert_close, monkeypatch, backend, sizes):
    monkeypatch.setattr("moe_kernels.one_token_triton._block", lambda size: 64)
    monkeypatch.setattr("moe_kernels.one_token_triton._ELEMENTS", 64)
    given_arguments = arguments(make_experts, 3 * [True], 2, *sizes, torch.bfloat16)
    expected, _ = separate(given_arguments)
    assert_close(one_token(**given_arguments, backend=backend), expected, scale=4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(33, 3), (64, 64), (128, 8), (256, 8), (1025, 5)])
def test_many_experts(make_experts, assert_close, backend, num_experts, top_k):
    """More than a warp has threads; every third is without a lane."""
    given_arguments = arguments(make_experts, [expert % 3 > 0 for expert in range(num_experts)], top_k, 16, 8)
    expected, load = separate(given_arguments)
    assert_close(one_token(**given_arguments, backend=backend), expected, scale=4)
    assert torch.equal(given_arguments["load_E"], load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_recorded_without_an_increment(make_experts, backend):
    given_arguments = arguments(make_experts, 2 * [True], 1, 16, 8) | {"increment_1": None}
    before = given_arguments["load_E"].clone()
    one_token(**given_arguments, backend=backend)
    assert torch.equal(given_arguments["load_E"], before)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_without_experts_is_zero(make_experts, backend):
    given_arguments = arguments(make_experts, 2 * [False], 2, 16, 8)
    given_arguments["lane_to_slot_L"].fill_(-1)
    assert (one_token(**given_arguments, backend=backend) == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bits_do_not_depend_on_slots_and_lanes(make_experts, backend):
    given_arguments = arguments(make_experts, 4 * [True], 2, 96, 40, torch.bfloat16)
    expected = one_token(**given_arguments, backend=backend)
    device = expected.device
    moved = dict(given_arguments)
    slots = given_arguments["lane_to_slot_L"].long()
    for name in ("gate_up_SNH", "down_SHI"):
        moved[name] = torch.full_like(given_arguments[name], float("nan"))
        moved[name][[4, 0, 3, 1]] = given_arguments[name][slots[given_arguments["table_lanes_E"].long()]]
    moved["table_lanes_E"] = torch.tensor([1, 5, 2, 0], dtype=torch.int32, device=device)
    moved["lane_to_slot_L"] = torch.tensor([1, 4, 3, -1, -1, 0], dtype=torch.int32, device=device)
    assert torch.equal(one_token(**moved, backend=backend), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_1H", lambda a: a["x_1H"].expand(2, -1)),
        ("gate_up_SNH", lambda a: a["gate_up_SNH"][:, 1:]),
        ("down_SHI", lambda a: a["down_SHI"].half()),
        ("lane_to_slot_L", lambda a: a["lane_to_slot_L"].long()),
        ("logits_1E", lambda a: a["logits_1E"][:, 1:]),
        ("load_E", lambda a: a["load_E"].int()),
        ("table_lanes_E", lambda a: a["table_lanes_E"][1:]),
        ("increment_1", lambda a: a["increment_1"].expand(2)),
        ("top_k", lambda a: 4),
        ("score_function", lambda a: "relu"),
        ("bias_E", lambda a: a["logits_1E"][0, 1:]),
        ("token_mask_1", lambda a: a["logits_1E"][0, :1]),
        ("activation", lambda a: "relu"),
    ],
)
def test_refuses(make_experts, name, change):
    given_arguments = arguments(make_experts, 3 * [True], 2, 16, 8)
    with pytest.raises(ValueError, match=name):
        one_token(**(given_arguments | {name: change(given_arguments)}))


@pytest.mark.gpu
def test_hooks_of_a_profiler_see_every_launch(make_experts):
    given_arguments = arguments(make_experts, 3 * [True], 2, 16, 8) | {"increment_1": None}
    expected = one_token(**given_arguments, backend="triton")  # compiles
    seen, hooks = [], triton.knobs.runtime.launch_enter_hook
    assert torch.equal(one_token(**given_arguments, backend="triton"), expected)
    hooks.add(seen.append)
    try:
        assert torch.equal(one_token(**given_arguments, backend="triton"), expected)
    finally:
        hooks.remove(seen.append)
    assert len(seen) == 3


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(make_experts, backend):
    given_arguments = arguments(make_experts, 2 * [True], 2, 16, 8)
    rule = ("softmax", True, 1.0, None, None, "silu")
    torch.library.opcheck(_one_token.registered, (*given_arguments.values(), *rule, backend))
