"""`expert_rows`: its bits are those of the separate ops, its gradients those of a dense formula in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_kernels import (
    GemmConfig,
    GradientConfigs,
    build_schedule,
    combine,
    expert_down,
    expert_rows,
    expert_up,
    gemm_config,
    gemm_configs,
    gradient_configs,
    has_tma,
)
from moe_kernels.gradients.expert_rows import _expert_rows
from moe_kernels.gradients.gradient_tiles import cut_tiles
from tests.moe_kernels.test_formats import FORMATS, dense, formatted
from tests.moe_kernels.test_grouped_gemm import SHAPES
from tests.moe_kernels.test_variants import MERGED, NARROW, WIDE

BACKENDS = ["torch", "triton"]
NAMES = ("gate_up_SNH", "down_SHI", "gate_up_bias_SN", "down_bias_SH")


def leaves_of(experts, matrices):
    """x, row weights and the tensors of the matrices (None: there are none), as leaves."""
    tensors = (experts.x_RH, experts.row_weights_N, *(getattr(matrices, name) for name in NAMES))
    return [None if one is None else one.detach().clone().requires_grad_() for one in tensors]


def configs_of(experts, rows=1):
    (_, hidden_size, intermediate), dtype = experts.down_SHI.shape, experts.x_RH.dtype
    config = gemm_config(64, 64, dtype, rows, 1, 1)
    return config, gradient_configs(hidden_size, intermediate, dtype, rows, 1, 1)


def scheduled(experts, config, backend):
    tiles = {"block_m": config.block_m, "extra_m": config.schedule_extra_m}
    return build_schedule(experts.lanes_N, experts.counts_L, **tiles, backend=backend)


def computed(experts, matrices, leaves, backend, *, combines, configs=None, grads=None, schedule=None, **options):
    """y, or the rows."""
    config, own_grads = configs_of(experts)
    up, down = configs or (config, config)
    schedule = schedule or scheduled(experts, up, backend)
    return expert_rows(
        leaves[0],
        replace(matrices, **dict(zip(NAMES, leaves[2:], strict=True))),
        experts.lane_to_slot_L,
        schedule,
        leaves[1],
        fanout=experts.fanout,
        configs=(up, down),
        gradient_configs=grads or own_grads,
        combine_into=experts.lanes_N.view(-1, experts.fanout) if combines else None,
        backend=backend,
        **options,
    )


def upstream_of(y, seed=3):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.device, y.dtype)


def grads_of(leaves):
    return [None if leaf is None else leaf.grad for leaf in leaves]


def check_gradients(experts, matrices, backend, assert_close, *, combines, **options):
    """Against `dense` in float64."""
    leaves, exact = leaves_of(experts, matrices), [
        None if one is None else one.detach().double().requires_grad_() for one in leaves_of(experts, matrices)
    ]  # fmt: skip
    y = computed(experts, matrices, leaves, backend, combines=combines, **options)
    upstream = upstream_of(y)
    if not len(experts.lanes_N):
        y.backward(upstream)
        assert all(leaf is None or (leaf.grad.shape == leaf.shape and not leaf.grad.any()) for leaf in leaves)
        return
    rows = dense(experts, matrices, exact[0], exact[1], exact[2:])
    expected = rows.view(-1, experts.fanout, rows.shape[1]).sum(1) if combines else rows
    (expected * upstream.double() + 0 * exact[0].sum()).sum().backward()  # also if no row has a lane
    if not combines:
        upstream[experts.lanes_N < 0] = float("nan")  # of rows that were not computed: not read
    y.backward(upstream)
    for leaf, other in zip(leaves, exact, strict=True):
        if leaf is not None:
            wanted = torch.zeros_like(other) if other.grad is None else other.grad
            scale = max(1.0, float(wanted.abs().max()))
            assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
            assert_close(leaf.grad / scale, wanted / scale, scale=4)
    assert leaves[2].grad.any() == (experts.lanes_N >= 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMATS)
def test_gradients_of_every_format(make_experts, assert_close, form, backend):
    experts = make_experts(12, 2, 3, 20, 12)
    check_gradients(experts, formatted(experts, *FORMATS[form]), backend, assert_close, combines=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_every_shape(make_experts, assert_close, shape, backend):
    experts = make_experts(*shape)
    check_gradients(experts, experts.matrices, backend, assert_close, combines=False)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (1000, torch.float16)])  # both lines of the table
def test_gradients_in_16_bit(make_experts, assert_close, dtype, rows):
    """Several tiles in each direction, and rows that fill no tile."""
    experts = make_experts(70, 2, 2, 150, 72, dtype=dtype)
    matrices = formatted(experts, *FORMATS["gpt-oss"])
    _, grads = configs_of(experts, rows)
    leaves = {}
    for backend in BACKENDS:
        leaves[backend] = leaves_of(experts, matrices)
        y = computed(experts, matrices, leaves[backend], backend, combines=True, grads=grads)
        y.backward(upstream_of(y))
    for one, other in zip(*map(grads_of, leaves.values()), strict=True):
        assert_close(other / one.abs().max(), one / one.abs().max())


def test_gradients_by_wide_tiles(make_experts, assert_close):
    """256 columns are finished in quarters; a tile of weights is higher than wide, and rows end within a block."""
    experts = make_experts(9, 2, 2, 40, 200)
    wide = gemm_config(64, 64, torch.float32, 1, 1, 1)
    tile = replace(wide, block_m=16, block_n=256, block_k=16)
    grads = GradientConfigs(tile, replace(tile, block_m=64, block_n=32), replace(tile, block_n=32, group_m=1))
    check_gradients(experts, experts.matrices, "triton", assert_close, combines=True, grads=grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combines", [False, True])
@pytest.mark.parametrize("lanes", ["random", "one takes all", "none"])
def test_the_bits_of_the_separate_ops(make_experts, backend, combines, lanes):
    experts = make_experts(20, 2, 3, 40, 24, torch.bfloat16)
    if lanes != "random":
        experts.lanes_N.fill_(1 if lanes == "one takes all" else -1)
    matrices = formatted(experts, *FORMATS["silu, biased"])
    config, _ = configs_of(experts)
    schedule = scheduled(experts, config, backend)
    common = (matrices, experts.lane_to_slot_L, schedule)
    hidden = expert_up(experts.x_RH, *common, fanout=2, config=config, backend=backend)
    expected = expert_down(hidden, *common, experts.row_weights_N, config=config, backend=backend)
    here = experts.lanes_N >= 0
    if combines:
        expected, here = combine(expected, experts.lanes_N.view(-1, 2), backend=backend), slice(None)
    leaves = leaves_of(experts, matrices)
    y = computed(experts, matrices, leaves, backend, combines=combines)
    assert torch.equal(y[here], expected[here])
    y.backward(upstream_of(y))
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    if lanes == "one takes all":
        others = torch.arange(4, device=y.device) != experts.lane_to_slot_L[1]
        assert all((leaf.grad[others] == 0).all() and leaf.grad.any() for leaf in leaves[2:])


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("gpt-oss", NARROW),
        pytest.param("silu, biased", WIDE, marks=pytest.mark.gpu),  # slow, where interpreted
        pytest.param("gelu without a gate, biased", MERGED, marks=pytest.mark.gpu),
    ],
)
def test_tma_keeps_the_pre_activation_too(make_experts, form, config):
    """And computes it again with the same bits."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU, or none")
    experts = make_experts(70, 2, 2, 64, 48, torch.bfloat16)
    matrices = formatted(experts, *FORMATS[form])
    grads = {}
    for recompute, tiles in ((False, config), (True, config), (False, replace(configs_of(experts)[0], block_m=32))):
        leaves = leaves_of(experts, matrices)
        y = computed(experts, matrices, leaves, "triton", combines=True, configs=(tiles, tiles), recompute=recompute)
        y.backward(upstream_of(y))
        grads[recompute, tiles.tma] = grads_of(leaves)
    for kept, again, portable in zip(grads[False, True], grads[True, True], grads[False, False], strict=True):
        assert torch.equal(kept, again)
        assert (kept.float() - portable.float()).abs().max() <= 0.02 * portable.abs().max()


