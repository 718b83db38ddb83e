from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_kernels import GemmConfig, TileSchedule, build_schedule
from moe_kernels.base.scan import MANY_KEYS, chunk_options, count_chunks
from moe_kernels.tiles.schedule import _build_schedule
from moe_kernels.tiles.schedule_triton import _build_schedule_kernel, _place_rows_kernel
from moe_kernels.tiles.tiles import max_tiles
from tests.moe_kernels.conftest import counts_of, few_if_interpreted

FIELDS = ("order_N", "offsets_L1", "tile_lane", "tile_start", "tile_end", "num_tiles")


def build(lanes, num_lanes, block_m=16, device="cpu", backend="torch", extra_m=0) -> TileSchedule:
    lanes_N = torch.tensor(lanes, dtype=torch.int32, device=device)
    return build_schedule(lanes_N, counts_of(lanes_N, num_lanes), block_m=block_m, extra_m=extra_m, backend=backend)


def as_lists(schedule: TileSchedule) -> dict[str, list[int]]:
    return {name: getattr(schedule, name).tolist() for name in FIELDS}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_example_of_few_rows(device, backend):
    assert as_lists(build([1, 0, -1, 1], 2, 16, device, backend)) == {
        "order_N": [1, 0, 3, 2],
        "offsets_L1": [0, 1, 3],
        "tile_lane": [0, 1],
        "tile_start": [0, 1],
        "tile_end": [1, 3],
        "num_tiles": [2],
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_example_of_several_tiles(device, backend):
    schedule = as_lists(build([0] * 20 + [2] * 5 + [-1] * 2, 3, 16, device, backend))
    assert schedule["offsets_L1"] == [0, 20, 20, 25]
    assert schedule["num_tiles"] == [3]
    assert schedule["tile_lane"] == [0, 0, 2, -1]
    assert schedule["tile_start"] == [0, 16, 20, -1]
    assert schedule["tile_end"] == [16, 20, 25, -1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_example_of_extra_rows(device, backend):
    """Of 20 rows, 4 are left after one tile of 16, of 21 5; of 3 there is one tile; 36 make two, the last of 20.

    The lanes with a longer tile come first.
    """
    lanes = [0] * 20 + [1] * 21 + [2] * 3 + [4] * 36
    schedule = as_lists(build(lanes, 5, 16, device, backend, extra_m=4))
    used = schedule["num_tiles"][0]
    assert schedule["tile_lane"][:used] == [0, 4, 4, 1, 1, 2]
    assert schedule["tile_start"][:used] == [0, 44, 60, 20, 36, 41]
    assert schedule["tile_end"][:used] == [20, 60, 80, 36, 41, 44]


@given(
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.lists(st.integers(-1, n - 1), max_size=90), st.just(n))),
    st.integers(0, 16),
)
def test_invariants(case, extra_m):
    lanes, num_lanes = case
    schedule = build(lanes, num_lanes, extra_m=extra_m)
    order, offsets = schedule.order_N.tolist(), schedule.offsets_L1.tolist()
    assert sorted(order) == list(range(len(lanes)))  # every row once
    assert order == sorted(order, key=lambda row: lanes[row] % (num_lanes + 1))  # those of no lane last
    in_tiles = []
    for tile in range(schedule.num_tiles.item()):
        lane, start, end = (getattr(schedule, name)[tile].item() for name in FIELDS[2:5])
        left = offsets[lane + 1] - start
        assert end - start == (left if left <= 16 + extra_m else 16)
        rows = order[start:end]
        assert rows and all(lanes[row] == lane for row in rows)  # a tile never spans lanes
        in_tiles += rows
    computed = [row for row, lane in enumerate(lanes) if lane >= 0]
    assert sorted(in_tiles) == computed
    assert sorted(in_tiles, key=lambda row: lanes[row]) == sorted(computed, key=lambda row: (lanes[row], row))  # stable
    assert schedule.num_tiles.item() <= max_tiles(len(lanes), num_lanes, 16) == schedule.tile_lane.numel()


@given(st.integers(0, 200), st.integers(1, 9), st.sampled_from([8, 16, 64]))
def test_max_tiles_is_reached_and_never_passed(rows, num_lanes, block_m):
    """The worst case: one row in every lane but the first, which has the rest."""
    lanes = list(range(1, num_lanes))[: max(rows - 1, 0)]
    lanes += [0] * (rows - len(lanes))
    assert build(lanes, num_lanes, block_m).num_tiles.item() == max_tiles(rows, num_lanes, block_m)


@pytest.mark.parametrize("size", ["small_blocks", "small_chunks"])
@pytest.mark.parametrize(
    ("lanes", "num_lanes"),
    [
        ([], 4),  # no rows
        ([0], 1),
        ([-1] * 5, 3),  # nothing to compute
        ([2] * 700, 5),  # one lane takes all
        ([1] * 700 + [-1] * 900 + [0], 2),  # more tiles, used and unused, than are written at once
        ([9, 0, 1, 9], 2),  # a lane that does not exist is not computed
    ],
)
def test_kernel_equals_reference_at_the_edges(request, size, device, lanes, num_lanes):
    request.getfixturevalue(size)
    expected = as_lists(build(lanes, num_lanes, 16, device, "torch"))
    assert as_lists(build(lanes, num_lanes, 16, device, "triton")) == expected


