"""Routing, replicas, schedules, shares, sums: what takes a launch of a few microseconds."""

from __future__ import annotations

import re

import triton

from moe_kernels import RoutingRule
from moe_kernels.base.scan import MANY_KEYS, chunk_options, scan_options
from moe_kernels.local_schedule import FEW_ROWS, MOST_LANES, add_up_options
from moe_kernels.routing import routing_triton
from tests.moe_kernels.compiling.kernel import DTYPES, compile_small_one


def compile_small(arch: int) -> None:
    for dtype in DTYPES.values():
        compile_small_one(
            "combine",
            "_combine_kernel",
            {"rows_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"},
            {"TOP_K": 8, "BLOCK_H": 1024} | ({} if dtype == "bf16" else {"places_ptr": None}),
            arch,
        )
        absent = {"bias_ptr": None, "mask_ptr": None}
        for rule, bias in (
            (RoutingRule(), absent),
            (RoutingRule("sigmoid", renormalize=False), {}),
            (RoutingRule("sigmoid", num_groups=8, top_groups=4), {}),
            (RoutingRule("softmax", num_groups=8, top_groups=3, group_score="max"), absent),
            (RoutingRule("sqrtsoftplus", round_to="bfloat16"), {}),
        ):
            for experts in (8, 16, 48, 64, 128, 256) if dtype == "bf16" and rule == RoutingRule() else (64,):
                tokens, num_warps = routing_triton.tokens_and_warps(experts)
                compiled = compile_small_one(
                    "routing_triton",
                    "_topk_routing_kernel",
                    {
                        "logits_ptr": f"*{dtype}",
                        "bias_ptr": "*fp32",
                        "mask_ptr": "*i1",
                        "scale": "fp32",
                        "epsilon": "fp32",
                        "weights_ptr": "*fp32",
                    },
                    {
                        "TOP_K": 8,
                        "BLOCK_E": triton.next_power_of_2(experts),
                    }
                    | routing_triton.rule_constants(rule)
                    | {"TOKENS": tokens}
                    | bias,
                    arch,
                    num_warps=num_warps,
                )
                warps = set(re.findall(r"warpsPerCTA = \[(.*?)\]", compiled.asm["ttgir"]))
                assert warps <= {f"{num_warps}, 1", f"{num_warps}, 1, 1"}, f"a token must be within a warp: {warps}"
            types = {"logits_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "grad_weights_ptr": "*fp32"}
            constants = {"TOP_K": 8, "SCORE_FUNCTION": rule.score_function, "RENORMALIZE": rule.renormalize}
            constants |= {"TOKENS": tokens, "BLOCK_E": triton.next_power_of_2(experts)}
            types |= {"scale": "fp32", "epsilon": "fp32"}
            compile_small_one("routing_grad", "_topk_routing_grad_kernel", types, constants, arch, num_warps=num_warps)
    one_replica_each = {"offsets_ptr": None, "cumulative_ptr": None}
    for num_keys in (512, 2048, 8192, MANY_KEYS):
        options, few = scan_options(num_keys), num_keys < MANY_KEYS
        block, rows = {"BLOCK": options["BLOCK"]}, {"ROWS": options["ROWS"]}
        for absent in ({}, {"increment_ptr": None}, one_replica_each):
            compile_small_one(
                "replicas_triton",
                "_select_replicas_kernel" if few else "_count_replicas_kernel",
                {"load_ptr": "*i64", "increment_ptr": "*i64"},
                block | (rows if few else {}) | {"BLOCK_P": 512, "BY_QUOTA": False} | absent,
                arch,
                options["num_warps"],
            )
        compile_small_one(
            "replicas_triton",
            "_select_replicas_kernel" if few else "_count_replicas_kernel",
            {"load_ptr": "*i64", "increment_ptr": "*i64", "starts": "*i32"},
            block | (rows if few else {}) | {"BLOCK_P": 512, "BY_QUOTA": True},
            arch,
            options["num_warps"],
        )
        compile_small_one(
            "count_experts",
            "_count_experts_kernel" if few else "_add_chunks_kernel",
            {},
            block | (rows if few else {}),
            arch,
            options["num_warps"],
        )
        for extra in (0, 64):
            tiles = {"BLOCK_M": 128, "EXTRA_M": extra, "BLOCK_L": 256} | ({"chunks_ptr": None} if few else {})
            tiles |= {"places_ptr": None} if extra else {}
            compile_small_one(
                "schedule_triton", "_build_schedule_kernel", {}, block | rows | tiles, arch, options["num_warps"]
            )
    types = {"load_ptr": "*i64", "increment_ptr": "*i64"}
    for extra, experts, absent in ((0, 16, {}), (64, 512, {"increment_ptr": None})):
        tiles = {"BLOCK_M": 128, "EXTRA_M": extra} | ({"places_ptr": None} if extra else {}) | absent
        options = scan_options(FEW_ROWS)
        few = tiles | {"BLOCK": options["BLOCK"], "ROWS": options["ROWS"], "BLOCK_E": experts}
        compile_small_one("local_schedule", "_schedule_few_kernel", types, few, arch, options["num_warps"])
        options = chunk_options(is_sorted=True)
        many = tiles | {"CHUNK": options["CHUNK"], "BLOCK": 512, "BLOCK_L": experts}
        compile_small_one("local_schedule", "_schedule_many_kernel", types, many, arch, options["num_warps"])
        count = {"CHUNK": options["CHUNK"], "BLOCK_B": experts}
        compile_small_one("local_schedule", "_count_lanes_kernel", {}, count, arch, options["num_warps"])
    options = add_up_options()
    compile_small_one(
        "local_schedule", "_add_up_chunks_kernel", {}, {"BLOCK": options["BLOCK"]}, arch, options["num_warps"]
    )
    options = chunk_options(is_sorted=True)
    many = {"BLOCK_M": 128, "EXTRA_M": 0, "CHUNK": options["CHUNK"], "BLOCK": 512, "BLOCK_L": MOST_LANES + 1}
    compiled = compile_small_one("local_schedule", "_schedule_many_kernel", types, many, arch, options["num_warps"])
    assert compiled.metadata.shared <= 48 << 10  # which every GPU has
    options = chunk_options()
    for block in (2, 128, 512):
        count = {"CHUNK": options["CHUNK"], "BLOCK_B": block}
        compile_small_one("scan", "_count_chunks_kernel", {}, count, arch, options["num_warps"])
    options = chunk_options()
    chunk = {"CHUNK": options["CHUNK"]}
    for absent in ({}, one_replica_each):
        find = chunk | {"BY_QUOTA": False} | absent
        compile_small_one("replicas_triton", "_find_lanes_kernel", {}, find, arch, options["num_warps"])
    compile_small_one(
        "replicas_triton", "_find_lanes_kernel", {}, chunk | {"BY_QUOTA": True}, arch, options["num_warps"]
    )
    for cost, block_e in ((0, 256), (40, 1024)):
        for absent in ({}, {"offsets_ptr": None}):
            solve = {"LANES": 9, "EXPERT_COST": cost, "BLOCK_E": block_e} | absent
            compile_small_one("solve_shares_rows", "_start_kernel", {}, solve | {"BLOCK_V": 8192 // block_e}, arch, 8)
            compiled = compile_small_one(
                "solve_shares_rows", "_solve_shares_kernel", {}, solve | {"BLOCK_W": 32}, arch, 1
            )
            assert "redux.sync.add.s32" in compiled.asm["ptx"], "a sum over ranks must be one instruction"
    for ranks, block_e in ((4, 256), (32, 1024)):
        solve = {"LANES": 9, "BLOCK_E": block_e, "BLOCK_W": 32, "PAIRS": ranks, "BLOCK_V": ranks, "BLOCK_F": 32}
        solve["SKIPS"] = ranks > 16
        warps = min(16, block_e // 32)
        compiled = compile_small_one("solve_shares_pairs", "_solve_pairs_kernel", {}, solve, arch, warps)
        assert "shfl.sync.idx" in compiled.asm["ptx"], "a step of pairs must need no shared memory"
    for absent in ({}, {"places_ptr": None}):
        compile_small_one("schedule_triton", "_place_rows_kernel", {}, chunk | absent, arch, options["num_warps"])
