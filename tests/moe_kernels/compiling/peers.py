"""Dispatch and combine over peer memory."""

from __future__ import annotations

import re

import torch
import triton

from tests.moe_kernels.compiling.kernel import DTYPES, compile_small_one


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
