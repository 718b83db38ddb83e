"""What is no tensor, no table, no integer, or means nothing, is refused by every op: a ValueError names argument and value."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from moe_kernels import (
    ExpertMatrices,
    GemmConfig,
    LoadCounter,
    ReplicaTable,
    RoutingRule,
    build_schedule,
    combine,
    count_experts,
    dequantise,
    expert_down,
    expert_mlp,
    expert_rows,
    expert_up,
    gemm_config,
    gemm_configs,
    gradient_configs,
    local_experts,
    local_forward,
    moe_experts,
    pack_nibbles,
    pack_words,
    quantise_rows,
    quantise_weights,
    select_by_quota,
    select_replicas,
    solve_shares,
    topk_routing,
    unpack_nibbles,
    unpack_words,
)
from moe_kernels.base.backend import INTERPRETED

T, K, E, H, I = 3, 2, 4, 32, 16  # noqa: E741
X_TH, LOGITS_TE = torch.ones(T, H), torch.ones(T, E)
IDS_TK = torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.int32)
LANES = torch.arange(E, dtype=torch.int32)
TABLE, MATRICES = ReplicaTable(LANES, LANES), ExpertMatrices(torch.ones(E, 2 * I, H), torch.ones(E, H, I))
COUNTS_E = torch.tensor([2, 2, 1, 1], dtype=torch.int32)
SIZES = {"num_tokens": T, "top_k": K, "num_experts": E, "dtype": torch.float32}
LAYER = {"hidden_size": H, "intermediate_size": I} | SIZES
UP, DOWN = gemm_configs(**LAYER)
SCHEDULE = build_schedule(IDS_TK.view(-1), COUNTS_E, block_m=UP.block_m, extra_m=UP.schedule_extra_m, backend="torch")
INT4, INT4_SCALE, _ = quantise_weights(torch.ones(E, 2 * I, H), "int4")
FP8, FP8_SCALE, _ = quantise_weights(torch.ones(E, 2 * I, H), "fp8_block")


def load() -> LoadCounter:
    return LoadCounter(torch.zeros(E, dtype=torch.int64))


OPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "topk_routing": (topk_routing, {"logits_TE": LOGITS_TE, "top_k": K, "rule": RoutingRule()}),
    "count_experts": (count_experts, {"expert_ids_TK": IDS_TK, "num_experts": E}),
    "select_replicas": (
        select_replicas,
        {"expert_ids_TK": IDS_TK, "table": TABLE, "load": load(), "rank_start": 0, "num_lanes": E},
    ),
    "solve_shares": (solve_shares, {"counts_WE": COUNTS_E[None], "table": TABLE, "lanes_per_rank": E, "rank": 0}),
    "select_by_quota": (
        select_by_quota,
        {
            "expert_ids_TK": IDS_TK,
            "table": TABLE,
            "quotas_P": COUNTS_E,
            "before_E": 0 * COUNTS_E,
            "load": load(),
            "num_lanes": E,
        },
    ),
    "build_schedule": (build_schedule, {"lanes_N": IDS_TK.view(-1), "counts_L": COUNTS_E, "block_m": 16}),
    "combine": (combine, {"rows_NH": torch.ones(T * K, H), "lanes_TK": IDS_TK}),
    "expert_up": (
        expert_up,
        {
            "x_RH": X_TH,
            "matrices": MATRICES,
            "lane_to_slot_L": LANES,
            "schedule": SCHEDULE,
            "fanout": K,
            "config": UP,
        },
    ),
    "expert_down": (
        expert_down,
        {
            "hidden_NI": torch.ones(T * K, I),
            "matrices": MATRICES,
            "lane_to_slot_L": LANES,
            "schedule": SCHEDULE,
            "row_weights_N": torch.ones(T * K),
            "config": DOWN,
        },
    ),
    "expert_mlp": (
        expert_mlp,
        {
            "x_RH": X_TH,
            "matrices": MATRICES,
            "lane_to_slot_L": LANES,
            "schedule": SCHEDULE,
            "row_weights_N": torch.ones(T * K),
            "fanout": K,
            "configs": (UP, DOWN),
        },
    ),
    "expert_rows": (
        expert_rows,
        {
            "x_RH": X_TH,
            "matrices": MATRICES,
            "lane_to_slot_L": LANES,
            "schedule": SCHEDULE,
            "row_weights_N": torch.ones(T * K),
            "fanout": K,
            "configs": (UP, DOWN),
            "gradient_configs": gradient_configs(**LAYER),
        },
    ),
    "local_forward": (
        local_forward,
        {
            "x_TH": X_TH,
            "logits_TE": LOGITS_TE,
            "matrices": MATRICES,
            "table": TABLE,
            "load": load(),
            "top_k": K,
            "rule": RoutingRule(),
        },
    ),
    "local_experts": (
        local_experts,
        {
            "x_TH": X_TH,
            "expert_ids_TK": IDS_TK,
            "expert_weights_TK": torch.ones(T, K),
            "matrices": MATRICES,
            "table": TABLE,
            "load": load(),
        },
    ),
    "moe_experts": (
        moe_experts,
        {"x_TH": X_TH, "expert_ids_TK": IDS_TK, "expert_weights_TK": torch.ones(T, K), "matrices": MATRICES},
    ),
    "quantise_rows": (quantise_rows, {"x_RH": X_TH}),
    "gemm_config": (gemm_config, {"n": H, "k": I} | SIZES),
    "gemm_configs": (gemm_configs, LAYER),
    "gradient_configs": (gradient_configs, LAYER),
    "GemmConfig": (GemmConfig, {"block_m": 16, "block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2}),
    "quantise_weights": (quantise_weights, {"weight": torch.ones(E, 2 * I, H), "scheme": "fp8_block"}),
    "dequantise": (dequantise, {"weight": INT4, "scale": INT4_SCALE, "zero": None, "scheme": "int4"}),
    "pack_nibbles": (pack_nibbles, {"codes": torch.zeros(2, 32, dtype=torch.uint8)}),
    "unpack_nibbles": (unpack_nibbles, {"packed": torch.zeros(2, 32, dtype=torch.uint8)}),
    "pack_words": (pack_words, {"codes": torch.zeros(2, 32, dtype=torch.uint8), "scheme": "int4"}),
    "unpack_words": (unpack_words, {"packed": torch.zeros(2, 32, dtype=torch.uint8), "scheme": "int4"}),
}


@pytest.mark.parametrize("name", OPS)
def test_what_the_others_change_is_right(name):
    op, arguments = OPS[name]
    op(**arguments)


def assert_refused(name: str, change: dict[str, Any], *said: str) -> None:
    op, arguments = OPS[name]
    with pytest.raises(ValueError) as refusal:
        op(**(arguments | change))
    assert all(one in str(refusal.value) for one in said), str(refusal.value)


TENSORS = [
    (name, argument)
    for name, (_, arguments) in OPS.items()
    for argument, value in arguments.items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("value", [None, [1]])
@pytest.mark.parametrize(("name", "argument"), [one for one in TENSORS if one != ("dequantise", "scale")])
def test_what_is_no_tensor_is_refused(name, argument, value):
    assert_refused(name, {argument: value}, f"{argument} is a {type(value).__name__}: must be a")


INTEGERS = [
    (name, argument)
    for name, (_, arguments) in OPS.items()
    for argument, value in arguments.items()
    if isinstance(value, int)
]


@pytest.mark.parametrize("value", [None, 2.0, "2", True])
@pytest.mark.parametrize(("name", "argument"), INTEGERS)
def test_what_is_no_integer_is_refused(name, argument, value):
    assert_refused(name, {argument: value}, f"{argument}={value!r}: must be an integer")


@pytest.mark.parametrize(("name", "argument"), INTEGERS)
def test_integers_of_numpy_are_taken(name, argument):
    """By the kernels too: what they get are ints."""
    op, arguments = OPS[name]
    given = arguments | {argument: np.uint8(arguments[argument])}
    if "backend" not in inspect.signature(op).parameters:
        assert repr(op(**given)) == repr(op(**arguments))
        return
    for backend in ("torch", "triton") if INTERPRETED else ("torch",):  # the arguments are on the CPU
        op(**given, backend=backend)


@pytest.mark.parametrize(
    ("name", "argument", "kind"),
    [
        ("topk_routing", "rule", "RoutingRule"),
        ("expert_up", "matrices", "ExpertMatrices"),
        ("expert_up", "schedule", "TileSchedule"),
        ("expert_up", "config", "GemmConfig"),
        ("expert_down", "matrices", "ExpertMatrices"),
        ("expert_down", "schedule", "TileSchedule"),
        ("expert_down", "config", "GemmConfig"),
        ("expert_mlp", "x_RH", "Tensor"),
        ("expert_mlp", "matrices", "ExpertMatrices"),
        ("expert_mlp", "schedule", "TileSchedule"),
        ("expert_mlp", "configs", "tuple"),
        ("local_forward", "matrices", "ExpertMatrices"),
        ("local_forward", "table", "ReplicaTable"),
        ("local_forward", "load", "LoadCounter"),
        ("local_forward", "rule", "RoutingRule"),
        ("local_experts", "matrices", "ExpertMatrices"),
        ("local_experts", "table", "ReplicaTable"),
        ("local_experts", "load", "LoadCounter"),
        ("select_replicas", "table", "ReplicaTable"),
        ("select_replicas", "load", "LoadCounter"),
        ("select_by_quota", "load", "LoadCounter"),
        ("solve_shares", "table", "ReplicaTable"),
        ("moe_experts", "matrices", "ExpertMatrices"),
        ("expert_rows", "matrices", "ExpertMatrices"),
        ("expert_rows", "schedule", "TileSchedule"),
        ("expert_rows", "configs", "tuple"),
        ("expert_rows", "gradient_configs", "GradientConfigs"),
    ],
)
def test_what_is_of_another_kind_is_refused(name, argument, kind):
    assert_refused(name, {argument: None}, f"{argument} is a NoneType: must be a {kind}")


@pytest.mark.parametrize("name", ["expert_mlp", "expert_rows"])
def test_configs_that_are_no_pair_are_refused(name):
    assert_refused(name, {"configs": (UP,)}, "configs has 1 entries: must be a pair of GemmConfig")
    assert_refused(name, {"configs": (UP, None)}, "configs[1] is a NoneType: must be a GemmConfig")


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (ExpertMatrices(None, torch.ones(E, H, I)), "matrices.gate_up_SNH is a NoneType: must be a"),
        (ExpertMatrices(torch.ones(E, 2 * I, H), None), "matrices.down_SHI is a NoneType: must be a"),
        (ExpertMatrices(MATRICES.gate_up_SNH, MATRICES.down_SHI, activation=None), "activation=None: must be one of"),
    ],
)
def test_matrices_that_are_none_are_refused(matrices, message):
    assert_refused("moe_experts", {"matrices": matrices}, message)


@pytest.mark.parametrize("name", ["gemm_configs", "gradient_configs"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0: must be at least 1"),
        ({"intermediate_size": -1}, "intermediate_size=-1: must be at least 1"),
        ({"num_tokens": -1}, "num_tokens=-1: must be at least 0"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"num_experts": 0}, "num_experts=0: must be at least 1"),
        ({"num_experts": 1}, "num_experts=1: must be at least top_k=2"),
        ({"dtype": torch.int8}, "dtype=torch.int8: must be torch.float32, torch.float16 or torch.bfloat16"),
    ],
)
def test_sizes_out_of_range_are_refused(name, change, message):
    assert_refused(name, change, message)


FP8_PARTS = {"weight": FP8, "scale": FP8_SCALE, "scheme": "fp8_block"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("quantise_weights", {"weight": torch.ones(E, 2 * I, H).int()}, "weight has dtype torch.int32"),
        (
            "quantise_weights",
            {"weight": torch.ones(H)},
            "weight has dtype torch.float32 and shape (32,): must be floats",
        ),
        ("quantise_weights", {"blocks_of": 7}, "blocks_of=7: must be None or divide the 32 rows"),
        ("quantise_weights", {"blocks_of": -1}, "blocks_of=-1: must be None or divide the 32 rows"),
        ("dequantise", {"weight": FP8}, "weight is of torch.float8_e4m3fn: must be torch.uint8 with scheme='int4'"),
        ("dequantise", {"scale": INT4_SCALE.view(torch.int16)}, "scale is of torch.int16: must be torch.float32 or"),
        ("dequantise", {"zero": INT4_SCALE}, "zero is of torch.bfloat16: must be torch.uint8"),
        ("dequantise", {"zero": INT4[:, :1, :1]}, "zero has shape (4, 1, 1): must be that of scale"),
        ("dequantise", {"columns": 2.5}, "columns=2.5: must be an integer"),
        ("dequantise", FP8_PARTS | {"weight": INT4}, "weight is of torch.uint8: must be torch.float8_e4m3fn"),
        ("dequantise", FP8_PARTS | {"zero": FP8_SCALE}, "zero is of torch.float32: must be None"),
        ("dequantise", FP8_PARTS | {"blocks_of": 7}, "blocks_of=7: must be None or divide the 32 rows"),
        ("pack_words", {"scheme": "fp8_block"}, "scheme='fp8_block': must be one of ('int4', 'mxfp4')"),
        ("unpack_words", {"scheme": None}, "scheme=None: must be one of ('int4', 'mxfp4')"),
        ("pack_words", {"codes": torch.tensor(1, dtype=torch.uint8)}, "codes has dtype torch.uint8 and shape ()"),
        ("unpack_nibbles", {"packed": torch.tensor(1, dtype=torch.uint8)}, "packed has dtype torch.uint8 and shape ()"),
    ],
)
def test_bytes_that_mean_nothing_are_refused(name, change, message):
    assert_refused(name, change, message)


@pytest.mark.parametrize("name", ["local_forward", "local_experts"])
def test_a_table_has_a_lane_for_each_expert(name):
    few = ReplicaTable(OPS[name][1]["table"].lanes_P, LANES[: E - 1])
    assert_refused(name, {"table": few}, f"table.lane_to_slot_L has {E - 1} lanes: must have at least num_experts={E}")
