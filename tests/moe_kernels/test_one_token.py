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

ONE = 1 << SHARE_BITS


def table_of(replicas, device):
    """offsets, lanes and cumulative shares; lane by lane in the order of the experts, shares equal but for rounding."""
    offsets, cumulative = [0], []
    for count in replicas:
        offsets.append(offsets[-1] + count)
        cumulative += [ONE * (replica + 1) // count for replica in range(count)]
    lanes = list(range(offsets[-1]))[::-1]
    return tuple(torch.tensor(values, dtype=torch.int32, device=device) for values in (offsets, lanes, cumulative))


def arguments(make_experts, replicas, top_k, hidden_size, intermediate, dtype=torch.float32, seed=0):
    num_lanes = max(sum(replicas), 1)
    experts = make_experts(1, top_k, num_lanes, hidden_size, intermediate, dtype, seed)
    device = experts.x_RH.device
    random = torch.Generator().manual_seed(seed)
    offsets, lanes, cumulative = table_of(replicas, device)
    return {
        "x_1H": experts.x_RH,
        "logits_1E": torch.randn(1, len(replicas), generator=random).to(device),
        "gate_up_SNH": experts.gate_up_SNH,
        "down_SHI": experts.down_SHI,
        "lane_to_slot_L": experts.lane_to_slot_L,
        "table_offsets_E1": offsets,
        "table_lanes_P": lanes,
        "table_cumulative_P": cumulative,
        "load_E": torch.randint(0, 10**12, (len(replicas),), generator=random).to(device),
        "increment_1": torch.ones(1, dtype=torch.int64, device=device),
        "rank_start": seed * 7_654_321 % ONE,
        "top_k": top_k,
    }


def separate(arguments, activation="silu", **rule):
    """The output, in float32, and the counters by the separate ops' references."""
    a = dict(arguments)
    load, mask = a["load_E"].clone(), rule.pop("token_mask_1", None)
    weights, ids = topk_routing(a["logits_1E"], a["top_k"], token_mask_T=mask, backend="torch", **rule)
    lanes, counts = select_replicas(
        ids,
        a["table_offsets_E1"],
        a["table_lanes_P"],
        a["table_cumulative_P"],
        load,
        a["rank_start"],
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
    replicas=st.lists(st.integers(0, 3), min_size=1, max_size=7),
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
    make_experts, assert_close, backend, replicas, data, hidden_size, intermediate, dtype, activation, score_function,
    renormalize, masked, seed,
):  # fmt: skip
    top_k = data.draw(st.integers(1, len(replicas)))
    given_arguments = arguments(make_experts, replicas, top_k, hidden_size, intermediate, dtype, seed)
    device = given_arguments["x_1H"].device
    rule = {
        "score_function": score_function,
        "renormalize": renormalize,
        "scale": 1.5,
        "bias_E": torch.randn(len(replicas), generator=torch.Generator().manual_seed(seed)).to(device),
        "token_mask_1": None if masked is None else torch.tensor([masked], device=device),
    }
    expected, load = separate(given_arguments, activation, **rule)
    y = one_token(**given_arguments, **rule, activation=activation, backend=backend)
    assert_close(y, expected, scale=4)
    assert torch.equal(given_arguments["load_E"], load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sizes", [(128, 24), (130, 72), (60, 192)])
def test_several_blocks(make_experts, assert_close, monkeypatch, backend, sizes):
    monkeypatch.setattr("moe_kernels.one_token_triton._block", lambda size: 64)
    monkeypatch.setattr("moe_kernels.one_token_triton._ELEMENTS", 64)
    given_arguments = arguments(make_experts, [1, 1, 1], 2, *sizes, torch.bfloat16)
    expected, _ = separate(given_arguments)
    assert_close(one_token(**given_arguments, backend=backend), expected, scale=4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_recorded_without_an_increment(make_experts, backend):
    given_arguments = arguments(make_experts, [1, 2], 1, 16, 8) | {"increment_1": None}
    before = given_arguments["load_E"].clone()
    one_token(**given_arguments, backend=backend)
    assert torch.equal(given_arguments["load_E"], before)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_without_experts_is_zero(make_experts, backend):
    given_arguments = arguments(make_experts, [0, 0], 2, 16, 8)
    given_arguments["lane_to_slot_L"].fill_(-1)
    assert (one_token(**given_arguments, backend=backend) == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bits_do_not_depend_on_slots_and_lanes(make_experts, backend):
    given_arguments = arguments(make_experts, [1, 1, 1, 1], 2, 96, 40, torch.bfloat16)
    expected = one_token(**given_arguments, backend=backend)
    device = expected.device
    moved = dict(given_arguments)
    slots = given_arguments["lane_to_slot_L"].long()
    for name in ("gate_up_SNH", "down_SHI"):
        moved[name] = torch.full_like(given_arguments[name], float("nan"))
        moved[name][[4, 0, 3, 1]] = given_arguments[name][slots[given_arguments["table_lanes_P"].long()]]
    moved["table_lanes_P"] = torch.tensor([1, 5, 2, 0], dtype=torch.int32, device=device)
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
        ("table_offsets_E1", lambda a: a["table_offsets_E1"][1:]),
        ("increment_1", lambda a: a["increment_1"].expand(2)),
        ("rank_start", lambda a: -1),
        ("top_k", lambda a: 4),
        ("score_function", lambda a: "relu"),
        ("bias_E", lambda a: a["logits_1E"][0, 1:]),
        ("token_mask_1", lambda a: a["logits_1E"][0, :1]),
        ("activation", lambda a: "relu"),
    ],
)
def test_refuses(make_experts, name, change):
    given_arguments = arguments(make_experts, [1, 1, 1], 2, 16, 8)
    with pytest.raises(ValueError, match=name):
        one_token(**(given_arguments | {name: change(given_arguments)}))


@pytest.mark.gpu
def test_hooks_of_a_profiler_see_every_launch(make_experts):
    given_arguments = arguments(make_experts, [1, 1, 1], 2, 16, 8) | {"increment_1": None}
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
    given_arguments = arguments(make_experts, [1, 2], 2, 16, 8)
    rule = ("softmax", True, 1.0, None, None, "silu")
    torch.library.opcheck(_one_token.registered, (*given_arguments.values(), *rule, backend))
