"""Every variant of the grouped GEMMs: right on any shape, and equal bit for bit where I5 needs it."""

from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import (
    GemmConfig,
    build_schedule,
    expert_down,
    expert_down_torch,
    expert_up,
    expert_up_torch,
    gemm_configs,
    has_tma,
)
from moe_kernels.gemms import expert_up_tma
from moe_kernels.gemms.combine import combine_triton
from moe_kernels.gemms.expert_down_triton import expert_down_triton
from moe_kernels.operands.config import _TABLE_TMA
from moe_kernels.tiles.schedule_triton import build_schedule_triton

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not has_tma(torch.device("cuda")), reason="needs a GPU with has_tma(), or none"
)

NARROW = GemmConfig(16, 128, 64, 4, 3, tma=True, swap=True)
MIDDLE = GemmConfig(64, 128, 64, 4, 3, group_m=2, tma=True)
WIDE = GemmConfig(128, 128, 64, 8, 3, tma=True, tail_m=64)
MERGED = replace(WIDE, extra_m=64)
PERSISTENT = GemmConfig(64, 128, 64, 4, 3, group_m=3, tma=True, programs_per_sm=1)
BY_LANE = replace(MERGED, group_m=2, by_lane=True)
VARIANTS = {
    "16 rows, swapped": NARROW,
    "32 rows, swapped": replace(NARROW, block_m=32),
    "64 rows": MIDDLE,
    "128 rows, tails": WIDE,
    "128 rows and more": MERGED,
    "persistent": PERSISTENT,
    "by lane": BY_LANE,
    "pairs": replace(MERGED, pairs=1),
    "pairs by lane": replace(BY_LANE, pairs=4096),
    "persistent pairs": replace(PERSISTENT, pairs=1),
    "persistent by lane": replace(PERSISTENT, group_m=2, by_lane=True),
    "portable": replace(MIDDLE, block_m=32, tma=False),
}


def routed(experts, name, lanes_N):
    """`experts` with other lanes."""
    experts.lanes_N = {
        "random": lanes_N,
        "all rows to one lane": torch.full_like(lanes_N, experts.lane_to_slot_L.numel() - 1),
        "no rows": torch.full_like(lanes_N, -1),
    }[name]
    return experts


def run(experts, config, backend="triton", activation="silu"):
    """Rows by a configuration; of pairs by a second launch, as the first of a kernel has no clusters."""
    if config.pairs and torch.cuda.is_available():
        first, second = (run_once(experts, config, backend, activation) for _ in range(2))
        assert all(map(torch.equal, first, second))
        return second
    return run_once(experts, config, backend, activation)


def run_once(experts, config, backend, activation):
    schedule = build_schedule(
        experts.lanes_N, experts.counts_L, block_m=config.block_m, extra_m=config.schedule_extra_m, backend=backend
    )
    matrices = replace(experts.matrices, activation=activation)
    up_config = replace(config, programs_per_sm=0)
    hidden = expert_up(
        experts.x_RH,
        matrices,
        experts.lane_to_slot_L,
        schedule,
        fanout=experts.fanout,
        config=up_config,
        backend=backend,
    )
    rows = expert_down(
        hidden,
        matrices,
        experts.lane_to_slot_L,
        schedule,
        experts.row_weights_N,
        config=config,
        backend=backend,
    )
    return hidden[: int(schedule.offsets_L1[-1])], rows[experts.lanes_N >= 0]


