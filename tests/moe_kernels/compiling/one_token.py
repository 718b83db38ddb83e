"""The forward of one token."""

from __future__ import annotations

import re

import torch

from moe_kernels import RoutingRule
from moe_kernels.one_token import one_token_fp8_launches
from moe_kernels.routing import routing_triton
from tests.moe_kernels.compiling.kernel import DTYPES, QUANTISED, check_recording, compile_kernel


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
    if arch == 90 and scheme == "fp8_block":
        compile_one_fp8_token_mma(types, sizes)
    elif arch == 90 and dtype == "bf16":
        compile_one_token_mma(types, sizes | {"TOP_K": 8})


def compile_one_token_mma(types: dict[str, str], sizes: dict[str, object]) -> None:
    """4-bit weights by tensor cores."""
    for name, num_warps, constants in (
        ("_up_mma_kernel", 4, {"ACTIVATION": "silu"}),
        ("_down_mma_kernel", 8, {"EXPERT_PAIRS": 4}),
    ):
        options = {"num_warps": num_warps, "launch_pdl": True}
        constants = sizes | constants | {"P": num_warps}
        ptx = compile_kernel("one_token_four_bit_mma", name, types, constants, 90, **options).asm["ptx"]
        assert "mma.sync" in ptx and re.search(r"ld\.global\.\S*evict_first\S*cache_hint\S*v4", ptx)


def compile_one_fp8_token_mma(types: dict[str, str], sizes: dict[str, object]) -> None:
    """fp8_block by tensor cores."""
    for hidden_size, intermediate, top_k in (
        *((2048, 768, 8), (7168, 2048, 8), (640, 384, 8), (256, 1152, 8)),
        (128, 1024, 16),
    ):
        of_up, of_down = one_token_fp8_launches.fp8_constants(hidden_size, intermediate, top_k)
        kernels = [("mma", "_up_fp8_mma_kernel", of_up)]
        if "SHARE" in of_down:
            kernels.append(("small", "_down_small_fp8_mma_kernel", of_down))
        else:
            kernels.append(("mma", "_down_fp8_mma_kernel", of_down))
        for module, name, constants in kernels:
            options = {"launch_pdl": True} | {one: constants[one] for one in ("num_warps", "maxnreg")}
            constants = {one: value for one, value in constants.items() if one not in options}
            constants |= sizes | {"HIDDEN_SIZE": hidden_size, "INTERMEDIATE": intermediate, "TOP_K": top_k}
            constants |= {"ACTIVATION": "silu"} if name.startswith("_up") else {}
            ptx = compile_kernel(f"one_token_fp8_{module}", name, types, constants, 90, **options).asm["ptx"]
            assert "mma.sync" in ptx and re.search(r"ld\.global\.\S*evict_first\S*cache_hint\S*v4", ptx)
            assert "cvt.rn.f16x2.e4m3x2" in ptx
