"""Shares solved for the batch: the bits of shares by window, and less on the fullest rank."""

from __future__ import annotations

import pytest
import torch

from bench.virtual_ranks import Sizes, VirtualRanks
from moe_layer import BatchShares, MoELayer
from tests.distributed import INTERPRETED, distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, TOP_K, make_layer, tokens
from tests.moe_layer.test_one_sided import SMALL, batch, run


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("batches", "shares must be one of 'window', 'batch' or BatchShares; got 'batches'"),
        (lambda: BatchShares(-1), "expert_cost must be an integer of at least 0, got -1"),
        (lambda: BatchShares(2.5), "expert_cost must be an integer of at least 0, got 2.5"),
        (lambda: BatchShares(1 << 21), "expert_cost must be at most 1048576, got 2097152"),
    ],
)
def test_arguments(shares, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(16, 8, 4, 2, shares=shares() if callable(shares) else shares)


def test_too_many_experts():
    with pytest.raises(ValueError, match="is solved for at most 64 ranks and 1024 experts, got 1 and 1025"):
        MoELayer(2, 2, 1025, 2, shares="batch")


def test_one_rank_has_nothing_to_divide(device):
    x = torch.randn(5, HIDDEN, device=device)
    with torch.no_grad():
        layers = [make_layer(None, torch.device(device), shares=shares) for shares in ("window", "batch")]
        assert torch.equal(*(layer(x) for layer in layers))


def test_virtual_ranks(device):
    """One-sided: the same bits, and the fullest rank has what it must: half of what the hot expert's tokens leave."""
    sizes = Sizes(num_ranks=2, num_redundant_experts=2, dtype=torch.float32, **SMALL)
    x, chosen = batch(sizes, [6, 5], device)
    plain = VirtualRanks(sizes, torch.device(device))
    solved = VirtualRanks(sizes, torch.device(device), batch_shares=BatchShares())
    for again, y in zip(run(solved, x, chosen), run(plain, x, chosen), strict=True):
        assert torch.equal(again, y)
    hot = [torch.zeros_like(ids) for _, ids in chosen]  # expert 0 alone, which has a replica on each rank
    for ids in hot:
        ids[:, 1] = -1
    solved.fork()
    lanes = solved.choose_lanes(hot)
    solved.join()
    per_rank = sum(counts_L.cpu() for _, counts_L in lanes).view(2, -1).sum(1)
    assert sorted(per_rank.tolist()) == [5, 6], "eleven tokens"


@distributed(num_ranks=2)
def test_two_ranks(rank, num_ranks, group, device):
    check(rank, group, device, "all_to_all", device.type == "cuda")
    check(rank, group, device, "all_gather", device.type == "cuda")


@distributed(num_ranks=2, on_cpu=INTERPRETED)
def test_two_ranks_one_sided(rank, num_ranks, group, device):
    check(rank, group, device, "symm_mem", True)


def check(rank, group, device, dispatcher, triton):
    options = {
        "dispatcher": dispatcher,
        "max_tokens": 12,
        "num_redundant_experts": 2,
        "backend": "triton" if triton else "torch",
    }
    plain, solved = (make_layer(group, device, shares=shares, **options) for shares in ("window", BatchShares(3)))
    x = tokens(rank, 0, device)
    with torch.no_grad():
        assert torch.equal(solved(x), plain(x))
    gradients = []  # with a gradient, another dispatcher may move the rows: the next forward is then as ever
    for layer in (plain, solved):
        x = tokens(rank, 3, device).requires_grad_()
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert torch.equal(plain.resident.load_E, solved.resident.load_E), "each forward is counted once"
    x = torch.ones(10 + rank, HIDDEN, device=device)  # all tokens choose the same experts
    with torch.no_grad():
        assert torch.equal(solved(x, max_tokens=11), plain(x, max_tokens=11))
    assert EXPERTS > TOP_K
