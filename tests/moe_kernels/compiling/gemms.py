"""The two products of plain experts."""

from __future__ import annotations

import re

import torch

from moe_kernels import GemmConfig, gemm_config
from tests.moe_kernels.compiling.kernel import DTYPES, check_hopper, compile_kernel


def compile_gemms(
    arch: int, dtype: torch.dtype, rows_per_expert: int, even_k: bool, activation: str, biased: bool
) -> None:
    config = gemm_config(4096, 4096, dtype, rows_per_expert, 1, 1)
    floats = {name: f"*{DTYPES[dtype]}" for name in ("x_ptr", "gate_up_ptr", "hidden_ptr", "down_ptr", "rows_ptr")}
    floats |= {"row_weights_ptr": "*fp32", "stride_slot": "i64", "bias_ptr": f"*{DTYPES[dtype]}"}
    floats["pre_ptr"] = f"*{DTYPES[dtype]}"
    tiles = ({} if biased else {"bias_ptr": None}) | {
        "PDL": arch >= 90,
        "EVEN_K": even_k,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    up = tiles | {"BLOCK_I": config.block_n // 2, "ACTIVATION": activation}
    down = tiles | {"BLOCK_N": config.block_n}
    # What serving, training and a backward that recomputes need.
    unwanted = {"pre_ptr": None} if activation == "silu" else {"hidden_ptr": None} if activation == "gelu" else {}
    for module, name, constants in (
        ("expert_up_triton", "_expert_up_kernel", up | unwanted),
        ("expert_down_triton", "_expert_down_kernel", down | {"homes_ptr": None}),
        ("expert_down_triton", "_expert_down_kernel", down),
    ):
        compiled = compile_kernel(module, name, floats | {"homes_ptr": "*i64"}, constants, arch, **options)
        assert compiled.metadata.shared <= 99 * 1024, f"{compiled.metadata.shared} bytes of shared memory"


def compile_tma_gemms(
    arch: int,
    dtype: torch.dtype,
    up: GemmConfig,
    down: GemmConfig,
    hidden_size: int,
    intermediate: int,
    activation: str = "silu",
    biased: bool = False,
) -> None:
    """What serving uses: wgmma, and as much shared memory as such a GPU has."""
    element = DTYPES[dtype]
    for module, config in (("expert_up_tma", up), ("expert_down_tma", down)):
        n, k = config.block_n, config.block_k
        sizes = {"HIDDEN_SIZE": hidden_size, "INTERMEDIATE": intermediate, "PDL": True, "SWAP": config.swap}
        sizes["EVICTION"] = "evict_last" if config.keep else ""
        tiles = {"TAIL_M": config.tail_m, "BLOCK_M": config.block_m, "EXTRA_M": config.extra_m}
        tiles |= {"BLOCK_K": k, "GROUP_M": config.group_m, "BY_LANE": config.by_lane, "CLUSTERS": config.pairs}
        if module == "expert_up_tma":
            is_plain = config.swap or "ungated" in activation
            box = f"1,{n // 2},{k}" if is_plain else f"1,{n // 16},2,8,{k}"
            types = {"gate_up": f"tensordesc<{element}[{box}]>", "x_ptr": f"*{element}", "hidden_ptr": f"*{element}"}
            types |= {"bias_ptr": f"*{element}", "pre_ptr": f"*{element}"}
            tiles |= {"ACTIVATION": activation, "BLOCK_I": n // 2}
        else:
            types = {
                "row_weights_ptr": "*fp32",
                "rows_ptr": f"*{element}",
                "homes_ptr": "*i64",
                "down": f"tensordesc<{element}[1,{n},{k}]>",
            }
            for name, rows in (
                ("hidden", config.block_m),
                ("hidden_tail", config.tail_m),
                ("hidden_extra", config.extra_m),
            ):
                ragged = "" if config.swap else "1,1,"
                types[name] = f"tensordesc<{element}[{ragged}{rows or config.block_m},{k}]>"
            types["row_boxes"] = f"tensordesc<{element}[1,1,{config.block_m},{n // 2}]>"
            tiles |= {"PERSISTENT": config.programs_per_sm > 0, "BLOCK_N": n}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": True}
        unsorted = {"row_boxes": None}
        variants = ({"homes_ptr": None} | unsorted, unsorted)
        variants += ({"homes_ptr": None},) if config.sorts_rows else ()
        if module == "expert_up_tma":
            variants = ({"pre_ptr": None} if activation == "silu" else {},)
        for absent in variants:
            compiled = compile_kernel(module, f"_{module}_kernel", types, sizes | tiles | absent, arch, **options)
            ptx = compiled.asm["ptx"]
            is_kept = re.search(r"st\.global\S*evict_last\S*cache_hint", ptx) is not None
            assert is_kept == config.keep, "outputs must stay in L2 where they are worth it"
            if module == "expert_up_tma" or "row_boxes" in absent:
                assert re.search(r"st\.global\S*v4\.b32", ptx), "rows must be stored 16 bytes at a time, also to a peer"
            else:
                assert "cp.async.bulk.tensor.4d.global.shared" in ptx and "st.global" not in ptx, (
                    "rows must be stored by TMA"
                )
            inner = hidden_size if module == "expert_up_tma" else intermediate
            assert ("barrier.cluster" in ptx) == (0 < config.pairs <= inner), "pairs must keep in step in long products"
            check_hopper(compiled)
