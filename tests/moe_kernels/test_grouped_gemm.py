"""Both grouped GEMMs against a dense formula in float64, by both backends."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_kernels import ExpertMatrices, build_schedule, expert_down, expert_up, gemm_config
from moe_kernels.gemms.expert_down import _expert_down
from moe_kernels.gemms.expert_up import _expert_up
from moe_kernels.tiles.row_blocks import padded_matrix
from tests.moe_kernels.conftest import counts_of

ACTIVATION = {"silu": F.silu, "gelu": F.gelu}

# sources, fanout, lanes, hidden_size, intermediate
SHAPES = {
    "no rows": (0, 2, 3, 16, 16),
    "one row, one lane, K = 1": (1, 1, 1, 16, 16),
    "sizes of one": (3, 1, 2, 1, 1),
    "odd sizes": (5, 3, 4, 37, 29),
    "sizes of one block": (9, 2, 2, 64, 64),
    "several blocks": (6, 2, 3, 130, 100),
    "several tiles of a lane, empty lanes": (70, 1, 9, 24, 40),
}


def schedule_of(experts, backend, rows=1):
    config = gemm_config(64, 64, experts.x_RH.dtype, rows, 1, 1)
    schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=config.block_m, backend=backend)
    return schedule, config


def dense_up(experts, schedule, x, gate_up, activation="silu"):
    """float64, in sorted order, of the scheduled rows only."""
    flat = schedule.order_N[: schedule.offsets_L1[-1]].long()
    slot = experts.lane_to_slot_L.long()[experts.lanes_N[flat].long()]
    product = torch.einsum("nih,nh->ni", gate_up[slot], x[flat // experts.fanout])
    gate, up = product.chunk(2, dim=1)
    return ACTIVATION[activation](gate) * up


def dense_down(experts, schedule, hidden, down, row_weights):
    """float64, in sorted order, of the scheduled rows only."""
    flat = schedule.order_N[: schedule.offsets_L1[-1]].long()
    slot = experts.lane_to_slot_L.long()[experts.lanes_N[flat].long()]
    return torch.einsum("nhi,ni->nh", down[slot], hidden[: flat.numel()]) * row_weights[flat, None]


def down_inputs(experts):
    """hidden [N, I]; what the schedule does not cover holds NaN, as after `expert_up`."""
    rows, intermediate = experts.lanes_N.numel(), experts.down_SHI.shape[2]
    hidden = torch.randn((rows, intermediate), generator=torch.Generator().manual_seed(5))
    hidden[int((experts.lanes_N >= 0).sum()) :] = float("nan")
    return hidden.to(experts.x_RH.device, experts.x_RH.dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_up(make_experts, assert_close, shape, dtype, backend):
    experts = make_experts(*shape, dtype=dtype)
    schedule, config = schedule_of(experts, backend)
    hidden = expert_up(
        experts.x_RH,
        experts.matrices,
        experts.lane_to_slot_L,
        schedule,
        fanout=experts.fanout,
        config=config,
        backend=backend,
    )
    expected = dense_up(experts, schedule, experts.x_RH.double(), experts.gate_up_SNH.double())
    assert hidden.dtype == dtype and hidden.shape == (experts.lanes_N.numel(), shape[4])
    assert_close(hidden[: expected.shape[0]], expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_down(make_experts, assert_close, shape, dtype, backend):
    experts = make_experts(*shape, dtype=dtype)
    schedule, config = schedule_of(experts, backend)
    hidden = down_inputs(experts)
    rows = expert_down(
        hidden,
        experts.matrices,
        experts.lane_to_slot_L,
        schedule,
        experts.row_weights_N,
        config=config,
        backend=backend,
    )
    expected = dense_down(experts, schedule, hidden.double(), experts.down_SHI.double(), experts.row_weights_N.double())
    assert rows.dtype == dtype and rows.shape == (experts.lanes_N.numel(), shape[3])
    assert_close(rows[schedule.order_N[: expected.shape[0]].long()], expected)


@pytest.mark.parametrize("rows", [1, 32, 64, 1000])  # every tile of the table
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_shape(make_experts, assert_close, dtype, rows):
    experts = make_experts(21, 1, 2, 70, 66, dtype=dtype)
    schedule, config = schedule_of(experts, "triton", rows)
    hidden = expert_up(
        experts.x_RH,
        replace(experts.matrices, activation="gelu"),
        experts.lane_to_slot_L,
        schedule,
        fanout=1,
        config=replace(config, group_m=1),
        backend="triton",
    )
    expected = dense_up(experts, schedule, experts.x_RH.double(), experts.gate_up_SNH.double(), "gelu")
    assert_close(hidden[: expected.shape[0]], expected)
    weights = (experts.lane_to_slot_L, schedule, experts.row_weights_N)
    out = expert_down(hidden, experts.matrices, *weights, config=config, backend="triton")
    expected = dense_down(experts, schedule, hidden.double(), experts.down_SHI.double(), experts.row_weights_N.double())
    assert_close(out[schedule.order_N[: expected.shape[0]].long()], expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_slots_beyond_32_bit_offsets(device, assert_close, backend):
    """Slot 2 begins 2**31 + 2**21 elements after slot 0, though the distance of slots fits into 32 bits (4 GiB; on a CPU
    only what is touched takes memory)."""
    distance = 2**30 + 2**20
    if device == "cpu":
        storage = torch.from_numpy(np.empty(2 * distance + 2**20, dtype=np.float16))
    else:
        storage = torch.empty(2 * distance + 2**20, dtype=torch.float16, device=device)
    gate_up = storage.as_strided((3, 32, 16), (distance, 16, 1))
    down = storage[2**16 :].as_strided((3, 16, 16), (distance, 16, 1))
    for weights in (gate_up, down):
        weights[2] = torch.randn(weights.shape[1:], generator=torch.Generator().manual_seed(0)).to(device) / 4
    x = torch.randn((3, 16), generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    lane_to_slot = torch.tensor([2], dtype=torch.int32, device=device)
    config = gemm_config(32, 16, torch.float16, 3, 1, 1)
    lanes = torch.zeros(3, dtype=torch.int32, device=device)
    schedule = build_schedule(lanes, counts_of(lanes, 1), block_m=config.block_m, backend=backend)
    matrices = ExpertMatrices(gate_up, down)
    hidden = expert_up(x, matrices, lane_to_slot, schedule, fanout=1, config=config, backend=backend)
    gate, up = F.linear(x.double(), gate_up[2].double()).chunk(2, dim=1)
    assert_close(hidden, F.silu(gate) * up)
    ones = torch.ones(3, device=device)
    rows = expert_down(hidden, matrices, lane_to_slot, schedule, ones, config=config, backend=backend)
    assert_close(rows, F.linear(hidden.double(), down[2].double()))


def test_rows_may_be_padded(make_experts, assert_close):
    experts = make_experts(5, 2, 3, 16, 16)
    wide = torch.full((5, 20), float("nan"), device=experts.x_RH.device)
    wide[:, :16] = experts.x_RH
    for backend in ("torch", "triton"):
        schedule, config = schedule_of(experts, backend)
        hidden = expert_up(
            wide[:, :16],
            experts.matrices,
            experts.lane_to_slot_L,
            schedule,
            fanout=2,
            config=config,
            backend=backend,
        )
        expected = dense_up(experts, schedule, experts.x_RH.double(), experts.gate_up_SNH.double())
        assert_close(hidden[: expected.shape[0]], expected)


def test_the_reference_aligns_what_the_pool_did_not():
    storage = torch.randn(16 * 16 + 1)
    aligned, shifted = storage[:256].view(16, 16), storage[1:].view(16, 16)
    assert padded_matrix(aligned).data_ptr() == aligned.data_ptr()  # no copy
    assert padded_matrix(shifted).data_ptr() % 64 == 0
    assert torch.equal(padded_matrix(shifted), shifted)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(make_experts, backend):
    experts = make_experts(5, 2, 3, 10, 6)
    experts.lanes_N.clamp_(min=0)  # undefined rows would compare as unequal
    schedule, config = schedule_of(experts, backend)
    slots = (experts.matrices, experts.lane_to_slot_L, schedule)
    plain = (None, torch.float32, *slots)
    torch.library.opcheck(_expert_up.registered, _expert_up.flatten(experts.x_RH, *plain, 2, config, backend))
    hidden = down_inputs(experts).nan_to_num()
    torch.library.opcheck(
        _expert_down.registered, _expert_down.flatten(hidden, *plain, experts.row_weights_N, config, backend)
    )


def good_up():
    schedule = build_schedule(torch.zeros(4, dtype=torch.int32), torch.tensor([4, 0], dtype=torch.int32), block_m=16)
    return {
        "x_RH": torch.zeros((2, 8)),
        "matrices": ExpertMatrices(torch.zeros((3, 12, 8)), torch.zeros((3, 8, 6))),
        "lane_to_slot_L": torch.zeros(2, dtype=torch.int32),
        "schedule": schedule,
        "fanout": 2,
        "config": gemm_config(12, 8, torch.float32, 1, 1, 1),
    }


def changed(arguments, change):
    """`arguments` with others, or with other fields of the matrices."""
    fields = {name: value for name, value in change.items() if name not in (*arguments, "backend")}
    arguments = arguments | {"matrices": replace(arguments["matrices"], **fields)}
    return arguments | {name: value for name, value in change.items() if name not in fields}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_RH", {"x_RH": torch.zeros((2, 8), dtype=torch.float64)}),
        ("x_RH", {"x_RH": torch.zeros((8, 2)).T}),
        ("gate_up_SNH", {"gate_up_SNH": torch.zeros((3, 12, 9))}),
        ("gate_up_SNH", {"gate_up_SNH": torch.zeros((3, 12, 8), dtype=torch.float16)}),
        ("gate_up_SNH", {"gate_up_SNH": torch.zeros((3, 8, 12)).transpose(1, 2)}),
        ("gate_up_SNH", {"gate_up_SNH": torch.zeros((3, 11, 8))}),
        ("gate_up_SNH", {"gate_up_SNH": torch.zeros((3, 0, 8))}),
        ("down_SHI", {"down_SHI": torch.zeros((3, 9, 6))}),
        ("lane_to_slot_L", {"lane_to_slot_L": torch.zeros(3, dtype=torch.int32)}),
        ("schedule.order_N", {"fanout": 3}),
        ("fanout", {"fanout": 0}),
        ("activation", {"activation": "relu"}),
        ("config.block_m", {"config": gemm_config(12, 8, torch.bfloat16, 10**6, 1, 1)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_up_refuses(name, change):
    with pytest.raises(ValueError, match=name):
        expert_up(**changed(good_up(), change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden_NI", {"hidden_NI": torch.zeros((4, 6), dtype=torch.int32)}),
        ("down_SHI", {"down_SHI": torch.zeros((3, 8, 7))}),
        ("down_SHI", {"down_SHI": torch.zeros((3, 16, 6))[:, ::2]}),
        ("row_weights_N", {"row_weights_N": torch.zeros(4, dtype=torch.bfloat16)}),
        ("row_weights_N", {"row_weights_N": torch.zeros(5)}),
        ("schedule.order_N", {"hidden_NI": torch.zeros((5, 6))}),
        ("config.block_m", {"config": gemm_config(12, 8, torch.bfloat16, 10**6, 1, 1)}),
    ],
)
def test_down_refuses(name, change):
    good = {name: value for name, value in good_up().items() if name not in ("x_RH", "fanout")}
    good |= {"hidden_NI": torch.zeros((4, 6)), "row_weights_N": torch.zeros(4)}
    with pytest.raises(ValueError, match=name):
        expert_down(**changed(good, change))
