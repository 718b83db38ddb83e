"""Quantised experts through the ops, against a plain float32 computation on dequantised weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from moe_kernels import (
    ExpertMatrices,
    GemmConfig,
    LoadCounter,
    QuantisedRows,
    ReplicaTable,
    RoutingRule,
    build_schedule,
    combine,
    dequantise,
    expert_down,
    expert_rows,
    expert_up,
    gemm_configs,
    gradient_configs,
    has_tma,
    local_experts,
    local_forward,
    moe_experts,
    pack_words,
    quantise_rows,
    quantise_weights,
)
from moe_kernels.gemms.expert_down import _expert_down, expert_down_home
from moe_kernels.gemms.expert_up import _expert_up
from moe_kernels.one_token import one_token
from moe_kernels.quantised import (
    expert_down_four_bit,
    expert_up_four_bit,
)
from moe_kernels.tiles.homes import RowHomes
from tests.moe_kernels.conftest import in_slots
from tests.moe_kernels.test_formats import GPT_OSS, exact

# scheme → options of `quantise_weights`, sizes (H, I) that need masks, where the scheme allows them
KINDS = {
    "fp8_block": ("fp8_block", {}, (200, 136)),
    "mxfp4": ("mxfp4", {}, (96, 160)),
    "int4 g32": ("int4", {"group": 32}, (96, 160)),
    "int4 g128": ("int4", {"group": 128}, (384, 128)),
    "int4 zeros": ("int4", {"group": 32, "with_zero": True}, (160, 96)),
}
FORMS = {"silu": ("silu", False), "gpt-oss": (GPT_OSS, True), "relu2 ungated": ("relu2 ungated", True)}


def quantised(experts, kind, form="silu", dtype=torch.bfloat16):
    """The experts' matrices quantised, in slots with other bytes between them; biases if the form has them."""
    scheme, options, _ = KINDS[kind]
    activation, is_biased = FORMS[form]
    device, slots = experts.x_RH.device, experts.gate_up_SNH.shape[0]
    hidden_size, intermediate = experts.down_SHI.shape[1:]
    gate_up = experts.gate_up_SNH.float()
    if activation.endswith("ungated"):
        gate_up = gate_up[:, :intermediate].contiguous()
    random = torch.Generator().manual_seed(2)

    def bias(size):
        return torch.randn(slots, size, generator=random).to(device, dtype)

    parts = quantise_weights(gate_up, scheme, blocks_of=intermediate if scheme == "fp8_block" else None, **options)
    down_parts = quantise_weights(experts.down_SHI.float(), scheme, **options)
    weights, scales, zeros = (
        [None if one is None else spaced(one) for one in pair] for pair in zip(parts, down_parts, strict=True)
    )
    return ExpertMatrices(
        *weights,
        activation,
        *((bias(gate_up.shape[1]), bias(hidden_size)) if is_biased else (None, None)),
        *scales,
        *zeros,
        scheme,
    )


def spaced(tensor):
    """As in a pool: slots with a gap between them."""
    if tensor.dtype in (torch.uint8, torch.float8_e4m3fn):
        slots, rows, columns = tensor.shape
        slab = torch.full((slots, rows * columns + 16), 0x7F, dtype=torch.uint8, device=tensor.device)
        slab[:, : rows * columns] = tensor.view(torch.uint8).reshape(slots, -1)
        return slab[:, : rows * columns].view(tensor.dtype).view(slots, rows, columns)
    return in_slots(tensor, 8)


@dataclass
class Case:
    experts: object
    matrices: ExpertMatrices
    configs: tuple
    schedule: object

    def up(self, backend, x=None):
        return expert_up(
            self.experts.x_RH if x is None else x, self.matrices, self.experts.lane_to_slot_L, self.schedule,
            fanout=self.experts.fanout, config=self.configs[0], backend=backend,
        )  # fmt: skip

    def down(self, backend, hidden):
        return expert_down(
            hidden, self.matrices, self.experts.lane_to_slot_L, self.schedule, self.experts.row_weights_N,
            config=self.configs[1], backend=backend,
        )  # fmt: skip

    @property
    def computed(self):
        return int(self.schedule.offsets_L1[-1])


FOUR_BIT_TMA = GemmConfig(16, 128, 128, 4, 3, tma=True, swap=True, quantised=True)


