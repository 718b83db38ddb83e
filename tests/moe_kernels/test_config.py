import itertools
from dataclasses import replace

import pytest
import torch

from moe_kernels import GemmConfig, gemm_config, has_tma

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = 99 * 1024  # bytes of shared memory on Ada


def shared_memory(config: GemmConfig, dtype: torch.dtype) -> int:
    return (config.block_m + config.block_n) * config.block_k * dtype.itemsize * config.num_stages


def test_every_config_fits_the_smallest_gpu():
    """By the portable kernels; 8, 16, 32, ... rows an expert."""
    for dtype, tokens, n, k in itertools.product(
        DTYPES, (0, 100, 200, 500, 1000, 2000, 10**6), (1, 24, 4096), (3, 64, 4096)
    ):
        assert shared_memory(gemm_config(n, k, dtype, tokens, 8, 128), dtype) <= LIMIT


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_gemms_share_a_schedule_and_only_the_bucket_counts(dtype):
    for tokens in (0, 1, 3, 64, 65, 1000, 1024, 70_000):
        up, down = gemm_config(1536, 2048, dtype, tokens, 8, 128), gemm_config(2048, 768, dtype, tokens, 8, 128)
        assert up.block_m == down.block_m
    assert gemm_config(64, 64, dtype, 513, 8, 128) == gemm_config(64, 64, dtype, 1024, 8, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_tma_both_gemms_share_a_schedule_and_fit_a_hopper_gpu(dtype):
    for tokens, (hidden, intermediate) in itertools.product(
        (0, 1, 16, 64, 256, 512, 1024, 2048, 4096, 70_000), ((2048, 768), (2880, 2880), (4096, 14336), (64, 8))
    ):
        up = gemm_config(2 * intermediate, hidden, dtype, tokens, 8, 128, gated=True, tma=True)
        down = gemm_config(hidden, intermediate, dtype, tokens, 8, 128, tma=True)
        assert up.tma and down.tma and not up.programs_per_sm
        assert (up.block_m, up.schedule_extra_m) == (down.block_m, down.schedule_extra_m)
        for config in (up, down):
            extra = config.extra_m * config.block_k * dtype.itemsize * config.num_stages
            # While the next tile's loads are under way, a persistent program brings half a tile into the order of memory.
            halves = config.block_m * config.block_n // 2 * dtype.itemsize if config.programs_per_sm else 0
            programs = max(config.programs_per_sm, 1)
            assert programs * (shared_memory(config, dtype) + extra + halves + 1024) <= 228 * 1024


def test_outputs_are_kept_by_the_bucket_and_up_to_a_size():
    sizes = {"n": 2048, "k": 768, "dtype": torch.bfloat16, "top_k": 6, "num_experts": 128, "tma": True}
    kept = {tokens: gemm_config(num_tokens=tokens, **sizes).keep for tokens in (0, 1, 600, 1000, 1024, 1025, 4096)}
    assert kept == {0: True, 1: True, 600: True, 1000: True, 1024: True, 1025: False, 4096: False}  # of 24 MiB
    assert not gemm_config(num_tokens=1, **(sizes | {"tma": False})).keep


def test_without_what_tma_needs_the_portable_kernels_are_chosen():
    sizes = {"n": 64, "k": 64, "dtype": torch.bfloat16, "num_tokens": 64, "top_k": 2, "num_experts": 8}
    assert gemm_config(**sizes, tma=True).tma
    assert not gemm_config(**sizes).tma
    for change in ({"dtype": torch.float32}, {"n": 60}, {"k": 60}):
        assert not gemm_config(**(sizes | change), tma=True).tma
    assert not gemm_config(**(sizes | {"n": 72}), gated=True, tma=True).tma  # 36 columns of each
    assert not has_tma(torch.device("cpu"))


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("n", {"n": 0}),
        ("k", {"k": -1}),
        ("num_tokens", {"num_tokens": -1}),
        ("top_k", {"top_k": 0}),
        ("num_experts", {"num_experts": 1}),
        ("dtype", {"dtype": torch.float64}),
    ],
)
def test_refused(argument, change):
    good = {"n": 64, "k": 64, "dtype": torch.float32, "num_tokens": 8, "top_k": 2, "num_experts": 4}
    with pytest.raises(ValueError, match=f"{argument}="):
        gemm_config(**(good | change))


