"""Gradients through the one-sided dispatcher, bit for bit those of all_to_all: frozen experts and trained ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from eplb.planning.placement import Placement
from moe_layer.dispatch.one_sided import OneSidedDispatcher
from moe_layer.training import no_sync
from tests.distributed import INTERPRETED, distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, TOP_K, make_layer

MOST = 6


@distributed(num_ranks=2, on_cpu=INTERPRETED)
def test_two_ranks(rank, num_ranks, group, device):
    check_choices_of_no_lane(rank, group, device)
    check_frozen(rank, group, device)
    check_trained(rank, group, device)


@distributed(num_ranks=2, on_cpu=INTERPRETED)
def test_what_ranks_must_do_alike(rank, num_ranks, group, device):
    if device.type == "cuda":
        check_trained(
            rank, group, device
        )  # kernels are compiled once and for all: that takes longer than some waits below
        dist.barrier(group)
    check_ranks_that_differ(rank, group, device)
    check_backwards_in_another_order(rank, group, device)
    check_absence_in_the_backward(rank, group, device)
    if device.type == "cuda":
        check_capture(group, device)


@distributed(num_ranks=4, on_cpu=False)
def test_four_ranks(rank, num_ranks, group, device):
    check_choices_of_no_lane(rank, group, device)
    check_frozen(rank, group, device, torch.bfloat16)
    check_trained(rank, group, device)


@distributed(num_ranks=2, backend="nccl")
def test_two_gpus(rank, num_ranks, group, device):
    check_frozen(rank, group, device)
    check_trained(rank, group, device)


def batch(rank, step, device, dtype=torch.float32, most=MOST):
    """Fewer tokens on higher ranks, none on the last in the second step; and a direction for the gradient."""
    random = torch.Generator().manual_seed(10 * step + rank)
    last = rank == dist.get_world_size() - 1
    count = 0 if last and step == 1 else max(1, most - rank - step)
    x, direction = (torch.randn(count, HIDDEN, generator=random).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), direction


def connect(group, device, **options) -> OneSidedDispatcher:
    lanes = EXPERTS // dist.get_world_size(group) + 3
    return OneSidedDispatcher.connect(group, lanes, EXPERTS, MOST, HIDDEN, TOP_K, torch.float32, device, **options)


def gradients(layer, x, y, direction, **options):
    """y and the gradients of x, the router, and experts that are trained."""
    y.backward(direction, **options)
    found = [y.detach().clone(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    return found


def assert_equal(ours, theirs, what):
    assert len(ours) == len(theirs) and all(one is not None for one in ours)
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one, other), f"{what}, tensor {place}: {(one - other).abs().max()}"


def check_frozen(rank, group, device, dtype=torch.float32):
    """In turns and with padding; with an empty rank and shares of the batch. Then each time a forward without gradients."""
    options = {"num_redundant_experts": dist.get_world_size(group), "backend": "triton", "dtype": dtype}
    for step, shares in enumerate(("window", "batch")):
        bound = MOST + 3 if shares == "window" else MOST
        results = []
        for name in ("symm_mem", "all_to_all"):
            layer = make_layer(group, device, dispatcher=name, max_tokens=MOST, shares=shares, **options)
            layer.gate.requires_grad_()
            x, direction = batch(rank, step, device, dtype, bound)
            mask = torch.arange(len(x), device=device) != 1
            found = gradients(layer, x, layer(x, mask, max_tokens=bound), direction)
            assert rank or found[1].abs().max() > 0.01
            with torch.no_grad():
                found.append(layer(x[:MOST]))
            results.append(found)
        assert_equal(*results, f"frozen, {shares}")


def check_choices_of_no_lane(rank, group, device):
    """Without experts in between; K is 3. What a step before has left in such a choice's place is no gradient of its weight."""
    world, tokens, top_k = dist.get_world_size(group), 5, 3
    dispatcher = OneSidedDispatcher.connect(group, 2, 2 * world, MOST, HIDDEN, top_k, torch.float32, device)
    random = torch.Generator().manual_seed(rank)
    for step in range(2):
        lanes = torch.stack([torch.randperm(2 * world, generator=random)[:top_k] for _ in range(tokens)]).int()
        lanes[torch.rand(tokens, top_k, generator=random) < 0.4 * step] = -1
        counts = torch.bincount(lanes[lanes >= 0], minlength=2 * world).int().to(device)
        lanes = lanes.to(device)
        # Whole numbers: sums are exact, in any order.
        x, direction, weights = (
            torch.randint(-4, 5, (tokens, width), generator=random).float().to(device)
            for width in (HIDDEN, HIDDEN, top_k)
        )
        x.requires_grad_()
        weights.requires_grad_()
        sent = dispatcher.dispatch(x, weights, lanes, counts, "triton")
        y = dispatcher.combine(sent.rows_RH * sent.row_weights_N[:, None], sent, lanes, "triton")
        y.backward(direction)
        exists = lanes >= 0
        factor = (weights.detach() * exists).sum(dim=1, keepdim=True)
        assert torch.equal(y.detach(), x.detach() * factor)
        assert torch.equal(x.grad, direction * factor)
        assert torch.equal(weights.grad, (x.detach() * direction).sum(dim=1, keepdim=True) * exists)
        assert bool(exists.all()) == (step == 0)