def runnable(configs):
    """The interpreter has no ring: there the kernels in Triton instead."""
    is_ring = configs[0].tma and configs[0].swap and configs[0].programs_per_sm
    return (FOUR_BIT_TMA,) * 2 if is_ring and not torch.cuda.is_available() else configs


def make_case(
    make_experts,
    kind,
    form="silu",
    dtype=torch.bfloat16,
    num_tokens=5,
    num_lanes=2,
    tma=False,
    change=None,
    configs=None,
):
    hidden_size, intermediate = KINDS[kind][2]
    experts = make_experts(num_tokens, 2, num_lanes, hidden_size, intermediate, dtype)
    matrices = quantised(experts, kind, form, dtype)
    batch = (hidden_size, intermediate, dtype, num_tokens, 2, num_lanes)
    if configs is None:
        configs = runnable(gemm_configs(*batch, tma=tma, scheme=matrices.scheme))
    if change is not None:
        configs = tuple(replace(config, **change) for config in configs)
    schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=configs[0].block_m, extra_m=configs[0].extra_m)
    return Case(experts, matrices, configs, schedule)


def weights_of(matrices, slot, dtype):
    """What the scheme means by the bytes of a slot; 4-bit weights in the dtype of x."""
    found = []
    for which, rows in (("gate_up", matrices.intermediate_size), ("down", None)):
        weight = matrices.gate_up_SNH if which == "gate_up" else matrices.down_SHI
        scale, zero = getattr(matrices, f"{which}_scale"), getattr(matrices, f"{which}_zero")
        zero = None if zero is None else zero[slot]
        values = dequantise(weight[slot], scale[slot], zero, matrices.scheme, blocks_of=rows)
        found.append(values if matrices.scheme == "fp8_block" else values.to(dtype).float())
    return found


def expected_hidden(case, exact_x=False):
    """[N, I] in float64, sorted; `exact_x`: of rows that are not quantised."""
    experts, matrices = case.experts, case.matrices
    dtype, x = experts.x_RH.dtype, experts.x_RH
    x = quantise_rows(x, backend="torch").dequantised() if matrices.scheme == "fp8_block" and not exact_x else x
    hidden = []
    for flat in case.schedule.order_N[: case.computed].tolist():
        slot = int(experts.lane_to_slot_L[experts.lanes_N[flat]])
        product = weights_of(matrices, slot, dtype)[0].double() @ x[flat // experts.fanout].double()
        bias = matrices.gate_up_bias_SN
        hidden.append(exact(matrices.activation, product if bias is None else product + bias[slot].double()))
    return torch.stack(hidden)


def expected_rows(case, hidden):
    """[N, H] in float64, flat; of hidden rows [N, I] in sorted order."""
    experts, matrices = case.experts, case.matrices
    rows = hidden.new_zeros((experts.lanes_N.numel(), matrices.hidden_size), dtype=torch.float64)
    for place, flat in enumerate(case.schedule.order_N[: case.computed].tolist()):
        slot = int(experts.lane_to_slot_L[experts.lanes_N[flat]])
        row = weights_of(matrices, slot, experts.x_RH.dtype)[1].double() @ hidden[place].double()
        if matrices.down_bias_SH is not None:
            row = row + matrices.down_bias_SH[slot].double()
        rows[flat] = row * experts.row_weights_N[flat].double()
    return rows


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def has_few_bits(case, backend):
    """Whether the products are of Hopper's wgmma, which adds e4m3 products with about 14 bits (DeepSeek-V3, 3.3.2)."""
    if backend == "torch" or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    return case.configs[0].swap or case.configs[0].block_m >= 64


def check(case, backend):
    """Each op for itself; the rounding of hidden may differ where a value is just between two."""
    is_fp8, dtype = case.matrices.scheme == "fp8_block", case.experts.x_RH.dtype
    rounding = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}[dtype]
    hidden, wanted = case.up(backend), expected_hidden(case)
    assert isinstance(hidden, QuantisedRows) == is_fp8
    values = (hidden.dequantised() if is_fp8 else hidden)[: case.computed]
    assert error(values, wanted) <= (0.03 if is_fp8 else rounding)
    if is_fp8:
        rounded = quantise_rows(wanted.float(), backend="torch")
        is_rough = has_few_bits(case, backend)  # on an H200 scales were off by up to 9e-4, and 0.9 % of the values
        rtol, most = (2e-3, 0.02) if is_rough else (1e-5, 0.01)
        assert torch.allclose(hidden.scale_RG[: case.computed], rounded.scale_RG, rtol=rtol, atol=0)
        assert (hidden.values_RH[: case.computed].float() != rounded.values_RH.float()).double().mean() < most
        assert error(values, rounded.dequantised().double()) <= 0.01
    rows, here = case.down(backend, hidden), case.experts.lanes_N >= 0
    assert rows.dtype == dtype
    assert error(rows[here], expected_rows(case, values)[here]) <= rounding


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


