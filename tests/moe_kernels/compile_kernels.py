"""Compile every kernel variant for real GPUs, without one; run by `test_compile.py` in a process without interpreter.

Prints one line per variant: name, architecture, shared memory in bytes, registers spilled (by ptxas, if it says).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_kernels import combine, counting, expert_down, expert_up, gemm_config, load, replicas, routing, schedule  # noqa: F401

MODULES = {
    name: sys.modules[f"moe_kernels.{name}"]
    for name in ("combine", "counting", "expert_down", "expert_up", "load", "replicas", "routing", "schedule")
}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compile_kernel(module: str, name: str, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int):  # type: ignore[no-untyped-def]
    """`types`: those of the arguments that differ from i32 (shapes) and *i32 (pointers); everything is 16-aligned."""
    kernel = getattr(MODULES[module], name)
    signature = {}
    for argument in kernel.arg_names:
        default = "*i32" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(argument, default)
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument not in constants
        and (argument.endswith("_ptr") or argument in ("stride_row", "stride_slot", "hidden_size", "intermediate"))
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, places, aligned), target=GPUTarget("cuda", arch, 32), options=options
    )
    print(f"{module}.{name} sm_{arch} {options} {constants} shared={compiled.metadata.shared}", flush=True)
    return compiled


def compile_gemms(arch: int, dtype: torch.dtype, rows_per_expert: int, even_k: bool, activation: str) -> None:
    config = gemm_config(4096, 4096, dtype, rows_per_expert, 1, 1)
    floats = {name: f"*{DTYPES[dtype]}" for name in ("x_ptr", "gate_up_ptr", "hidden_ptr", "down_ptr", "rows_ptr")}
    floats |= {"row_weights_ptr": "*fp32", "stride_slot": "i64"}
    tiles = {"EVEN_K": even_k, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "GROUP_M": config.group_m}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    up = tiles | {"BLOCK_I": config.block_n // 2, "ACTIVATION": activation}
    down = tiles | {"BLOCK_N": config.block_n}
    for module, name, constants in (
        ("expert_up", "_expert_up_kernel", up),
        ("expert_down", "_expert_down_kernel", down),
    ):
        compiled = compile_kernel(module, name, floats, constants, arch, **options)
        assert compiled.metadata.shared <= 99 * 1024, f"{compiled.metadata.shared} bytes of shared memory"


def compile_small(arch: int) -> None:
    for dtype in DTYPES.values():
        compile_kernel(
            "combine",
            "_combine_kernel",
            {"rows_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"},
            {"TOP_K": 8, "BLOCK_H": 1024},
            arch,
        )
        for softmax, bias in ((True, {"bias_ptr": None, "mask_ptr": None}), (False, {})):
            compile_kernel(
                "routing",
                "_topk_routing_kernel",
                {
                    "logits_ptr": f"*{dtype}",
                    "bias_ptr": "*fp32",
                    "mask_ptr": "*i1",
                    "scale": "fp32",
                    "weights_ptr": "*fp32",
                },
                {"TOP_K": 8, "SOFTMAX": softmax, "RENORMALIZE": softmax, "BLOCK_E": 256, "BLOCK_K": 8} | bias,
                arch,
                num_warps=1,
            )
    compile_kernel("counting", "_block_ranks_kernel", {}, {"BLOCK": 128}, arch)
    compile_kernel("counting", "_block_starts_kernel", {}, {"BLOCK_B": 64, "BLOCK_P": 32}, arch)
    compile_kernel("load", "_record_load_kernel", {"increment_ptr": "*i64", "load_ptr": "*i64"}, {"BLOCK": 256}, arch)
    compile_kernel("replicas", "_select_replicas_kernel", {"count_ptr": "*i64"}, {"BLOCK": 128}, arch)
    compile_kernel("schedule", "_lane_starts_kernel", {}, {"BLOCK_M": 64, "BLOCK_L": 128}, arch)
    compile_kernel("schedule", "_fill_schedule_kernel", {}, {"BLOCK_M": 64, "BLOCK": 128}, arch)


if __name__ == "__main__":
    arch = int(sys.argv[1])
    compile_small(arch)
    for dtype in DTYPES:
        for rows in (16, 32, 64, 128):
            compile_gemms(arch, dtype, rows, even_k=rows != 16, activation="gelu" if rows == 32 else "silu")
