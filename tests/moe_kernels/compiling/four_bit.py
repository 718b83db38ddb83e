"""The two products of 4-bit experts on Hopper."""

from __future__ import annotations

import re

from moe_kernels import GemmConfig
from moe_kernels.quantised.four_bit import MOST_HALVED
from moe_kernels.quantised.four_bit_ring import groups_layout, ring_constants, rows_layout, words_layout
from tests.moe_kernels.compiling.kernel import QUANTISED, check_hopper, compile_kernel


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
    check_hopper(compiled)
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
    check_hopper(compiled, config.programs_per_sm)
    assert "cp.async.bulk.tensor" in ptx
    assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time"
    # Weights are unpacked to registers, beside a product that is under way.
    products = re.findall(r"warp_group_dot %\S+, .*? : tensor<", compiled.asm["ttgir"])
    assert products and len(products) == compiled.asm["ttgir"].count("ttng.warp_group_dot %")
