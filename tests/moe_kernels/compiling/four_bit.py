"""The two products of 4-bit experts on Hopper."""

from __future__ import annotations

import re

from moe_kernels import GemmConfig
from moe_kernels.quantised.four_bit_ring import groups_layout, hands_of_box, ring_constants, rows_layout, words_layout
from tests.moe_kernels.compiling.kernel import check_hopper, compile_kernel


def compile_four_bit_ring(
    scheme: str, config: GemmConfig, is_up: bool, dtype: str = "bf16", sizes: tuple[int, int] = (2880, 2880),
    group: int = 32, activation: str = "silu", biased: bool = False, zeros: bool = False,
) -> None:  # fmt: skip
    """Likewise, by a ring of operands."""
    is_interleaved = is_up and "ungated" not in activation
    k, rows_of_box = config.block_k, (32 if is_interleaved else 64) * hands_of_box(config.block_n // 64)
    box = [1, max(config.block_k // group, 1), rows_of_box]
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