SMALL = {
    "fp8_block": (136, 8),
    "mxfp4": (32, 32),
    "int4 g32": (32, 32),
    "int4 g128": (128, 128),
    "int4 zeros": (32, 32),
}


def whole(make_experts, kind, num_tokens, form="silu", num_experts=4):
    """One token has a program for each column, which is slow in the interpreter: it gets few."""
    hidden_size, intermediate = SMALL[kind] if num_tokens == 1 else KINDS[kind][2]
    experts = make_experts(num_tokens, 2, num_experts, hidden_size, intermediate, torch.bfloat16)
    device = experts.x_RH.device
    return experts, {
        "x_TH": experts.x_RH,
        "matrices": quantised(experts, kind, form),
        "table": ReplicaTable(
            torch.arange(num_experts, dtype=torch.int32, device=device).flip(0), experts.lane_to_slot_L
        ),
        "load": LoadCounter(torch.zeros(num_experts, dtype=torch.int64, device=device), None),
    }


def run_whole(arguments, logits, backend):
    return local_forward(**arguments, logits_TE=logits, top_k=2, rule=RoutingRule(), backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_whole_forward(make_experts, kind, num_tokens, backend):
    if (kind, num_tokens, backend) == ("int4 g128", 1, "triton") and not torch.cuda.is_available():
        pytest.skip("slow in the interpreter: needs a CUDA device")
    form = "gpt-oss" if num_tokens == 1 else "silu"
    experts, arguments = whole(make_experts, kind, num_tokens, form)
    logits = torch.randn(num_tokens, 4, generator=torch.Generator().manual_seed(4)).to(experts.x_RH.device)
    y = run_whole(arguments, logits, backend)
    best, ids = logits.topk(2)
    weights = torch.softmax(best, -1).float()
    expected = torch.zeros_like(y, dtype=torch.float64)
    matrices, x = arguments["matrices"], experts.x_RH.double()
    for token in range(num_tokens):
        for k in range(2):
            slot = int(experts.lane_to_slot_L[3 - ids[token, k]])
            gate_up, down = (one.double() for one in weights_of(matrices, slot, torch.bfloat16))
            biased = matrices.gate_up_bias_SN is not None
            product = gate_up @ x[token] + (matrices.gate_up_bias_SN[slot].double() if biased else 0)
            row = down @ exact(matrices.activation, product)
            row = row + (matrices.down_bias_SH[slot].double() if biased else 0)
            expected[token] += weights[token, k].double() * row
    is_rounded = kind == "fp8_block" and (num_tokens > 1 or backend == "torch")  # a single token's rows are not
    assert error(y, expected) <= (0.06 if is_rounded else 6e-3)
    given = {"expert_ids_TK": ids.int().contiguous(), "expert_weights_TK": weights.contiguous()}
    z = local_experts(**arguments, **given, backend=backend)
    assert error(z, y.double()) <= (0.06 if kind == "fp8_block" and num_tokens == 1 else 8e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_moe_experts(make_experts, kind):
    experts, arguments = whole(make_experts, kind, 6)
    matrices, x = arguments["matrices"], experts.x_RH
    ids = torch.tensor([[0, 1], [2, 3], [4, 0], [1, -1], [3, 2], [0, 4]], device=x.device)
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)).to(x.device)
    y = moe_experts(x, ids, weights, matrices, backend="torch")
    case = make_case(make_experts, kind, num_tokens=6)
    case.experts.lane_to_slot_L = torch.arange(5, dtype=torch.int32, device=x.device)
    case.experts.lanes_N, case.experts.row_weights_N = ids.int().flatten(), weights.flatten()
    case.experts.x_RH, case.matrices = x, matrices
    counts = torch.bincount(ids[ids >= 0].flatten(), minlength=5).int()
    case.schedule = build_schedule(case.experts.lanes_N, counts, block_m=case.configs[0].block_m)
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


