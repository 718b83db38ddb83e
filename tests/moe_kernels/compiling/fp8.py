"""The two products of fp8_block experts on Hopper."""

from __future__ import annotations

import re

from moe_kernels import GemmConfig
from moe_kernels.quantised.fp8_ring import ROW_LAYOUT, WEIGHT_LAYOUT
from tests.moe_kernels.compiling.kernel import check_hopper, compile_kernel


def compile_ring(config: GemmConfig, dtype: str = "bf16", activation: str = "silu", biased: bool = False) -> None:
    """Both products with fp8_block experts on Hopper."""
    fp8 = "*fp8e4nv"
    types = dict.fromkeys(("x_ptr", "hidden_ptr"), fp8) | dict.fromkeys(("bias_ptr", "rows_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("x_scale_ptr", "hidden_scale_ptr", "scale_ptr", "row_weights_ptr"), "*fp32")
    for name, block, layout in (
        ("gate_up", (1, 128, 128), WEIGHT_LAYOUT),
        ("down", (1, 128, 128), WEIGHT_LAYOUT),
        ("hidden", (min(config.block_m, 64), 128), ROW_LAYOUT),
    ):
        types[name] = f"tensordesc<{fp8[1:]}{list(block)},{layout.value!r}>"
    types["homes_ptr"] = "*i64"
    constants = {"PDL": True, "M": config.block_m, "STAGES": config.num_stages, "GROUP_M": config.group_m}
    absent = {} if biased else {"bias_ptr": None}
    for module, more in (
        ("expert_up_fp8", {"ACTIVATION": activation}),
        ("expert_down_fp8", {"homes_ptr": None, "BEHIND_UP": True}),
        ("expert_down_fp8", {"BEHIND_UP": False}),
    ):
        compiled = compile_kernel(
            module, f"_{module}_kernel", types, constants | absent | more, 90, num_warps=4, launch_pdl=True
        )
        ptx = compiled.asm["ptx"]
        check_hopper(compiled)
        weights, wait = ptx.find("cp.async.bulk.tensor"), ptx.find("griddepcontrol.wait")
        assert weights != -1 and -1 < wait < ptx.find("st.global"), "must have waited when it stores"
        if more.get("BEHIND_UP"):
            assert ptx.count("griddepcontrol.wait") == 3, "who fills, and each group that multiplies"
        else:
            assert wait < min(weights, ptx.find("ld.global")), "the schedule may be what the kernel before makes"
        assert ptx.count("setmaxnreg.inc") >= 2, "who multiplies needs more registers than who copies"
        if module == "expert_up_fp8" or dtype != "fp32":
            assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time"
