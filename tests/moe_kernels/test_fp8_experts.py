"""What only fp8_block experts have: rows quantised before, the ring on Hopper, kernels of one token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from moe_kernels import (
    GemmConfig,
    LoadCounter,
    ReplicaTable,
    combine,
    has_tma,
    local_experts,
    quantise_rows,
    quantise_rows_torch,
)
from moe_kernels.gemms.expert_mlp import _expert_mlp
from moe_kernels.one_token import one_token
from moe_kernels.operands.quantised_weights import to_e4m3
from moe_kernels.quantised import experts_fp8
from moe_kernels.quantised.fp8 import quantised_by
from tests.moe_kernels.quantised import (
    Case,
    check_both_kernels_of_one_token,
    error,
    expected_whole,
    make_case,
    quantised,
    reordered,
    run_whole,
    whole,
)


def test_rows_quantised_before_give_the_same_bits(make_experts):
    """As a dispatch would send them."""
    case = make_case(make_experts, "fp8_block")
    before = case.up("torch")
    after = case.up("torch", quantise_rows(case.experts.x_RH))
    assert torch.equal(before.values_RH.float(), after.values_RH.float())
    assert torch.equal(before.scale_RG, after.scale_RG)


@triton.jit
def _quantised_by_kernel(x_ptr, values_ptr, scale_ptr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    at = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + at)
    values, scale = quantised_by(x, tl.max(tl.abs(x), axis=1), 1)
    tl.store(values_ptr + at, values)
    tl.store(scale_ptr + row, scale)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the interpreter: infinity times zero
def test_one_reciprocal_a_group_gives_the_bits_of_divisions(device):
    """With rows whose scales are anywhere in float32's range, denormal, infinite or zero, and negative zeros."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=random) * 10.0 ** torch.empty(256, 1).uniform_(-44, 38, generator=random)
    x[:64] *= 10.0 ** torch.empty(64, 128).uniform_(-12, 0, generator=random)
    x[64:80, 5] = float("inf")
    x[80:96] = 0.0
    x[96:112, ::3] = -0.0
    x = x.to(device)
    values, scale = torch.empty_like(x), torch.empty(256, device=device)
    _quantised_by_kernel[(1,)](x, values, scale, ROWS=256)
    expected, expected_scale = quantise_rows_torch(x)
    assert torch.equal(scale, expected_scale[:, 0])
    assert torch.equal(to_e4m3(values).view(torch.uint8), expected.view(torch.uint8))


RING = GemmConfig(128, 256, 128, 4, 4, tma=True, quantised=True)
FEW = replace(RING, block_m=16, num_stages=6, swap=True)
RINGS = {
    "two stages": replace(RING, num_stages=2),
    "four stages": RING,
    "16 rows": FEW,
    "32 rows": replace(FEW, block_m=32, num_stages=5),
}


@pytest.mark.gpu
@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
@pytest.mark.parametrize(
    ("hidden_size", "intermediate", "num_sources", "form", "dtype"),
    [
        (512, 256, 700, "silu", torch.bfloat16),  # whole blocks, and lanes with several tiles
        (400, 144, 300, "silu", torch.bfloat16),  # parts of blocks; the down projection's second half has a part, too
        (2032, 272, 77, "gpt-oss", torch.float16),  # a last half tile of rows; the last columns have no second half
        (512, 400, 301, "relu2 ungated", torch.bfloat16),  # two blocks of `up` in a tile, the last without a second
        (128, 128, 64, "gpt-oss", torch.float32),  # a single step
        (144, 1040, 30, "silu", torch.float32),  # more steps than stages, and no second half of `down`
        (128, 128, 0, "silu", torch.bfloat16),
    ],
)
def test_the_ring_has_the_bits_of_the_plain_kernels(
    make_experts, hidden_size, intermediate, num_sources, form, dtype, ring
):
    """fp8_block on Hopper, to homes as well; rows of no lane and empty lanes are among the cases."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    experts = make_experts(max(num_sources, 9), 2, 5, hidden_size, intermediate, dtype)
    experts.lanes_N[experts.lanes_N == 3] = 1
    if num_sources == 0:
        experts.lanes_N.fill_(-1)
    matrices, num_rows = quantised(experts, "fp8_block", form, dtype), experts.lanes_N.numel()
    here = experts.lanes_N >= 0
    plain = GemmConfig(64, 256, 128, 8, 3, quantised=True), GemmConfig(64, 128, 128, 4, 4, quantised=True)
    found = []
    for configs in (plain, (ring, ring)):
        case = Case(experts, matrices, configs)
        hidden = case.up("triton")
        rows = case.down("triton", hidden)
        homes = torch.zeros(2, num_rows // 2, hidden_size, dtype=dtype, device="cuda")
        case.down_home(hidden, homes)
        assert torch.equal(case.mlp("triton")[here], rows[here])
        homes_of_both = torch.zeros_like(homes)
        case.mlp_home(homes_of_both)
        for found_homes in (homes, homes_of_both):
            assert torch.equal(found_homes.flatten(0, 1)[here], rows[here])
            assert (found_homes.flatten(0, 1)[~here] == 0).all(), "rows of no expert are not written"
        found.append((hidden.values_RH[: case.computed].float(), hidden.scale_RG[: case.computed], rows[here]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [RING, FEW], ids=["many rows", "few rows"])
@pytest.mark.parametrize("num_programs", [1, 2, 5])
def test_one_kernel_for_both_products_ends_with_any_number_of_programs(make_experts, monkeypatch, ring, num_programs):
    """As where other kernels hold most of the GPU: nobody waits for a program that has not begun."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    experts = make_experts(150, 2, 5, 400, 272, torch.bfloat16)
    case = Case(experts, quantised(experts, "fp8_block"), (ring, ring))
    expected = case.down("triton", case.up("triton"))
    monkeypatch.setattr(experts_fp8, "num_programs", lambda *_: num_programs)
    here = experts.lanes_N >= 0
    for _ in range(3):
        assert torch.equal(case.mlp("triton")[here], expected[here])


