"""Ranks that do not come: the watch over NCCL's forwards without NCCL, and on GPUs. (On CPUs one-sided: test_ranks.py.)"""

from __future__ import annotations

import copy
import gc
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from moe_layer.dispatch.all_gather import AllGatherDispatcher
from moe_layer.dispatch.one_sided import OneSidedDispatcher
from moe_layer.hf import swap_experts, unswap_experts
from moe_layer.hf.absence import NcclWatch
from tests.distributed import distributed
from tests.moe_layer.hf.models import make_model, make_tokens
from tests.moe_layer.ranks import wait_until

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ABSENT = r"(?s)2 ranks .* did not take part.*needs generate\(.*synced_gpus=True"


class Device:
    """What a watch is told of a device, and does to it."""

    def __init__(self):
        self.marked, self.finished, self.aborted, self.capturing = [], 0, 0, False

    def abort(self):
        self.aborted += 1

    def watch(self, timeout):
        return NcclWatch(timeout, self.abort, self.marked.append, lambda: self.finished, lambda: self.capturing)


def test_forwards_that_end():
    """Late marks, exceptions and captures are no absence; the thread ends with the watch."""
    device = Device()
    watch = device.watch(1.0)
    for _ in range(3):
        with watch:
            pass
    assert device.marked == [1, 2, 3]
    device.finished = 2
    time.sleep(0.1)
    device.finished = 3
    with pytest.raises(ZeroDivisionError), watch:
        1 / 0  # noqa: B018
    device.capturing = True
    with watch:
        pass
    assert device.marked == [1, 2, 3]
    time.sleep(1.2)
    watch.raise_if_over()
    assert not device.aborted and watch.thread.is_alive()
    thread = watch.thread
    del watch
    gc.collect()
    wait_until(lambda: not thread.is_alive(), "the thread has ended")


@pytest.mark.parametrize("hangs", ["on the host", "on the device", "and raises"])
def test_a_forward_that_does_not_end(hangs, caplog):
    device = Device()
    watch = device.watch(0.1)
    with watch:
        pass
    device.finished = 1
    if hangs == "on the device":
        with watch:  # the host goes on
            pass
        wait_until(lambda: device.aborted, "the watch has aborted")
    else:
        with pytest.raises(TimeoutError, match=r"a forward was not over within 0\.1 s") as raised, watch:
            wait_until(lambda: device.aborted, "the watch has aborted")
            if hangs == "and raises":
                raise RuntimeError("out of memory, as the counts are none")
        assert isinstance(raised.value.__cause__, RuntimeError) == (hangs == "and raises")
    assert "synced_gpus=True" in caplog.text
    with pytest.raises(TimeoutError, match="not over"), watch:
        raise AssertionError("a forward began")
    time.sleep(0.1)
    assert device.aborted == 1


def _small(device, layers):
    model = make_model("qwen3_moe", device=str(device))
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    return model


def test_generate_is_the_models_own_again():
    """A copy has its own; what somebody put on the instance stays."""
    from moe_layer.hf.absence import check_generate, uncheck_generate

    model, tokens, looked = _small("cpu", 1), make_tokens(shape=(1, 3)), []
    check_generate(model, looked.append)
    other = copy.deepcopy(model)
    for one in (model, other):
        told = one.generate(tokens, max_new_tokens=1, **GREEDY)
        assert told.shape == (1, 4) and looked.pop() is one
    uncheck_generate(model)
    uncheck_generate(model)
    assert "generate" not in vars(model) and "generate" in vars(other)
    model.generate = own = lambda *args: ("own", *args)
    check_generate(model, looked.append)
    assert model.generate(3) == ("own", 3) and looked == [model]
    uncheck_generate(model)
    assert model.generate is own
    check_generate(torch.nn.Linear(2, 2), looked.append)  # has none


def _ends_in_an_error(rank, group, device, dispatcher, longer, warm):
    """The other rank's generate() is `longer` tokens longer: one more, and no forward follows that could raise.

    `warm` has a deadline that kernels may be compiled in.
    """
    model, tokens = _small(device, 1), make_tokens(str(device), (1, 2))
    greedy = {**GREEDY, "max_new_tokens": 1 + longer * rank}
    expected = model.generate(tokens, **greedy)
    options = {"max_tokens": 2, "num_shadow_slots": 0, "backend": "triton"}
    if device.type == "cuda":
        swap_experts(model, dist.group.WORLD, dispatcher=warm, **options)
        assert torch.equal(model.generate(tokens, synced_gpus=True, **greedy), expected)
        unswap_experts(model)
    swap_experts(model, group, dispatcher=dispatcher, **options)
    assert torch.equal(model.generate(tokens, synced_gpus=True, **greedy), expected)
    start = time.monotonic()
    if rank == 0:
        assert torch.equal(model.generate(tokens, **greedy), expected)
    else:
        with pytest.raises(RuntimeError, match=ABSENT):
            model.generate(tokens, **greedy)
        assert device.type == "cpu" or time.monotonic() - start < 30  # interpreted kernels have no clock
    return model


def one_sided_waits(rank, group, device):
    for longer in (1, 2) if device.type == "cuda" else (1,):  # the interpreter takes seconds
        sizes = (4, 8, 2, 32, 2, torch.float32, device)
        hasty = OneSidedDispatcher.connect(group, *sizes, timeout=2.0 if device.type == "cuda" else 0.5)
        model = _ends_in_an_error(rank, group, device, hasty, longer, "symm_mem")
        assert unswap_experts(model) == 1 and "generate" not in vars(model)
        dist.barrier(group)


@distributed(num_ranks=2, backend="nccl")
def test_one_sided_waits_of_two_gpus(rank, num_ranks, group, device):
    one_sided_waits(rank, group, device)


@pytest.mark.parametrize("name", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("longer", [1, 2])
@distributed(num_ranks=2, backend="nccl")
def test_nccl_is_waited_for_with_a_deadline(rank, num_ranks, group, device, name, longer):
    """all_to_all's host waits in the forward, all_gather's at its next look at a result. The process lives on."""
    hasty = dist.new_group([0, 1], timeout=timedelta(seconds=20))  # a busy machine needs time to make its communicator
    dispatcher = name if name == "all_to_all" else AllGatherDispatcher(hasty, 4, 2)
    _ends_in_an_error(rank, hasty, device, dispatcher, longer, name)
    dist.barrier(group)
    assert (torch.ones(2, device=device) + 1).sum().item() == 4
    os._exit(0)  # nothing is asked of how an aborted communicator is destroyed