def test_rows_quantised_before_give_the_same_bits(make_experts):
    """As a dispatch would send them."""
    case = make_case(make_experts, "fp8_block")
    before = case.up("torch")
    after = case.up("torch", quantise_rows(case.experts.x_RH))
    assert torch.equal(before.values_RH.float(), after.values_RH.float())
    assert torch.equal(before.scale_RG, after.scale_RG)


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


RING = GemmConfig(128, 256, 128, 4, 4, tma=True, quantised=True)


@pytest.mark.gpu
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate", "num_sources", "form", "dtype"),
    [
        (512, 256, 700, "silu", torch.bfloat16),  # whole blocks, and lanes with several tiles
        (400, 144, 300, "silu", torch.bfloat16),  # parts of blocks; the down projection's second half has a part, too
        (
            2032,
            272,
            77,
            "gpt-oss",
            torch.float16,
        ),  # a last half tile of rows; the second half of the last columns is empty
        (512, 400, 301, "relu2 ungated", torch.bfloat16),  # two blocks of `up` in a tile, the last without a second
        (128, 128, 64, "gpt-oss", torch.float32),  # a single step
        (128, 128, 0, "silu", torch.bfloat16),
    ],
)
def test_the_ring_has_the_bits_of_the_plain_kernels(
    make_experts, hidden_size, intermediate, num_sources, form, dtype, num_stages
):
    """fp8_block on Hopper, to homes as well; rows of no lane and empty lanes are among the cases."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    experts = make_experts(max(num_sources, 9), 2, 5, hidden_size, intermediate, dtype)
    experts.lanes_N[experts.lanes_N == 3] = 1
    if num_sources == 0:
        experts.lanes_N.fill_(-1)
    matrices, num_rows = quantised(experts, "fp8_block", form, dtype), experts.lanes_N.numel()
    plain = GemmConfig(64, 256, 128, 8, 3, quantised=True), GemmConfig(64, 128, 128, 4, 4, quantised=True)
    ring = replace(RING, num_stages=num_stages)
    found = []
    for configs in (plain, (ring, ring)):
        schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=configs[0].block_m)
        case = Case(experts, matrices, configs, schedule)
        hidden = case.up("triton")
        rows = case.down("triton", hidden)
        homes = torch.zeros(2, num_rows // 2, hidden_size, dtype=dtype, device="cuda")
        addresses = torch.tensor([home.data_ptr() for home in homes], dtype=torch.int64, device="cuda")
        expert_down_home(
            hidden, matrices, experts.lane_to_slot_L, schedule, experts.row_weights_N,
            RowHomes(addresses, homes[0], num_rows // 2), config=configs[1],
        )  # fmt: skip
        here = experts.lanes_N >= 0
        assert torch.equal(homes.view(num_rows, hidden_size)[here], rows[here])
        assert (homes.view(num_rows, hidden_size)[~here] == 0).all(), "rows of no expert are not written"
        found.append((hidden.values_RH[: case.computed].float(), hidden.scale_RG[: case.computed], rows[here]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


FOUR_BIT_PLAIN = GemmConfig(16, 128, 128, 4, 3, swap=True, quantised=True)
FOUR_BIT_RINGS = (
    # block_m, block_n, block_k, num_stages, programs_per_sm, tail_m, extra_m
    (16, 128, 256, 4, 2, 0, 0),
    (16, 192, 256, 4, 1, 0, 16),
    (32, 192, 128, 4, 1, 16, 16),
    (64, 128, 64, 8, 1, 32, 16),
    (128, 192, 128, 4, 1, 64, 32),
    (256, 128, 64, 4, 1, 64, 0),
    (64, 192, 128, 4, 1, 0, 32),
)


def four_bit_ring(block_m, block_n, block_k, num_stages, programs, tail_m, extra_m):
    return GemmConfig(
        block_m, block_n, block_k, block_n // 16, num_stages, tma=True, swap=True, quantised=True, programs_per_sm=programs,
        tail_m=tail_m, extra_m=extra_m,
    )  # fmt: skip


FOUR_BIT_CASES = (
    # kind, form, dtype, sources, (H, I), places of rings: to compile all of them for all takes long
    ("mxfp4", "gpt-oss", torch.bfloat16, 700, (640, 384), (0, 4, 5)),  # lanes with several tiles of each size
    ("mxfp4", "gpt-oss", torch.bfloat16, 300, (96, 160), (1, 3, 6)),
    ("mxfp4", "relu2 ungated", torch.bfloat16, 77, (96, 160), (0, 2, 4)),
    ("int4 zeros", "gpt-oss", torch.bfloat16, 300, (640, 384), (1, 3, 4)),
    ("int4 g128", "silu", torch.bfloat16, 41, (640, 256), (0, 2, 6)),
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
    for number, config in enumerate(
        (FOUR_BIT_PLAIN, *(four_bit_ring(*FOUR_BIT_RINGS[place]) for place in places), FOUR_BIT_TMA)
    ):
        schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=config.block_m, extra_m=config.extra_m)
        case = Case(experts, matrices, (config, config), schedule)
        hidden = case.up("triton")
        rows = case.down("triton", hidden)
        if number == 1:
            homes = torch.zeros(2, num_rows // 2, sizes[0], dtype=dtype, device="cuda")
            addresses = torch.tensor([home.data_ptr() for home in homes], dtype=torch.int64, device="cuda")
            expert_down_home(
                hidden, matrices, experts.lane_to_slot_L, schedule, experts.row_weights_N,
                RowHomes(addresses, homes[0], num_rows // 2), config=config,
            )  # fmt: skip
            assert torch.equal(homes.view(num_rows, sizes[0])[here], rows[here]), config
            assert (homes.view(num_rows, sizes[0])[~here] == 0).all(), "rows of no expert are not written"
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
    for scales, is_exact in (((65, 100, 127, 150, 190, 191, 192, 65), True), ((194, 255, 230, 200), False)):
        of_groups = torch.tensor(scales, dtype=torch.uint8, device="cuda")
        matrices.gate_up_scale[:, : len(scales)] = of_groups[None, :, None]
        found = []
        for config in (FOUR_BIT_PLAIN, four_bit_ring(*FOUR_BIT_RINGS[0])):
            schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=config.block_m)
            case = Case(experts, matrices, (config, config), schedule)
            assert case.computed
            found.append(case.up("triton")[: case.computed])
        plain, by_ring = found
        assert torch.equal(plain, by_ring) if is_exact else by_ring.isnan().all()


@pytest.mark.gpu
def test_the_ring_quantises_what_a_fast_division_could_not(make_experts):
    """Rows whose scales are at the ends of float32's range, infinite or NaN: the bits of a division."""
    if not has_tma(torch.device("cuda")):
        pytest.skip("needs Hopper")
    found = []
    for factor in (1e-30, 1e-37, 1e30, float("inf"), float("nan"), 0.0):
        experts = make_experts(40, 1, 2, 256, 128, torch.float32)
        experts.x_RH[7] *= factor
        experts.x_RH[8] *= abs(factor) ** 0.5
        matrices = quantised(experts, "fp8_block", "relu2 ungated", torch.float32)
        matrices = replace(matrices, gate_up_bias_SN=None)
        found = []
        for config in (GemmConfig(64, 256, 128, 8, 3, quantised=True), RING):
            schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=config.block_m)
            case = Case(experts, matrices, (config, config), schedule)
            hidden = case.up("triton")
            found.append((hidden.values_RH[: case.computed].view(torch.uint8), hidden.scale_RG[: case.computed]))
        assert torch.equal(found[0][0], found[1][0]), factor
        assert torch.equal(found[0][1].nan_to_num(3.0), found[1][1].nan_to_num(3.0)), factor


