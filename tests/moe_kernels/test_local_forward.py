"""All of a forward as one op, against the separate ops. A single token has kernels of its own."""

from dataclasses import replace

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import (
    SHARE_BITS,
    LoadCounter,
    ReplicaTable,
    RoutingRule,
    build_schedule,
    combine,
    expert_down,
    expert_up,
    gemm_configs,
    has_tma,
    local_experts,
    local_forward,
    select_replicas,
    topk_routing,
)
from moe_kernels.local_experts import _local_experts
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
    one = torch.ones(1, dtype=torch.int64, device=device)
    return {
        "x_TH": experts.x_RH,
        "logits_TE": torch.randn(num_tokens, num_experts, generator=random).to(device),
        "matrices": experts.matrices,
        "table": ReplicaTable(
            torch.arange(spare_lanes, num_lanes, dtype=torch.int32, device=device).flip(0), experts.lane_to_slot_L
        ),
        "load": LoadCounter(torch.randint(0, 10**12, (num_experts,), generator=random).to(device), one),
        "top_k": top_k,
        "rule": RoutingRule(),
    }


def separate(arguments, backend="torch", configs=None, bias_E=None, token_mask_T=None):
    """The output and the counters by the separate ops."""
    options = {"bias_E": bias_E, "token_mask_T": token_mask_T, "backend": backend}
    weights, ids = topk_routing(arguments["logits_TE"], arguments["top_k"], arguments["rule"], **options)
    given_experts = {"expert_ids_TK": ids, "expert_weights_TK": weights}
    return separate_experts(arguments | given_experts, backend, configs)


def separate_experts(a, backend, configs):
    """`separate` after the routing."""
    load, table, slots = a["load"].load_E.clone(), a["table"], a["table"].lane_to_slot_L
    ids, weights = a["expert_ids_TK"], a["expert_weights_TK"]
    num_experts = load.numel()
    table = replace(
        table,
        offsets_E1=torch.arange(num_experts + 1, dtype=torch.int32, device=load.device),
        cumulative_P=torch.full_like(table.lanes_P, 1 << SHARE_BITS),
    )
    counter = LoadCounter(load, a["load"].increment_1)
    lanes, counts = select_replicas(ids, table, counter, 0, num_lanes=slots.numel(), backend=backend)
    up, down = configs or gemm_configs(64, 64, torch.float32, 1, 1, 1)
    schedule = build_schedule(lanes.view(-1), counts, block_m=up.block_m, extra_m=up.schedule_extra_m, backend=backend)
    hidden = expert_up(a["x_TH"], a["matrices"], slots, schedule, fanout=ids.shape[1], config=up, backend=backend)
    rows = expert_down(hidden, a["matrices"], slots, schedule, weights.view(-1), config=down, backend=backend)
    return combine(rows, lanes, backend=backend), load


def in_float32(arguments):
    matrices = arguments["matrices"]
    exact = replace(matrices, gate_up_SNH=matrices.gate_up_SNH.float(), down_SHI=matrices.down_SHI.float())
    return arguments | {"x_TH": arguments["x_TH"].float(), "matrices": exact}


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
    given_arguments["rule"] = RoutingRule(score_function, renormalize, 1.5)
    given_arguments["matrices"] = replace(given_arguments["matrices"], activation=activation)
    options = {
        "bias_E": torch.randn(num_experts, generator=random).to(device),
        "token_mask_T": torch.randint(2, (num_tokens,), generator=random).bool().to(device) if masked else None,
    }
    expected, load = separate(in_float32(given_arguments), **options)
    y = local_forward(**given_arguments, **options, backend=backend)
    assert_close(y, expected, scale=4)
    assert torch.equal(given_arguments["load"].load_E, load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(2, 2), (100, 2), pytest.param(300, 4, marks=pytest.mark.gpu)])