@pytest.mark.parametrize("lanes", ["random", "all rows to one lane", "no rows"])
@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=8)
@given(
    sources=st.integers(0, 90),
    fanout=st.integers(1, 3),
    num_lanes=st.integers(1, 6),
    hidden_size=st.integers(1, 26).map(lambda eighths: 8 * eighths),
    intermediate=st.integers(1, 20).map(lambda eighths: 8 * eighths),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    activation=st.sampled_from(["silu", "gelu"]),
    seed=st.integers(0, 100),
)
def test_variant_computes_what_the_reference_computes(
    make_experts,
    assert_close,
    name,
    lanes,
    sources,
    fanout,
    num_lanes,
    hidden_size,
    intermediate,
    dtype,
    activation,
    seed,
):
    experts = make_experts(sources, fanout, num_lanes, hidden_size, intermediate, dtype, seed)
    experts = routed(experts, lanes, experts.lanes_N)
    hidden, rows = run(experts, VARIANTS[name], activation=activation)
    expected_hidden, expected_rows = run(experts, VARIANTS[name], backend="torch", activation=activation)
    assert_close(hidden, expected_hidden)
    assert_close(rows, expected_rows, scale=2)


@pytest.mark.parametrize(
    "shape", [(70, 2, 3, 192, 96), (300, 1, 2, 320, 136), (33, 4, 9, 64, 640)], ids=["small", "tails", "short inner"]
)
def test_tma_variants_have_equal_bits(make_experts, shape):
    """So block sizes, swapping, tails and persistence may be chosen by what differs between ranks, if ever needed."""
    experts = make_experts(*shape, torch.bfloat16)
    expected = run(experts, NARROW)
    for name in [name for name in VARIANTS if name not in ("16 rows, swapped", "portable")]:
        for actual, wanted in zip(run(experts, VARIANTS[name]), expected, strict=True):
            assert torch.equal(actual, wanted), name


@pytest.mark.parametrize("lanes", ["random", "all rows to one lane", "no rows"])
@pytest.mark.parametrize("shape", [(70, 2, 3, 192, 96), (300, 1, 2, 320, 136), (40, 3, 5, 72, 8)])
def test_rows_where_they_are_sorted_are_those_of_flat_places(make_experts, shape, lanes):
    """`expert_down` stores them by TMA where the schedule has places, and a token's sum finds them there."""
    experts = make_experts(*shape, torch.bfloat16)
    experts = routed(experts, lanes, experts.lanes_N)
    fanout = experts.fanout

    def down(with_places):
        tiles = {"block_m": PERSISTENT.block_m, "extra_m": 0}
        schedule = build_schedule_triton(experts.lanes_N, experts.counts_L, **tiles, with_places=with_places)
        hidden_NI = experts.x_RH.new_ones((len(experts.lanes_N), shape[4])) * torch.arange(
            len(experts.lanes_N), device=experts.x_RH.device
        ).view(-1, 1).to(experts.x_RH.dtype)
        where = (experts.matrices, experts.lane_to_slot_L, schedule, experts.row_weights_N, PERSISTENT)
        return schedule, expert_down_triton(hidden_NI, *where)

    schedule, rows_NH = down(True)
    _, flat_NH = down(False)
    computed = experts.lanes_N >= 0
    flat_N = torch.arange(len(computed), dtype=torch.int32, device=computed.device)
    assert torch.equal(schedule.order_N[schedule.places_N.long()], flat_N)
    assert torch.equal(rows_NH[schedule.places_N.long()][computed], flat_NH[computed])
    lanes_TK = experts.lanes_N.view(-1, fanout)
    assert torch.equal(combine_triton(rows_NH, lanes_TK, schedule.places_N), combine_triton(flat_NH, lanes_TK))


SERVED = sorted({config for *_, pairs in _TABLE_TMA for pair in pairs for config in pair}, key=astuple)


