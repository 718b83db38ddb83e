"""Dispatch by all-gather: the bits of all_to_all, whatever the placement. Each test has several checks, as starting is slow."""

import contextlib
import functools
import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_layer import AllGatherDispatcher, MoELayer
from moe_layer.dispatch.packed import token_bytes
from tests.conftest import TOLERANCES
from tests.distributed import distributed
from tests.moe_layer.ranks import (
    DEADLINE,
    EXPERTS,
    HIDDEN,
    TOP_K,
    Service,
    everybody,
    make_controller,
    make_layer,
    tokens,
)
from tests.moe_layer.test_serving import check_gradients_across_flips

BOUND = 12  # `tokens()` makes at most 11
NUM_STEPS = 4  # batches; each of four ranks has none in one or two of them
STATIC = (False, True)  # as over gloo, as over NCCL; either runs over both
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


def gathering(group, device, max_tokens=BOUND, static=None, combine="exact", **options) -> MoELayer:
    """A layer that dispatches by all-gather. static=False: as over gloo; True: as over NCCL, whatever the group."""
    layer = make_layer(group, device, dispatcher="all_gather", max_tokens=max_tokens, **options)
    if static is not None or combine != "exact":
        layer.executor.dispatcher = AllGatherDispatcher(
            group, layer.resident.num_lanes, max_tokens, static=static, combine=combine
        )
    return layer