PORTABLE = GemmConfig(64, 64, 32, 4, 3)
BY_TMA = replace(PORTABLE, tma=True)
WITH_TAILS = replace(BY_TMA, block_m=128, tail_m=64)
LONG = replace(PORTABLE, block_m=128)
PERSISTENT = replace(BY_TMA, programs_per_sm=1)


@pytest.mark.parametrize("adds_to_main_grads", [False, True])
@pytest.mark.parametrize(
    ("tokens", "grads"),
    [
        (20, GradientConfigs(BY_TMA, PERSISTENT, BY_TMA)),
        (70, GradientConfigs(LONG, replace(PERSISTENT, block_n=128), WITH_TAILS)),
        (20, GradientConfigs(BY_TMA, replace(PERSISTENT, block_k=16, num_stages=4), PERSISTENT)),
    ],
)
@pytest.mark.parametrize("has_rows", [True, False])
def test_tma_changes_no_bit(make_experts, tokens, grads, has_rows, adds_to_main_grads):
    """Sizes that no tile divides; the last slot's box ends with the tensor. Tiles of at most 64 rows, and longer ones.

    Rows of no lane, a slot without rows, a slot of two lanes.
    """
    if torch.cuda.is_available() and not has_tma(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU, or none")
    experts = make_experts(tokens, 2, 3, 88, 72, torch.bfloat16)
    if not has_rows:
        experts.lanes_N.fill_(-1)
    assert (experts.lanes_N < 0).any()
    experts.lane_to_slot_L[2] = experts.lane_to_slot_L[0]
    matrices = formatted(experts, *FORMATS["clamped"])
    found = []
    for configs in (GradientConfigs(PORTABLE, PORTABLE, PORTABLE), grads):
        leaves = leaves_of(experts, matrices)
        if adds_to_main_grads:
            for place, leaf in enumerate(leaves[2:]):
                if leaf is not None:
                    leaf.main_grad = torch.full(leaf.shape, 0.25 * place, device=leaf.device)
        y = computed(
            experts, matrices, leaves, "triton", combines=True, grads=configs, adds_to_main_grads=adds_to_main_grads
        )
        y.backward(upstream_of(y))
        found.append(
            [
                getattr(leaf, "main_grad", None) if adds_to_main_grads and place > 1 else leaf.grad
                for place, leaf in enumerate(leaves)
                if leaf is not None
            ]
        )
    for portable, other in zip(*found, strict=True):
        assert portable is not None and torch.equal(portable, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_and_repeated_gradients_have_equal_bits(make_experts, backend):
    """A graph that is retained keeps what it saved; the last backward may overwrite it."""
    experts = make_experts(9, 2, 3, 20, 12)
    matrices = formatted(experts, *FORMATS["gpt-oss"])
    found = []
    for recompute in (False, True):
        leaves = leaves_of(experts, matrices)
        y = computed(experts, matrices, leaves, backend, combines=True, recompute=recompute)
        for is_retained in (True, True, False):
            for leaf in leaves:
                leaf.grad = None
            y.backward(upstream_of(y), retain_graph=is_retained)
            found.append(grads_of(leaves))
        with pytest.raises(RuntimeError, match="second time"):
            y.backward(upstream_of(y))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (0, 1), (2, 4), (5,), (0, 1, 2, 3, 4, 5)])
