"""The automatic choice of a dispatcher: what it depends on, and what it says."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_layer import AllGatherDispatcher, AllToAllDispatcher
from moe_layer.dispatch.choose import MOST_PADDING, Situation, choose_dispatcher, padding_bytes
from tests.distributed import distributed
from tests.moe_layer.ranks import make_layer

DECODE = Situation(num_ranks=8, mover="nccl", max_tokens=16, hidden_size=4096, top_k=8, item=2)
DEMO = Situation(num_ranks=4, mover="gloo", max_tokens=64, hidden_size=64, top_k=4, item=4)


def test_padding_bytes_by_hand():
    """(W, T, H, K, bytes an element) = (4, 10, 8, 2, 4): a row has 32 bytes; a token 32 + 5 · 4 = 20 → 32 = 64 bytes."""
    by_hand = Situation(num_ranks=4, mover="gloo", max_tokens=10, hidden_size=8, top_k=2, item=4)
    forth, exact = 3 * 10 * 64, 3 * 10 * 2 * 32 // 4
    assert padding_bytes(by_hand) == forth + exact - 2 * exact == 1440
    assert padding_bytes(replace(by_hand, mover="nccl")) == forth + 4 * exact - 2 * exact == 2880


@pytest.mark.parametrize(
    ("situation", "name", "reason"),
    [
        pytest.param(replace(DECODE, num_ranks=1), "local", "on this rank", id="one rank"),
        pytest.param(replace(DECODE, max_tokens=None), "all_to_all", "max_tokens was not given", id="no bound"),
        pytest.param(replace(DECODE, trainable=True), "all_to_all", "trained", id="trained"),
        pytest.param(replace(DECODE, peers=True), "symm_mem", "memory", id="peers"),
        pytest.param(replace(DECODE, peers=True, max_tokens=None), "all_to_all", "not given", id="peers, no bound"),
        pytest.param(replace(DECODE, peers=True, trainable=True), "all_to_all", "trained", id="peers, trained"),
        pytest.param(DECODE, "all_gather", "max_tokens=16", id="decode"),
        pytest.param(replace(DECODE, max_tokens=4096), "all_to_all", "would not pay", id="prefill"),
        pytest.param(DEMO, "all_gather", "max_tokens=64", id="the demo"),
        pytest.param(replace(DEMO, max_tokens=8192, top_k=1), "all_to_all", "would not pay", id="gloo, few choices"),
        # Two ranks and four choices: all ranks' tokens are fewer than the rows that all_to_all would send.
        pytest.param(
            replace(DEMO, max_tokens=1 << 20, num_ranks=2), "all_gather", "moves 0 bytes", id="nothing padded"
        ),
    ],
)
def test_choices(situation, name, reason):
    chosen, said = choose_dispatcher(situation)
    assert chosen == name and reason in said


@pytest.mark.parametrize("situation", [DECODE, replace(DEMO, top_k=1)], ids=["nccl", "gloo"])
def test_the_choice_turns_where_padding_costs_more_than_a_collective(situation):
    most = MOST_PADDING[situation.mover]
    last = max(tokens for tokens in range(1, 4096) if padding_bytes(replace(situation, max_tokens=tokens)) <= most)
    assert 1 < last < 4095
    names = [choose_dispatcher(replace(situation, max_tokens=tokens))[0] for tokens in (last, last + 1)]
    assert names == ["all_gather", "all_to_all"]


@distributed(num_ranks=2)
def test_what_a_layer_gets(rank, num_ranks, group, device):
    """The choice by the layer's own sizes, which it logs once with its reason; whatever is named is taken."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("moe_layer.dispatch.choose")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    backend = {"backend": "torch"}  # with the Triton kernels a GPU's choice is "symm_mem"
    for options, kind in (
        ({"max_tokens": 8, **backend}, AllGatherDispatcher),
        ({"max_tokens": 8, **backend}, AllGatherDispatcher),
        ({"max_tokens": 8, "trainable": True}, AllToAllDispatcher),
        ({"max_tokens": 1 << 20, "top_k": 1, **backend}, AllToAllDispatcher),
        ({"max_tokens": 1 << 20, "top_k": 1, "dispatcher": "all_gather"}, AllGatherDispatcher),
        ({}, AllToAllDispatcher),
        ({"max_tokens": 8, "dispatcher": "all_to_all"}, AllToAllDispatcher),
    ):
        layer = make_layer(group, device, **options)
        assert type(layer.executor.dispatcher) is kind, options
        assert layer.dispatch_backend == dist.get_backend(group)
    assert len(lines) == 4, lines
    assert "dispatcher='auto' is 'all_gather' for 2 ranks over gloo: with max_tokens=8 it moves" in lines[0]
    assert all("dispatcher='auto' is 'all_to_all' for 2 ranks over gloo" in line for line in lines[1:])
    if device.type == "cuda":
        assert make_layer(group, device, max_tokens=8).dispatch_backend == "symm_mem"
        assert "dispatcher='auto' is 'symm_mem' for 2 ranks over gloo: every rank reaches" in lines[-1]
    x = torch.ones(9, layer.hidden_size, device=device)
    with torch.no_grad(), pytest.raises(ValueError, match="x has 9 tokens, more than max_tokens=8"):
        layer(x)