@contextlib.contextmanager
def poisoned():
    """New memory holds NaN until it is written: what is read of the padding would be seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def counted(monkeypatch):
    """The collectives that are called inside, by name, with the bytes that this rank sends."""
    called = []

    def wrapped(name, function, *arguments, **options):
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        called.append((name, tensors[-1].nbytes if tensors else 0))
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, functools.partial(wrapped, name, getattr(dist, name)))
        yield called


@distributed(num_ranks=2)
def test_two_ranks(rank, num_ranks, group, device):
    check_dispatch(rank, group, device)
    for dtype in (torch.float32, torch.bfloat16):
        check_outputs(rank, num_ranks, group, device, dtype)
    check_skew(rank, group, device)
    check_numbers_of_choices(rank, group, device)
    check_turns(rank, group, device)
    check_masks(rank, group, device)
    check_given_ids(rank, group, device)
    check_errors(group, device)
    check_collectives(rank, num_ranks, group, device)
    check_ranks_that_differ_in_gradients(rank, group, device)
    check_partial(rank, group, device)
    for trainable in (False, True):
        check_gradients(rank, group, device, trainable)


@distributed(num_ranks=4, on_cpu=False)
def test_four_ranks(rank, num_ranks, group, device):
    for dtype in (torch.float32, torch.bfloat16):
        check_outputs(rank, num_ranks, group, device, dtype)
    check_skew(rank, group, device)
    check_turns(rank, group, device)
    check_collectives(rank, num_ranks, group, device)
    check_gradients(rank, group, device, trainable=False)
    check_partial(rank, group, device)


@distributed(num_ranks=4, timeout=150, on_cpu=False)
def test_i5_random_placements(rank, num_ranks, group, device):
    """Experts move at random; a layer that dispatches by all_to_all and never moves says the same, bit for bit."""
    layers = [
        gathering(group, device, static=static, seed=seed, num_redundant_experts=num_ranks, num_shadow_slots=2)
        for seed, static in enumerate(STATIC)
    ]
    twins = [make_layer(group, device, seed=seed) for seed in range(len(layers))]
    controller = make_controller(group, layers)
    service = Service(rank, group, device, layers, twins, controller)
    service.serve_until(lambda: controller.metrics().waves >= 12, "relocations")
    versions = [layer.resident.current.number for layer in layers]
    assert all(version >= 2 for version in versions), versions
    with controller.quiesced():
        service.assert_well()
    controller.close()


@distributed(num_ranks=2, timeout=150, on_cpu=False)
def test_i3_gradients_across_flips(rank, num_ranks, group, device):
    num_lanes = (EXPERTS + 2) // 2 + 2
    for static in STATIC:
        dispatcher = AllGatherDispatcher(group, num_lanes, BOUND, static=static)
        check_gradients_across_flips(rank, group, device, dispatcher=dispatcher, max_tokens=BOUND)


@distributed(num_ranks=2, on_cpu=False)
def test_triton(rank, num_ranks, group, device):
    """The host code of the Triton backend, in the interpreter on a CPU: few tokens, as it is slow."""
    x = torch.randn(3 * rank + 1, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    expected = make_layer(group, device, backend="triton", num_redundant_experts=2)(x)
    for static in STATIC:
        for redundant in (0, 2):
            layer = gathering(group, device, 4, static=static, backend="triton", num_redundant_experts=redundant)
            with torch.no_grad(), poisoned():
                y = layer(x)
            # (The batch of 8 and that of 5 tokens are of one bucket, so all_to_all has the same tiles.)
            assert torch.equal(y, expected), f"static={static}, {redundant} redundant experts"
            leaf = x.clone().requires_grad_()
            layer(leaf).square().sum().backward()
            assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0.01


@distributed(num_ranks=2, backend="nccl", timeout=150)
def test_two_gpus(rank, num_ranks, group, device):
    for dtype in (torch.float32, torch.bfloat16):
        check_outputs(rank, num_ranks, group, device, dtype)
    check_skew(rank, group, device)
    check_numbers_of_choices(rank, group, device)
    check_turns(rank, group, device)
    check_masks(rank, group, device)
    check_given_ids(rank, group, device)
    check_collectives(rank, num_ranks, group, device)
    check_ranks_that_differ_in_gradients(rank, group, device)
    check_partial(rank, group, device)
    check_gradients(rank, group, device, trainable=False)
    check_no_host_sync(rank, group, device)
    check_graphs(rank, num_ranks, group, device, torch.bfloat16)


@distributed(num_ranks=4, backend="nccl", timeout=150)
def test_four_gpus(rank, num_ranks, group, device):
    check_outputs(rank, num_ranks, group, device, torch.bfloat16)
    check_graphs(rank, num_ranks, group, device, torch.bfloat16)


# ---- the checks; all are collective


@torch.no_grad()
def check_dispatch(rank, group, device):
    """What is computed where, by hand-made lanes, 3 a rank, and back: rank 0 has 4 tokens, rank 1 none, then the reverse."""
    lanes = [[0, 5], [-1, -1], [4, 1], [3, 3]]  # global: rank · 3 + lane
    x = torch.arange(12.0).view(4, 3)
    for static in (False, True):
        dispatcher = AllGatherDispatcher(group, 3, 6, static=static)
        for sender in (0, 1):
            count = 4 if rank == sender else 0
            lanes_TK = torch.tensor(lanes, dtype=torch.int32, device=device)[:count]
            x_TH, weights_TK = x[:count].to(device), torch.arange(8.0, device=device).view(4, 2)[:count]
            nothing = torch.zeros(6, dtype=torch.int32, device=device)
            with poisoned():
                sent = dispatcher.dispatch(x_TH, weights_TK, lanes_TK, nothing, "torch", 5)
            assert sent.num_tokens == 10, "the bound of all ranks"
            # (token, k) of the rows for this rank, by lane; the masked token goes nowhere.
            expected = [(0, 0), (2, 1)] if rank == 0 else [(3, 0), (3, 1), (2, 0), (0, 1)]
            schedule = sent.schedule(16, 0)
            assert schedule.offsets_L1.tolist() == [[0, 1, 2, 2], [0, 2, 3, 4]][rank]
            rows = schedule.order_N[: len(expected)]
            assert sent.rows_RH[rows // sent.fanout].tolist() == [x[token].tolist() for token, _ in expected]
            assert sent.row_weights_N[rows].tolist() == [float(2 * token + k) for token, k in expected]
            assert len(schedule.order_N) == (2 * 5 * 2 if static else len(expected)), "static shapes"
            every = torch.arange(len(schedule.order_N), device=device)
            computed = sent.rows_RH[every // sent.fanout] * sent.row_weights_N[:, None]
            y = dispatcher.combine(computed, sent, lanes_TK, "torch")
            sums = torch.tensor([1.0, 0.0, 4.0 + 5.0, 6.0 + 7.0])[:, None] * x
            assert y.tolist() == sums[:count].tolist()


@torch.no_grad()
def check_outputs(rank, num_ranks, group, device, dtype):
    """I5: bitwise those of all_to_all, for any number of replicas and any bound."""
    alone = make_layer(None, device, dtype=dtype)
    other = make_layer(group, device, num_redundant_experts=num_ranks, dtype=dtype)
    for static in STATIC:
        for redundant in (0, num_ranks, EXPERTS):
            layer = gathering(group, device, static=static, num_redundant_experts=redundant, dtype=dtype)
            for step in range(NUM_STEPS):
                x = tokens(rank, step, device, dtype)
                with poisoned():
                    y = layer(x)
                assert torch.equal(y, other(x)), f"step {step}, static={static}, {redundant} redundant experts"
                assert torch.equal(layer(x, max_tokens=11), y), "another bound"
                if device.type == "cpu":
                    assert torch.equal(y, alone(x)), f"step {step}: not what one rank says"
            empty = layer(x[:0], max_tokens=1)
            assert empty.shape == (0, HIDDEN), "no rank has a token"


@torch.no_grad()
def check_skew(rank, group, device):
    """All tokens of all ranks choose the same two experts, which are on one rank; or rank 1's choose none."""
    x = torch.randn(BOUND, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    weights = torch.rand(BOUND, TOP_K, generator=torch.Generator().manual_seed(rank)).to(device)
    other = make_layer(group, device, router=None)
    for static in STATIC:
        layer = gathering(group, device, static=static, router=None)
        for chosen in ([0, 1], [EXPERTS - 1, EXPERTS - 2], [3, -1], [-1, -1] if rank == 1 else [2, 5]):
            ids = torch.tensor([chosen] * BOUND, device=device)
            with poisoned():
                y = layer(x, expert_ids=ids, expert_weights=weights)
            assert torch.equal(y, other(x, expert_ids=ids, expert_weights=weights)), f"{chosen}, static={static}"


@torch.no_grad()
def check_numbers_of_choices(rank, group, device):
    """One expert a token, and all of them, for which no rank has lanes enough; hidden states of a size that is padded."""
    for top_k in (1, 3, EXPERTS):
        other = make_layer(group, device, top_k=top_k, hidden_size=10)
        x = torch.randn(3 * rank + 1, 10, generator=torch.Generator().manual_seed(rank)).to(device)
        for static in STATIC:
            for bound in (7, BOUND):
                layer = gathering(group, device, bound, static=static, top_k=top_k, hidden_size=10)
                with poisoned():
                    y = layer(x)
                assert torch.equal(y, other(x)), f"top_k={top_k}, static={static}"


def check_turns(rank, group, device):
    """More tokens than the constructor's bound: in turns, the same number on all ranks, with equal bits and gradients."""
    other = make_layer(group, device)
    for static in STATIC:
        layer = gathering(group, device, 4, static=static, num_redundant_experts=dist.get_world_size(group))
        for step in range(NUM_STEPS):
            x = tokens(rank, step, device)
            with torch.no_grad():
                expected = other(x)
                for bound in (11, 12, 13):
                    assert torch.equal(layer(x, max_tokens=bound), expected), f"step {step}, max_tokens={bound}"
        grads = []
        for one, options in ((layer, {"max_tokens": 11}), (other, {})):
            leaf = x.clone().requires_grad_()
            one(leaf, **options).square().sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
        if len(x) <= 4:
            continue
        with torch.no_grad(), pytest.raises(ValueError, match=f"x has {len(x)} tokens, more than max_tokens=4"):
            layer(x)  # nothing was sent: the others, which have as many or fewer, are not in it


@torch.no_grad()
def check_masks(rank, group, device):
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    mask = torch.arange(6, device=device) % 3 != rank
    other = make_layer(group, device)
    for static in STATIC:
        layer = gathering(group, device, static=static, num_redundant_experts=2)
        y = layer(torch.where(mask[:, None], x, float("nan")), mask)
        assert not y[~mask].any() and torch.equal(y, other(x, mask))
        nobody = torch.full_like(mask, rank == 0)  # all tokens of the other ranks are padding
        assert torch.equal(layer(x, nobody), other(x, nobody))


def check_given_ids(rank, group, device):
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    ids = torch.tensor([[0, 7], [-1, 3], [-1, -1], [EXPERTS, 5], [2**32 + 1, 4]], device=device)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(rank)).to(device)
    weights[2] = float("nan")  # of nothing
    other = make_layer(group, device, router=None)
    for static in STATIC:
        layer = gathering(group, device, static=static, router=None)
        results = []
        for one in (layer, other):
            leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
            y = one(leaves[0], expert_ids=ids, expert_weights=leaves[1])
            y.square().sum().backward()
            results.append((y.detach(), *(leaf.grad for leaf in leaves)))
        for mine, wanted in zip(*results, strict=True):
            assert torch.equal(mine, wanted), f"static={static}"


