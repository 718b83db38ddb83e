"""Expert formats: clamps, slopes, offsets, no gate, biases; each in every variant of the kernels, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moe_kernels import (
    LoadCounter,
    ReplicaTable,
    RoutingRule,
    build_schedule,
    expert_down,
    expert_up,
    gemm_config,
    has_tma,
    local_forward,
    topk_routing_torch,
)
from moe_kernels.operands.activation import gated, parse_activation, ungated
from tests.moe_kernels.conftest import in_slots
from tests.moe_kernels.test_variants import VARIANTS

GPT_OSS = "silu limit=7.0 alpha=1.702 up_offset=1.0"
FORMATS = {
    "silu, biased": ("silu", True),
    "gpt-oss": (GPT_OSS, True),
    "clamped": ("silu limit=0.5", False),
    "gelu_tanh": ("gelu_tanh", False),
    "relu2 without a gate": ("relu2 ungated", False),
    "gelu without a gate, biased": ("gelu ungated", True),
}


def exact(activation: str, product: torch.Tensor) -> torch.Tensor:
    """By hand, in float64."""
    parsed = parse_activation(activation)
    gate, up = product.chunk(2, -1) if parsed.is_gated else (product, product)
    if parsed.limit:
        gate, up = gate.clamp(max=parsed.limit), up.clamp(-parsed.limit, parsed.limit)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    function = {
        "silu": gate / (1 + torch.exp(-parsed.alpha * gate)),
        "gelu": 0.5 * gate * (1 + torch.erf(gate / 2**0.5)),
        "gelu_tanh": 0.5 * gate * (1 + tanh),
        "relu2": torch.where(gate > 0, gate * gate, 0),
    }[parsed.name]
    return function * (up + parsed.up_offset) if parsed.is_gated else function


def formatted(experts, activation, biased):
    """`experts` with this activation, biases if asked, and inputs so large that clamps act."""
    matrices, device, dtype = experts.matrices, experts.x_RH.device, experts.x_RH.dtype
    slots, rows, _ = matrices.gate_up_SNH.shape
    if not parse_activation(activation).is_gated:
        rows //= 2
        matrices = replace(matrices, gate_up_SNH=in_slots(matrices.gate_up_SNH[:, :rows].contiguous()))
    random = torch.Generator().manual_seed(5)

    def bias(size):
        """One row a slot, with NaN between them."""
        padded = torch.full((slots, size + 3), float("nan"))
        padded[:, :size] = torch.randn(slots, size, generator=random)
        return padded.to(device, dtype)[:, :size]

    experts.x_RH = experts.x_RH * 2
    biases = (bias(rows), bias(matrices.down_SHI.shape[1])) if biased else (None, None)
    return replace(matrices, activation=activation, gate_up_bias_SN=biases[0], down_bias_SH=biases[1])


def dense(experts, matrices, x=None, weights=None, tensors=None):
    """Rows [N, H] in flat order and in float64; those of no lane are zero."""
    x = experts.x_RH.double() if x is None else x
    weights = experts.row_weights_N.double() if weights is None else weights
    if tensors is None:
        names = ("gate_up_SNH", "down_SHI", "gate_up_bias_SN", "down_bias_SH")
        tensors = [None if getattr(matrices, name) is None else getattr(matrices, name).double() for name in names]
    gate_up, down, up_bias, down_bias = tensors
    rows = []
    for row, lane in enumerate(experts.lanes_N.tolist()):
        if lane < 0:
            rows.append(x.new_zeros(down.shape[1]))
            continue
        slot = int(experts.lane_to_slot_L[lane])
        product = gate_up[slot] @ x[row // experts.fanout]
        hidden = exact(matrices.activation, product if up_bias is None else product + up_bias[slot])
        out = down[slot] @ hidden
        rows.append((out if down_bias is None else out + down_bias[slot]) * weights[row])
    return torch.stack(rows)


def computed(experts, matrices, config, backend):
    schedule = build_schedule(
        experts.lanes_N, experts.counts_L, block_m=config.block_m, extra_m=config.schedule_extra_m, backend=backend
    )
    up = replace(config, programs_per_sm=0)
    hidden = expert_up(
        experts.x_RH, matrices, experts.lane_to_slot_L, schedule,
        fanout=experts.fanout, config=up, backend=backend,
    )  # fmt: skip
    return expert_down(
        hidden, matrices, experts.lane_to_slot_L, schedule,
        experts.row_weights_N, config=config, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("variant", ["reference", *VARIANTS])
def test_every_variant(make_experts, assert_close, form, variant):
    """Sizes that no tile divides."""
    if torch.cuda.is_available() and not has_tma(torch.device("cuda")) and variant not in ("reference", "portable"):
        pytest.skip("needs a GPU with has_tma(), or none")
    experts = make_experts(40, 2, 3, 88, 72, torch.bfloat16)
    matrices = formatted(experts, *FORMATS[form])
    config = VARIANTS["portable" if variant == "reference" else variant]
    rows = computed(experts, matrices, config, "torch" if variant == "reference" else "triton")
    here = experts.lanes_N >= 0
    expected = dense(experts, matrices)[here]
    scale = float(expected.abs().max())
    assert (rows[here].double() - expected).abs().max() <= 0.02 * scale
    if FORMATS[form][1]:  # a test that could not see biases would be none
        without = dense(experts, replace(matrices, gate_up_bias_SN=None, down_bias_SH=None))[here]
        assert (without - expected).abs().max() > 0.2 * scale


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_the_whole_forward(make_experts, device, form, backend, num_tokens):
    """One token has kernels of its own; also by groups, whose choice they share."""
    experts = make_experts(num_tokens, 2, 8, 40, 24)
    matrices = formatted(experts, *FORMATS[form])
    logits = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(4)).to(device)
    rule = RoutingRule("sigmoid", num_groups=4, top_groups=2, scale=1.5, epsilon=1e-6, round_to="bfloat16")
    table = ReplicaTable(torch.arange(8, dtype=torch.int32, device=device), experts.lane_to_slot_L)
    load = LoadCounter(torch.zeros(8, dtype=torch.int64, device=device), None)
    y = local_forward(experts.x_RH, logits, matrices, table, load, 2, rule, backend=backend)
    weights, ids = topk_routing_torch(logits, 2, rule)
    experts.lanes_N, experts.row_weights_N = ids.view(-1), weights.view(-1)
    expected = dense(experts, matrices).view(num_tokens, 2, -1).sum(1)
    assert (y.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_by_hand():
    """limit 7: min(9, 7) · sigmoid(1.702 · 7) · (clamp(-8, -7, 7) + 1) = 7 · 0.99999331 · -6."""
    gate, up = torch.tensor([9.0]), torch.tensor([-8.0])
    torch.testing.assert_close(gated(GPT_OSS, gate, up), torch.tensor([-41.99972]))
    assert gated("silu", gate, up).item() == pytest.approx(float(F.silu(gate) * up))
    assert ungated("relu2 ungated", torch.tensor([-3.0, 3.0])).tolist() == [0.0, 9.0]


@pytest.mark.parametrize(
    "wrong",
    ["swish", "silu limit", "silu limit=x", "silu limit=nan", "silu limit=-1", "silu beta=1", "ungated",
     "relu2 limit=1 ungated", "gelu alpha=2", "silu ungated limit=1"],
)  # fmt: skip
def test_others_are_refused(make_experts, wrong):
    experts = make_experts(2, 1, 2, 16, 8)
    with pytest.raises(ValueError, match="activation="):
        computed(
            experts, replace(experts.matrices, activation=wrong), gemm_config(16, 8, torch.float32, 2, 1, 2), "torch"
        )


def test_shapes_are_checked(make_experts):
    experts = make_experts(2, 1, 2, 16, 8)
    config, matrices = gemm_config(16, 8, torch.float32, 2, 1, 2), experts.matrices
    slots = matrices.down_SHI.shape[0]
    for message, change in (
        ("matrices.gate_up_bias_SN", {"gate_up_bias_SN": torch.zeros(slots, 8)}),
        ("matrices.gate_up_bias_SN", {"gate_up_bias_SN": torch.zeros(16, slots).T}),
        ("matrices.down_bias_SH", {"down_bias_SH": torch.zeros(slots, 16, dtype=torch.float64)}),
        ("matrices.down_SHI", {"activation": "relu2 ungated"}),  # 16 rows and 8 columns
    ):
        moved = {
            name: one.to(experts.x_RH.device) if isinstance(one, torch.Tensor) else one for name, one in change.items()
        }
        with pytest.raises(ValueError, match=message):
            computed(experts, replace(matrices, **moved), config, "torch")
