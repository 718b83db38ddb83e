"""What only 4-bit experts (mxfp4, int4) have: codes and scales bit by bit, tiles in halves, the ring on Hopper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_kernels import (
    ExpertMatrices,
    GemmConfig,
    build_schedule,
    dequantise,
    expert_down,
    gemm_configs,
    has_tma,
    pack_words,
    quantise_weights,
)
from tests.moe_kernels.quantised import (
    FOUR_BIT_PLAIN,
    KINDS,
    Case,
    check,
    check_both_kernels_of_one_token,
    make_case,
    quantised,
    runnable,
    whole,
)

FOUR_BIT_RINGS = (
    # block_m, block_n, block_k, num_stages, programs_per_sm, tail_m, extra_m
    (16, 128, 256, 4, 2, 0, 0),
    (16, 192, 256, 4, 1, 0, 16),
    (32, 192, 128, 4, 1, 16, 16),
    (64, 128, 64, 8, 1, 32, 16),
    (128, 192, 128, 4, 1, 64, 32),
    (256, 128, 64, 4, 1, 64, 0),
    (64, 192, 128, 4, 1, 0, 32),
    (8, 128, 256, 4, 2, 0, 0),
)


def four_bit_ring(block_m, block_n, block_k, num_stages, programs, tail_m, extra_m):
    return GemmConfig(
        block_m, block_n, block_k, block_n // 16, num_stages, tma=True, swap=True, quantised=True, programs_per_sm=programs,
        tail_m=tail_m, extra_m=extra_m,
    )  # fmt: skip


FOUR_BIT_CASES = (
    # kind, form, dtype, sources, (H, I), places of rings: to compile all of them for all takes long
    ("mxfp4", "gpt-oss", torch.bfloat16, 700, (640, 384), (0, 4, 5)),  # lanes with several tiles of each size
    ("mxfp4", "gpt-oss", torch.bfloat16, 300, (96, 160), (1, 3, 6, 7)),
    ("mxfp4", "relu2 ungated", torch.bfloat16, 77, (96, 160), (0, 2, 4)),
    ("int4 zeros", "gpt-oss", torch.bfloat16, 300, (640, 384), (1, 3, 4)),
    ("int4 g128", "silu", torch.bfloat16, 41, (640, 256), (0, 2, 6, 7)),
    ("int4 g32", "silu", torch.float16, 95, (96, 160), (0, 3, 5)),
    ("mxfp4", "silu", torch.float16, 95, (640, 384), (1, 4)),
    ("mxfp4", "silu", torch.bfloat16, 0, (96, 160), (2, 4)),
)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "form", "dtype", "num_sources", "sizes", "places"), FOUR_BIT_CASES)
def test_the_ring_of_four_bits_has_the_bits_of_the_plain_kernels(
    make_experts, kind, form, dtype, num_sources, sizes, places
):
    """On Hopper, to homes as well; sizes that no tile divides, rows of no lane, and empty lanes are among the cases."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    experts = make_experts(max(num_sources, 9), 2, 5, *sizes, dtype)
    experts.lanes_N[experts.lanes_N == 3] = 1
    if num_sources == 0:
        experts.lanes_N.fill_(-1)
    matrices, num_rows = quantised(experts, kind, form, dtype), experts.lanes_N.numel()
    here = experts.lanes_N >= 0
    expected = None
    for number, config in enumerate((FOUR_BIT_PLAIN, *(four_bit_ring(*FOUR_BIT_RINGS[place]) for place in places))):
        case = Case(experts, matrices, (config, config))
        hidden = case.up("triton")
        rows = case.down("triton", hidden)
        if number == 1:
            homes = torch.zeros(2, num_rows // 2, sizes[0], dtype=dtype, device="cuda")
            case.down_home(hidden, homes)
            assert torch.equal(homes.flatten(0, 1)[here], rows[here]), config
            assert (homes.flatten(0, 1)[~here] == 0).all(), "rows of no expert are not written"
        found = hidden[: case.computed], rows[here]
        if expected is None:
            expected = found
            if case.computed:
                check(case, "triton")
        for one, other in zip(found, expected, strict=True):
            assert one.isfinite().all() and torch.equal(one, other), config


def test_the_ring_of_four_bits_is_for_a_gpu(make_experts):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's")
    case = make_case(make_experts, "mxfp4")
    case.configs = (four_bit_ring(16, 128, 128, 8, 1, 0, 0),) * 2
    with pytest.raises(ValueError, match="gate_up_SNH is on cpu"):
        case.up("triton")
    hidden = torch.zeros(len(case.experts.lanes_N), case.matrices.intermediate_size, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="down_SHI is on cpu"):
        case.down("triton", hidden)


@pytest.mark.parametrize("scheme", ["mxfp4", "int4 zeros"])
def test_four_bits_do_not_take_the_tile_of_few_fp8_rows(make_experts, scheme):
    """Of 256 columns, by four warps: the kernels of the ring would read it as their own."""
    case = make_case(make_experts, scheme)
    few = GemmConfig(16, 256, 128, 4, 5, tma=True, swap=True, quantised=True)
    rule = r"config\.block_n=256: must be 128 or 192 with config\.tma and 4-bit weights"
    for which in ("up", "down"):
        with pytest.raises(ValueError, match=rule):
            case.matrices.check_config(few, which)
        for block_n in (128, 192):
            case.matrices.check_config(four_bit_ring(16, block_n, 128, 8, 1, 0, 0), which)
    fp8 = make_case(make_experts, "fp8_block")
    fp8.matrices.check_config(few, "down")
    with pytest.raises(ValueError, match=r"config\.block_n=192: must be 256 in `expert_down`"):
        fp8.matrices.check_config(four_bit_ring(16, 192, 128, 8, 1, 0, 0), "down")


@pytest.mark.gpu
def test_the_ring_of_mxfp4_has_a_range(make_experts):
    """Exact for scales of 2 ** -62 to 2 ** 65; from 2 ** 67 on (194) NaN, as of 255, and weights below are rounded to 0."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    experts = make_experts(8, 1, 1, 256, 128, torch.bfloat16)
    matrices = replace(quantised(experts, "mxfp4", "relu2 ungated"), gate_up_bias_SN=None)
    experts.x_RH.zero_()
    experts.x_RH[torch.arange(8), 32 * torch.arange(8) + 3] = 1.0
    assert matrices.gate_up_scale is not None
    # One NaN makes all rows NaN, as zeros are multiplied by it too: so each scale out of range alone.
    beyond = [((scale,), False) for scale in (194, 200, 230, 255)]
    for scales, is_exact in (((65, 100, 127, 150, 190, 191, 192, 65), True), *beyond):
        of_groups = torch.tensor(scales, dtype=torch.uint8, device="cuda")
        matrices.gate_up_scale[:, : len(scales)] = of_groups[None, :, None]
        found = []
        for config in (FOUR_BIT_PLAIN, four_bit_ring(*FOUR_BIT_RINGS[0])):
            case = Case(experts, matrices, (config, config))
            assert case.computed
            found.append(case.up("triton")[: case.computed])
        plain, by_ring = found
        assert torch.equal(plain, by_ring) if is_exact else by_ring.isnan().all()


@pytest.mark.parametrize(("dtype", "tma"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
@pytest.mark.parametrize("kind", ["mxfp4", "int4 g32", "int4 zeros"])
def test_every_code_and_scale_exactly(device, kind, dtype, tma):
    """Rows of an identity matrix times the weights are the weights, bit for bit: all codes, with scales down to subnormals.

    Natively the kernels compute bfloat16 weights by bits, with subnormal ones in between, which no tolerance would see.
    """
    if tma and device == "cuda" and not has_tma(torch.device(device)):
        pytest.skip("needs TMA")
    scheme, group = KINDS[kind][0], 32
    random = torch.Generator().manual_seed(3)
    if scheme == "mxfp4":
        # All but the ones whose products are infinite, and 255, which is NaN. By the ring those that it is exact for.
        scale = torch.arange(0, 253, dtype=torch.uint8).repeat(2)[:256].view(1, 1, 256)
        if tma and torch.cuda.is_available():
            scale = scale.clamp(65, 192)
    else:
        exponents = torch.arange(256) % 240 - 130  # down to bfloat16's subnormals
        scale = (1 + torch.rand(256, generator=random)) * torch.ldexp(torch.ones(256), exponents)
        scale = (scale * torch.where(torch.arange(256) % 3 == 0, -1, 1)).bfloat16().view(1, 1, 256)
    codes = torch.cat([torch.arange(16).roll(shift) for shift in range(2)]).to(torch.uint8)
    down = pack_words(codes.expand(1, 256, group), scheme)
    zero = (torch.arange(256) % 16).to(torch.uint8).view(1, 1, 256) if kind == "int4 zeros" else None
    up = quantise_weights(torch.ones(1, 2 * group, 256), scheme, group=group, with_zero=zero is not None)
    down_parts, up_parts = (
        [None if one is None else one.to(device) for one in parts] for parts in ((down, scale, zero), up)
    )
    pairs = zip(up_parts, down_parts, strict=True)
    (gate_up, down), scales, zeros = pairs
    matrices = ExpertMatrices(gate_up, down, "silu", None, None, *scales, *zeros, scheme)
    lanes = torch.zeros(group, dtype=torch.int32, device=device)
    config = runnable(gemm_configs(256, group, dtype, group, 1, 1, tma=tma, scheme=scheme))[1]
    counts = torch.full((1,), group, dtype=torch.int32, device=device)
    schedule = build_schedule(lanes, counts, block_m=config.block_m, extra_m=config.extra_m)
    hidden = torch.eye(group, dtype=dtype, device=device)[schedule.order_N.long()]
    rows = expert_down(
        hidden, matrices, torch.zeros(1, dtype=torch.int32, device=device), schedule, torch.ones(group, device=device),
        config=config, backend="triton",
    )  # fmt: skip
    wanted = dequantise(down, scales[1], zeros[1], scheme)[0].to(dtype).T
    assert wanted.isfinite().all() and (wanted != 0).double().mean() > 0.85
    assert torch.equal(rows, wanted)


@pytest.mark.parametrize("tma", [False, True])
def test_a_scale_of_255_is_nan(make_experts, tma):
    """Also where a clamp or a zero code would hide an infinite weight."""
    if tma and torch.cuda.is_available() and not has_tma(torch.device("cuda")):
        pytest.skip("needs TMA")
    case = make_case(make_experts, "mxfp4", "gpt-oss", tma=tma)
    case.matrices.gate_up_scale[:, 1, 7] = 255
    hidden = case.up("triton")[: case.computed]
    assert hidden[:, 7].isnan().all() and hidden[:, :7].isfinite().all() and hidden[:, 8:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "form", "sizes", "top_k"),
    [
        ("mxfp4", "gpt-oss", (2880, 2880), 4),
        ("mxfp4", "silu", (96, 160), 2),  # less than a step
        ("mxfp4", "silu", (640, 384), 1),
        ("mxfp4", "gpt-oss", (640, 384), 3),
        ("int4 g128", "silu", (2048, 768), 8),
        ("int4 zeros", "gpt-oss", (640, 384), 2),
    ],
)
def test_one_token_by_tensor_cores(make_experts, monkeypatch, kind, form, sizes, top_k):
    """As exact as the kernels without, whose sums are in another order. Of a token that does not count, zeros."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    arguments, logits = whole(make_experts, kind, 1, form, num_experts=9, sizes=sizes)
    assert all(check_both_kernels_of_one_token(monkeypatch, "_can_use_mma", arguments, logits, top_k))