def test_the_ring_is_for_a_gpu(make_experts):
    """Gluon has no interpreter; the reference takes any configuration."""
    experts = make_experts(5, 2, 2, 256, 128, torch.bfloat16)
    if experts.x_RH.is_cuda:
        pytest.skip("for a CPU")
    matrices = quantised(experts, "fp8_block")
    schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=128)
    case = Case(experts, matrices, (RING, RING), schedule)
    hidden = case.up("torch")
    case.down("torch", hidden)
    with pytest.raises(ValueError, match=r"gate_up_SNH is on cpu: with fp8_block config\.tma needs a GPU"):
        case.up("triton")
    with pytest.raises(ValueError, match=r"down_SHI is on cpu: with fp8_block config\.tma needs a GPU"):
        case.down("triton", hidden)
    with pytest.raises(ValueError, match="columns divisible by 16"):
        small = make_experts(5, 2, 2, 200, 128, torch.bfloat16)
        Case(small, quantised(small, "fp8_block"), (RING, RING), schedule).up("torch")


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
    case.schedule = build_schedule(
        case.experts.lanes_N, case.experts.counts_L, block_m=case.configs[0].block_m, extra_m=case.configs[0].extra_m
    )
    assert case.computed == (0 if busy is None else num_rows)
    if busy is not None:
        check(case, "triton")
        return
    home = torch.full((num_rows, case.matrices.hidden_size), 7.0, dtype=torch.bfloat16, device=case.experts.x_RH.device)
    addresses = torch.tensor([home.data_ptr()], dtype=torch.int64, device=home.device)
    expert_down_home(
        case.up("triton"), case.matrices, case.experts.lane_to_slot_L, case.schedule, case.experts.row_weights_N,
        RowHomes(addresses, home, num_rows), config=case.configs[1],
    )  # fmt: skip
    assert (home == 7).all(), "rows of no expert are not written"


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