def test_only_what_is_wanted_is_computed_and_kept(make_experts, backend, wanted):
    """Frozen experts, a frozen router, a bias alone: the same gradients, and x is kept only for the up projection's."""
    experts = make_experts(9, 2, 3, 20, 12)
    matrices = formatted(experts, *FORMATS["silu, biased"])
    full, some = leaves_of(experts, matrices), leaves_of(experts, matrices)
    for place, leaf in enumerate(some):
        leaf.requires_grad_(place in wanted)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one.shape) or one, lambda one: one):
        y = computed(experts, matrices, some, backend, combines=True)
    assert (experts.x_RH.shape in saved) == (2 in wanted)
    assert (18, 24) in saved and (18, 12) not in saved and (18, 20) not in saved  # pre; neither hidden nor rows
    y.backward(upstream_of(y))
    y = computed(experts, matrices, full, backend, combines=True)
    y.backward(upstream_of(y))
    for place, (one, other) in enumerate(zip(some, full, strict=True)):
        assert torch.equal(one.grad, other.grad) if place in wanted else one.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_lanes_of_one_slot_are_summed(make_experts, assert_close, backend):
    experts = make_experts(9, 2, 4, 20, 12)
    experts.lane_to_slot_L[2:] = experts.lane_to_slot_L[0]
    check_gradients(experts, experts.matrices, backend, assert_close, combines=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_slots_may_be_filled_before_the_backward(make_experts, backend):
    """I3: a relocation fills a free slot and gives it a lane while a backward is still to come."""

    def gradient(fill):
        experts = make_experts(9, 1, 3, 16, 16)
        experts.lanes_N[experts.lanes_N == 2] = 1  # no row is in lane 2
        leaves = [experts.x_RH.requires_grad_(), experts.row_weights_N.requires_grad_()]
        tensors = [experts.gate_up_SNH, experts.down_SHI, None, None]
        y = computed(experts, experts.matrices, leaves + tensors, backend, combines=True)
        if fill:
            (free,) = set(range(4)) - set(experts.lane_to_slot_L.tolist())
            for weights in (experts.gate_up_SNH, experts.down_SHI):
                weights[[free, int(experts.lane_to_slot_L[2])]] = float("nan")
            experts.lane_to_slot_L[2] = free
        y.square().sum().backward()
        return experts.x_RH.grad, experts.row_weights_N.grad

    for still, filled in zip(gradient(fill=False), gradient(fill=True), strict=True):
        assert torch.equal(still, filled)


@pytest.mark.parametrize("form", FORMATS)
def test_gradcheck_of_the_reference(make_experts, form):
    """By finite differences in float64, with the reference computing in it too."""
    experts = make_experts(3, 2, 2, 4, 3)
    experts.lanes_N[:3] = torch.tensor([0, 1, -1], dtype=torch.int32)
    matrices = formatted(experts, *FORMATS[form])
    leaves = [None if one is None else one.detach().double().requires_grad_() for one in leaves_of(experts, matrices)]
    given = [leaf for leaf in leaves if leaf is not None]
    config, grads = configs_of(experts)
    schedule = build_schedule(experts.lanes_N, experts.counts_L, block_m=config.block_m, backend="torch")
    lanes = experts.lanes_N.view(3, 2)

    def function(*tensors):
        rest = iter(tensors)
        x, weights, *parts = [None if leaf is None else next(rest) for leaf in leaves]
        filled = replace(matrices, **dict(zip(NAMES, parts, strict=True)))
        tiles = (config, config, grads.hidden, grads.weights, grads.x)
        return _expert_rows(
            x, filled, experts.lane_to_slot_L, schedule, weights, lanes, 2, *tiles, False, False, "torch"
        )[0]

    assert torch.autograd.gradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("combines", "recompute"), [(True, False), (False, True)])
