"""Quantised experts: what every GPU can compute, and which variants there are."""

from __future__ import annotations

import torch

from moe_kernels import GemmConfig
from moe_kernels.operands.config import _FP8_RING, _TABLE_FP8_RING, _quantised_table
from tests.moe_kernels.compiling.four_bit import compile_four_bit_ring
from tests.moe_kernels.compiling.fp8 import compile_ring
from tests.moe_kernels.compiling.kernel import GPT_OSS, QUANTISED, compile_kernel, compile_small_one
from tests.moe_kernels.compiling.one_token import compile_one_quantised_token


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
        few = [down for _, _, down in _TABLE_FP8_RING[:2]]
        compile_ring(few[1])
        for kind in (("bf16", GPT_OSS, True), ("fp16", "relu2 ungated", True), ("fp32", "gelu")) if all_of_them else ():
            for config in (_FP8_RING, *few):
                compile_ring(config, *kind)
    if not all_of_them:
        (_, up, down), (_, wide_up, _) = tables["fp8_block"][0], tables["fp8_block"][-1]
        compile_quantised(arch, "fp8_block", up, True)
        compile_quantised(arch, "fp8_block", down, False, even_k=False)
        compile_quantised(arch, "fp8_block", wide_up, True)
        narrow, wide = tables["mxfp4"][0][1], tables["int4"][-1][2]
        if arch == 90:
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
                compile_four_bit_ring(scheme, up, True, **kind)
                compile_four_bit_ring(scheme, down, False, biased=True)
                compile_four_bit_ring(scheme, up, True, sizes=sizes, group=group, zeros=scheme == "int4")
                compile_four_bit_ring(scheme, down, False, sizes=sizes, group=group, zeros=scheme == "int4")
                compile_four_bit_ring(scheme, up, True, "fp16", activation="relu2 ungated")
                compile_four_bit_ring(scheme, down, False, "fp16")
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
