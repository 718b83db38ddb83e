"""The two products of fp8_block experts on Hopper."""

from __future__ import annotations

import re

from moe_kernels import GemmConfig
from moe_kernels.quantised.fp8_ring import ROW_LAYOUT, WEIGHT_LAYOUT
from tests.moe_kernels.compiling.kernel import check_hopper, compile_kernel


def compile_few(
    config: GemmConfig, dtype: str = "bf16", sizes: tuple[int, int] = (2048, 768), biased: bool = False
) -> None:
    """The down projection of few rows."""
    fp8, fp32 = "*fp8e4nv", "*fp32"
    types = {
        "hidden_ptr": fp8,
        "down": f"tensordesc<{fp8[1:]}[1, 128, 128],{WEIGHT_LAYOUT.value!r}>",
        "homes_ptr": "*i64",
    }
    types |= dict.fromkeys(("bias_ptr", "rows_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("hidden_scale_ptr", "scale_ptr", "row_weights_ptr"), fp32)
    constants = {"PDL": True, "M": config.block_m, "STAGES": config.num_stages, "GROUP_M": config.group_m}
    constants |= {"HIDDEN_SIZE": sizes[0], "INTERMEDIATE": sizes[1]} | ({} if biased else {"bias_ptr": None})
    for more in ({"homes_ptr": None, "BEHIND_UP": True}, {"BEHIND_UP": False}):
        compiled = compile_kernel(
            "expert_down_fp8_few",
            "_expert_down_fp8_few_kernel",
            types,
            constants | more,
            90,
            num_warps=4,
            launch_pdl=True,
        )
        ptx = compiled.asm["ptx"]
        check_hopper(compiled)
        weights, wait = ptx.find("cp.async.bulk.tensor"), ptx.find("griddepcontrol.wait")
        assert weights != -1 and wait < ptx.find("st.global"), "must have waited when it stores"
        if not more["BEHIND_UP"]:
            assert wait < min(weights, ptx.find("ld.global")), "the schedule may be what the kernel before makes"
        assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time"


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
        check_hopper(compiled)
        assert "cp.async.bulk.tensor" in ptx
        assert ptx.count("setmaxnreg.inc") >= 2, "who multiplies needs more registers than who copies"
        if module == "expert_up_fp8" or dtype != "fp32":
            assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time"
