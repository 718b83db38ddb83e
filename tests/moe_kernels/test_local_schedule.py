"""Choice and schedule in one, against the two ops' references."""

from dataclasses import replace

import pytest
import torch

from moe_kernels import LoadCounter, ReplicaTable, local_schedule
from moe_kernels.base import scan
from moe_kernels.local_schedule import FEW_ROWS, MANY_ROWS, MOST_LANES, local_schedule_triton
from moe_kernels.replicas.replicas import select_replicas_torch
from moe_kernels.tiles.schedule import build_schedule_torch

FIELDS = ("order_N", "offsets_L1", "tile_lane", "tile_start", "tile_end", "num_tiles")


def make(device, num_experts, num_lanes, seed=0, increment=1):
    random = torch.Generator().manual_seed(seed)
    lanes_E = torch.randperm(num_lanes, generator=random)[:num_experts].int().to(device)
    load_E = torch.randint(0, 10**12, (num_experts,), generator=random).to(device)
    increment_1 = None if increment is None else torch.tensor([increment], device=device)
    slots_L = torch.arange(num_lanes, dtype=torch.int32, device=device)
    return ReplicaTable(lanes_E, slots_L), LoadCounter(load_E, increment_1)


def check(ids_TK, table, load, num_lanes, block_m=16, extra_m=0):
    mine, theirs = (replace(load, load_E=load.load_E.clone()) for _ in range(2))
    sizes = {"block_m": block_m, "extra_m": extra_m}
    lanes_TK, schedule = local_schedule_triton(ids_TK, table, mine, num_lanes=num_lanes, **sizes, with_places=True)
    expected_TK, counts_L = select_replicas_torch(ids_TK, table, theirs, 0, num_lanes=num_lanes)
    expected = build_schedule_torch(expected_TK.view(-1), counts_L, **sizes)
    assert torch.equal(lanes_TK, expected_TK)
    for name in FIELDS:
        assert torch.equal(getattr(schedule, name), getattr(expected, name)), name
    places_N = torch.empty_like(expected.order_N)
    places_N[expected.order_N.long()] = torch.arange(ids_TK.numel(), dtype=torch.int32, device=ids_TK.device)
    assert torch.equal(schedule.places_N, places_N)
    assert torch.equal(mine.load_E, theirs.load_E)


CASES = [  # tokens, top-k, experts, lanes
    (0, 2, 5, 5),
    (1, 1, 1, 1),
    (2, 2, 2, 4),
    (64, 8, 16, 16),
    (65, 6, 33, 40),
    (FEW_ROWS // 8, 8, 12, 12),
    (FEW_ROWS // 8 + 1, 8, 9, 11),  # more than few
    pytest.param(100, 6, 257, 300, marks=pytest.mark.gpu),  # slow, where interpreted
]


@pytest.mark.parametrize("extra_m", [0, 8])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "lanes"), CASES)
def test_it_is_the_two_ops(device, tokens, top_k, experts, lanes, extra_m):
    table, load = make(device, experts, lanes)
    ids = torch.randint(-1, experts + 2, (tokens, top_k), dtype=torch.int32, device=device)  # also what names no expert
    check(ids, table, load, lanes, extra_m=extra_m)


@pytest.mark.parametrize("extra_m", [0, 8])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "lanes"), CASES[1:])
def test_many_rows_are(small_chunks, device, tokens, top_k, experts, lanes, extra_m):
    """Three launches, the last of them with a program for each expert's tiles."""
    test_it_is_the_two_ops(device, tokens, top_k, experts, lanes, extra_m)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [MANY_ROWS - 8, MANY_ROWS, MANY_ROWS + 8 * 123])
def test_as_many_as_are_many(rows):
    test_it_is_the_two_ops(torch.device("cuda"), rows // 8, 8, 128, 130, 8)


@pytest.mark.parametrize("many", [False, True])
def test_one_expert_has_all_and_others_none(request, device, many):
    if many:
        request.getfixturevalue("small_chunks")
    table, load = make(device, 40, 48)
    check(torch.full((90, 3), 17, dtype=torch.int32, device=device), table, load, 48, extra_m=4)
    check(torch.full((90, 3), -1, dtype=torch.int32, device=device), table, load, 48, extra_m=4)


@pytest.mark.parametrize("increment", [None, 0, 3])
@pytest.mark.parametrize("many", [False, True])
def test_load_is_recorded_as_it_is_said(request, device, increment, many):
    if many:
        request.getfixturevalue("small_chunks")
    table, load = make(device, 9, 9, increment=increment)
    check(torch.randint(0, 9, (50, 2), dtype=torch.int32, device=device), table, load, 9)


def test_example(device):
    """The one of `_schedule_few_kernel`."""
    table = ReplicaTable(*(torch.tensor(lanes, dtype=torch.int32, device=device) for lanes in ([1, 0], [0, 1])))
    load = LoadCounter(
        torch.zeros(2, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.int64, device=device)
    )
    ids = torch.tensor([[0, 1, 7, 0]], dtype=torch.int32, device=device)
    lanes_TK, schedule = local_schedule_triton(ids, table, load, num_lanes=2, block_m=16, extra_m=0)
    assert lanes_TK.tolist() == [[1, 0, -1, 1]] and load.load_E.tolist() == [2, 1]
    assert [getattr(schedule, name).tolist() for name in FIELDS] == [
        [1, 0, 3, 2],
        [0, 1, 3],
        [0, 1],
        [0, 1],
        [1, 3],
        [2],
    ]


def test_the_few_are_one_step():
    assert scan.scan_options(FEW_ROWS)["BLOCK"] == FEW_ROWS < MANY_ROWS


@pytest.mark.gpu
@pytest.mark.parametrize("lanes", [MOST_LANES, MOST_LANES + 1])
def test_very_many_lanes(lanes):
    test_it_is_the_two_ops(torch.device("cuda"), MANY_ROWS // 8, 8, 300, lanes, 0)


def test_more_lanes_than_a_program_can_look_up_are_two_ops(small_chunks, device, monkeypatch):
    monkeypatch.setattr(local_schedule, "MOST_LANES", 40)
    monkeypatch.setattr(local_schedule, "FEW_ROWS", 16)
    for lanes in (40, 41):
        test_it_is_the_two_ops(device, 60, 2, 33, lanes, 4)
