"""The one-sided dispatcher between processes, through the layer: over shared memory on CPUs, CUDA IPC on one GPU, symmetric
memory on several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from eplb import EplbController
from moe_layer import MoELayer
from moe_layer.dispatch.one_sided import OneSidedDispatcher
from tests.distributed import INTERPRETED, distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, TOP_K, make_layer, tokens

MOST = 8


def connect(group, device, **options) -> OneSidedDispatcher:
    lanes = EXPERTS // dist.get_world_size(group) + 3
    return OneSidedDispatcher.connect(group, lanes, EXPERTS, MOST, HIDDEN, TOP_K, torch.float32, device, **options)


@distributed(num_ranks=2, on_cpu=INTERPRETED)
def test_two_ranks(rank, num_ranks, group, device):
    check_refusals(group, device)
    check_outputs(rank, group, device)
    check_absence(rank, group, device)


@distributed(num_ranks=4, on_cpu=False)
def test_four_ranks(rank, num_ranks, group, device):
    check_outputs(rank, group, device)


@distributed(num_ranks=2, backend="nccl")
def test_two_gpus(rank, num_ranks, group, device):
    check_outputs(rank, group, device)
    check_absence(rank, group, device)


@torch.no_grad()
def check_outputs(rank, group, device):
    """The same bits as with collectives, for batches that differ by rank, empty ones among them."""
    one_sided = connect(group, device)
    expected = {"cpu": "shared_memory", "cuda": "symmetric" if torch.cuda.device_count() > 1 else "cuda_ipc"}
    if dist.get_backend(group) == "nccl" or device.type == "cpu":
        assert one_sided._memory.source == expected[device.type]
    options = {"num_redundant_experts": dist.get_world_size(group), "backend": "triton"}
    ours = make_layer(group, device, dispatcher=one_sided, max_tokens=MOST, **options)
    theirs = make_layer(group, device, dispatcher="all_to_all", **options)
    assert ours.dispatch_backend == "symm_mem"
    for step in range(3 if device.type == "cuda" else 1):  # the interpreter takes seconds for each
        x = tokens(rank, step, device)[:MOST]
        assert torch.equal(ours(x), theirs(x))
    if device.type == "cuda":  # one forward after the other, whatever stream it is on
        x = tokens(rank, 1, device)[:MOST]
        wanted, streams = theirs(x), [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results = []
        for turn in range(10):
            with torch.cuda.stream(streams[turn % 2]):
                results.append(ours(x))
        torch.cuda.synchronize()
        assert all(torch.equal(y, wanted) for y in results)
    assert make_layer(group, device, dispatcher="symm_mem", max_tokens=MOST, **options).executor.dispatcher is (
        make_layer(group, device, dispatcher="symm_mem", max_tokens=MOST, **options).executor.dispatcher
    ), "layers share one"
    x = torch.randn(2 * MOST + 3 - rank, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    assert torch.equal(ours(x, max_tokens=2 * MOST + 3), theirs(x)), "in turns"


def check_refusals(group, device):
    for options, message in (
        ({}, "dispatcher='symm_mem' needs max_tokens, an integer of at least 1 and equal on all ranks, got None"),
        (
            {"max_tokens": MOST, "backend": "torch"},
            "dispatcher='symm_mem' needs the Triton kernels, but backend is 'torch'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_layer(group, device, dispatcher="symm_mem", **{"backend": "triton", **options})


@torch.no_grad()
def check_absence(rank, group, device):
    """A rank that does not come: the other's wait ends, its next forward says so, and nobody hangs."""
    dispatcher = connect(group, device, timeout=0.5)
    layer = make_layer(group, device, dispatcher=dispatcher, max_tokens=MOST, backend="triton")
    x = torch.zeros(3, HIDDEN, device=device)
    controller = EplbController(process_group=group)
    controller.register(layer)
    layer(x)
    dist.barrier(group)
    assert controller.health().state == "idle" and layer.dispatch_failure() is None
    if rank == 0:
        layer(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        with pytest.raises(TimeoutError, match="rank 1 of the ranks that share the experts did not come"):
            layer(x)
        health = controller.health()
        assert health.state == "dispatch_failed" and "rank 1 of the ranks that share" in health.reason
        assert layer.dispatch_failure() == health.reason
    else:
        assert controller.health().state == "idle"  # it has waited for nobody
    dist.barrier(group)
    controller.close()
    assert controller.health().state == "closed" and isinstance(layer, MoELayer)