@pytest.mark.parametrize("config", SERVED, ids=lambda config: "-".join(map(str, astuple(config))))
def test_served_configs_have_equal_bits_in_any_company(make_experts, config):
    """Whether a row is in a tail depends on the other rows of its expert: its bits must not."""
    experts = make_experts(200, 2, 2, 192, 136, torch.bfloat16)
    hidden, rows = run(experts, config)
    # In the interpreter, block_k decides where float64 products are rounded.
    for other in (replace(NARROW, block_k=config.block_k), replace(config, tail_m=0, extra_m=0)):
        for actual, wanted in zip(run(experts, other), (hidden, rows), strict=True):
            assert torch.equal(actual, wanted)
    # Fewer and fewer of them: the rows that are left are computed in full tiles, in tails and alone.
    for kept in (140, 70, 33, 1):
        few = replace(
            experts, lanes_N=torch.where(torch.arange(400, device=rows.device) < 2 * kept, experts.lanes_N, -1)
        )
        assert torch.equal(run(few, config)[1], rows[: int((few.lanes_N >= 0).sum())])


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 128, 256, 1024, 16384])
def test_configured_pair_on_a_ragged_shape(make_experts, assert_close, num_tokens):
    """The configurations that serving uses, both GEMMs with their own."""
    rows = min(num_tokens, 150)
    experts = make_experts(rows, 2, 5, 200, 72, torch.bfloat16)
    up, down = gemm_configs(200, 72, torch.bfloat16, num_tokens, 2, 5, tma=True)
    assert up.tma and down.tma and (up.block_m, up.schedule_extra_m) == (down.block_m, down.schedule_extra_m)
    schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=up.block_m, extra_m=up.schedule_extra_m)
    common = (experts.lane_to_slot_L, schedule)
    hidden = expert_up(experts.x_RH, experts.matrices, *common, fanout=2, config=up, backend="triton")
    actual = expert_down(hidden, experts.matrices, *common, experts.row_weights_N, config=down, backend="triton")
    expected_hidden = expert_up_torch(experts.x_RH, experts.matrices, *common, fanout=2)
    expected = expert_down_torch(expected_hidden, experts.matrices, *common, experts.row_weights_N)
    computed = experts.lanes_N >= 0
    assert_close(actual[computed], expected[computed], scale=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tma": False}, "need tma=True"),
        ({"tail_m": 32}, "tail_m=32"),
        ({"tail_m": 96}, "tail_m=96"),
        ({"tail_m": 64, "programs_per_sm": 1}, "not together"),
        ({"extra_m": 32}, "extra_m=32"),
        ({"extra_m": 128}, "extra_m=128: must be less than block_m=128"),
        ({"extra_m": 64, "tail_m": 0, "programs_per_sm": 1}, "extra_m=64: not together"),
        ({"programs_per_sm": -1}, "programs_per_sm=-1"),
        ({"tma": False, "tail_m": 0, "by_lane": True}, "by_lane needs tma=True"),
        ({"quantised": True, "tail_m": 0, "by_lane": True}, "by_lane needs tma=True and quantised=False"),
        ({"block_m": 64}, "tail_m=64: must be less than block_m=64"),
        ({"block_n": 512}, "block_n=512"),
        ({"block_n": 64, "swap": True, "tail_m": 0}, "block_n=64"),
    ],
)
def test_refuses_what_does_not_go_together(change, message):
    with pytest.raises(ValueError, match=message):
        replace(WIDE, **change)


@pytest.mark.parametrize(("built_for", "used"), [(WIDE, MERGED), (MERGED, WIDE)], ids=["without", "with"])
def test_a_schedule_of_other_extra_rows_is_refused(make_experts, built_for, used):
    experts = make_experts(9, 2, 3, 64, 32, torch.bfloat16)
    schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=128, extra_m=built_for.extra_m)
    common = (experts.lane_to_slot_L, schedule)
    message = f"config.schedule_extra_m={used.extra_m}: must be the schedule's, {built_for.extra_m}"
    with pytest.raises(ValueError, match=message):
        expert_up(experts.x_RH, experts.matrices, *common, fanout=2, config=used)
    hidden = torch.zeros(18, 32, dtype=torch.bfloat16, device=experts.x_RH.device)
    with pytest.raises(ValueError, match=message):
        expert_down(hidden, experts.matrices, *common, experts.row_weights_N, config=used)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["32 rows, swapped", "128 rows and more", "persistent by lane"])
