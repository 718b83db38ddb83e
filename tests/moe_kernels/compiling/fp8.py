"""Both products with fp8_block experts on Hopper."""

from __future__ import annotations

import re
from typing import Any

from moe_kernels import GemmConfig
from moe_kernels.quantised.fp8_ring import ROW_LAYOUT, STAGED_LAYOUT, WEIGHT_LAYOUT
from tests.moe_kernels.compiling.kernel import check_hopper, compile_kernel


def compile_ring(config: GemmConfig, dtype: str = "bf16", activation: str = "silu", biased: bool = False) -> None:
    """Both products in one kernel, and each in its own; the down projection also to homes."""
    fp8 = "*fp8e4nv"
    types = dict.fromkeys(("x_ptr", "hidden_ptr"), fp8) | {"homes_ptr": "*i64"}
    types |= dict.fromkeys(("up_bias_ptr", "down_bias_ptr", "rows_ptr"), f"*{dtype}")
    scales = ("x_scale_ptr", "hidden_scale_ptr", "gate_up_scale_ptr", "down_scale_ptr", "row_weights_ptr")
    types |= dict.fromkeys(scales, "*fp32")
    for name, block, layout in (
        ("gate_up", (1, 128, 128), WEIGHT_LAYOUT),
        ("down", (1, 128, 128), WEIGHT_LAYOUT),
        ("hidden", (min(config.block_m, 64), 128), ROW_LAYOUT),
    ):
        types[name] = f"tensordesc<{fp8[1:]}{list(block)},{layout.value!r}>"
    types["boxes"] = f"tensordesc<{dtype}[1, 1, 64, 128],{STAGED_LAYOUT.value!r}>"
    constants: dict[str, Any] = {
        "PDL": True,
        "M": config.block_m,
        "STAGES": config.num_stages,
        "GROUP_M": config.group_m,
    }
    constants |= {"HIDDEN_SIZE": 2048, "INTERMEDIATE": 768, "FANOUT": 8, "ACTIVATION": activation}
    if not biased:
        constants |= {"up_bias_ptr": None, "down_bias_ptr": None}
    no_up = {"x_ptr": None, "x_scale_ptr": None, "gate_up": None}
    no_down = {"down": None, "row_weights_ptr": None, "rows_ptr": None}
    alone = {"counters_ptr": None}
    for more in (
        *(({"UP": True, "DOWN": True, "homes_ptr": None},) if config.sorts_rows and dtype != "fp32" else ()),
        {"UP": True, "DOWN": True, "homes_ptr": None, "boxes": None},
        {"UP": True, "DOWN": True, "boxes": None},
        {"UP": True, "DOWN": False, "homes_ptr": None, "boxes": None, **no_down, **alone},
        {"UP": False, "DOWN": True, "boxes": None, **no_up, **alone},
    ):
        compiled = compile_kernel(
            "experts_fp8_kernel", "experts_fp8_kernel", types, constants | more, 90, num_warps=4, launch_pdl=True
        )
        ptx = compiled.asm["ptx"]
        check_hopper(compiled)
        _check_waits(ptx)
        assert ptx.count("setmaxnreg.inc") >= 2, "who multiplies needs more registers than who copies"
        if more["UP"] or dtype != "fp32":
            assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time"
        _check_order(ptx, more["UP"] and more["DOWN"])
        assert ("bulk_group" in ptx) == ("boxes" not in more), "sorted rows must go by TMA"


def _check_waits(ptx: str) -> None:
    """Each part of the warps waits for the kernel before, and before all else, as does nobody before the warps part."""
    waits = [found.start() for found in re.finditer("griddepcontrol.wait", ptx)]
    assert len(waits) == 3, "who fills, and each group that multiplies"
    parts = [ptx[ptx.rfind("barrier.sync", 0, wait) : wait] for wait in waits]
    for part in (ptx[: ptx.find("barrier.sync")], *parts):
        assert not re.search(r"(ld|st|atom|red)\.global|cp\.async", part), part


def _check_order(ptx: str, is_both: bool) -> None:
    """Hidden rows are released by who stored them, acquired by who reads them, and by TMA only behind a fence."""
    kinds = (r"atom\.global\.gpu\.release\.add", r"ld\.global\.gpu\.acquire", r"atom\.global\.gpu\.relaxed\.add")
    found = [len(re.findall(kind, ptx)) for kind in kinds]
    fences = ptx.count("fence.proxy.async;")
    assert (all(found) and fences == 1) if is_both else (not any(found) and not fences), (found, fences)
