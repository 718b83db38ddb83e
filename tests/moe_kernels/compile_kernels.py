"""Compile every kernel variant for real GPUs, without one; run by `test_compile.py` in a process without interpreter.

Prints one line per variant: name, architecture, shared memory in bytes, registers spilled (by ptxas, if it says).
"""

from __future__ import annotations

import bisect
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from moe_kernels import (  # noqa: F401
    GemmConfig,
    GradientConfigs,
    RoutingRule,
    gemm_config,
    local_forward,
)
from moe_kernels.base.scan import MANY_KEYS, chunk_options, scan_options
from moe_kernels.gradients.experts_grad_weights_tma import most_registers, num_parts
from moe_kernels.gradients.gradient_configs import _TABLE_16_BIT, _TABLE_32_BIT, _TABLE_HOPPER
from moe_kernels.gradients.gradient_configs import _TABLE_TMA as _GRADIENTS_TMA
from moe_kernels.local_schedule import FEW_ROWS
from moe_kernels.operands.config import _FP8_RING, _INTERMEDIATE, _KEPT_TMA, _TABLE_TMA, _quantised_table
from moe_kernels.peers import (  # noqa: F401
    combine_home,
    expand_rows,
    gather_counts,
    meet_peers,
    receive_rows,
    return_rows,
    return_sorted,
    send_few_rows,
    send_rows,
)
from moe_kernels.quantised.four_bit import MOST_HALVED
from moe_kernels.quantised.four_bit_ring import groups_layout, ring_constants, rows_layout, words_layout
from moe_kernels.quantised.fp8_ring import ROW_LAYOUT, WEIGHT_LAYOUT
from moe_kernels.routing import routing_triton

MODULES = {
    name.rpartition(".")[2]: module
    for name, module in sys.modules.items()
    if name.startswith("moe_kernels.") and not hasattr(module, "__path__")
}
ALIGNED = ("stride_row", "stride_slot", "hidden_size", "intermediate", "num_experts", "rows_at")
ALIGNED += ("stride_scale", "stride_zero", "inner", "height", "width", "stride_left", "stride_right")
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compile_kernel(module: str, name: str, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int):  # type: ignore[no-untyped-def]
    """`types`: those of the arguments that differ from i32 (shapes) and *i32 (pointers); everything is 16-aligned."""
    kernel = getattr(MODULES[module], name).jit
    signature = {}
    for argument in kernel.arg_names:
        default = "*i32" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(argument, default)
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument not in constants and (argument.endswith("_ptr") or argument in ALIGNED)
    }
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, places, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    print(f"{module}.{name} sm_{arch} {options} {constants} shared={compiled.metadata.shared}", flush=True)
    return compiled


# Of every kind of expert: activation, and whether it has biases.
GPT_OSS = "silu limit=7.0 alpha=1.702 up_offset=1.0"
KINDS = (("silu", False), (GPT_OSS, True), ("gelu_tanh", False), ("relu2 ungated", False), ("gelu", True))