def test_compiles_as_one_graph(make_experts, name, backend):
    """With `triton`, that is the host code of the TMA kernels: descriptors, checks of addresses, the number of programs."""
    torch.compiler.reset()
    experts, config = make_experts(9, 2, 3, 64, 32, torch.bfloat16), VARIANTS[name]
    tiles = {"block_m": config.block_m, "extra_m": config.schedule_extra_m}
    schedule = build_schedule(experts.lanes_N, experts.counts_L, **tiles, backend=backend)

    def both(x):
        common = (experts.lane_to_slot_L, schedule)
        options = {"config": config, "backend": backend}
        hidden = expert_up(x, experts.matrices, *common, fanout=2, **options)
        return expert_down(hidden, experts.matrices, *common, experts.row_weights_N, **options)

    computed = experts.lanes_N >= 0
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(experts.x_RH)[computed], both(experts.x_RH)[computed])


def test_one_slot_may_have_any_stride(make_experts, assert_close):
    experts = make_experts(5, 1, 1, 16, 16, torch.bfloat16)
    experts.lane_to_slot_L.zero_()
    odd = {
        name: getattr(experts, name)[:1].as_strided((1, *getattr(experts, name).shape[1:]), (259, 16, 1))
        for name in ("gate_up_SNH", "down_SHI")
    }
    alone = replace(experts, **odd)
    for actual, wanted in zip(run(alone, NARROW), run(experts, NARROW, backend="torch"), strict=True):
        assert_close(actual, wanted, scale=2)


def test_tma_refuses_what_it_cannot_load(make_experts):
    experts = make_experts(4, 1, 2, 20, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"gate_up_SNH has shape .* divisible by 8"):
        run(experts, NARROW)
    experts = make_experts(4, 1, 2, 16, 12, torch.bfloat16)
    with pytest.raises(ValueError, match=r"gate_up_SNH has shape .* divisible by 8"):
        run(experts, NARROW)
    experts = make_experts(4, 1, 2, 16, 16, torch.float32)
    with pytest.raises(ValueError, match=r"gate_up_SNH has dtype torch.float32"):
        run(experts, NARROW)
    experts = make_experts(4, 1, 2, 16, 16, torch.bfloat16)
    experts.gate_up_SNH = torch.zeros(3 * (512 + 4), dtype=torch.bfloat16, device=experts.x_RH.device).as_strided(
        (3, 32, 16), (516, 16, 1)
    )
    with pytest.raises(ValueError, match=r"gate_up_SNH has strides .* multiples of 16 bytes"):
        run(experts, NARROW)


@pytest.mark.parametrize(("intermediate", "clusters"), [(64, 0), (72, 1)])
def test_pairs_of_up_need_two_column_blocks(make_experts, monkeypatch, intermediate, clusters):
    """The kernel counts tiles by its programs: with one column block, the program beside an odd last would pass for a tile."""
    experts = make_experts(90, 2, 3, 64, intermediate, torch.bfloat16)
    schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=128, extra_m=64)
    kernel, seen = expert_up_tma._expert_up_tma_kernel, []

    class Noting:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: (
                seen.append(constants["CLUSTERS"]),
                kernel[grid](*arguments, **constants),
            )

    monkeypatch.setattr(expert_up_tma, "_expert_up_tma_kernel", Noting())
    config, inputs = replace(MERGED, pairs=1), (experts.x_RH, experts.matrices, experts.lane_to_slot_L, schedule)
    for _ in range(2):
        hidden = expert_up(*inputs, fanout=experts.fanout, config=config, backend="triton")
    num_rows = int(schedule.offsets_L1[-1])
    without = expert_up(*inputs, fanout=experts.fanout, config=MERGED, backend="triton")
    assert torch.equal(hidden[:num_rows], without[:num_rows]) and seen == [clusters, clusters, 0]