def check_errors(group, device):
    with pytest.raises(
        ValueError, match=r"dispatcher='all_gather' needs max_tokens, an integer of at least 1 .* got None"
    ):
        make_layer(group, device, dispatcher="all_gather")
    for options, message in (
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"combine": "sum"}, "combine must be one of 'exact', 'partial'; got 'sum'"),
        ({"static": False, "combine": "partial"}, "static=False does not go with combine='partial'"),
    ):
        with pytest.raises(ValueError, match=message):
            AllGatherDispatcher(group, 4, **{"max_tokens": 8, **options})
    layer = gathering(group, device)
    assert isinstance(layer.executor.dispatcher, AllGatherDispatcher) and layer.dispatch_backend in ("gloo", "nccl")


def check_collectives(rank, num_ranks, group, device):
    """Two a forward; a backward repeats the forward's and has two of its own. What travels is what the choice counts on."""
    monkeypatch = pytest.MonkeyPatch()
    x = torch.randn(BOUND, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    forth = BOUND * token_bytes(HIDDEN, 4, TOP_K)
    back = num_ranks * BOUND * TOP_K * HIDDEN * 4  # with static shapes; else what was computed
    by_gloo = dist.get_backend(group) == "gloo"
    for static in STATIC:
        layer = gathering(group, device, static=static, num_redundant_experts=num_ranks)
        with torch.no_grad(), counted(monkeypatch) as called:
            layer(x)
        assert len(called) == 2, called
        assert called[0][1] == forth * (num_ranks if by_gloo else 1)  # gloo sends each rank its copy
        if static:
            assert called[1][1] == back
        returned = torch.tensor([called[1][1]], device=device if not by_gloo else "cpu")
        dist.all_reduce(returned, group=group)
        assert int(returned) == num_ranks * (back if static else BOUND * TOP_K * HIDDEN * 4)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        with counted(monkeypatch) as called:
            y.sum().backward()
        assert len(called) == 4, called
    with torch.no_grad(), counted(monkeypatch) as called:
        make_layer(group, device)(x)
    assert [name for name, _ in called if name != "broadcast"] == ["all_to_all_single"] * 3, called
    partial = gathering(group, device, combine="partial")
    with torch.no_grad(), counted(monkeypatch) as called:
        partial(x)
    assert len(called) == 2 and called[1][1] == back // TOP_K, called


def check_gradients(rank, group, device, trainable):
    """Bitwise those of all_to_all (two choices a token: their sum has no order), for any number of replicas; repeated too."""
    num_ranks = dist.get_world_size(group)
    other = make_layer(group, device, trainable=trainable)
    layers = [
        gathering(group, device, static=static, trainable=trainable, num_redundant_experts=redundant)
        for static in STATIC
        for redundant in ((0,) if trainable else (0, num_ranks))
    ]
    runs = [(other, other), *((layer, layer) for layer in layers)]
    runs += [(layer, functools.partial(checkpoint, layer, use_reentrant=False)) for layer in layers[:1]]
    largest = 0.0
    for step in range(3):
        direction = torch.randn(BOUND, HIDDEN, generator=torch.Generator().manual_seed(step)).to(device)
        grads = []
        for layer, run in runs:
            layer.gate.requires_grad_()
            layer.zero_grad()
            x = tokens(rank, step, device).requires_grad_()
            y = run(x)
            with poisoned():
                y.backward(direction[: len(x)])
            weights = [parameter.grad for parameter in layer.parameters()]
            assert all(grad is not None and grad.isfinite().all() for grad in weights)
            grads.append([y.detach(), x.grad, *weights])
            assert trainable or not layer.resident.is_pinned_before(1)
        for number, mine in enumerate(grads[1:]):
            for one, another in zip(grads[0], mine, strict=True):
                assert torch.equal(one, another), f"step {step}, run {number}: {(one - another).abs().max()}"
        largest = max(largest, *(float(grad.abs().max()) for grad in grads[0][2:]))
    assert largest > 0.01


def check_ranks_that_differ_in_gradients(rank, group, device):
    """Not a hang: over gloo all ranks say so, in the forward; with static shapes the ones that need a gradient do."""
    message = r"on all ranks of process_group or on none: those of the ranks \[0\] do, those of the ranks \[1\] do not"
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    for static in STATIC:
        layer = gathering(group, device, static=static)
        with torch.inference_mode():  # what it keeps between forwards can be used outside of it too
            expected = layer(x).clone()
        for _ in range(2):
            if rank == 0 or not static:
                with pytest.raises(ValueError, match=message):
                    layer(x.clone().requires_grad_(rank == 0))
            else:
                assert torch.equal(layer(x), expected), "its own output is right"
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert not layer.resident.is_pinned_before(1), "a forward that was refused pins its version"
        with torch.no_grad():
            assert torch.equal(layer(x.clone().requires_grad_(rank == 0)), expected), "no backward comes"
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()  # every collective was taken part in by all
        assert leaf.grad.isfinite().all()


def check_partial(rank, group, device):
    """Sums by rank: equal to rounding; where all of a token's experts are on one rank, bit for bit."""
    num_ranks = dist.get_world_size(group)
    for dtype in (torch.float32, torch.bfloat16):
        rtol, atol = TOLERANCES[dtype]
        exact = gathering(group, device, dtype=dtype)
        partial = gathering(group, device, combine="partial", dtype=dtype, num_redundant_experts=num_ranks)
        for step in range(NUM_STEPS):
            results = []
            for layer in (exact, partial):
                leaf = tokens(rank, step, device, dtype).requires_grad_()
                with poisoned():
                    y = layer(leaf)
                y.float().sin().sum().backward()
                results.append((y.detach(), leaf.grad))
            for one, another in zip(*results, strict=True):
                torch.testing.assert_close(one, another, rtol=2 * rtol, atol=2 * atol)
    x, weights = torch.randn(6, HIDDEN, device=device), torch.rand(6, TOP_K, device=device)
    ids = torch.tensor([[2 * index, 2 * index + 1] for index in (0, 1, 2, 3, 1, 0)], device=device)
    exact, partial = (gathering(group, device, combine=how, router=None) for how in ("exact", "partial"))
    with torch.no_grad():
        y = [layer(x, expert_ids=ids, expert_weights=weights) for layer in (exact, partial)]
    assert torch.equal(*y)


@torch.no_grad()
def check_no_host_sync(rank, group, device):
    """Eager forwards over NCCL never wait for the device."""
    layer = gathering(group, device, dtype=torch.bfloat16)
    x = torch.randn(8, HIDDEN, device=device, dtype=torch.bfloat16)
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
        layer(x, max_tokens=2 * BOUND)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@torch.no_grad()
def check_graphs(rank, num_ranks, group, device, dtype):
    """A captured forward, replayed with new tokens while tables flip on all ranks; a twin that never moves says the same."""
    options = {"num_redundant_experts": num_ranks, "num_shadow_slots": 2, "dtype": dtype}
    layers = [
        gathering(group, device, seed=1, **options),
        gathering(group, device, combine="partial", seed=2, **options),
    ]
    twin = gathering(group, device, seed=1, num_redundant_experts=num_ranks, dtype=dtype)
    controller = make_controller(group, layers)
    x = torch.zeros(BOUND, HIDDEN, device=device, dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), controller.warm_up():
        for _ in range(2):  # compiles the kernels, and NCCL connects
            for layer in layers:
                layer(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [layer(x) for layer in layers]
    versions, step, deadline = set(), 0, time.monotonic() + DEADLINE
    while not everybody(len(versions) >= 4, group, device):
        for _ in range(10):
            x.copy_(torch.randn(BOUND, HIDDEN, generator=torch.Generator().manual_seed(num_ranks * step + rank)))
            graph.replay()
            controller.step()
            step += 1
            version = layers[0].resident.current.number
            versions.add(version)
            assert torch.equal(outputs[0], twin(x)), f"replay {step} at table version {version}"
            assert outputs[1].isfinite().all()
        assert time.monotonic() < deadline, f"rank {rank} has seen the versions {versions}; {controller.health()}"
    controller.close()
