"""Quantised experts of every scheme through the ops, against a plain computation on dequantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_kernels import (
    QuantisedRows,
    combine,
    expert_rows,
    gemm_configs,
    gradient_configs,
    has_tma,
    local_experts,
    moe_experts,
    quantise_rows,
)
from moe_kernels.gemms.expert_down import _expert_down
from moe_kernels.gemms.expert_mlp import _expert_mlp
from moe_kernels.gemms.expert_up import _expert_up
from tests.moe_kernels.quantised import (
    FORMS,
    KINDS,
    Case,
    check,
    error,
    expected_whole,
    make_case,
    reordered,
    run_whole,
    whole,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference(make_experts, kind, form):
    check(make_case(make_experts, kind, form), "torch")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_in_float32(make_experts, kind):
    check(make_case(make_experts, kind, dtype=torch.float32), "torch")


def test_scales_count(make_experts):
    """With the scales of another slot the result is another: they are read where the weights are."""
    for kind in KINDS:
        case = make_case(make_experts, kind)
        before = case.up("torch")
        case.matrices = replace(case.matrices, gate_up_scale=case.matrices.gate_up_scale.flip(0))
        after = case.up("torch")
        if isinstance(before, QuantisedRows):
            before, after = before.dequantised(), after.dequantised()
        assert error(after[: case.computed], before[: case.computed].double()) > 0.01, kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_both_products_in_one_call_have_the_same_bits(make_experts, kind, backend):
    """To homes as well."""
    case = make_case(make_experts, kind)
    here = case.experts.lanes_N >= 0
    rows = case.down(backend, case.up(backend))[here]
    assert torch.equal(case.mlp(backend)[here], rows)
    if backend == "triton":
        homes = torch.zeros(1, here.numel(), case.matrices.hidden_size, dtype=rows.dtype, device=rows.device)
        case.mlp_home(homes)
        assert torch.equal(homes[0][here], rows) and not homes[0][~here].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_whole_forward(make_experts, kind, num_tokens, backend):
    if (kind, num_tokens, backend) == ("int4 g128", 1, "triton") and not torch.cuda.is_available():
        pytest.skip("slow in the interpreter: needs a CUDA device")
    form = "gpt-oss" if num_tokens == 1 else "silu"
    arguments, logits = whole(make_experts, kind, num_tokens, form)
    y = run_whole(arguments, logits, backend)
    is_rounded = kind == "fp8_block" and (num_tokens > 1 or backend == "torch")  # a single token's rows are not
    assert error(y, expected_whole(arguments, logits)) <= (0.06 if is_rounded else 6e-3)
    best, ids = logits.topk(2)
    given = {"expert_ids_TK": ids.int().contiguous(), "expert_weights_TK": torch.softmax(best, -1).float()}
    z = local_experts(**arguments, **given, backend=backend)
    assert error(z, y.double()) <= (0.06 if kind == "fp8_block" and num_tokens == 1 else 8e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_moe_experts(make_experts, kind):
    arguments, _ = whole(make_experts, kind, 6)
    matrices, x = arguments["matrices"], arguments["x_TH"]
    ids = torch.tensor([[0, 1], [2, 3], [4, 0], [1, -1], [3, 2], [0, 4]], device=x.device)
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)).to(x.device)
    y = moe_experts(x, ids, weights, matrices, backend="torch")
    case = make_case(make_experts, kind, num_tokens=6)
    case.experts.lane_to_slot_L = torch.arange(5, dtype=torch.int32, device=x.device)
    case.experts.lanes_N, case.experts.row_weights_N = ids.int().flatten(), weights.flatten()
    case.experts.x_RH, case.matrices = x, matrices
    rows = case.down("torch", case.up("torch"))
    assert torch.equal(combine(rows, ids.int().contiguous(), backend="torch"), y)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_gradient(make_experts, kind):
    case = make_case(make_experts, kind)
    experts, x = case.experts, case.experts.x_RH.clone().requires_grad_()
    sizes = (case.matrices.hidden_size, case.matrices.intermediate_size)
    with pytest.raises(ValueError, match=r"matrices.scheme='\w+': must be 'plain' where a gradient is wanted"):
        expert_rows(
            x, case.matrices, experts.lane_to_slot_L, case.schedule, experts.row_weights_N, fanout=2,
            configs=case.configs, gradient_configs=gradient_configs(*sizes, torch.bfloat16, 5, 2, 2),
        )  # fmt: skip
    with pytest.raises(ValueError, match="where a gradient is wanted"):
        moe_experts(x, torch.zeros(5, 2, dtype=torch.int64, device=x.device), x.new_ones(5, 2), case.matrices)
    with torch.no_grad():
        moe_experts(x, torch.zeros(5, 2, dtype=torch.int64, device=x.device), x.new_ones(5, 2), case.matrices)


WRONG = {
    "scheme": ("scheme='fp6'", "mxfp4", {"scheme": "fp6"}),
    "no scale": ("matrices.gate_up_scale is None", "mxfp4", {"gate_up_scale": None}),
    "a scale too many": ("matrices.gate_up_SNH has shape", "mxfp4", {"scheme": "plain"}),
    "zeros": ("matrices.gate_up_zero is given", "int4 zeros", {"scheme": "mxfp4"}),
    "shape": (
        r"matrices.gate_up_scale has shape \(3, 2, 2\): dimension 1 must be 4", "fp8_block",
        {"gate_up_scale": torch.ones(3, 2, 2)},
    ),
    "group": ("divided by a group of", "mxfp4", {"gate_up_scale": torch.ones(3, 2, 320, dtype=torch.uint8)}),
    "dtype": ("matrices.gate_up_scale has dtype", "mxfp4", {"gate_up_scale": torch.ones(3, 3, 320)}),
    "zero's shape": (
        "matrices.gate_up_zero has shape", "int4 zeros", {"gate_up_zero": torch.ones(3, 4, 192, dtype=torch.uint8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(make_experts, name):
    message, kind, change = WRONG[name]
    case = make_case(make_experts, kind)
    case.matrices = replace(
        case.matrices,
        **{key: one.to(case.experts.x_RH.device) if torch.is_tensor(one) else one for key, one in change.items()},
    )
    with pytest.raises(ValueError, match=message):
        case.up("torch")


def test_rows_and_configs_must_be_of_the_scheme(make_experts):
    fp8, plain = make_case(make_experts, "fp8_block"), make_case(make_experts, "mxfp4")
    hidden = fp8.up("torch")
    with pytest.raises(ValueError, match="hidden_NI is a Tensor"):
        fp8.down("torch", hidden.dequantised().bfloat16())
    with pytest.raises(ValueError, match="hidden_NI is a QuantisedRows"):
        plain.down("torch", hidden)
    with pytest.raises(ValueError, match="x_RH is quantised"):
        plain.up("torch", quantise_rows(plain.experts.x_RH))
    fp8.configs = tuple(replace(config, block_k=64) for config in fp8.configs)
    with pytest.raises(ValueError, match=r"config\.block_k=64"):
        fp8.up("torch")
    fp8.configs = gemm_configs(200, 136, torch.bfloat16, 5, 2, 2)
    with pytest.raises(ValueError, match=r"config\.quantised=False"):
        fp8.up("torch")


@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "silu") for kind in KINDS), ("fp8_block", "relu2 ungated"), ("mxfp4", "relu2 ungated")]
)
def test_the_kernels(make_experts, kind, form):
    check(make_case(make_experts, kind, form), "triton")


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_with_weights_on_the_wide_side(make_experts, kind):
    """As on Hopper for few rows."""
    if torch.cuda.is_available() and not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper's shared memory, or no GPU")
    case = make_case(make_experts, kind, "gpt-oss", tma=True)
    assert case.configs[0].swap and case.configs[1].swap
    check(case, "triton")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("fp8_block", torch.float16), ("mxfp4", torch.float16), ("int4 zeros", torch.float16), ("mxfp4", torch.float32)],
)
def test_the_kernels_in_other_dtypes(make_experts, kind, dtype):
    check(make_case(make_experts, kind, dtype=dtype), "triton")
    if kind != "fp8_block" and (not torch.cuda.is_available() or has_tma(torch.device("cuda"))):
        check(make_case(make_experts, kind, dtype=dtype, tma=True), "triton")


@pytest.mark.parametrize(
    ("kind", "swap"),
    [("fp8_block", False), ("mxfp4", False), pytest.param("mxfp4", True, marks=pytest.mark.gpu), ("int4 zeros", False)],
)
@pytest.mark.parametrize("busy", [0, 2, None])
def test_one_expert_takes_all_rows(make_experts, kind, swap, busy):
    """And the other lanes are empty; None: all of them are. More rows than one tile has, but no multiple."""
    if swap and not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper's shared memory")
    num_rows = 38 if swap else 18  # Hopper's tiles have more rows
    case = make_case(make_experts, kind, num_tokens=num_rows // 2, num_lanes=3, tma=swap)
    assert case.configs[0].swap == swap and case.configs[0].block_m < num_rows
    assert num_rows % case.configs[0].block_m
    case.experts.lanes_N.fill_(-1 if busy is None else busy)
    assert case.computed == (0 if busy is None else num_rows)
    if busy is not None:
        check(case, "triton")
        return
    homes = case.experts.x_RH.new_full((1, num_rows, case.matrices.hidden_size), 7.0)
    case.down_home(case.up("triton"), homes)
    assert (homes == 7).all(), "rows of no expert are not written"


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "torch") for kind in KINDS),
        *((kind, "triton") for kind in ("fp8_block", "mxfp4", "int4 zeros")),
        *(pytest.param(kind, "triton", marks=pytest.mark.gpu) for kind in ("int4 g32", "int4 g128")),
    ],
)
def test_bits_do_not_depend_on_the_placement(make_experts, kind, backend):
    """I5: other slots, other order of the rows, other company."""
    case = make_case(make_experts, kind, "gpt-oss", num_tokens=8, num_lanes=3)
    experts, matrices = case.experts, case.matrices
    experts.lanes_N[:6] = 1
    device = experts.x_RH.device

    def rows_of(experts, matrices):
        moved = Case(experts, matrices, case.configs)
        return moved.down(backend, moved.up(backend))

    before, here = rows_of(experts, matrices), experts.lanes_N >= 0
    order = torch.tensor([2, 0, 3, 1], device=device)  # new slot → old slot
    names = ("gate_up_SNH", "down_SHI", "gate_up_scale", "down_scale", "gate_up_zero", "down_zero")
    names += ("gate_up_bias_SN", "down_bias_SH")
    parts = {name: getattr(matrices, name) for name in names if getattr(matrices, name) is not None}
    moved = replace(matrices, **{name: reordered(part, order) for name, part in parts.items()})
    slots = order.argsort()[experts.lane_to_slot_L.long()].to(torch.int32)
    after = rows_of(replace(experts, lane_to_slot_L=slots), moved)
    assert torch.equal(after[here], before[here])
    tokens = torch.tensor([6, 3, 0], device=device)
    flat = torch.stack([2 * tokens, 2 * tokens + 1], 1).flatten()
    few = replace(
        experts, x_RH=experts.x_RH[tokens], lanes_N=experts.lanes_N[flat], row_weights_N=experts.row_weights_N[flat]
    )
    alone = rows_of(few, matrices)
    assert torch.equal(alone[few.lanes_N >= 0], before[flat][few.lanes_N >= 0])


@pytest.mark.parametrize("kind", ["fp8_block", "mxfp4"])
def test_rows_go_to_their_homes(make_experts, kind):
    case = make_case(make_experts, kind)
    hidden, here = case.up("triton"), case.experts.lanes_N >= 0
    homes = case.experts.x_RH.new_zeros(2, 5, case.matrices.hidden_size)
    case.down_home(hidden, homes)
    assert torch.equal(homes.flatten(0, 1)[here], case.down("triton", hidden)[here])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["fp8_block", "int4 zeros"])
def test_opcheck(make_experts, kind, backend):
    case = make_case(make_experts, kind, num_tokens=3)
    case.experts.lanes_N.clamp_(min=0)  # undefined rows would compare as unequal
    experts = case.experts
    slots = (torch.bfloat16, case.matrices, experts.lane_to_slot_L, case.schedule)
    rows = quantise_rows(experts.x_RH) if kind == "fp8_block" else (experts.x_RH, None)
    # The other checks trace gradients, which there are none; that of the schema compares inputs, which e4m3 can't be.
    checks = ("test_faketensor",) if kind == "fp8_block" else ("test_schema", "test_faketensor")
    torch.library.opcheck(
        _expert_up.registered, _expert_up.flatten(*rows[:2], *slots, 2, case.configs[0], backend), test_utils=checks
    )
    hidden = case.up("torch")
    hidden = hidden[:2] if kind == "fp8_block" else (hidden, None)
    torch.library.opcheck(
        _expert_down.registered,
        _expert_down.flatten(*hidden, *slots, experts.row_weights_N, case.configs[1], backend),
        test_utils=checks,
    )
    both = (experts.x_RH, *slots[1:], experts.row_weights_N, 2, *case.configs, backend)
    torch.library.opcheck(_expert_mlp.registered, _expert_mlp.flatten(*both), test_utils=checks)


@pytest.mark.parametrize("kind", ["fp8_block", "int4 zeros"])
def test_ops_are_registered(make_experts, kind):
    """What a tracer sees has the shapes and dtypes of the real thing."""
    case = make_case(make_experts, kind)
    hidden, on_meta = case.up("torch"), {}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_meta["x"] = mode.from_tensor(case.experts.x_RH)
        fake = case.up("torch", on_meta["x"])
        rows = case.down("torch", fake)
    for one, other in zip(hidden, fake, strict=True) if isinstance(hidden, QuantisedRows) else ((hidden, fake),):
        assert one == other if isinstance(one, torch.dtype) else (one.shape, one.dtype) == (other.shape, other.dtype)
    assert rows.shape == (10, case.matrices.hidden_size) and rows.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [pytest.param("fp8_block", marks=pytest.mark.gpu), "mxfp4"])
def test_bits_of_one_token_do_not_depend_on_the_slots(make_experts, kind):
    arguments, logits = whole(make_experts, kind, 1, "gpt-oss")
    before = run_whole(arguments, logits, "triton")
    order = torch.tensor([4, 2, 0, 3, 1], device=logits.device)
    slots = order.argsort()[arguments["table"].lane_to_slot_L.long()].to(torch.int32)
    matrices, names = arguments["matrices"], ("gate_up_SNH", "down_SHI", "gate_up_scale", "down_scale")
    moved = {name: reordered(getattr(matrices, name), order) for name in (*names, "gate_up_bias_SN", "down_bias_SH")}
    arguments |= {"matrices": replace(matrices, **moved)}
    arguments["table"] = replace(arguments["table"], lane_to_slot_L=slots)
    assert torch.equal(run_whole(arguments, logits, "triton"), before)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_on_a_gpu(make_experts, kind, num_tokens):
    """Sizes that many blocks divide, and batches that reach each line of the table; against the reference on the GPU."""
    arguments, logits = whole(make_experts, kind, num_tokens, "gpt-oss", num_experts=8, sizes=(512, 384))
    y, expected = (run_whole(arguments, logits, backend) for backend in ("triton", "torch"))
    most = 6e-3 if kind != "fp8_block" else 0.06 if num_tokens == 1 else 0.02
    assert error(y, expected.double()) <= most
    assert torch.equal(run_whole(arguments, logits, "triton"), y)