def test_opcheck(make_experts, backend, combines, recompute):
    experts = make_experts(5, 2, 3, 10, 6)
    experts.lanes_N.clamp_(min=0)  # undefined rows would compare as unequal
    matrices = formatted(experts, *FORMATS["silu, biased"])
    x, weights, *parts = leaves_of(experts, matrices)
    config, grads = configs_of(experts)
    schedule = scheduled(experts, config, backend)
    arguments = (
        x,
        replace(matrices, **dict(zip(NAMES, parts, strict=True))),
        experts.lane_to_slot_L,
        schedule,
        weights,
        experts.lanes_N.view(5, 2) if combines else None,
        2,
        *(config, config, grads.hidden, grads.weights, grads.x),
        recompute,
        False,
        backend,
    )
    # With `recompute` the second output is empty; else it holds what the first needs, all rows of it.
    torch.library.opcheck(_expert_rows.registered, _expert_rows.flatten(*arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_as_one_graph(make_experts, assert_close, backend, recompute):
    torch.compiler.reset()
    experts = make_experts(9, 2, 3, 20, 12)
    matrices = formatted(experts, *FORMATS["silu, biased"])

    schedule = scheduled(experts, configs_of(experts)[0], backend)

    def run(*leaves):
        y = computed(experts, matrices, leaves, backend, combines=True, recompute=recompute, schedule=schedule)
        return y.sin()

    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(experts, matrices)
        y = function(*leaves)
        y.backward(upstream_of(y))
        grads.append(grads_of(leaves))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_added_to_main_grads(make_experts, assert_close, backend):
    """Two micro-batches, summed in float32; one parameter has hooks, one no buffer."""
    experts = make_experts(9, 2, 3, 20, 12, torch.bfloat16)
    matrices = formatted(experts, *FORMATS["silu, biased"])
    plain, leaves = leaves_of(experts, matrices), leaves_of(experts, matrices)
    for leaf in leaves[2:5]:
        leaf.main_grad = torch.ones(leaf.shape, device=leaf.device)
    leaves[2].grad_added_to_main_grad = False
    hooked = []
    leaves[2].register_post_accumulate_grad_hook(lambda leaf: hooked.append(leaf.grad.clone()))
    for _ in range(2):
        for some, adds in ((plain, False), (leaves, True)):
            y = computed(experts, matrices, some, backend, combines=True, adds_to_main_grads=adds)
            y.backward(upstream_of(y))
            if adds:
                leaves[2].grad = None
    assert len(hooked) == 2 and not hooked[0].any() and leaves[2].grad_added_to_main_grad is True
    assert leaves[3].grad is None and leaves[4].grad is None
    for place in (0, 1, 5):
        assert torch.equal(leaves[place].grad, plain[place].grad)
    for place in (2, 3, 4):
        added = leaves[place].main_grad - 1
        assert_close(plain[place].grad, added)
        assert (added != added.bfloat16().float()).any()


def test_main_grads_that_do_not_fit_are_refused(make_experts):
    experts = make_experts(9, 2, 3, 20, 12)
    matrices = experts.matrices
    leaves = leaves_of(experts, matrices)
    run = partial(computed, experts, matrices, leaves, "torch", combines=True, adds_to_main_grads=True)
    for wrong in (torch.zeros(3), torch.zeros_like(leaves[2]).half(), torch.zeros(4, 20, 24).transpose(1, 2)):
        leaves[2].main_grad = wrong.to(leaves[2].device)
        with pytest.raises(ValueError, match=r"matrices\.gate_up_SNH\.main_grad"):
            run()
    del leaves[2].main_grad
    with pytest.raises(RuntimeError, match="needs a plain eager call"), FlopCounterMode(display=False):
        run()


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_in_a_cuda_graph(make_experts, recompute):
    """Forward and backward wait for nothing on the host, and a replay with other inputs has the bits of an eager step."""
    experts = make_experts(300, 2, 5, 256, 192, torch.bfloat16)
    matrices = formatted(experts, *FORMATS["gpt-oss"])
    leaves = leaves_of(experts, matrices)
    config, _ = configs_of(experts)
    counts = experts.counts_L.clone()
    run = partial(computed, experts, matrices, leaves, "triton", combines=True, recompute=recompute)

    def step():
        schedule = build_schedule(experts.lanes_N, counts, block_m=config.block_m, backend="triton")
        y = run(schedule=schedule)
        return y, *torch.autograd.grad(y, leaves, upstream)

    upstream = upstream_of(experts.x_RH)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        other = make_experts(300, 2, 5, 256, 192, torch.bfloat16, seed=seed)
        with torch.no_grad():
            leaves[0].copy_(other.x_RH)
        experts.lanes_N.copy_(other.lanes_N)
        counts.copy_(other.counts_L)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        assert all(torch.equal(one, two) for one, two in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_the_peak_of_a_step(make_experts):
    """Beside outputs and gradients: hidden rows, and half of the columns of the output's gradient in sorted order."""
    device = torch.device("cuda")
    tma, tokens, top_k, hidden_size, intermediate, slots = has_tma(device), 4096, 2, 1024, 512, 32
    experts = make_experts(tokens, top_k, slots, hidden_size, intermediate, torch.bfloat16)
    sizes = (hidden_size, intermediate, torch.bfloat16, tokens, top_k, slots)
    configs, grads = gemm_configs(*sizes, tma=tma), gradient_configs(*sizes, tma=tma)
    leaves = leaves_of(experts, experts.matrices)
    schedule = scheduled(experts, configs[0], "triton")
    upstream = upstream_of(experts.x_RH)

    def step():
        y = computed(
            experts, experts.matrices, leaves, "triton", combines=True, configs=configs, grads=grads, schedule=schedule
        )
        return y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], upstream)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = sum(one.nbytes for one in step())
    columns = intermediate + hidden_size // 2 if tma else intermediate
    most = returned + tokens * top_k * columns * 2 + 2**23  # the allocator rounds up, by up to 1 MiB a tensor
    assert torch.cuda.max_memory_allocated() - before <= most


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_larger_sizes_natively(make_experts, dtype):
    """By the tiles that a large batch gets, on Hopper by TMA, against the reference; two runs have equal bits."""
    tma = has_tma(torch.device("cuda"))
    experts = make_experts(3000, 4, 8, 704, 576, dtype)
    experts.lanes_N[experts.lanes_N == 3] = 2
    up, down = gemm_configs(704, 576, dtype, 3000, 4, 8, tma=tma)
    grads = gradient_configs(704, 576, dtype, 3000, 4, 8, tma=tma)
    found = []
    for backend in ("torch", "triton", "triton"):
        leaves = leaves_of(experts, experts.matrices)
        y = computed(experts, experts.matrices, leaves, backend, combines=True, configs=(up, down), grads=grads)
        y.backward(upstream_of(y))
        found.append([y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for wanted, first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
        error = torch.linalg.vector_norm(first.double() - wanted.double()) / torch.linalg.vector_norm(wanted.double())
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_tiles_by_hand(device):
    """The example of the kernel's docstring; and lanes 0 and 2 lead to one slot, lane 1 has no rows."""
    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=device)
    slots = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    tiles = cut_tiles(offsets, slots, num_rows=6, num_slots=3, tile_m=2, block_k=2)
    assert tiles.tile_lane.tolist() == [0, 0, 2, 3, -1]
    assert tiles.tile_start[:4].tolist() == [0, 2, 3, 5]
    assert tiles.tile_end[:4].tolist() == [2, 3, 5, 6]
    assert tiles.first_lane_S.tolist() == [-1, 0, -1]
    assert tiles.next_lane_L[[0, 2]].tolist() == [2, -1]
    assert tiles.num_tiles.tolist() == [3]
    assert tiles.blocks_S.tolist() == [1, 3, 1]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_RH", {"x_RH": torch.zeros((8, 2)).T}),
        ("down_SHI", {"down_SHI": torch.zeros((4, 20, 11))}),
        ("lane_to_slot_L", {"lane_to_slot_L": torch.zeros(4, dtype=torch.int32)}),
        ("fanout", {"fanout": 0}),
        ("schedule.order_N", {"fanout": 3}),
        ("row_weights_N", {"row_weights_N": torch.zeros(17)}),
        ("combine_into", {"combine_into": torch.zeros((8, 2), dtype=torch.int32)}),
        ("combine_into", {"combine_into": torch.zeros((9, 2), dtype=torch.int64)}),
        ("config.block_m", {"configs": 2 * (gemm_config(12, 8, torch.bfloat16, 10**6, 1, 1),)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_refuses(make_experts, name, change):
    experts = make_experts(9, 2, 3, 20, 12)
    config, grads = configs_of(experts)
    good = {
        "x_RH": experts.x_RH,
        "matrices": replace(experts.matrices, **{key: change[key] for key in ("down_SHI",) if key in change}),
        "lane_to_slot_L": experts.lane_to_slot_L,
        "schedule": build_schedule(experts.lanes_N, experts.counts_L, block_m=config.block_m),
        "row_weights_N": experts.row_weights_N,
        "fanout": 2,
        "configs": (config, config),
        "gradient_configs": grads,
    }
    change = {
        key: one.to(experts.x_RH.device) if isinstance(one, torch.Tensor) else one
        for key, one in change.items()
        if key != "down_SHI"
    }
    with pytest.raises(ValueError, match=name):
        expert_rows(**(good | change))


def test_configs_go_together():
    config = gemm_config(64, 64, torch.bfloat16, 1, 1, 1)
    with pytest.raises(ValueError, match=r"x\.block_m"):
        GradientConfigs(config, config, replace(config, block_m=64))
    with pytest.raises(ValueError, match=r"weights\.programs_per_sm=0"):
        GradientConfigs(config, BY_TMA, config)
    with pytest.raises(ValueError, match=r"weights\.tail_m=64"):
        GradientConfigs(config, WITH_TAILS, config)
    with pytest.raises(ValueError, match=r"x\.by_lane=True"):
        GradientConfigs(BY_TMA, PERSISTENT, replace(BY_TMA, by_lane=True))