def assert_kernel_equals_reference(rows, num_lanes, block_m, seed, device, extra_m=0):
    lanes = torch.randint(-1, num_lanes, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    extra_m = min(extra_m, block_m)
    expected = as_lists(build(lanes, num_lanes, block_m, device, "torch", extra_m))
    assert as_lists(build(lanes, num_lanes, block_m, device, "triton", extra_m)) == expected


shapes = {
    "rows": st.integers(0, 150),
    "num_lanes": st.integers(1, 10),
    "block_m": st.sampled_from([8, 16, 128]),
    "extra_m": st.sampled_from([0, 8, 16]),
}


@few_if_interpreted
@given(**shapes, seed=st.integers(0, 9))
def test_kernel_equals_reference(device, rows, num_lanes, block_m, extra_m, seed):
    assert_kernel_equals_reference(rows, num_lanes, block_m, seed, device, extra_m)


@few_if_interpreted
@given(**shapes, seed=st.integers(0, 9))
def test_kernel_equals_reference_over_several_blocks(small_blocks, device, rows, num_lanes, block_m, extra_m, seed):
    assert_kernel_equals_reference(rows, num_lanes, block_m, seed, device, extra_m)


@few_if_interpreted
@given(**shapes, seed=st.integers(0, 9))
def test_kernel_equals_reference_over_several_chunks(small_chunks, device, rows, num_lanes, block_m, extra_m, seed):
    assert_kernel_equals_reference(rows, num_lanes, block_m, seed, device, extra_m)


# Up to one full block of each size, two; in chunks.
@pytest.mark.parametrize(
    "rows",
    [
        600,
        2047,
        8192,
        8193,
        MANY_KEYS - 1,
        *(pytest.param(n, marks=pytest.mark.gpu) for n in (MANY_KEYS, MANY_KEYS + 1234)),
    ],
)
def test_kernel_equals_reference_for_many_rows(device, rows):
    assert_kernel_equals_reference(rows, 3, 16, 0, device)


@pytest.mark.parametrize(("many", "extra_m"), [(False, 0), (False, 8), (True, 0)])
@pytest.mark.parametrize("counts", [[0, 0, 0], [90, -90, 7], [-50, 0, 0], [5, 70, 900], [2**29] * 3])
def test_wrong_counts_write_nothing_out_of_bounds(small_chunks, device, counts, many, extra_m):
    lanes = torch.randint(-1, 3, (100,), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(device)
    wrong = torch.tensor(counts, dtype=torch.int32, device=device)
    guard, most = 1000, max_tiles(100, 3, 16)
    outputs = {size: torch.full((size + 2 * guard,), 77, dtype=torch.int32, device=device) for size in (100, 4, most)}
    order, offsets, tile_lane = (whole[guard:-guard] for whole in outputs.values())
    places_whole = torch.full_like(outputs[100], 77)
    places = places_whole[guard:-guard]
    start_whole, end_whole = torch.full_like(outputs[most], 77), torch.full_like(outputs[most], 77)
    num_tiles = torch.zeros(1, dtype=torch.int32, device=device)
    chunks = count_chunks(lanes, 3) if many else None
    num_chunks = chunks.shape[1] if many else 0
    _build_schedule_kernel[(4,)](
        *(
            lanes,
            wrong,
            chunks,
            order,
            places,
            offsets,
            tile_lane,
            start_whole[guard:-guard],
            end_whole[guard:-guard],
            num_tiles,
        ),
        *(100, num_chunks, 3, most),
        BLOCK_M=16,
        EXTRA_M=extra_m,
        BLOCK=256,
        ROWS=2,
        BLOCK_L=4,
    )
    if many:
        _place_rows_kernel[(num_chunks,)](lanes, offsets, chunks, order, places, 100, 3, **chunk_options())
    for whole in (*outputs.values(), places_whole, start_whole, end_whole):
        assert (whole[:guard] == 77).all() and (whole[-guard:] == 77).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(device, backend):
    lanes, counts = (torch.tensor(values, dtype=torch.int32, device=device) for values in ([1, 0, -1, 1], [1, 2, 0]))
    torch.library.opcheck(_build_schedule.registered, (lanes, counts, 16, 8, backend))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lanes_N", {"lanes_N": torch.zeros(3)}),
        ("lanes_N", {"lanes_N": torch.zeros((3, 1), dtype=torch.int32)}),
        ("counts_L", {"counts_L": torch.zeros(2)}),
        ("counts_L", {"counts_L": torch.zeros(0, dtype=torch.int32)}),
        ("block_m", {"block_m": 4}),
        ("block_m", {"block_m": 48}),
        ("extra_m", {"extra_m": -1}),
        ("extra_m", {"extra_m": 17}),
    ],
)
def test_refused(name, change):
    good = {"lanes_N": torch.zeros(3, dtype=torch.int32), "counts_L": torch.zeros(2, dtype=torch.int32), "block_m": 16}
    with pytest.raises(ValueError, match=name):
        build_schedule(**(good | change))


@pytest.mark.parametrize("change", [{"block_m": 128}, {"block_m": 512}, {"extra_m": 0}, {"extra_m": 128}])
def test_a_config_must_be_the_schedules(change):
    schedule = build([0, 1], 2, block_m=256, extra_m=64)
    config = GemmConfig(256, 128, 64, num_warps=4, num_stages=3, tma=True, extra_m=64)
    schedule.check_config(config)
    with pytest.raises(ValueError, match=f"config.(schedule_)?{next(iter(change))}"):
        schedule.check_config(replace(config, **change))


def test_with_tiles_by_lane_a_schedule_has_no_extra_rows():
    config = GemmConfig(256, 128, 64, num_warps=4, num_stages=3, tma=True, extra_m=64, by_lane=True)
    build([0, 1], 2, block_m=256).check_config(config)
    with pytest.raises(ValueError, match=r"config\.schedule_extra_m=0: must be the schedule's, 64"):
        build([0, 1], 2, block_m=256, extra_m=64).check_config(config)