@pytest.mark.parametrize("field", ["block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m"])
def test_bad_tiles_are_refused(field):
    good = {"block_m": 16, "block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2}
    with pytest.raises(ValueError, match=f"{field}=0"):
        GemmConfig(**(good | {field: 0}))


def test_fp8_block_has_the_ring_on_hopper_where_tma_can_read_its_weights():
    sizes = {"n": 2048, "k": 768, "dtype": torch.bfloat16, "num_tokens": 512, "top_k": 8, "num_experts": 128}
    sizes |= {"scheme": "fp8_block", "tma": True}
    ring = gemm_config(**sizes)
    assert ring.tma and ring.quantised and ring.block_m == 128
    assert gemm_config(**(sizes | {"n": 1536, "k": 2048}), gated=True) == ring
    assert not gemm_config(**(sizes | {"tma": False})).tma
    assert not gemm_config(**(sizes | {"k": 776})).tma and not gemm_config(**(sizes | {"n": 2056})).tma
    assert not gemm_config(**(sizes | {"n": 1552, "k": 2048}), gated=True).tma  # 776 columns of each
    for num_tokens, rows in ((16, 16), (64, 16), (256, 32)):
        few = gemm_config(**(sizes | {"num_tokens": num_tokens}))
        assert few.tma and few.swap and few.block_m == rows
        assert gemm_config(**(sizes | {"n": 1536, "k": 2048, "num_tokens": num_tokens}), gated=True) == few
    with pytest.raises(ValueError, match="quantised with tma"):
        replace(few, block_m=64)
    for wrong in ({"block_m": 64}, {"num_warps": 8}, {"tail_m": 64}, {"keep": True}):
        with pytest.raises(ValueError, match="quantised with tma"):
            replace(ring, **wrong)


def test_four_bits_have_the_ring_on_hopper():
    sizes = {"n": 2880, "k": 2880, "dtype": torch.bfloat16, "top_k": 4, "num_experts": 128, "tma": True}
    for scheme, tokens, gated in itertools.product(("mxfp4", "int4"), (16, 256, 512, 2048, 65536), (False, True)):
        config = gemm_config(**sizes, num_tokens=tokens, scheme=scheme, gated=gated)
        assert config.tma and config.swap and config.quantised and config.programs_per_sm > 0
        assert (config.block_m == 8) == (tokens == 16)
    assert not gemm_config(**(sizes | {"tma": False}), num_tokens=16, scheme="mxfp4").tma


def test_the_ring_of_four_bits_has_its_rules():
    ring = GemmConfig(32, 128, 256, 8, 4, tma=True, swap=True, quantised=True, programs_per_sm=1, tail_m=16, extra_m=32)
    replace(ring, block_n=192, num_warps=12, programs_per_sm=2)
    with pytest.raises(ValueError, match="block_m=8: must be a power of two and at least 16"):
        GemmConfig(8, 128, 64, 4, 3)
    for wrong, rule in (
        ({"block_n": 256, "num_warps": 16}, "block_n=128"),
        ({"num_warps": 4}, "num_warps=8"),
        ({"num_warps": 12}, "num_warps=8"),
        ({"block_k": 32}, "block_k of 64"),
        ({"num_stages": 3}, "num_stages a power of two, at least 2"),
        ({"num_stages": 1}, "num_stages a power of two, at least 2"),  # the kernel would never end
        ({"block_m": 512}, "block_m <= 256"),
        ({"programs_per_sm": 3}, "programs_per_sm of 1 or 2"),
        ({"programs_per_sm": 0}, "programs_per_sm of 1 or 2"),
        ({"keep": True}, "no keep"),
        ({"tail_m": 32}, "tail_m=32"),
        ({"extra_m": 8}, "extra_m=8"),
        ({"extra_m": 24}, "extra_m=24"),
        ({"extra_m": 64}, "extra_m=64"),
    ):
        with pytest.raises(ValueError, match=rule):
            replace(ring, **wrong)
