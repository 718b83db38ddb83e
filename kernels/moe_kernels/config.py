"""Tile sizes of the grouped GEMMs: data in one table, chosen by what is equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmConfig:
    """One tile of a grouped GEMM and how it is run.

    Attributes:
        block_m: rows of a tile; a power of two, at least 16. The tile schedule must have been built with it.
        block_n: columns of the product per tile; a power of two, at least 32. `expert_up` computes block_n / 2
            columns of the gate and block_n / 2 of the up projection.
        block_k: how much of the inner dimension is multiplied at once; a power of two, at least 16.
        num_warps: warps per program.
        num_stages: depth of the software pipeline of loads; does not change any bit of the result.
        group_m: tiles that share a column block before the next column block begins (reuse of weights in L2).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    def __post_init__(self) -> None:
        for name, least in (("block_m", 16), ("block_n", 32), ("block_k", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}={value}: must be a power of two and at least {least}")
        for name in ("num_stages", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    def as_list(self) -> list[int]:
        """What a registered op takes: [block_m, block_n, block_k, num_warps, num_stages, group_m]."""
        return [self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages, self.group_m]


# (most rows per expert, config). Shared memory of a tile: (block_m + block_n) * block_k * itemsize * num_stages bytes.
_TABLE_16_BIT: tuple[tuple[int | None, GemmConfig], ...] = (
    (16, GemmConfig(block_m=16, block_n=128, block_k=64, num_warps=4, num_stages=4)),
    (32, GemmConfig(block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=4)),
    (64, GemmConfig(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=4)),
    (None, GemmConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)),
)
_TABLE_32_BIT: tuple[tuple[int | None, GemmConfig], ...] = (
    (16, GemmConfig(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3)),
    (None, GemmConfig(block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=3)),
)
# What a block may use, in bytes: 99 KiB on Ada and consumer Ampere, the least of what is supported (A100 163, H100 227;
# CUDA C++ Programming Guide, "Compute Capabilities"). The rest of a tile's use (epilogue) reuses the stages' memory.
_SHARED_MEMORY = 99 * 1024


def gemm_config(
    n: int,
    k: int,
    dtype: torch.dtype,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    shared_memory: int = _SHARED_MEMORY,
) -> GemmConfig:
    """The configuration of a grouped GEMM.

    A pure function of what is equal on all ranks, so that a row's bits don't depend on the rank, the slot or the other
    rows: never pass a rank's or a slot's own count of rows as `num_tokens`.

    Args:
        n: columns of the product: 2I for `expert_up`, H for `expert_down`.
        k: inner dimension: H for `expert_up`, I for `expert_down`.
        dtype: of the rows and weights: float32, float16 or bfloat16.
        num_tokens: tokens of the whole batch, summed over all ranks. Only its bucket (the next power of two) counts.
        top_k: experts per token.
        num_experts: logical experts of the layer.
        shared_memory: bytes that a block may use; it limits only `num_stages`, which changes no bit.

    Returns:
        The configuration; `block_m` depends only on `dtype` and the bucket of rows per expert, so that both GEMMs of
        a layer can use one schedule.

    Raises:
        ValueError: a size that is not positive (`num_tokens` may be 0), or a dtype that is not supported.
    """
    for name, value, least in (("n", n, 1), ("k", k, 1), ("num_tokens", num_tokens, 0), ("top_k", top_k, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if num_experts < top_k:
        raise ValueError(f"num_experts={num_experts}: must be at least top_k={top_k}")
    if dtype in (torch.float16, torch.bfloat16):
        table = _TABLE_16_BIT
    elif dtype == torch.float32:
        table = _TABLE_32_BIT
    else:
        raise ValueError(f"dtype={dtype}: must be torch.float32, torch.float16 or torch.bfloat16")
    bucket = _next_power_of_2(num_tokens)
    rows_per_expert = bucket * top_k // num_experts
    config = next(config for most, config in table if most is None or rows_per_expert <= most)

    block_n = min(config.block_n, max(32, _next_power_of_2(n)))
    block_k = min(config.block_k, max(16, _next_power_of_2(k)))
    stage = (config.block_m + block_n) * block_k * dtype.itemsize
    num_stages = max(1, min(config.num_stages, shared_memory // stage))
    return GemmConfig(config.block_m, block_n, block_k, config.num_warps, num_stages, config.group_m)


def _next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length() if value > 0 else 1
