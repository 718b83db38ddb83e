"""Backward of the experts: tile sizes of its GEMMs, a table keyed by what is equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moe_kernels.base.checks import check_batch
from moe_kernels.base.integers import next_power_of_2
from moe_kernels.operands.config import GemmConfig


@dataclass(frozen=True)
class GradientConfigs:
    """Tiles of the three GEMMs of a backward.

    With `tma` weights, sorted rows and gradients of weights go through the tensor memory accelerator: on Hopper, for 16-bit
    dtypes and sizes divisible by 8. It changes no bit. No field of `GemmConfig` after `tma` is used but those named here.

    Attributes:
        hidden: of the gradient of the hidden rows: `block_m` rows, `block_n` columns of I, `block_k` of H.
        weights: of the gradients of matrices: `block_m` × `block_n` of a slot's matrix, `block_k` rows. With `tma`
            `programs_per_sm` persistent programs per multiprocessor; rows that are not in sorted order are copied first.
        x: of the gradient of x: `block_m` rows, equal to `hidden`'s, `block_n` columns of H, `block_k` of gate and up rows.
            `tail_m` and `programs_per_sm` as of the forward.
    """

    hidden: GemmConfig
    weights: GemmConfig
    x: GemmConfig

    def __post_init__(self) -> None:
        if self.x.block_m != self.hidden.block_m:
            raise ValueError(f"x.block_m={self.x.block_m}: must be hidden.block_m, {self.hidden.block_m}")
        for name, used in (
            ("hidden", ()),
            ("weights", ("programs_per_sm",)),
            ("x", ("tail_m", "programs_per_sm")),
        ):
            for field in {"swap", "tail_m", "extra_m", "programs_per_sm", "keep", "by_lane"}.difference(used):
                value = getattr(getattr(self, name), field)
                if value:
                    raise ValueError(f"{name}.{field}={value}: must not be set")
        if self.weights.tma and not self.weights.programs_per_sm:
            raise ValueError(f"weights.programs_per_sm={self.weights.programs_per_sm}: must be positive with tma=True")


_ANY = 1 << 62  # more than there can be
_FEW = GemmConfig(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3)
_SQUARE = GemmConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
_WIDE = GemmConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3)
_IEEE = GemmConfig(block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=3)
# (most rows per expert, configs). Shared memory: see `operands.config`; _WIDE needs the 163 KiB of an A100 or H100.
_TABLE_16_BIT = (
    (64, GradientConfigs(_FEW, replace(_SQUARE, block_k=32), _FEW)),
    (_ANY, GradientConfigs(_SQUARE, _SQUARE, _SQUARE)),
)
# Measured on an H200 with 128 to 4,096 rows per expert (qwen3, gptoss, dsv3, mixtral; docs/log.md). Two programs of `weights`
# must fit on a multiprocessor: where rows are few, one stores while the other multiplies.
_HOPPER = replace(_WIDE, num_stages=4)
_SHALLOW = replace(_SQUARE, block_k=32, num_stages=4)
_TABLE_HOPPER = (
    (64, GradientConfigs(_FEW, _SHALLOW, _FEW)),
    (128, GradientConfigs(_HOPPER, _SHALLOW, _HOPPER)),
    (_ANY, GradientConfigs(_HOPPER, _SQUARE, _HOPPER)),
)
# Measured there with 256 rows per expert (qwen3). Why that holds for 128 and for more: docs/log.md.
_SUMS = replace(_HOPPER, tma=True, programs_per_sm=1)
_TABLE_TMA = (
    (64, GradientConfigs(_FEW, _SHALLOW, _FEW)),
    (_ANY, GradientConfigs(_HOPPER, _SUMS, replace(_HOPPER, tma=True, tail_m=64))),
)
_LEAST_TMA = 128  # of H and I: smaller tiles have not been measured, nor would wgmma multiply all of them
_TABLE_32_BIT = ((_ANY, GradientConfigs(_IEEE, replace(_IEEE, block_m=64), _IEEE)),)


def _within(config: GemmConfig, n: int, k: int, m: int | None = None) -> GemmConfig:
    """No larger than sizes need."""
    block_m = config.block_m if m is None else min(config.block_m, max(16, next_power_of_2(m)))
    block_n = min(config.block_n, max(32, next_power_of_2(n)))
    block_k = min(config.block_k, max(16, next_power_of_2(k)))
    return replace(config, block_m=block_m, block_n=block_n, block_k=block_k)


def gradient_configs(
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    tma: bool = False,
) -> GradientConfigs:
    """The configurations of a backward: a pure function of what is equal on all ranks, as `gemm_config` is.

    Args:
        hidden_size, intermediate_size: H, I.
        dtype: of the rows and weights: float32, float16 or bfloat16.
        num_tokens: tokens of the whole batch, summed over all ranks. Only its bucket (the next power of two) counts.
        top_k: experts per token.
        num_experts: logical experts of the layer.
        tma: `has_tma(device)`: whether tiles may need as much shared memory as Hopper has, and use its accelerator, where
            sizes are divisible by 8.

    Raises:
        ValueError: a size that is not positive (`num_tokens` may be 0), or a dtype that is not supported.
    """
    sizes = (("hidden_size", hidden_size), ("intermediate_size", intermediate_size))
    hidden_size, intermediate_size, num_tokens, top_k, num_experts = check_batch(
        sizes, dtype, num_tokens, top_k, num_experts
    )
    rows_per_expert = next_power_of_2(num_tokens) * top_k // num_experts
    smaller = min(hidden_size, intermediate_size)
    fits_tma = hidden_size % 8 == intermediate_size % 8 == 0 and smaller >= _LEAST_TMA
    table: tuple[tuple[int, GradientConfigs], ...] = _TABLE_TMA if fits_tma else _TABLE_HOPPER
    if not tma:
        table = _TABLE_16_BIT
    if dtype.itemsize == 4:
        table = _TABLE_32_BIT
    configs = next(configs for most, configs in table if rows_per_expert <= most)
    hidden, weights, x = configs.hidden, configs.weights, configs.x
    # `weights` is of both matrices, [J, H] and [H, I].
    return GradientConfigs(
        _within(hidden, intermediate_size, hidden_size),
        _within(weights, smaller, weights.block_k, smaller),
        _within(x, hidden_size, intermediate_size),
    )
