"""The backward."""

from __future__ import annotations

from typing import Any

import torch

from moe_kernels import GemmConfig, GradientConfigs
from moe_kernels.gradients.experts_grad_weights_tma import most_registers, num_parts
from tests.moe_kernels.compiling.kernel import DTYPES, check_hopper, compile_kernel, compile_small_one


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
        # One product is under way while the next one's operands are waited for.
        assert "wgmma.wait_group.sync.aligned 1" in compiled.asm["ptx"]
        check_hopper(compiled, max(1, config.programs_per_sm))