def compile_gemms(
    arch: int, dtype: torch.dtype, rows_per_expert: int, even_k: bool, activation: str, biased: bool
) -> None:
    config = gemm_config(4096, 4096, dtype, rows_per_expert, 1, 1)
    floats = {name: f"*{DTYPES[dtype]}" for name in ("x_ptr", "gate_up_ptr", "hidden_ptr", "down_ptr", "rows_ptr")}
    floats |= {"row_weights_ptr": "*fp32", "stride_slot": "i64", "bias_ptr": f"*{DTYPES[dtype]}"}
    floats["pre_ptr"] = f"*{DTYPES[dtype]}"
    tiles = ({} if biased else {"bias_ptr": None}) | {
        "PDL": arch >= 90,
        "EVEN_K": even_k,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    up = tiles | {"BLOCK_I": config.block_n // 2, "ACTIVATION": activation}
    down = tiles | {"BLOCK_N": config.block_n}
    # What serving, training and a backward that recomputes need.
    unwanted = {"pre_ptr": None} if activation == "silu" else {"hidden_ptr": None} if activation == "gelu" else {}
    for module, name, constants in (
        ("expert_up_triton", "_expert_up_kernel", up | unwanted),
        ("expert_down_triton", "_expert_down_kernel", down | {"homes_ptr": None}),
        ("expert_down_triton", "_expert_down_kernel", down),
    ):
        compiled = compile_kernel(module, name, floats | {"homes_ptr": "*i64"}, constants, arch, **options)
        assert compiled.metadata.shared <= 99 * 1024, f"{compiled.metadata.shared} bytes of shared memory"


def _arguments(module: str) -> list[str]:
    return getattr(MODULES[module], f"_{module}_kernel").jit.arg_names


def compile_gradients(
    arch: int, dtype: torch.dtype, place: int, configs: GradientConfigs, activation: str, biased: bool
) -> None:
    """The backward, by the line of the table at `place`."""
    names = ("grad", "down", "pre", "grad_pre", "weighted", "gate_up", "rows", "left", "right", "bias")
    types = dict.fromkeys((f"{name}_ptr" for name in names), f"*{DTYPES[dtype]}")
    types |= dict.fromkeys(("row_weights_ptr", "partials_ptr", "grad_row_weights_ptr"), "*fp32") | {
        "stride_slot": "i64"
    }
    # By turns with all outputs and with some, even and uneven: each configuration once.
    unwanted = {} if place != 1 else {"weighted_ptr": None} if biased else {"grad_pre_ptr": None}
    weights = {"ADDS": place == 1} | ({"left_fanout": None} if place % 2 else {"right_fanout": None})
    is_even = place % 2 == 0
    hidden = {"ACTIVATION": activation} | unwanted
    for module, config, variant, inner in (
        ("experts_grad_hidden", configs.hidden, hidden, "EVEN_K"),
        ("experts_grad_x", configs.x, {}, "EVEN_K"),
        ("experts_grad_weights", configs.weights, weights, "EVEN_M"),
    ):
        tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        tiles |= {"GROUP_M": config.group_m, "PDL": arch >= 90}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        grads = {"grad_ptr": "*fp32"} if variant.get("ADDS") else {}
        constants = tiles | {"EVEN_N": is_even, inner: is_even} | variant
        boxes = {"down": f"tensordesc<{DTYPES[dtype]}[1,{config.block_k},{config.block_n}]>"} if config.tma else {}
        if module == "experts_grad_hidden" and not config.tma:
            constants |= {"down": None}
        compiled = compile_kernel(module, f"_{module}_kernel", types | grads | boxes, constants, arch, **options)
        ptx = compiled.asm["ptx"]
        assert "cp.async" in ptx, "operands must be loaded ahead"
        if dtype != torch.float32:
            assert ("wgmma" in ptx and "mma.sync" not in ptx) if arch == 90 else "mma.sync" in ptx
        most = 227 if arch == 90 else 99
        assert compiled.metadata.shared <= most * 1024, f"{compiled.metadata.shared} bytes of shared memory"
    blocks = {"BLOCK_M": configs.hidden.block_m, "BLOCK_H": 64}
    absent = {} if biased else {"bias_ptr": None}
    compile_small_one("experts_grad_hidden", "_row_weights_kernel", types, blocks | absent, arch)
    if biased:
        blocks = {"BLOCK_K": 32, "BLOCK_N": 64}
        for variant in ({"fanout": None, "row_weights_ptr": None, "ADDS": False}, {"ADDS": True}):
            grads = {"grad_ptr": "*fp32"} if variant["ADDS"] else {}
            name = "_experts_grad_bias_kernel"
            compile_small_one("experts_grad_weights", name, types | grads, blocks | variant, arch)
    blocks = {"TILE_M": configs.hidden.block_m, "BLOCK_K": configs.weights.block_k, "BLOCK_L": 256, "BLOCK_T": 64}
    compile_small_one("gradient_tiles", "_cut_tiles_kernel", {}, blocks, arch)


def compile_gradients_tma(arch: int, dtype: torch.dtype, configs: GradientConfigs) -> None:
    """Those of x and of weights on Hopper: loads run ahead of the products, and persistent ones past the end of a tile."""
    element = DTYPES[dtype]
    pointers = {"rows_ptr": f"*{element}", "grad_ptr": f"*{element}", "sorted_ptr": f"*{element}", "stride_slot": "i64"}
    compile_small_one("gather_sorted", "_gather_sorted_kernel", pointers, {"BLOCK_M": 4, "BLOCK_N": 1024}, arch)
    variants: list[tuple[str, GemmConfig, dict[str, str], dict[str, Any]]] = []
    config = configs.weights
    for adds in (False, True) if config.tma else ():
        parts = num_parts(config, adds)
        types = {"left": f"tensordesc<{element}[1,1,{config.block_k},{config.block_m}]>"}
        types["right"] = f"tensordesc<{element}[1,1,{config.block_k},{config.block_n}]>"
        types["grad"] = f"tensordesc<{element}[1,{config.block_m},{config.block_n // parts}]>"
        added = {"grad": None} if adds else {}
        types |= {"grad_ptr": "*fp32"} if adds else {}
        variants.append(("weights", config, types, added | {"PARTS": parts, "BLOCK_S": 128}))
    config = configs.x
    if config.tma:
        sizes = {"HIDDEN_SIZE": 2880, "INNER": 5760}
        for programs, tail_m in ((0, config.tail_m), (1, 0)):
            rows = {"grad_pre": config.block_m, "grad_tail": tail_m or config.block_m}
            types = {name: f"tensordesc<{element}[{block},{config.block_k}]>" for name, block in rows.items()}
            types["gate_up"] = f"tensordesc<{element}[1,{config.block_k},{config.block_n}]>"
            variants.append(("x", config, types, sizes | {"PERSISTENT": programs > 0, "TAIL_M": tail_m}))
    for name, config, types, constants in variants:
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        constants |= {"GROUP_M": config.group_m, "PDL": True}
        module = f"experts_grad_{name}_tma"
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": True}
        if name == "weights":
            options["maxnreg"] = most_registers(config)
        compiled = compile_kernel(module, f"_{module}_kernel", pointers | types, constants, arch, **options)
        ptx = compiled.asm["ptx"]
        # One product is under way while the next one's operands are waited for.
        assert "wgmma.wait_group.sync.aligned 1" in ptx and "mma.sync" not in ptx
        assert compiled.metadata.shared <= 227 * 1024 // max(1, config.programs_per_sm), (
            f"{compiled.metadata.shared} bytes"
        )


def compile_small_one(
    module: str, name: str, types: dict[str, str], constants: dict[str, Any], arch: int, num_warps: int = 4
):  # type: ignore[no-untyped-def]
    pdl = arch >= 90
    compiled = compile_kernel(module, name, types, constants | {"PDL": pdl}, arch, num_warps=num_warps, launch_pdl=pdl)
    ptx = compiled.asm["ptx"]
    wait, access = ptx.find("griddepcontrol.wait"), min(ptx.find("ld.global"), ptx.find("st.global"))
    if name == "_send_rows_kernel" and pdl:
        assert access < wait < ptx.find("atom."), "must wait for the kernel before, and before it says anything"
    elif name == "_combine_home_kernel" and pdl and not constants["SAYS"]:
        assert ptx.find("atom.") < wait < ptx.find("launch_dependents"), "must have waited when the next kernel starts"
    else:
        assert 0 <= wait < access if pdl else wait == -1, "must wait for the kernel before, and before all else"
    if "increment_ptr" in types and constants.get("increment_ptr", 0) is not None:
        check_recording(ptx)
    return compiled


def check_recording(ptx: str) -> None:
    """Load is added by one atomic without a fence, whose result nobody reads (so ptxas makes a RED of it)."""
    (result,) = re.findall(r"atom\.global\.gpu\.relaxed\.add\.u64 (%rd\d+),", ptx)
    uses = [line for line in ptx.splitlines() if re.search(rf"{result}\b", line)]
    assert all(re.search(rf"(mov\.u64|add\.u64)\s+{result},", line) for line in uses), f"the result is read: {uses}"
    assert not re.search(r"fence|membar|acq_rel", ptx)


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
            for experts in (16, 48, 64, 128, 256) if dtype == "bf16" and rule == RoutingRule() else (64,):
                tokens = routing_triton.tokens_per_program(experts)
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
                        "BLOCK_K": 8,
                    }
                    | routing_triton.rule_constants(rule)
                    | {"TOKENS": tokens}
                    | bias,
                    arch,
                    num_warps=tokens,
                )
                warps = set(re.findall(r"warpsPerCTA = \[(.*?)\]", compiled.asm["ttgir"]))
                assert warps == {f"{tokens}, 1"}, f"a warp must have a token of its own: {warps}"
            types = {"logits_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "grad_weights_ptr": "*fp32"}
            constants = {"TOP_K": 8, "SCORE_FUNCTION": rule.score_function, "RENORMALIZE": rule.renormalize}
            constants |= {"TOKENS": tokens, "BLOCK_E": triton.next_power_of_2(experts)}
            types |= {"scale": "fp32", "epsilon": "fp32"}
            compile_small_one("routing_grad", "_topk_routing_grad_kernel", types, constants, arch, num_warps=tokens)
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
    for extra, experts in ((0, 16), (64, 512)):
        local = {"BLOCK_M": 128, "EXTRA_M": extra, "BLOCK_E": experts} | ({"places_ptr": None} if extra else {})
        types = {"load_ptr": "*i64", "increment_ptr": "*i64"}
        options = scan_options(FEW_ROWS)
        few = local | {"BLOCK": options["BLOCK"], "ROWS": options["ROWS"]}
        compile_small_one("local_schedule", "_schedule_few_kernel", types, few, arch, options["num_warps"])
        options = chunk_options()
        many = local | {"CHUNK": options["CHUNK"], "BLOCK": 512}
        compile_small_one("local_schedule", "_schedule_many_kernel", {}, many, arch, options["num_warps"])
    for absent in ({}, {"increment_ptr": None}):
        options = scan_options(MANY_KEYS)
        types = {"load_ptr": "*i64", "increment_ptr": "*i64"}
        block = {"BLOCK": options["BLOCK"]} | absent
        compile_small_one("local_schedule", "_add_up_chunks_kernel", types, block, arch, options["num_warps"])
    options = chunk_options()
    chunk = {"CHUNK": options["CHUNK"]}
    for block in (2, 128, 512):
        count = chunk | {"BLOCK_B": block}
        compile_small_one("scan", "_count_chunks_kernel", {}, count, arch, options["num_warps"])
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


def compile_peers(arch: int, dtype: torch.dtype, num_ranks: int) -> None:
    """The kernels between several GPUs."""
    element = f"*{DTYPES[dtype]}"
    types = dict.fromkeys(("flags_ptr", "addresses_ptr", "state_ptr", "error_ptr", "here_ptr", "homes_ptr"), "*i64")
    types |= dict.fromkeys(("x_ptr", "rows_ptr", "y_ptr", "sums_ptr"), element) | {"weights_ptr": "*fp32"}
    types["scalars_ptr"] = "*fp32"
    types |= dict.fromkeys(("patience", "rows_at", "lists_at"), "i64")
    ranks = {"W": num_ranks}
    waits = ranks | {"BLOCK_W": triton.next_power_of_2(num_ranks), "TIMED": True}
    columns = {"TOP_K": 8, "BLOCK_K": 8, "BLOCK_H": 1024}
    sees = ranks | {"BLOCK_W": waits["BLOCK_W"]}
    sends = columns | sees | {"BLOCK": 128, "GROUP": 128}
    few = sends | {"BLOCK": 512, "ROWS": 4, "BLOCK_L": 512}
    expands = sees | {"GROUP": 128, "BLOCK_H": 1024}
    receives = waits | {"BLOCK_M": 16, "EXTRA_M": 0, "BLOCK": 512, "BLOCK_L": 128}
    meets = waits | {"SAYS": True, "WAITS": True}
    for module, name, constants, num_warps in (
        ("send_rows", "_send_rows_kernel", sends | {"scales_ptr": None}, 4),
        ("send_few_rows", "_send_few_rows_kernel", few | {"scales_ptr": None}, 4),
        *(
            [("send_rows", "_send_rows_kernel", sends, 4), ("expand_rows", "_expand_rows_kernel", expands, 4)]
            if arch >= 89
            else []
        ),
        ("receive_rows", "_receive_rows_kernel", receives, 4),
        ("receive_rows", "_receive_rows_kernel", receives | {"here_ptr": None}, 4),
        ("meet_peers", "_meet_peers_kernel", meets, 1),
        ("gather_counts", "_gather_counts_kernel", meets | {"BLOCK": 1024}, 4),
        ("return_rows", "_return_rows_kernel", sees | {"BLOCK_H": 1024}, 4),
        ("return_rows", "_return_sums_kernel", columns | sees, 4),
        ("return_sorted", "_begin_return_kernel", waits, 1),
        ("return_sorted", "_return_sorted_kernel", {"BLOCK_H": 1024}, 4),
        ("return_sorted", "_return_sorted_kernel", {"BLOCK_H": 1024, "scalars_ptr": None}, 4),
        *(
            ("combine_home", "_combine_home_kernel", meets | columns | {"BY_RANK": by_rank, "SAYS": says}, 4)
            for by_rank, says in ((False, True), (False, False), (True, False))
        ),
    ):
        fp8 = module == "expand_rows" or (module == "send_rows" and "scales_ptr" not in constants)
        own = types | ({"rows_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "expanded_ptr": element} if fp8 else {})
        compiled = compile_small_one(module, name, own, constants, arch, num_warps)
        ptx = compiled.asm["ptx"]
        if "return" in name and "begin" not in name:
            assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time"
        if "TIMED" in constants:
            assert "global.sys.acquire" in ptx and "globaltimer" in ptx
        if name not in ("_receive_rows_kernel", "_expand_rows_kernel", "_return_sorted_kernel"):
            assert "global.sys.release" in ptx or not constants.get("SAYS", True)


def compile_one_token(arch: int, dtype: torch.dtype) -> None:
    element, pdl = f"*{DTYPES[dtype]}", arch >= 90
    choice = {"logits_ptr": element, "bias_ptr": "*fp32", "mask_ptr": "*i1", "scale": "fp32", "epsilon": "fp32"}
    choice |= {"increment_ptr": "*i64", "load_ptr": "*i64"}
    choice["scratch_ptr"] = element
    constants = {
        "TOP_K": 8,
        **routing_triton.rule_constants(RoutingRule()),
        "PDL": pdl,
        "BLOCK_E": 128,
        "BLOCK_K": 8,
        "SCRATCH": 6144,
    }
    compiled = compile_kernel(
        "one_token_triton", "_choice_kernel", choice, constants, arch, num_warps=1, launch_pdl=pdl
    )
    check_recording(compiled.asm["ptx"])
    sizes = {"HIDDEN_SIZE": 2880, "INTERMEDIATE": 768, "PDL": pdl, "SCRATCH": 6144, "EVICTION": "evict_first"}
    sizes |= {"bias_ptr": None, "scale_ptr": None, "zero_ptr": None, "SCHEME": "plain", "GROUP": 0}
    up = ("x_ptr", "gate_up_ptr", "scratch_ptr"), 2, {"ACTIVATION": "silu", "BLOCK_H": 1024}
    down = ("scratch_ptr", "down_ptr", "y_ptr"), 1, {"TOP_K": 8, "BLOCK_K": 8, "BLOCK_I": 256}
    # More steps than are unrolled, and more weights than stream.
    long = *down[:2], {"TOP_K": 16, "BLOCK_K": 16, "BLOCK_I": 128, "INTERMEDIATE": 8192, "EVICTION": ""}
    cases = [("_up_kernel", *up), ("_down_kernel", *down)]
    if dtype == torch.bfloat16:
        cases.append(("_down_kernel", *long))
        cases += [("_up_kernel", *up[:2], up[2] | {"ACTIVATION": one}) for one in ("relu2 ungated", "gelu_tanh")]
    for name, types, num_warps, constants in cases:
        compiled = compile_kernel(
            "one_token_triton",
            name,
            dict.fromkeys(types, element),
            sizes | constants,
            arch,
            num_warps=num_warps,
            launch_pdl=pdl,
        )
        hint = r"evict_first\S*cache_hint\S*" if "EVICTION" not in constants else ""
        assert re.search(rf"ld\.global\.\S*{hint}v4", compiled.asm["ptx"]), (
            "weights must be loaded 16 bytes at a time, and not stay in L2"
        )


def compile_one_quantised_token(arch: int, scheme: str, dtype: str, zeros: bool = False) -> None:
    weights, scale = QUANTISED[scheme]
    types = dict.fromkeys(("x_ptr", "scratch_ptr", "y_ptr"), f"*{dtype}") | {"scale_ptr": scale, "zero_ptr": "*u8"}
    words = "*i32" if scheme != "fp8_block" else "*u8" if arch < 89 else weights
    types |= dict.fromkeys(("gate_up_ptr", "down_ptr"), words)
    pdl, group = arch >= 90, 128 if scheme == "fp8_block" else 32
    sizes = {"HIDDEN_SIZE": 2048, "INTERMEDIATE": 768, "PDL": pdl, "SCRATCH": 6144, "EVICTION": "evict_first"}
    sizes |= {"SCHEME": scheme, "GROUP": group, "bias_ptr": None} | ({} if zeros else {"zero_ptr": None})
    module, kernels = (
        "one_token_four_bit",
        (
            ("_up_kernel", 2, {"ACTIVATION": "silu", "BLOCK_H": 1024, "BLOCK_R": 8}),
            ("_down_kernel", 4, {"TOP_K": 8, "BLOCK_K": 8, "BLOCK_I": 256, "BLOCK_R": 2}),
        ),
    )
    if scheme == "fp8_block":
        sizes = {name: value for name, value in sizes.items() if name not in ("SCHEME", "GROUP", "zero_ptr")}
        module, kernels = (
            "one_token_fp8",
            (
                ("_up_fp8_kernel", 2, {"ACTIVATION": "silu", "CHUNKS": 64}),
                ("_down_fp8_kernel", 4, {"TOP_K": 8, "ROWS": 4, "CHUNKS": 128}),
            ),
        )
    for name, num_warps, constants in kernels:
        compiled = compile_kernel(module, name, types, sizes | constants, arch, num_warps=num_warps, launch_pdl=pdl)
        assert re.search(r"ld\.global\.\S*evict_first\S*cache_hint\S*v4", compiled.asm["ptx"]), (
            "weights must be loaded 16 bytes at a time, and not stay in L2"
        )


def compile_tma_gemms(
    arch: int,
    dtype: torch.dtype,
    up: GemmConfig,
    down: GemmConfig,
    hidden_size: int,
    intermediate: int,
    activation: str = "silu",
    biased: bool = False,
) -> None:
    """What serving uses: wgmma, and as much shared memory as such a GPU has."""
    element = DTYPES[dtype]
    for module, config in (("expert_up_tma", up), ("expert_down_tma", down)):
        n, k = config.block_n, config.block_k
        sizes = {"HIDDEN_SIZE": hidden_size, "INTERMEDIATE": intermediate, "PDL": True, "SWAP": config.swap}
        sizes["EVICTION"] = "evict_last" if config.keep else ""
        tiles = {"TAIL_M": config.tail_m, "BLOCK_M": config.block_m, "EXTRA_M": config.extra_m}
        tiles |= {"BLOCK_K": k, "GROUP_M": config.group_m, "BY_LANE": config.by_lane}
        if module == "expert_up_tma":
            is_plain = config.swap or "ungated" in activation
            box = f"1,{n // 2},{k}" if is_plain else f"1,{n // 16},2,8,{k}"
            types = {"gate_up": f"tensordesc<{element}[{box}]>", "x_ptr": f"*{element}", "hidden_ptr": f"*{element}"}
            types |= {"bias_ptr": f"*{element}", "pre_ptr": f"*{element}"}
            tiles |= {"ACTIVATION": activation, "BLOCK_I": n // 2}
        else:
            types = {
                "row_weights_ptr": "*fp32",
                "rows_ptr": f"*{element}",
                "homes_ptr": "*i64",
                "down": f"tensordesc<{element}[1,{n},{k}]>",
            }
            for name, rows in (
                ("hidden", config.block_m),
                ("hidden_tail", config.tail_m),
                ("hidden_extra", config.extra_m),
            ):
                ragged = "" if config.swap else "1,1,"
                types[name] = f"tensordesc<{element}[{ragged}{rows or config.block_m},{k}]>"
            types["row_boxes"] = f"tensordesc<{element}[1,1,{config.block_m},{n // 2}]>"
            tiles |= {"PERSISTENT": config.programs_per_sm > 0, "BLOCK_N": n}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": True}
        unsorted = {"row_boxes": None}
        variants = ({"homes_ptr": None} | unsorted, unsorted)
        variants += ({"homes_ptr": None},) if config.sorts_rows else ()
        if module == "expert_up_tma":
            variants = ({"pre_ptr": None} if activation == "silu" else {},)
        for absent in variants:
            compiled = compile_kernel(module, f"_{module}_kernel", types, sizes | tiles | absent, arch, **options)
            ptx = compiled.asm["ptx"]
            is_kept = re.search(r"st\.global\S*evict_last\S*cache_hint", ptx) is not None
            assert is_kept == config.keep, "outputs must stay in L2 where they are worth it"
            if module == "expert_up_tma" or "row_boxes" in absent:
                assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time, also to a peer"
            else:
                assert "cp.async.bulk.tensor.4d.global.shared" in ptx and "st.global" not in ptx, (
                    "rows must be stored by TMA"
                )
            assert "wgmma" in ptx and "mma.sync" not in ptx
            assert compiled.metadata.shared <= 227 * 1024, f"{compiled.metadata.shared} bytes of shared memory"


QUANTISED = {  # the types of weights and of their scales
    "fp8_block": ("*fp8e4nv", "*fp32"),
    "mxfp4": ("*i32", "*u8"),
    "int4": ("*i32", "*bf16"),
}


def compile_four_bit(
    scheme: str, config: GemmConfig, is_up: bool, dtype: str = "bf16", sizes: tuple[int, int] = (2880, 2880),
    group: int = 32, activation: str = "silu", biased: bool = False, zeros: bool = False,
) -> None:  # fmt: skip
    """One of the two products with 4-bit experts on Hopper."""
    assert not config.programs_per_sm, "that is the ring's"
    rows, k = config.block_n // 2 if is_up else config.block_n, config.block_k
    box = f"1,{max(k // group, 1)},{rows}"
    types = {"scale": f"tensordesc<{QUANTISED[scheme][1][1:]}[{box}]>", "zero": f"tensordesc<u8[{box}]>"}
    types |= dict.fromkeys(("bias_ptr", "x_ptr", "hidden_ptr", "rows_ptr"), f"*{dtype}")
    is_interleaved, is_halved = is_up and "ungated" not in activation, config.block_m <= MOST_HALVED
    height = f"{rows // 8},2,8" if is_interleaved else f"{rows}"
    types |= {"gate_up" if is_up else "down": f"tensordesc<i32[1,{height},{k // 8}]>", "row_weights_ptr": "*fp32"}
    constants = {"HIDDEN_SIZE": sizes[0], "INTERMEDIATE": sizes[1], "SCHEME": scheme, "GROUP": group, "PDL": True}
    constants |= {
        "ASSEMBLY": dtype == "bf16",
        "HALVES": is_halved,
        "TAIL_M": config.tail_m,
        "BLOCK_M": config.block_m,
        "BLOCK_K": k,
    }
    constants |= {"GROUP_M": config.group_m}
    if is_up:
        eviction = "evict_last" if config.keep else ""
        constants |= {"ACTIVATION": activation, "EVICTION": eviction, "BLOCK_I": rows}
    else:
        constants |= {"BLOCK_N": rows, "homes_ptr": None}
        for name, most in (("hidden", config.block_m), ("hidden_tail", config.tail_m or config.block_m)):
            types[name] = f"*{dtype}" if is_halved else f"tensordesc<{dtype}[{most},{k}]>"
    constants |= ({} if biased else {"bias_ptr": None}) | ({} if zeros else {"zero": None})
    module = f"expert_{'up' if is_up else 'down'}_four_bit"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": True}
    compiled = compile_kernel(module, f"_{module}_kernel", types, constants, 90, **options)
    ptx = compiled.asm["ptx"]
    assert "wgmma" in ptx and "mma.sync" not in ptx
    assert compiled.metadata.shared <= 227 * 1024, f"{compiled.metadata.shared} bytes of shared memory"
    loop = re.search(r"scf\.for.*?scf\.yield", compiled.asm["ttgir"], re.DOTALL)
    assert loop is not None and "local_store" not in loop[0], (
        "weights must go from shared memory to registers, and stay there"
    )
    operands = re.findall(r"warp_group_dot %\S+, .*? : tensor<", loop[0])
    assert operands and len(operands) == len(re.findall(r"ttng\.warp_group_dot %", loop[0])), (
        "weights must be in registers"
    )


def compile_four_bit_ring(
    scheme: str, config: GemmConfig, is_up: bool, dtype: str = "bf16", sizes: tuple[int, int] = (2880, 2880),
    group: int = 32, activation: str = "silu", biased: bool = False, zeros: bool = False,
) -> None:  # fmt: skip
    """Likewise, by a ring of operands."""
    is_interleaved = is_up and "ungated" not in activation
    k, box = config.block_k, [1, max(config.block_k // group, 1), 32 if is_interleaved else 64]
    words = [1, 4, 2, 8, k // 8] if is_interleaved else [1, 64, k // 8]
    kind, bits = ("u8", 8) if scheme == "mxfp4" else ("bf16", 16)
    types = {"gate_up" if is_up else "down": f"tensordesc<i32{words},{words_layout(k, len(words))!r}>"}
    types |= {
        "scale": f"tensordesc<{kind}{box},{groups_layout(bits)!r}>",
        "zero": f"tensordesc<u8{box},{groups_layout(8)!r}>",
    }
    for name, rows in (("rows" if is_up else "hidden", config.block_m), ("extra", config.extra_m)):
        types[name] = f"tensordesc<{dtype}[{rows}, 64],{rows_layout()!r}>"
    types |= dict.fromkeys(("bias_ptr", "hidden_ptr", "rows_ptr"), f"*{dtype}") | {"row_weights_ptr": "*fp32"}
    constants = {"HIDDEN_SIZE": sizes[0], "INTERMEDIATE": sizes[1], "SCHEME": scheme, "GROUP": group, "PDL": True}
    constants |= {"ACTIVATION": activation} if is_up else {"homes_ptr": None}
    options = {"num_warps": 4, "launch_pdl": True}
    for name, value in ring_constants(config).items():
        (options if name == "maxnreg" else constants)[name] = value
    constants |= ({} if biased else {"bias_ptr": None}) | ({} if zeros else {"zero": None})
    constants |= {} if config.extra_m else {"extra": None}
    module = f"expert_{'up' if is_up else 'down'}_four_bit_ring"
    compiled = compile_kernel(module, f"_{module}_kernel", types, constants, 90, **options)
    ptx = compiled.asm["ptx"]
    assert "wgmma" in ptx and "mma.sync" not in ptx and "cp.async.bulk.tensor" in ptx
    assert compiled.metadata.shared <= 227 * 1024 // config.programs_per_sm, f"{compiled.metadata.shared} bytes"
    assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time"
    # Weights are unpacked to registers, beside a product that is under way.
    products = re.findall(r"warp_group_dot %\S+, .*? : tensor<", compiled.asm["ttgir"])
    assert products and len(products) == compiled.asm["ttgir"].count("ttng.warp_group_dot %")


def compile_quantised(
    arch: int, scheme: str, config: GemmConfig, is_up: bool, dtype: str = "bf16", even_k: bool = True,
    activation: str = "silu", biased: bool = False, zeros: bool = False,
) -> None:  # fmt: skip
    """One of the two products with quantised experts."""
    is_fp8 = scheme == "fp8_block"
    weights, scale = QUANTISED[scheme]
    weights = "*u8" if is_fp8 and arch < 89 else weights  # no e4m3 there: bytes
    rows = weights if is_fp8 else f"*{dtype}"
    types = dict.fromkeys(("x_ptr", "hidden_ptr"), rows) | dict.fromkeys(("gate_up_ptr", "down_ptr"), weights)
    types |= dict.fromkeys(("x_scale_ptr", "hidden_scale_ptr", "row_weights_ptr"), "*fp32")
    types |= dict.fromkeys(("bias_ptr", "rows_ptr"), f"*{dtype}")
    types |= {"scale_ptr": scale, "zero_ptr": "*u8", "homes_ptr": "*i64", "stride_slot": "i64"}
    constants = {"PDL": arch >= 90, "SCHEME": scheme, "GROUP": 128 if is_fp8 else 32, "EVEN_K": even_k}
    constants |= {"SWAP": config.swap, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "GROUP_M": config.group_m}
    absent = [] if biased else ["bias_ptr"]
    absent += [] if zeros else ["zero_ptr"]
    absent += [] if is_fp8 else ["hidden_scale_ptr", "x_scale_ptr"] if is_up else ["hidden_scale_ptr"]
    if is_up:
        constants |= {"ACTIVATION": activation, "BLOCK_I": config.block_n // 2}
    else:
        constants |= {"BLOCK_N": config.block_n}
        absent += ["homes_ptr"] if even_k else []
    module = f"expert_{'up' if is_up else 'down'}_quantised"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_kernel(module, f"_{module}_kernel", types, constants | dict.fromkeys(absent), arch, **options)
    ptx = compiled.asm["ptx"]
    assert "cp.async" in ptx, "operands must be loaded ahead"
    if arch == 90 and dtype != "fp32":
        assert "wgmma" in ptx and "mma.sync" not in ptx
    most = 227 if arch == 90 else 99
    assert compiled.metadata.shared <= most * 1024, f"{compiled.metadata.shared} bytes of shared memory"


def compile_ring(config: GemmConfig, dtype: str = "bf16", activation: str = "silu", biased: bool = False) -> None:
    """Both products with fp8_block experts on Hopper."""
    fp8 = "*fp8e4nv"
    types = dict.fromkeys(("x_ptr", "hidden_ptr"), fp8) | dict.fromkeys(("bias_ptr", "rows_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("x_scale_ptr", "hidden_scale_ptr", "scale_ptr", "row_weights_ptr"), "*fp32")
    for name, block, layout in (
        ("gate_up", (1, 128, 128), WEIGHT_LAYOUT),
        ("down", (1, 128, 128), WEIGHT_LAYOUT),
        ("hidden", (64, 128), ROW_LAYOUT),
    ):
        types[name] = f"tensordesc<{fp8[1:]}{list(block)},{layout.value!r}>"
    types["homes_ptr"] = "*i64"
    constants = {"PDL": True, "STAGES": config.num_stages, "GROUP_M": config.group_m}
    absent = {} if biased else {"bias_ptr": None}
    for module, more in (
        ("expert_up_fp8", {"ACTIVATION": activation}),
        ("expert_down_fp8", {"homes_ptr": None}),
        ("expert_down_fp8", {}),
    ):
        compiled = compile_kernel(
            module, f"_{module}_kernel", types, constants | absent | more, 90, num_warps=4, launch_pdl=True
        )
        ptx = compiled.asm["ptx"]
        assert "wgmma" in ptx and "mma.sync" not in ptx and "cp.async.bulk.tensor" in ptx
        assert ptx.count("setmaxnreg.inc") >= 2, "who multiplies needs more registers than who copies"
        if module == "expert_up_fp8" or dtype != "fp32":
            assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time"
        assert compiled.metadata.shared <= 227 * 1024, f"{compiled.metadata.shared} bytes of shared memory"


def compile_all_quantised(arch: int, all_of_them: bool) -> None:
    for dtype in ("bf16", "fp16", "fp32") if all_of_them else ("bf16",):
        values = "*u8" if arch < 89 else "*fp8e4nv"
        types = {"x_ptr": f"*{dtype}", "values_ptr": values, "scale_ptr": "*fp32"}
        compile_small_one("quantise_rows", "_quantise_rows_kernel", types, {"BLOCK_H": 1024, "GROUP": 128}, arch)
    for scheme in QUANTISED if all_of_them else ("fp8_block", "mxfp4"):
        for dtype in ("bf16", "fp16", "fp32") if all_of_them else ("bf16",):
            compile_one_quantised_token(arch, scheme, dtype, zeros=scheme == "int4")
    tables = {scheme: _quantised_table(scheme, torch.bfloat16, arch == 90, can_use_tma=False) for scheme in QUANTISED}
    if arch == 90:
        compile_ring(_FP8_RING)
        for kind in (("bf16", GPT_OSS, True), ("fp16", "relu2 ungated", True), ("fp32", "gelu")) if all_of_them else ():
            compile_ring(_FP8_RING, *kind)
    if not all_of_them:
        (_, up, down), (_, wide_up, _) = tables["fp8_block"][0], tables["fp8_block"][-1]
        compile_quantised(arch, "fp8_block", up, True)
        compile_quantised(arch, "fp8_block", down, False, even_k=False)
        compile_quantised(arch, "fp8_block", wide_up, True)
        narrow, wide = tables["mxfp4"][0][1], tables["int4"][-1][2]
        if arch == 90:
            compile_four_bit("int4", tables["int4"][1][1], True, sizes=(2048, 768), group=128, zeros=True)
            compile_four_bit_ring("mxfp4", narrow, True, activation=GPT_OSS, biased=True)
            compile_four_bit_ring("int4", wide, False, sizes=(2048, 768), group=128, zeros=True)
        else:
            compile_quantised(arch, "mxfp4", narrow, True, activation=GPT_OSS, biased=True)
            compile_quantised(arch, "int4", wide, False, zeros=True)
        return
    for scheme, table in tables.items():
        for _, up, down in table:
            if up.tma:
                kind, group, sizes = (
                    {"activation": GPT_OSS, "biased": True},
                    32 if scheme == "mxfp4" else 128,
                    (2048, 768),
                )
                compile_one = compile_four_bit_ring if up.programs_per_sm else compile_four_bit
                compile_one(scheme, up, True, **kind)
                compile_one(scheme, down, False, biased=True)
                compile_one(scheme, up, True, sizes=sizes, group=group, zeros=scheme == "int4")
                compile_one(scheme, down, False, sizes=sizes, group=group, zeros=scheme == "int4")
                compile_one(scheme, up, True, "fp16", activation="relu2 ungated")
                compile_one(scheme, down, False, "fp16")
                continue
            for even_k in (True, False):
                compile_quantised(arch, scheme, up, True, even_k=even_k)
                compile_quantised(arch, scheme, down, False, even_k=even_k)
            compile_quantised(arch, scheme, up, True, "fp16", activation=GPT_OSS, biased=True, zeros=scheme == "int4")
            compile_quantised(arch, scheme, down, False, "fp16", biased=True, zeros=scheme == "int4")
            compile_quantised(arch, scheme, up, True, activation="relu2 ungated")
    for scheme in ("mxfp4", "int4"):
        for _, up, down in _quantised_table(scheme, torch.float32, arch == 90):
            compile_quantised(arch, scheme, up, True, "fp32")
            compile_quantised(arch, scheme, down, False, "fp32")


if __name__ == "__main__":
    arch, all_of_them = int(sys.argv[1]), sys.argv[2:] == ["all"]  # all of them takes minutes
    compile_small(arch)
    for dtype, num_ranks in ((torch.bfloat16, 4), (torch.float32, 2), *(((torch.bfloat16, 8),) if all_of_them else ())):
        compile_peers(arch, dtype, num_ranks)
    for dtype in DTYPES if arch >= 90 else (torch.bfloat16,):  # an older one shows what must not be used there
        compile_one_token(arch, dtype)
        is_usual = all_of_them or dtype == torch.bfloat16
        for rows in (16, 32, 64, 128) if is_usual else ():
            compile_gemms(arch, dtype, rows, rows != 16, "gelu" if rows == 32 else "silu", biased=False)
        for activation, biased in KINDS if all_of_them else KINDS[1:3] if is_usual else ():
            compile_gemms(arch, dtype, 64, True, activation, biased)
    tables = {torch.float32: _TABLE_32_BIT, torch.bfloat16: _TABLE_HOPPER if arch == 90 else _TABLE_16_BIT}
    for dtype, table in tables.items():
        for place, (_, configs) in enumerate(table):
            compile_gradients(arch, dtype, place, configs, *KINDS[place])
    if arch == 90:
        for _, configs in _GRADIENTS_TMA:
            compile_gradients_tma(arch, torch.bfloat16, configs)
    compile_all_quantised(arch, all_of_them)
    if arch == 90:
        for hidden_size, intermediate in ((2048, 768), (2880, 2880), (4096, 14336)):  # one for each column
            column = bisect.bisect_left(_INTERMEDIATE, intermediate)
            dtypes = (torch.bfloat16,) if column else (torch.bfloat16, torch.float16)  # whose tiles are the same
            for dtype in dtypes if all_of_them else dtypes[:1]:
                table = _KEPT_TMA if dtype == torch.bfloat16 and not column else _TABLE_TMA
                every = 1 if all_of_them else 5
                for number, (up, down) in enumerate([*dict.fromkeys(pairs[column] for *_, pairs in table)][::every]):
                    compile_tma_gemms(arch, dtype, up, down, hidden_size, intermediate)
                    if hidden_size == 2880 and dtype == torch.bfloat16 and (all_of_them or number == 0):
                        for kind in KINDS[1:4]:
                            compile_tma_gemms(arch, dtype, up, down, hidden_size, intermediate, *kind)
