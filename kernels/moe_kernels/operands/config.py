"""Steps 3 to 5 of a forward: tile sizes of the grouped GEMMs, a table keyed by what is equal on all ranks."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, fields, replace

import torch

from moe_kernels.base.checks import check_batch, check_integer
from moe_kernels.base.integers import next_power_of_2
from moe_kernels.operands.schemes import check_scheme


@dataclass(frozen=True)
class GemmConfig:
    """One tile of a grouped GEMM and how it is run.

    On one machine only `tma` and `block_k` can decide bits; `tests/moe_kernels/test_variants.py` holds the rest to it.

    Attributes:
        block_m: rows of a tile; a power of two, at least 16, or 8 by the ring for 4-bit weights. The tile schedule must have
            been built with it.
        block_n: columns of the product per tile; a power of two, at least 32. `expert_up` computes block_n / 2
            columns of the gate and block_n / 2 of the up projection.
        block_k: how much of the inner dimension is multiplied at once; a power of two, at least 16.
        num_warps: warps per program.
        num_stages: depth of the software pipeline of loads; does not change any bit of the result.
        group_m: tiles that share a column block before the next column block begins (reuse of weights in L2).
        tma: whether the weights come through the tensor memory accelerator (on Hopper: 16-bit dtypes with H and I
            divisible by 8, fp8_block by 16). The others below are only for these kernels.
        swap: weights on the M side of the product, for few rows: the tensor core takes 64 rows there and 16 on the N side.
        tail_m: tiles of at most so many rows are computed as ones of `tail_m` rows; 0, or a power of two, at least 64.
        extra_m: an expert's last rows, if at most so many, are computed together with the `block_m` before them, by the
            same load of the weights; 0, or a power of two, at least 64. The tile schedule must have been built with
            `schedule_extra_m`.
        programs_per_sm: so many persistent programs per multiprocessor; 0 is one program per tile. `expert_down` only, but for
            4-bit weights by the ring.
        keep: write the output so that L2 rather lets other things go, weights that stream by above all.
        quantised: for experts of a scheme other than "plain", which may `swap`. With `tma`, on Hopper: of fp8_block the kernels
            of `fp8_ring.py`, with `num_stages` in the ring, whose tiles are 128 x 256 x 128, or, if they `swap`, of 16 or 32
            rows; of 4-bit weights, which always `swap`, those of `four_bit_ring.py`, with `programs_per_sm`, four warps for
            each 64 of `block_n`, and `tail_m` and `extra_m` of 16 at least.
        by_lane: tiles share a column block with tiles of their own lane only, in groups of at most `group_m` and about equal
            size: so a lane's weights are read from memory once for each of its groups. Else most groups have tiles of two
            lanes, whose weights are read by two groups each.
        pairs: if not 0, every two programs start together, as most of them load the same weights, and keep in step
            (`keep_in_step`) if the inner dimension is at least so long: so the L2 is read less. For one program per
            multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tma: bool = False
    swap: bool = False
    tail_m: int = 0
    programs_per_sm: int = 0
    extra_m: int = 0
    keep: bool = False
    quantised: bool = False
    by_lane: bool = False
    pairs: int = 0

    @property
    def schedule_extra_m(self) -> int:
        """What the tile schedule must have been built with: with `by_lane`, programs find the extra rows themselves."""
        return 0 if self.by_lane else self.extra_m

    @property
    def sorts_rows(self) -> bool:
        """Whether `expert_down` should store 16-bit rows where they are sorted (`TileSchedule.places_N`), by TMA, which keeps
        nothing: measured with one program per multiprocessor only. Rows of other dtypes stay in flat order."""
        is_measured = not self.swap if self.quantised else self.programs_per_sm == 1 and not self.keep
        return self.tma and is_measured

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            if type(getattr(self, name)) is not int:
                object.__setattr__(self, name, check_integer(name, getattr(self, name)))
        is_few_fp8 = self.swap and (self.block_n, self.num_warps) == (256, 4)
        is_ring = self.quantised and self.tma and self.swap and not is_few_fp8  # of 4-bit weights
        for name, least in (("block_m", 8 if is_ring else 16), ("block_n", 32), ("block_k", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or (value & (value - 1) and not (is_ring and name in ("block_n", "num_warps"))):
                raise ValueError(f"{name}={value}: must be a power of two and at least {least}")
        for name, least in (("num_stages", 1), ("group_m", 1), ("programs_per_sm", 0), ("pairs", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if self.by_lane and (self.quantised or not self.tma):
            raise ValueError(f"{self}: by_lane needs tma=True and quantised=False")
        if self.pairs and (self.quantised or not self.tma or self.swap or self.programs_per_sm > 1):
            raise ValueError(f"{self}: pairs needs tma=True, quantised=False, swap=False and programs_per_sm of 0 or 1")
        others = self.tail_m or self.programs_per_sm or self.extra_m or self.keep
        if is_ring:
            self._check_four_bit_ring()
            return
        if self.quantised and self.tma:
            rows = [16, 32] if self.swap else [128]
            if self.block_m not in rows or (self.block_n, self.block_k, self.num_warps) != (256, 128, 4):
                raise ValueError(f"{self}: quantised with tma needs tiles of {rows} x 256 x 128 and num_warps=4")
            if others:
                raise ValueError(f"{self}: quantised with tma has no tail_m, programs_per_sm, extra_m or keep")
        if not self.tma and (others or (self.swap and not self.quantised)):
            raise ValueError(f"{self}: tail_m, programs_per_sm, extra_m, keep and (not quantised) swap need tma=True")
        for name, value in (("tail_m", self.tail_m), ("extra_m", self.extra_m)):
            # Fewer rows would be multiplied by mma.sync, whose bits are not those of wgmma.
            if value and (value < 64 or value & (value - 1)):
                raise ValueError(f"{name}={value}: must be 0, or a power of two and at least 64")
            if value >= self.block_m:
                raise ValueError(f"{name}={value}: must be less than block_m={self.block_m}")
            if value and (self.swap or self.programs_per_sm):
                raise ValueError(f"{name}={value}: not together with swap or programs_per_sm")
        # Swapped, gate and up rows are 64 at least each, or they would be multiplied by mma.sync; a box holds 256.
        least = 128 if self.swap else 32
        if self.tma and not least <= self.block_n <= 256:
            raise ValueError(f"block_n={self.block_n}: must be in [{least}, 256] with tma=True")

    def _check_four_bit_ring(self) -> None:
        if (self.block_n, self.num_warps) not in ((128, 8), (192, 12)):
            raise ValueError(f"{self}: the ring of 4-bit weights needs block_n=128 and num_warps=8, or 192 and 12")
        # Who multiplies waits for the next stage before it empties its own: with one stage for ever.
        if self.block_k not in (64, 128, 256) or self.num_stages & (self.num_stages - 1) or self.num_stages < 2:
            raise ValueError(
                f"{self}: the ring needs block_k of 64, 128 or 256 and num_stages a power of two, at least 2"
            )
        if self.block_m > 256 or self.programs_per_sm not in (1, 2) or self.keep:
            raise ValueError(f"{self}: the ring needs block_m <= 256, programs_per_sm of 1 or 2 and no keep")
        for name, most in (("tail_m", self.block_m - 1), ("extra_m", self.block_m)):
            value = getattr(self, name)
            if value and (value < 16 or value & (value - 1) or value > most):
                raise ValueError(f"{name}={value}: must be 0, or a power of two from 16 to {most}")


_INTEGERS = tuple(field.name for field in fields(GemmConfig) if field.type == "int")
_ANY = 1 << 62  # more than there can be
# (most rows per expert, config). Shared memory of a tile: (block_m + block_n) * block_k * itemsize * num_stages bytes (the
# epilogue reuses it), which fit the 99 KiB that a block may use on Ada and consumer Ampere, the least of what is supported
# (A100 163, H100 227; CUDA C++ Programming Guide, "Compute Capabilities").
_TABLE_16_BIT: tuple[tuple[int, GemmConfig], ...] = (
    (16, GemmConfig(block_m=16, block_n=128, block_k=64, num_warps=4, num_stages=4)),
    (32, GemmConfig(block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=4)),
    (64, GemmConfig(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=4)),
    (_ANY, GemmConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)),
)
_TABLE_32_BIT: tuple[tuple[int, GemmConfig], ...] = (
    (16, GemmConfig(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3)),
    (_ANY, GemmConfig(block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=3)),
)

# Quantised, (most rows per expert, expert_up, expert_down); those that are not for Hopper were not measured. fp8_block:
# `expert_up` has a whole group of 128 hidden channels in a program, whose largest decides their scale.
_FP8_UP = GemmConfig(block_m=16, block_n=256, block_k=128, num_warps=4, num_stages=2, quantised=True)
_FP8_DOWN = GemmConfig(block_m=16, block_n=128, block_k=128, num_warps=4, num_stages=4, quantised=True)
_FOUR_BIT = GemmConfig(block_m=16, block_n=128, block_k=128, num_warps=4, num_stages=3, quantised=True)
_QuantisedTable = tuple[tuple[int, GemmConfig, GemmConfig], ...]
_TABLE_FP8: _QuantisedTable = (
    (16, _FP8_UP, _FP8_DOWN),
    (32, replace(_FP8_UP, block_m=32), replace(_FP8_DOWN, block_m=32)),
    (_ANY, replace(_FP8_UP, block_m=64, num_warps=8), replace(_FP8_DOWN, block_m=64, num_stages=3)),
)
_TABLE_4_BIT: _QuantisedTable = (
    (16, _FOUR_BIT, _FOUR_BIT),
    (32, replace(_FOUR_BIT, block_m=32), replace(_FOUR_BIT, block_m=32)),
    (_ANY, *2 * (replace(_FOUR_BIT, block_m=64, block_k=64, num_warps=8),)),
)
_TABLE_4_BIT_OF_32: _QuantisedTable = (
    (_ANY, *2 * (GemmConfig(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3, quantised=True),)),
)
# On Hopper, by a ring (`fp8_ring.py`) if TMA can read the weights; few rows are on the N side of products.
_FP8_RING = GemmConfig(block_m=128, block_n=256, block_k=128, num_warps=4, num_stages=4, tma=True, quantised=True)
_FEW_FP8: _QuantisedTable = (
    (8, replace(_FP8_UP, num_stages=3, swap=True), replace(_FP8_DOWN, swap=True)),
    (
        16,
        replace(_FP8_UP, block_m=32, num_stages=3, swap=True),
        replace(_FP8_DOWN, block_m=32, num_stages=3, swap=True),
    ),
)
_TABLE_FP8_RING: _QuantisedTable = (
    (8, *2 * (replace(_FP8_RING, block_m=16, num_stages=6, swap=True),)),
    (16, *2 * (replace(_FP8_RING, block_m=32, num_stages=5, swap=True),)),
    (_ANY, *2 * (_FP8_RING,)),
)
_TABLE_FP8_HOPPER: _QuantisedTable = (
    *_FEW_FP8,
    (32, *_FEW_FP8[-1][1:]),
    (64, replace(_FP8_UP, block_m=64, num_warps=8, num_stages=3), replace(_FP8_DOWN, block_m=64)),
    (_ANY, replace(_FP8_UP, block_m=128, num_warps=8, num_stages=3), replace(_FP8_DOWN, block_m=128, num_warps=8)),
)
# By a ring (`four_bit_ring.py`), measured with gptoss-mxfp4, qwen3-mxfp4 and qwen3-int4 on an H200. Weights are unpacked once
# for `block_m` rows, so a few more rows are `extra_m`.
_RING = GemmConfig(
    block_m=16,
    block_n=192,
    block_k=256,
    num_warps=12,
    num_stages=4,
    tma=True,
    swap=True,
    quantised=True,
    programs_per_sm=1,
)
_RINGS = replace(_RING, block_n=128, num_warps=8, programs_per_sm=2)
_RING_MANY: _QuantisedTable = (
    (64, *2 * (replace(_RING, block_m=64, block_k=128, tail_m=32, extra_m=32),)),
    (_ANY, *2 * (replace(_RING, block_m=128, block_k=128, tail_m=64, extra_m=32),)),
)
_TABLE_4_BIT_HOPPER: _QuantisedTable = (
    (2, *2 * (replace(_RINGS, block_m=8),)),
    (8, *2 * (_RINGS,)),
    (16, *2 * (replace(_RINGS, block_m=32, block_k=128),)),
    (32, *2 * (replace(_RINGS, block_m=32, block_k=128, tail_m=16, extra_m=16),)),
    *_RING_MANY,
)

# With TMA, tuned on an H200 (`python -m bench.tune`, docs/log.md).
_NARROW = GemmConfig(block_m=16, block_n=128, block_k=128, num_warps=4, num_stages=3, tma=True, swap=True)
_NARROW_32 = GemmConfig(block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=5, tma=True, swap=True)
_MIDDLE = GemmConfig(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=4, tma=True)
_WIDE = GemmConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, tma=True, tail_m=64)
_WIDE_DOWN = GemmConfig(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3, group_m=4, tma=True, tail_m=64)
_MERGED = GemmConfig(
    block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, group_m=4, tma=True, tail_m=64, extra_m=64
)
_PERSISTENT = GemmConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, tma=True, programs_per_sm=1)
# Pairs of many tiles of one expert keep in step even where the inner dimension is short; of unequal tiles one waits in vain.
_PAIRS = replace(_WIDE, pairs=4096)
_PAIRS_LONG = replace(_WIDE, pairs=2048)
_BY_LANE = replace(_PAIRS, group_m=12, by_lane=True)
_BY_LANE_LONG = replace(_PAIRS, group_m=20, by_lane=True)  # 4,096 rows are 32 or 33 tiles: two groups
_MERGED_BY_LANE = replace(_MERGED, group_m=12, by_lane=True, pairs=4096)
_PERSISTENT_PAIRS = replace(_PERSISTENT, pairs=1)
_PERSISTENT_BY_LANE = replace(_PERSISTENT_PAIRS, group_m=12, by_lane=True)
# Where the inner dimension is short, loads and stores of a tile weigh more: two persistent programs take turns.
_MIDDLE_SHORT = GemmConfig(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3, tma=True, programs_per_sm=2)
_WIDE_SHORT = GemmConfig(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3, tma=True, programs_per_sm=2)

_Pair = tuple[GemmConfig, GemmConfig]
_INTERMEDIATE = (1024, 4096)  # up to these sizes: the first column below, the second; larger ones: the third
_TABLE_TMA: tuple[tuple[int, int, tuple[_Pair, _Pair, _Pair]], ...] = (
    # most rows per expert, most tokens, (expert_up, expert_down) by the intermediate size
    (8, _ANY, 3 * ((_NARROW, _NARROW),)),
    (32, 64, 3 * ((_NARROW_32, _NARROW_32),)),  # no expert has more than two such tiles, however skewed the routing is
    (32, _ANY, ((_MIDDLE, _MIDDLE_SHORT), (_MIDDLE, _MIDDLE), (_MIDDLE, _MIDDLE))),
    (64, _ANY, ((_WIDE, _WIDE_SHORT), (_WIDE, _WIDE_DOWN), (_WIDE, _WIDE_DOWN))),
    (128, _ANY, 3 * ((_MERGED, _MERGED),)),
    (256, _ANY, ((_PAIRS, _PERSISTENT), (_MERGED, _MERGED), (_MERGED, _MERGED))),
    (512, _ANY, ((_PAIRS, _PERSISTENT), (_MERGED_BY_LANE, _MERGED_BY_LANE), (_PAIRS, _PAIRS))),
    (1024, _ANY, ((_PAIRS, _PERSISTENT_PAIRS), (_BY_LANE, _PERSISTENT_BY_LANE), (_BY_LANE, _BY_LANE))),
    (_ANY, _ANY, ((_PAIRS_LONG, _PERSISTENT_PAIRS), (_BY_LANE_LONG, _PERSISTENT_PAIRS), (_BY_LANE_LONG, _PAIRS))),
)
# An output up to this size is worth keeping in L2 (50 to 60 MB on Hopper) for the kernel that reads it next; larger ones gain
# nothing. (Measured on an H200. Weights come by TMA, for which Triton has no such policy, so they can't be told to go.)
_MOST_TO_KEEP = 24 << 20  # bytes
_KEPT_TMA = tuple(
    (rows, tokens, tuple((replace(up, keep=True), replace(down, keep=True)) for up, down in pairs))
    for rows, tokens, pairs in _TABLE_TMA
)


def gemm_config(
    n: int,
    k: int,
    dtype: torch.dtype,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    gated: bool = False,
    tma: bool = False,
    scheme: str = "plain",
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
        gated: True for `expert_up`, False for `expert_down`.
        tma: `has_tma(device)`, the same on all ranks; used for 16-bit dtypes where H and I are divisible by 8 (TMA needs
            rows of a multiple of 16 bytes). Of quantised experts it only says that the GPU is Hopper.
        scheme: of the experts' weights; `dtype` is then that of the rows.

    Returns:
        The configuration; `block_m` and `schedule_extra_m` depend only on `dtype`, `tma`, `scheme`, H, I, and the
        buckets of tokens and of rows per expert, so that both GEMMs of a layer can use one schedule.

    Raises:
        ValueError: a size that is not positive (`num_tokens` may be 0), or a dtype that is not supported.
    """
    n, k, num_tokens, top_k, num_experts = check_batch((("n", n), ("k", k)), dtype, num_tokens, top_k, num_experts)
    check_scheme(scheme)
    bucket = next_power_of_2(num_tokens)
    rows_per_expert = bucket * top_k // num_experts
    if scheme != "plain":
        quantised = _quantised_table(scheme, dtype, tma, can_use_tma=(n // 2 if gated else n) % 16 == 0 and k % 16 == 0)
        up, down = next(pair for most, *pair in quantised if rows_per_expert <= most)
        return up if gated else down
    columns = n // 2 if gated else n
    if tma and dtype.itemsize == 2 and columns % 8 == 0 and k % 8 == 0:
        # By the bucket, as kernels are compiled for it; with several ranks it is more than what a rank computes.
        keep = bucket * top_k * columns * dtype.itemsize <= _MOST_TO_KEEP
        table_tma = _KEPT_TMA if keep else _TABLE_TMA
        pairs = next(pairs for rows, tokens, pairs in table_tma if rows_per_expert <= rows and bucket <= tokens)
        up, down = pairs[bisect.bisect_left(_INTERMEDIATE, columns if gated else k)]
        return up if gated else down
    table = _TABLE_16_BIT if dtype.itemsize == 2 else _TABLE_32_BIT
    config = next(config for most, config in table if rows_per_expert <= most)
    block_n = min(config.block_n, max(32, next_power_of_2(n)))
    block_k = min(config.block_k, max(16, next_power_of_2(k)))
    return GemmConfig(config.block_m, block_n, block_k, config.num_warps, config.num_stages, config.group_m)


def _quantised_table(scheme: str, dtype: torch.dtype, is_hopper: bool, can_use_tma: bool = True) -> _QuantisedTable:
    if scheme == "fp8_block":
        return (_TABLE_FP8_RING if can_use_tma else _TABLE_FP8_HOPPER) if is_hopper else _TABLE_FP8
    if dtype.itemsize == 4:
        return _TABLE_4_BIT_OF_32
    return _TABLE_4_BIT_HOPPER if is_hopper else _TABLE_4_BIT


def gemm_configs(
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    tma: bool = False,
    scheme: str = "plain",
) -> tuple[GemmConfig, GemmConfig]:
    """`gemm_config` of a layer's `expert_up` and `expert_down`, which share one schedule."""
    batch = (dtype, num_tokens, top_k, num_experts)
    try:
        up = gemm_config(2 * intermediate_size, hidden_size, *batch, gated=True, tma=tma, scheme=scheme)
        return up, gemm_config(hidden_size, intermediate_size, *batch, tma=tma, scheme=scheme)
    except (TypeError, ValueError):  # by the names of these arguments; only now, as a forward waits for this
        check_batch((("hidden_size", hidden_size), ("intermediate_size", intermediate_size)), *batch)
        raise