@pytest.mark.gpu
def test_one_kernel_for_both_products_on_two_streams(make_experts):
    """Each has a program for each multiprocessor, so either may hold what the other's programs wait for."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    experts = make_experts(2000, 2, 16, 1024, 512, torch.bfloat16)
    case = Case(experts, quantised(experts, "fp8_block"), (RING, RING))
    here, expected = experts.lanes_N >= 0, case.mlp("triton")
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(case.mlp("triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(rows[here], expected[here]) for rows in found)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "intermediate", "form", "dtype", "is_empty"),
    [
        (700, 400, 272, "silu", torch.bfloat16, False),
        (700, 400, 272, "silu", torch.float32, False),  # stays in flat order
        (600, 2032, 272, "gpt-oss", torch.float16, False),
        (700, 512, 400, "relu2 ungated", torch.bfloat16, False),
        (700, 128, 128, "gpt-oss", torch.bfloat16, False),  # no second half of columns, and a single step
        (700, 400, 272, "silu", torch.bfloat16, True),  # nothing is computed
        (20, 512, 256, "gpt-oss", torch.bfloat16, False),  # 32 rows in a tile
        (5, 400, 144, "silu", torch.float16, False),  # 16
    ],
)
def test_a_forward_has_the_bits_of_its_ops(make_experts, num_tokens, hidden_size, intermediate, form, dtype, is_empty):
    """Which may store rows where they are sorted (those of 16 bits); in a graph, too, whose replays count from zero again."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    experts = make_experts(num_tokens, 2, 5, hidden_size, intermediate, dtype)
    if is_empty:
        experts.lanes_N.fill_(-1)
    case = Case(experts, quantised(experts, "fp8_block", form, dtype), (RING, RING))
    both = (experts.x_RH, case.matrices, experts.lane_to_slot_L, case.schedule, experts.row_weights_N, 2, RING, RING)
    flat = _expert_mlp.flatten(*both, "triton")
    torch.library.opcheck(_expert_mlp.registered, flat, test_utils=("test_faketensor",))
    lanes_TK = experts.lanes_N.view(-1, 2)
    expected = combine(case.down("triton", case.up("triton")), lanes_TK, backend="triton")
    table = ReplicaTable(torch.arange(5, dtype=torch.int32, device="cuda"), experts.lane_to_slot_L)
    load = LoadCounter(torch.zeros(5, dtype=torch.int64, device="cuda"), None)
    arguments = (experts.x_RH, lanes_TK, experts.row_weights_N.view(-1, 2), case.matrices, table, load)
    found = [local_experts(*arguments, backend="triton")]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TH = local_experts(*arguments, backend="triton")
    for _ in range(3):
        graph.replay()
        found.append(y_TH.clone())
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["relu2 ungated", "silu"])
def test_the_ring_quantises_what_a_fast_division_could_not(make_experts, form):
    """Rows whose scales are at the ends of float32's range, infinite or NaN: the bits of a division."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    found = []
    for factor in (1e-30, 1e-37, 1e30, float("inf"), float("nan"), 0.0):
        experts = make_experts(40, 1, 2, 256, 128, torch.float32)
        experts.x_RH[7] *= factor
        experts.x_RH[8] *= abs(factor) ** 0.5
        matrices = quantised(experts, "fp8_block", form, torch.float32)
        matrices = replace(matrices, gate_up_bias_SN=None)
        found = []
        for config in (GemmConfig(64, 256, 128, 8, 3, quantised=True), RING, FEW):
            case = Case(experts, matrices, (config, config))
            hidden = case.up("triton")
            found.append((hidden.values_RH[: case.computed].view(torch.uint8), hidden.scale_RG[: case.computed]))
        for values, scale in found[1:]:
            assert torch.equal(found[0][0], values), factor
            assert torch.equal(found[0][1].nan_to_num(3.0), scale.nan_to_num(3.0)), factor


def test_the_ring_is_for_a_gpu(make_experts):
    """Gluon has no interpreter; the reference takes any configuration."""
    experts = make_experts(5, 2, 2, 256, 128, torch.bfloat16)
    if experts.x_RH.is_cuda:
        pytest.skip("for a CPU")
    matrices = quantised(experts, "fp8_block")
    case = Case(experts, matrices, (RING, RING))
    hidden = case.up("torch")
    case.down("torch", hidden)
    with pytest.raises(ValueError, match=r"gate_up_SNH is on cpu: with fp8_block config\.tma needs a GPU"):
        case.up("triton")
    with pytest.raises(ValueError, match=r"down_SHI is on cpu: with fp8_block config\.tma needs a GPU"):
        case.down("triton", hidden)
    with pytest.raises(ValueError, match=r"gate_up_SNH is on cpu: with fp8_block config\.tma needs a GPU"):
        case.mlp("triton")
    with pytest.raises(ValueError, match="columns divisible by 16"):
        small = make_experts(5, 2, 2, 200, 128, torch.bfloat16)
        Case(small, quantised(small, "fp8_block"), (RING, RING)).up("torch")


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ((136, 8), "gpt-oss"),  # a part of a block of sixteen chunks
        ((133, 24), "silu"),  # rows of hidden one by one, and weights that no 16 bytes divide
        ((136, 8), "relu2 ungated"),
        pytest.param((7168, 2048), "silu", marks=pytest.mark.gpu),
        pytest.param((1152, 2176), "gpt-oss", marks=pytest.mark.gpu),  # a second step of hidden, with a part
    ],
)
def test_one_token_of_large_fp8_experts(make_experts, monkeypatch, sizes, form):
    """The kernels of `one_token_fp8`, whatever the size, against those of small experts and float64."""
    arguments, logits = whole(make_experts, "fp8_block", 1, form, sizes=sizes)
    found, plans, make_plan = [], [], one_token._make_plan
    monkeypatch.setattr(one_token, "_make_plan", lambda *sizes: plans.append(make_plan(*sizes)) or plans[-1])
    monkeypatch.setattr(one_token, "can_use_fp8_mma", lambda *_: False)
    for most in (1 << 62, 0):
        monkeypatch.setattr(one_token, "_MOST_TO_STREAM", most)
        monkeypatch.setattr(one_token, "_plans", {})
        found.append(run_whole(arguments, logits, "triton"))
    assert [plan.is_fp8 for plan in plans] == [False, True]
    expected = expected_whole(arguments, logits)
    for y in found:
        assert error(y, expected) <= 6e-3
    assert torch.equal(run_whole(arguments, logits, "triton"), found[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "form", "top_k"),
    [
        ((2048, 768), "silu", 8),
        ((640, 384), "gpt-oss", 3),  # less than the warps have places for
        ((2176, 128), "silu", 1),
        ((7168, 256), "gpt-oss", 3),
        ((512, 2048), "silu", 8),
        ((256, 1152), "silu", 8),  # warps with pieces of two experts
        ((3072, 1536), "gpt-oss", 3),
    ],
)
def test_one_token_by_tensor_cores(make_experts, monkeypatch, sizes, form, top_k):
    """As exact as the kernels without, whose sums are in another order, also with values that float16 does not have."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    arguments, logits = whole(make_experts, "fp8_block", 1, form, num_experts=9, sizes=sizes)
    x = arguments["x_TH"]
    for factor in (1.0, 2.0**40, 2.0**-40):
        arguments["x_TH"] = x * factor
        arguments["x_TH"][0, 1] = 300 * factor
        assert all(check_both_kernels_of_one_token(monkeypatch, "can_use_fp8_mma", arguments, logits, top_k))
    monkeypatch.setattr(one_token, "_plans", {})
    before, matrices, table = run_whole(arguments, logits, "triton", top_k), arguments["matrices"], arguments["table"]
    order = torch.randperm(matrices.down_SHI.shape[0], generator=torch.Generator().manual_seed(5)).to("cuda")
    names = ("gate_up_SNH", "down_SHI", "gate_up_scale", "down_scale", "gate_up_bias_SN", "down_bias_SH")
    parts = {name: getattr(matrices, name) for name in names if getattr(matrices, name) is not None}
    arguments["matrices"] = replace(matrices, **{name: reordered(part, order) for name, part in parts.items()})
    slots = order.argsort()[table.lane_to_slot_L.long()].to(torch.int32)
    arguments["table"] = ReplicaTable(table.lanes_P, slots)
    assert torch.equal(run_whole(arguments, logits, "triton", top_k), before)
