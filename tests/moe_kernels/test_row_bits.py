"""I5: the bits of a row depend on the row and the weights alone, forward and backward, by both backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from moe_kernels import build_schedule, expert_rows, expert_up, gemm_config, gradient_configs
from moe_kernels.tiles.row_blocks import ROWS, elementwise
from tests.moe_kernels.conftest import Experts, in_slots

BACKENDS = ["torch", "triton"]
# hidden_size, intermediate: what small, odd and large matrices make a BLAS do differently.
SIZES = [(7, 5), (33, 20), (64, 48), (100, 131)]
# Several pieces of the reference's activation.
LARGE = (16, 1100)
CASES = [(backend, sizes) for backend in BACKENDS for sizes in SIZES] + [("torch", LARGE)]


@dataclass
class Bits:
    """What a row owns, in flat order; a row that was not computed has NaN."""

    hidden: torch.Tensor
    out: torch.Tensor
    grad_x: torch.Tensor
    grad_weight: torch.Tensor


def compute(experts: Experts, backend: str) -> Bits:
    """Forward and backward of both GEMMs; the gradient of an output row is a function of its input row."""
    dtype, rows = experts.x_RH.dtype, experts.lanes_N.numel()
    config = gemm_config(*experts.gate_up_SNH.shape[1:], dtype, 1, 1, 1)  # one bucket for all variants
    schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=config.block_m, backend=backend)
    x, row_weights = (tensor.detach().requires_grad_() for tensor in (experts.x_RH, experts.row_weights_N))
    slots = (experts.lane_to_slot_L, schedule)
    hidden = expert_up(experts.x_RH, experts.matrices, *slots, fanout=1, config=config, backend=backend)
    out = expert_rows(
        x, experts.matrices, *slots, row_weights, fanout=1, configs=(config, config),
        gradient_configs=gradient_configs(*experts.down_SHI.shape[1:], dtype, 1, 1, 1), backend=backend,
    )  # fmt: skip
    out.backward(experts.x_RH.cos())
    flat_hidden = torch.full_like(hidden, float("nan"))
    computed = int(schedule.offsets_L1[-1])
    flat_hidden[schedule.order_N[:computed].long()] = hidden[:computed]
    assert rows == out.shape[0]
    return Bits(flat_hidden, out.detach(), x.grad, row_weights.grad)


def assert_rows_equal(bits: Bits, rows: torch.Tensor, expected: Bits, expected_rows: torch.Tensor) -> None:
    for name in ("hidden", "out", "grad_x", "grad_weight"):
        assert torch.equal(getattr(bits, name)[rows], getattr(expected, name)[expected_rows]), name


@pytest.fixture(params=CASES, ids=str)
def case(request, make_experts) -> tuple[Experts, str]:
    """The experts and the backend."""
    backend, sizes = request.param
    experts = make_experts(45, 1, 3, *sizes)
    experts.lanes_N[:40] = 1  # more than a block of rows of one lane
    return experts, backend


def computed_rows(experts: Experts) -> torch.Tensor:
    return (experts.lanes_N >= 0).nonzero().flatten()


def test_where_the_slot_is(case):
    """Other slots, other alignment of the slots."""
    experts, backend = case
    rows, before = computed_rows(experts), compute(experts, backend)
    order = torch.tensor([2, 0, 3, 1], device=rows.device)  # new slot → old slot
    for padding in (1, 3, 16):
        moved = replace(
            experts,
            gate_up_SNH=in_slots(experts.gate_up_SNH[order], padding),
            down_SHI=in_slots(experts.down_SHI[order], padding),
            lane_to_slot_L=order.argsort()[experts.lane_to_slot_L.long()].to(torch.int32),
        )
        assert_rows_equal(compute(moved, backend), rows, before, rows)


def test_which_lane_and_which_replica(case):
    """Lane 1 becomes lane 0 or lane 3, from row to row: two replicas of one expert, in two slots."""
    experts, backend = case
    rows, before = computed_rows(experts), compute(experts, backend)
    slots = experts.gate_up_SNH.shape[0]
    gate_up, down = experts.gate_up_SNH, experts.down_SHI
    source = experts.lane_to_slot_L[1].long()
    lane_to_slot = torch.cat([experts.lane_to_slot_L, experts.lane_to_slot_L.new_tensor([slots])])[[1, 0, 2, 3]]
    lanes = experts.lanes_N.clone()
    lanes[experts.lanes_N == 0] = 1
    of_expert = (experts.lanes_N == 1).nonzero().flatten()
    lanes[of_expert] = torch.where(torch.arange(of_expert.numel(), device=lanes.device) % 3 == 0, 3, 0).to(torch.int32)
    replicated = replace(
        experts,
        gate_up_SNH=in_slots(torch.cat([gate_up, gate_up[source][None]])),
        down_SHI=in_slots(torch.cat([down, down[source][None]])),
        lane_to_slot_L=lane_to_slot,
        lanes_N=lanes,
    )
    assert_rows_equal(compute(replicated, backend), rows, before, rows)


def test_order_of_the_rows(case):
    experts, backend = case
    rows, before = computed_rows(experts), compute(experts, backend)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(3)).to(rows.device)
    permuted = replace(
        experts,
        x_RH=experts.x_RH[order],
        lanes_N=experts.lanes_N[order],
        row_weights_N=experts.row_weights_N[order],
    )
    assert_rows_equal(compute(permuted, backend), order.argsort()[rows], before, rows)


@pytest.mark.parametrize("kept", [1, 2, 17, 31])
def test_company_of_other_rows(case, kept):
    """The same rows alone; so their lane has another number of rows, and they stand elsewhere in a tile."""
    experts, backend = case
    before = compute(experts, backend)
    rows = torch.randperm(45, generator=torch.Generator().manual_seed(kept))[:kept].to(experts.lanes_N.device)
    rows = rows[experts.lanes_N[rows] >= 0]
    alone = replace(
        experts, x_RH=experts.x_RH[rows], lanes_N=experts.lanes_N[rows], row_weights_N=experts.row_weights_N[rows]
    )
    everything = torch.arange(rows.numel(), device=rows.device)
    assert_rows_equal(compute(alone, backend), everything, before, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(make_experts, backend, dtype):
    experts = make_experts(45, 1, 3, 66, 34, dtype=dtype)
    before = compute(experts, backend)
    rows = computed_rows(experts)[::3]
    alone = replace(
        experts, x_RH=experts.x_RH[rows], lanes_N=experts.lanes_N[rows], row_weights_N=experts.row_weights_N[rows]
    )
    assert_rows_equal(compute(alone, backend), torch.arange(rows.numel(), device=rows.device), before, rows)


def test_a_nan_stays_in_its_row(case):
    experts, backend = case
    before = compute(experts, backend)
    x = experts.x_RH.clone()
    x[[0, 44]] = float("nan")
    rows = computed_rows(experts)
    rows = rows[(rows != 0) & (rows != 44)]
    assert_rows_equal(compute(replace(experts, x_RH=x), backend), rows, before, rows)


@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.sigmoid])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_reference_computes_equal_rows_equally(function, threads):
    """PyTorch's own loop gives the last elements of a thread's part other bits than the rest (here from 3 threads on)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        row = torch.randn(2503, generator=torch.Generator().manual_seed(0))
        block = elementwise(function, row.expand(ROWS, -1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(block, block[:1].expand(ROWS, -1))