def check_trained(rank, group, device):
    """With experts that move between steps, a checkpoint, a graph that is kept, and two layers' backwards in turn."""
    options = {"backend": "triton", "trainable": True}
    ours, theirs = (
        [make_layer(group, device, seed, dispatcher=name, max_tokens=MOST, **options) for seed in range(2)]
        for name in ("symm_mem", "all_to_all")
    )
    assert ours[0].dispatch_backend == "symm_mem"
    optimizers = [
        torch.optim.SGD([p for layer in layers for p in layer.parameters()], 0.1) for layers in (ours, theirs)
    ]
    for step in range(2):
        results = []
        for layers in (ours, theirs):
            layer = layers[0]
            x, direction = batch(rank, step, device)
            if step == 0:
                y = layer(x)
                with no_sync(layer):
                    found = gradients_kept(layer, x, y, direction)
                found += gradients(layer, x, y, direction)
                layer(x.detach()).backward(direction)  # to step by
            else:
                found = gradients(layer, x, checkpoint(layer, x, use_reentrant=False), direction)
                # Of the experts alone.
                halves = torch.full((len(x), TOP_K), 0.5, device=device)
                layer(x.detach(), expert_ids=ids(x), expert_weights=halves).backward(direction)
                found += [parameter.grad.clone() for parameter in layer.experts.parameters()]
            results.append(found)
        assert_equal(*results, f"trained, step {step}")
        for layers, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            lanes = layers[0].experts.owned.placement.lanes_WS
            layers[0].experts.place(Placement(lanes[::-1].copy(), EXPERTS))
    if device.type == "cpu":
        return  # the interpreter takes seconds for each
    results = []
    for layers in (ours, theirs):
        x, direction = batch(rank, 0, device)
        ys = [layer(x) for layer in layers]
        (ys[0] * direction + ys[1]).sum().backward()
        results.append([x.grad, *(p.grad for layer in layers for p in layer.parameters())])
    assert_equal(*results, "two layers")


def ids(x):
    """Two experts of each token."""
    first = torch.arange(len(x), device=x.device) % EXPERTS
    return torch.stack((first, (first + 3) % EXPERTS), dim=1).int()


def gradients_kept(layer, x, y, direction):
    """The first of two backwards through one graph; within no_sync only x and the router have theirs yet."""
    y.backward(direction, retain_graph=True)
    found = [x.grad.clone(), layer.gate.weight.grad.clone()]
    x.grad = layer.gate.weight.grad = None
    return found


def check_ranks_that_differ(rank, group, device):
    """In whether a backward may come: who needs one learns it in the forward, the others in their next."""
    layer = make_layer(group, device, dispatcher=connect(group, device), max_tokens=MOST, backend="triton")
    x = torch.ones(3, HIDDEN, device=device)
    message = r"those of the ranks \[0\] do, those of the ranks \[1\] do not"
    if rank == 0:
        with pytest.raises(ValueError, match=message):
            layer(x.requires_grad_())
    else:
        layer(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
    with pytest.raises(ValueError, match="x or expert_weights must require a gradient on all of them or on none"):
        layer(x.detach())
    dist.barrier(group)


def check_backwards_in_another_order(rank, group, device):
    """No wrong numbers."""
    layer = make_layer(
        group, device, dispatcher=connect(group, device), max_tokens=MOST, backend="triton", trainable=True
    )
    x = torch.ones(3, HIDDEN, device=device).requires_grad_()
    outputs = [layer(x), layer(x)]
    with pytest.raises(ValueError, match="must run forwards and backwards in the same order"):
        outputs[rank].sum().backward()
    dist.barrier(group)


def check_absence_in_the_backward(rank, group, device):
    """From all of it, or from the way home alone: an error after the deadline, before any optimizer steps."""
    for trainable in (False, True):
        dispatcher = connect(group, device, timeout=2.0)
        options = {"max_tokens": MOST, "backend": "triton", "trainable": trainable}
        layer = make_layer(group, device, dispatcher=dispatcher, **options)
        x = torch.ones(3, HIDDEN, device=device).requires_grad_()
        y = layer(x).sum()
        dist.barrier(group)
        if rank == 0:
            with pytest.raises(TimeoutError, match="rank 1 of the ranks that share the experts did not come"):
                y.backward()
        elif trainable:
            torch.autograd.grad(y, list(layer.experts.parameters()))
        dist.barrier(group)
        if rank == 1:
            dispatcher.raise_if_failed()  # it has waited for nobody that did not come
        dist.barrier(group)


def check_capture(group, device):
    """A graph would replay what the host has waited for: refused before anything is sent."""
    layer = make_layer(group, device, dispatcher="symm_mem", max_tokens=MOST, backend="triton", router=None)
    x = torch.ones(3, HIDDEN, device=device).requires_grad_()
    weights = torch.full((3, TOP_K), 0.5, device=device)
    layer(x, expert_ids=ids(x), expert_weights=weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="no CUDA graph can capture that forward"), torch.cuda.graph(graph):
        layer(x, expert_ids=ids(x), expert_weights=weights)
    torch.cuda.synchronize()