@pytest.mark.parametrize("kind", ["mxfp4", "int4 zeros"])
def test_halves_have_the_same_bits(make_experts, monkeypatch, kind):
    if torch.cuda.is_available() and not has_tma(torch.device("cuda")):
        pytest.skip("needs TMA")
    case = make_case(make_experts, kind, "gpt-oss", configs=(FOUR_BIT_TMA,) * 2)
    rows = []
    for most in (0, 32):
        for module in (expert_up_four_bit, expert_down_four_bit):
            monkeypatch.setattr(module, "MOST_HALVED", most)
        hidden = case.up("triton")
        rows.append((hidden[: case.computed], case.down("triton", hidden)[case.experts.lanes_N >= 0]))
    assert all(torch.equal(one, other) for one, other in zip(*rows, strict=True))


@pytest.mark.parametrize("tma", [False, True])
def test_a_scale_of_255_is_nan(make_experts, tma):
    """Also where a clamp or a zero code would hide an infinite weight."""
    if tma and torch.cuda.is_available() and not has_tma(torch.device("cuda")):
        pytest.skip("needs TMA")
    case = make_case(make_experts, "mxfp4", "gpt-oss", tma=tma)
    case.matrices.gate_up_scale[:, 1, 7] = 255
    hidden = case.up("triton")[: case.computed]
    assert hidden[:, 7].isnan().all() and hidden[:, :7].isfinite().all() and hidden[:, 8:].isfinite().all()


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
        schedule = build_schedule(
            experts.lanes_N, experts.counts_L, block_m=case.configs[0].block_m, extra_m=case.configs[0].extra_m
        )
        moved = Case(experts, matrices, case.configs, schedule)
        return moved.down(backend, moved.up(backend))

    case.schedule = build_schedule(
        experts.lanes_N, experts.counts_L, block_m=case.configs[0].block_m, extra_m=case.configs[0].extra_m
    )
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


def reordered(part, order):
    """The same bytes in other slots; with another gap between them."""
    slots = part.view(torch.uint8)[order] if part.dtype == torch.float8_e4m3fn else part[order]
    flat = torch.zeros((slots.shape[0], slots[0].numel() + 32), dtype=slots.dtype, device=part.device)
    flat[:, : slots[0].numel()] = slots.reshape(slots.shape[0], -1)
    return flat[:, : slots[0].numel()].unflatten(1, slots.shape[1:]).view(part.dtype)


@pytest.mark.parametrize("kind", ["fp8_block", "mxfp4"])
def test_rows_go_to_their_homes(make_experts, kind):
    """As between several GPUs; here both homes are on this device."""
    case = make_case(make_experts, kind)
    device, (num_rows, columns) = case.experts.x_RH.device, (10, case.matrices.hidden_size)
    hidden = case.up("triton")
    homes = torch.zeros(2, 5, columns, dtype=torch.bfloat16, device=device)
    addresses = torch.tensor([home.data_ptr() for home in homes], dtype=torch.int64, device=device)
    expert_down_home(
        hidden, case.matrices, case.experts.lane_to_slot_L, case.schedule, case.experts.row_weights_N,
        RowHomes(addresses, homes[0], 5), config=case.configs[1],
    )  # fmt: skip
    here = case.experts.lanes_N >= 0
    assert torch.equal(homes.view(num_rows, columns)[here], case.down("triton", hidden)[here])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["fp8_block", "int4 zeros"])