def test_bits_are_those_of_the_separate_ops(make_experts, backend, num_tokens, top_k):
    """On a GPU with TMA too."""
    dtype, sizes = torch.bfloat16, (6, top_k, 64, 48)
    given_arguments = arguments(make_experts, *sizes, dtype, num_tokens=num_tokens, spare_lanes=1)
    device = given_arguments["x_TH"].device
    up, down = gemm_configs(64, 48, dtype, num_tokens, top_k, 6, tma=has_tma(device))
    expected, load = separate(given_arguments, backend, configs=(up, down))
    assert torch.equal(local_forward(**given_arguments, backend=backend), expected)
    assert torch.equal(given_arguments["load"].load_E, load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sizes", [(128, 24), (130, 72), (60, 192), (16, 600)])
def test_several_blocks(make_experts, assert_close, monkeypatch, backend, sizes):
    monkeypatch.setattr("moe_kernels.one_token.one_token._block", lambda size: 64)
    monkeypatch.setattr("moe_kernels.one_token.one_token._ELEMENTS", 64)
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
    assert torch.equal(given_arguments["load"].load_E, load)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_recorded_without_an_increment(make_experts, backend):
    given_arguments = arguments(make_experts, 2, 1, 16, 8)
    given_arguments["load"] = replace(given_arguments["load"], increment_1=None)
    before = given_arguments["load"].load_E.clone()
    local_forward(**given_arguments, backend=backend)
    assert torch.equal(given_arguments["load"].load_E, before)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_bits_do_not_depend_on_slots_and_lanes(make_experts, backend, num_tokens):
    given_arguments = arguments(make_experts, 4, 2, 96, 40, torch.bfloat16, num_tokens=num_tokens)
    expected = local_forward(**given_arguments, backend=backend)
    device = expected.device
    moved = dict(given_arguments)
    table, matrices = given_arguments["table"], given_arguments["matrices"]
    slots, fields = table.lane_to_slot_L.long(), {}
    for name in ("gate_up_SNH", "down_SHI"):
        weights = getattr(matrices, name)
        fields[name] = torch.full_like(weights, float("nan"))
        fields[name][[4, 0, 3, 1]] = weights[slots[table.lanes_P.long()]]
    moved["matrices"] = replace(matrices, **fields)
    moved["table"] = ReplicaTable(
        torch.tensor([1, 5, 2, 0], dtype=torch.int32, device=device),
        torch.tensor([1, 4, 3, -1, -1, 0], dtype=torch.int32, device=device),
    )
    assert torch.equal(local_forward(**moved, backend=backend), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_TH", lambda a: {"x_TH": a["x_TH"][:, ::2]}),
        ("matrices.gate_up_SNH", lambda a: {"gate_up_SNH": a["matrices"].gate_up_SNH[:, 1:]}),
        ("matrices.down_SHI", lambda a: {"down_SHI": a["matrices"].down_SHI.half()}),
        ("activation", lambda a: {"activation": "relu"}),
        ("table.lane_to_slot_L", lambda a: {"lane_to_slot_L": a["table"].lane_to_slot_L.long()}),
        ("table.lanes_P", lambda a: {"lanes_P": a["table"].lanes_P[1:]}),
        ("table.offsets_E1", lambda a: {"offsets_E1": a["table"].lanes_P, "cumulative_P": a["table"].lanes_P}),
        (
            "table.offsets_E1",  # a right one, but of replicas
            lambda a: {
                "offsets_E1": torch.arange(4, dtype=torch.int32, device=a["x_TH"].device),
                "cumulative_P": torch.full_like(a["table"].lanes_P, 2**SHARE_BITS),
            },
        ),
        ("load.load_E", lambda a: {"load_E": a["load"].load_E.int()}),
        ("load.increment_1", lambda a: {"increment_1": a["load"].increment_1.expand(2)}),
        ("logits_TE", lambda a: {"logits_TE": a["logits_TE"][:, 1:]}),
        ("top_k", lambda a: {"top_k": 4}),
        ("rule.score_function", lambda a: {"score_function": "relu"}),
        ("bias_E", lambda a: {"bias_E": a["logits_TE"][0, 1:]}),
        ("token_mask_T", lambda a: {"token_mask_T": a["logits_TE"][0, :1]}),
        ("backend", lambda a: {"backend": "cuda"}),
    ],
)
def test_refuses(make_experts, name, change):
    given_arguments = arguments(make_experts, 3, 2, 16, 8)
    with pytest.raises(ValueError, match=name):
        local_forward(**changed(given_arguments, change(given_arguments)))