def test_opcheck(make_experts, kind, backend):
    case = make_case(make_experts, kind, num_tokens=3)
    case.experts.lanes_N.clamp_(min=0)  # undefined rows would compare as unequal
    experts = case.experts
    case.schedule = build_schedule(
        experts.lanes_N, experts.counts_L, block_m=case.configs[0].block_m, extra_m=case.configs[0].extra_m
    )
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
    experts, arguments = whole(make_experts, kind, 1, "gpt-oss")
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(4)).to(experts.x_RH.device)
    before = run_whole(arguments, logits, "triton")
    order = torch.tensor([4, 2, 0, 3, 1], device=logits.device)
    slots = order.argsort()[experts.lane_to_slot_L.long()].to(torch.int32)
    matrices, names = arguments["matrices"], ("gate_up_SNH", "down_SHI", "gate_up_scale", "down_scale")
    moved = {name: reordered(getattr(matrices, name), order) for name in (*names, "gate_up_bias_SN", "down_bias_SH")}
    arguments |= {"matrices": replace(matrices, **moved)}
    arguments["table"] = replace(arguments["table"], lane_to_slot_L=slots)
    assert torch.equal(run_whole(arguments, logits, "triton"), before)


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
    experts = make_experts(1, 2, 4, *sizes, torch.bfloat16)
    matrices, device = quantised(experts, "fp8_block", form), experts.x_RH.device
    table = ReplicaTable(torch.arange(4, dtype=torch.int32, device=device).flip(0), experts.lane_to_slot_L)
    load = LoadCounter(torch.zeros(4, dtype=torch.int64, device=device), None)
    arguments = {"x_TH": experts.x_RH, "matrices": matrices, "table": table, "load": load}
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(4)).to(device)
    found = []
    for most in (1 << 62, 0):
        monkeypatch.setattr(one_token, "_MOST_TO_STREAM", most)
        monkeypatch.setattr(one_token, "_plans", {})
        found.append(run_whole(arguments, logits, "triton"))
        assert [plan.is_fp8 for plan in one_token._plans.values()] in ([most == 0], [])  # unaligned ones are not kept
    best, ids = logits.topk(2)
    expected = torch.zeros(sizes[0], dtype=torch.float64, device=device)
    for k, weight in enumerate(torch.softmax(best, -1).double()[0]):
        slot = int(experts.lane_to_slot_L[3 - ids[0, k]])
        gate_up, down = (one.double() for one in weights_of(matrices, slot, torch.bfloat16))
        biases = [
            0 if bias is None else bias[slot].double() for bias in (matrices.gate_up_bias_SN, matrices.down_bias_SH)
        ]
        product = gate_up @ experts.x_RH[0].double() + biases[0]
        expected += weight * (down @ exact(matrices.activation, product) + biases[1])
    for y in found:
        assert error(y[0], expected) <= 6e-3
    assert torch.equal(run_whole(arguments, logits, "triton"), found[1])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_on_a_gpu(make_experts, kind, num_tokens):
    """Sizes that many blocks divide, and batches that reach each line of the table; against the reference on the GPU."""
    scheme, _, _ = KINDS[kind]
    experts = make_experts(num_tokens, 2, 8, 512, 384, torch.bfloat16)
    matrices = quantised(experts, kind, "gpt-oss")
    table = ReplicaTable(torch.arange(8, dtype=torch.int32, device="cuda"), experts.lane_to_slot_L)
    load = LoadCounter(torch.zeros(8, dtype=torch.int64, device="cuda"), None)
    arguments = {"x_TH": experts.x_RH, "matrices": matrices, "table": table, "load": load}
    logits = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(4)).to("cuda")
    y, expected = (run_whole(arguments, logits, backend) for backend in ("triton", "torch"))
    most = 6e-3 if scheme != "fp8_block" else 0.06 if num_tokens == 1 else 0.02
    assert error(y, expected.double()) <= most
    assert torch.equal(run_whole(arguments, logits, "triton"), y)