def changed(arguments, change):
    """`arguments` with others, or with other fields of the structures among them."""
    found = dict(arguments)
    for name, value in change.items():
        owner = next((key for key, kept in arguments.items() if hasattr(kept, name)), None)
        found |= {name: value} if owner is None else {owner: replace(found[owner], **{name: value})}
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "launches"), [(1, 3), (5, 5)])
def test_hooks_of_a_profiler_see_every_launch(make_experts, num_tokens, launches):
    given_arguments = arguments(make_experts, 3, 2, 16, 8, num_tokens=num_tokens)
    given_arguments["load"] = replace(given_arguments["load"], increment_1=None)
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
    flat = _local_forward.flatten(*given_arguments.values(), None, None, backend)
    torch.library.opcheck(_local_forward.registered, flat)


def of_experts(arguments, backend, device):
    """The arguments of `local_experts` after the routing of `arguments`."""
    weights, ids = topk_routing(arguments["logits_TE"], arguments["top_k"], arguments["rule"], backend=backend)
    kept = {name: arguments[name] for name in ("matrices", "table", "load")}
    return {"x_TH": arguments["x_TH"], "expert_ids_TK": ids, "expert_weights_TK": weights} | kept


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_experts_of_ids_from_elsewhere(make_experts, device, backend, num_tokens):
    """The bits and counts of the separate ops, also of one token, and with ids that name no expert."""
    given_arguments = arguments(make_experts, 4, 2, 64, 48, torch.bfloat16, num_tokens=num_tokens, spare_lanes=1)
    given_experts = of_experts(given_arguments, backend, device)
    if num_tokens > 2:
        given_experts["expert_ids_TK"][0] = -1
        given_experts["expert_ids_TK"][2, 1] = 4
    configs = gemm_configs(64, 48, torch.bfloat16, num_tokens, 2, 4, tma=has_tma(given_arguments["x_TH"].device))
    expected, load = separate_experts(given_experts, backend, configs)
    assert torch.equal(local_experts(**given_experts, backend=backend), expected)
    assert torch.equal(given_experts["load"].load_E, load)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_TH", lambda a: {"x_TH": a["x_TH"].double()}),
        ("matrices.down_SHI", lambda a: {"down_SHI": a["matrices"].down_SHI.half()}),
        ("table.offsets_E1", lambda a: {"offsets_E1": a["table"].lanes_P, "cumulative_P": a["table"].lanes_P}),
        ("expert_ids_TK", lambda a: {"expert_ids_TK": a["expert_ids_TK"].long()}),
        ("expert_ids_TK", lambda a: {"expert_ids_TK": a["expert_ids_TK"].repeat(2, 1)}),
        ("expert_weights_TK", lambda a: {"expert_weights_TK": a["expert_weights_TK"].half()}),
        ("expert_weights_TK", lambda a: {"expert_weights_TK": a["expert_weights_TK"][:, :1]}),
    ],
)
def test_experts_refuse(make_experts, device, name, change):
    given_experts = of_experts(arguments(make_experts, 3, 2, 16, 8), "torch", device)
    with pytest.raises(ValueError, match=name):
        local_experts(**changed(given_experts, change(given_experts)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_of_experts(make_experts, device, backend):
    given_experts = of_experts(arguments(make_experts, 2, 2, 16, 8, num_tokens=3), backend, device)
    flat = _local_experts.flatten(*given_experts.values(), backend)
    torch.library.opcheck(_local_experts.registered, flat)


def test_a_backward_through_the_registered_op_is_an_error(make_experts, device):
    """As compiled graphs call it; never a gradient that is silently missing."""
    given_experts = of_experts(arguments(make_experts, 2, 2, 16, 8, num_tokens=3), "torch", device)
    given_experts["x_TH"].requires_grad_()
    flat = _local_experts.flatten(*given_experts.values(), "torch")
    y = _local_experts.registered(*flat)
    with pytest.raises(RuntimeError, match="local_experts has no gradient: call it under"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(_local_experts.registered(*flat), y) and not _local_experts.registered(*flat).requires_grad
