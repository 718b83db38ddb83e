"""Swapped models over two ranks: loading, one batch for all of them, padding, and `generate()` to different lengths."""

from __future__ import annotations

import copy
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from moe_layer import ignore_in_ddp
from moe_layer.checkpoint.folder import Checkpoint
from moe_layer.collectives import all_gather_rows
from moe_layer.dispatch.all_gather import AllGatherDispatcher
from moe_layer.dispatch.one_sided import OneSidedDispatcher
from moe_layer.hf import load_experts_from, swap_experts, unswap_experts
from moe_layer.hf.padding import Padding
from tests.distributed import INTERPRETED, distributed
from tests.moe_layer.hf.models import logits_of, make_model, make_tokens, relative, without_experts
from tests.moe_layer.hf.test_absence import one_sided_waits
from tests.moe_layer.ranks import DEADLINE, everybody, make_controller

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOP_K = 2


def swapped(seed, device, group, **options):
    model = make_model("qwen3_moe", device=str(device), seed=seed)
    twin = copy.deepcopy(model)
    swap_experts(model, group, **options)
    return model, twin


def load_of(model, group):
    """Tokens that the experts of the first layer were given, on all ranks."""
    load_E = model.get_submodule("model.layers.0.mlp.experts").resident.load_E
    return int(all_gather_rows(load_E.sum()[None], group).sum())


def _one_batch_for_all(rank, group, device):
    model, twin = swapped(0, device, group, tokens="replicated")
    for shape in ((1, 7), (1, 1), (2, 4)):
        tokens, before = make_tokens(str(device), shape), load_of(model, group)
        found = logits_of(model, tokens)
        assert relative(found, logits_of(twin, tokens)) <= 1e-5
        every = all_gather_rows(found.flatten()[None], group)
        assert torch.equal(every[0], every[1]), "ranks differ"
        assert load_of(model, group) - before == TOP_K * tokens.numel(), "each token counts once"
    told = model.generate(tokens, max_new_tokens=4, **GREEDY)
    assert torch.equal(told, twin.generate(tokens, max_new_tokens=4, **GREEDY))
    if dist.get_backend(group) == "gloo":
        with pytest.raises(ValueError, match=r"the same batch on all ranks, but these have \[3, 4\] tokens"):
            logits_of(model, make_tokens(str(device), (1, 3 + rank)))

    trained, _ = swapped(0, device, group, tokens="replicated", trainable=True)
    for one in (model, trained, twin):
        one(tokens, labels=tokens, use_cache=False).loss.backward()
    wrapped, _ = swapped(0, device, group, tokens="replicated", trainable=True)
    ignore_in_ddp(wrapped)
    DistributedDataParallel(wrapped)(tokens, labels=tokens, use_cache=False).loss.backward()
    wanted = dict(twin.named_parameters())
    for one in (model, trained, wrapped):
        for name, parameter in one.named_parameters():
            gradient = wanted[name].grad
            if ".experts." in name:  # this rank's four
                gradient = gradient[4 * rank : 4 * rank + 4]
            assert relative(parameter.grad, gradient) <= 1e-5, name


def _padding(rank, group, device):
    """Left of the tokens, as `generate()` wants it; another number of rows on each rank."""
    model, twin = swapped(1, device, group)
    tokens = make_tokens(str(device), (2 + rank, 6))
    mask = torch.ones_like(tokens)
    mask[0, :4], mask[1, :1] = 0, 0
    real = sum(6 * (2 + other) - 5 for other in (0, 1))
    found, before = logits_of(model, tokens, attention_mask=mask), load_of(model, group)
    assert relative(found[mask > 0], logits_of(twin, tokens, attention_mask=mask)[mask > 0]) <= 1e-5
    assert before == TOP_K * real
    with torch.no_grad():
        positional = model(tokens, mask, use_cache=False).logits
    assert torch.equal(positional, found)
    assert load_of(model, group) == 2 * before
    logits_of(model, tokens)  # without a mask all count
    assert load_of(model, group) == 2 * before + TOP_K * 6 * (2 + 3)

    before = load_of(model, group)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        greedy = {**GREEDY, **options, "attention_mask": mask, "max_new_tokens": 4}
        told = model.generate(tokens, synced_gpus=True, **greedy)
        assert torch.equal(told, twin.generate(tokens, **greedy))
        if not options:  # the prompt's tokens, and three times one of each sequence
            assert load_of(model, group) - before == TOP_K * (real + 3 * (2 + 3))

    loss = copy.deepcopy(twin)(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
    assert relative(model(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss, loss) <= 1e-5
    assert unswap_experts(model) == 2 and not model._forward_pre_hooks and not model._forward_hooks

    swap_experts(model, group, count_padding=True)
    found = logits_of(model, tokens, attention_mask=mask)
    assert relative(found, logits_of(twin, tokens, attention_mask=mask)) <= 1e-5
    assert load_of(model, group) == TOP_K * 6 * (2 + 3)


def _different_lengths(rank, group, device):
    """The other rank goes on as long as this one if it is told to; else this one ends in an error that says what to do."""
    hasty = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    model, twin = swapped(2, device, hasty)
    tokens = make_tokens(str(device), (1, 4 + rank))
    greedy = {**GREEDY, "max_new_tokens": 2 + 4 * rank}
    expected = twin.generate(tokens, **greedy)
    assert torch.equal(model.generate(tokens, synced_gpus=True, **greedy), expected)
    start = time.monotonic()
    if rank == 0:
        assert torch.equal(model.generate(tokens, synced_gpus=False, **greedy), expected)
    else:
        with pytest.raises(RuntimeError, match=r"(?s)2 ranks .* did not take part.*needs generate\(.*synced_gpus=True"):
            model.generate(tokens, synced_gpus=False, **greedy)
        assert time.monotonic() - start < 20
    dist.barrier(group)


def _bounded(rank, group, device):
    """With `max_tokens` dispatch has buffers of a static size; with a batch for all ranks, for a rank's part of it."""
    num_ranks, on_cpu = dist.get_world_size(group), device.type == "cpu"
    for mode, shape in (("own", (2, 5 + rank)), ("replicated", (2, 6))):
        model, twin = swapped(4, device, group, tokens=mode, max_tokens=12, num_redundant_experts=2)
        dispatchers = [layer.mlp.experts.executor.dispatcher for layer in model.model.layers]
        assert {type(one) for one in dispatchers} == {AllGatherDispatcher if on_cpu else OneSidedDispatcher}
        assert {one.max_tokens for one in dispatchers} == {12 if mode == "own" else 12 // num_ranks}
        assert on_cpu or dispatchers[0] is dispatchers[1], "their buffers are shared"
        for tokens in (make_tokens(str(device), shape), make_tokens(str(device), (1, 1))):
            assert relative(logits_of(model, tokens), logits_of(twin, tokens)) <= 1e-5
        with pytest.raises(ValueError, match=r"hidden_states has 14 tokens, more than the max_tokens=12"):
            logits_of(model, make_tokens(str(device), (2, 7)))
    gemma = make_model("gemma4_text", device=str(device))
    modules = list(gemma.modules())
    with pytest.raises(
        ValueError, match=r"(?s)how many experts a token has, but of .*experts it is not: its block cannot"
    ):
        swap_experts(gemma, group, max_tokens=12)
    assert all(one is other for one, other in zip(gemma.modules(), modules, strict=True)), "it has changed"
    twin = copy.deepcopy(gemma)
    swap_experts(gemma, group, max_tokens=12, dispatcher="all_gather")
    assert relative(logits_of(gemma, tokens), logits_of(twin, tokens)) <= 1e-5


@contextmanager
def shared_folder(rank, group):
    """The same new folder for all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        names = [folder]
        dist.broadcast_object_list(names, group=group)
        yield names[0]
        dist.barrier(group)


def _loading(rank, group, device):
    tokens = make_tokens(str(device), (2, 5 + 3 * rank))
    models = [make_model("qwen3_moe", device=str(device), seed=seed) for seed in (0, 1)]
    with shared_folder(rank, group) as folder:
        folders = [f"{folder}/{seed}" for seed in (0, 1)]
        for model, one in zip(models, folders, strict=True):
            model.save_pretrained(one)  # transformers writes on rank 0
        dist.barrier(group)
        _their_own_experts(rank, group, device, tokens, models, folders)


def _their_own_experts(rank, group, device, tokens, models, folders):
    """Each rank reads its own; and while experts move, another checkpoint is loaded over them."""
    lean = without_experts(models[0], folders[0], device)
    swap_experts(lean, group, num_redundant_experts=2)
    read, names = Checkpoint.read, []
    Checkpoint.read = lambda self, name, row=None: names.append(name) or read(self, name, row)
    assert load_experts_from(lean, folders[0], progress=False) == 2 * 5
    Checkpoint.read = read
    placement = lean.get_submodule("model.layers.0.mlp.experts").resident.current.placement
    mine = {int(expert) for expert in placement.compact()[rank]}
    assert {int(name.split(".")[5]) for name in names if ".layers.0." in name} == mine and len(mine) == 5
    expected = logits_of(models[0], tokens)
    assert relative(logits_of(lean, tokens), expected) <= 1e-5

    # Its parameters beside the experts are those of the first model.
    for name, one in models[1].named_parameters():
        if ".experts." not in name:
            one.data.copy_(models[0].get_parameter(name))
    renewed = logits_of(models[1], tokens)
    assert relative(renewed, expected) > 1e-2
    controller = make_controller(group, [lean], num_redundant_experts=2)
    deadline, flips, experts = time.monotonic() + DEADLINE, 0, lean.get_submodule("model.layers.0.mlp.experts")
    for number in (2, 4):
        while not everybody(flips >= number, group, device):
            assert time.monotonic() < deadline, controller.health()
            assert relative(logits_of(lean, tokens), expected) <= 1e-5
            controller.step()
            flips = experts.resident.current.number
        if number == 2:
            load_experts_from(lean, folders[1], progress=False)
            expected = renewed
    controller.close()
    dist.barrier(group)


@distributed(num_ranks=2, timeout=240.0)  # of which 15 s on two idle cores
def test_over_two_ranks(rank, num_ranks, group, device):
    _loading(rank, group, device)
    _one_batch_for_all(rank, group, device)
    _padding(rank, group, device)
    _bounded(rank, group, device)
    if INTERPRETED or device.type == "cuda":
        one_sided_waits(rank, group, device)
    _different_lengths(rank, group, device)  # last: its group is of no use afterwards


@distributed(num_ranks=2, backend="nccl")
def test_over_two_gpus(rank, num_ranks, group, device):
    _loading(rank, group, device)
    _one_batch_for_all(rank, group, device)
    _padding(rank, group, device)
    _bounded(rank, group, device)


def test_what_is_known_of_padding():
    """P + S columns of the mask and S tokens: the last S are theirs."""
    model = make_model("mixtral")
    padding = Padding(model)
    heard = []
    model.model.register_forward_hook(lambda *_: heard.append((padding.mask_of(4), padding.mask_of(5))))
    tokens = make_tokens(shape=(2, 2))
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    with torch.no_grad():
        model(tokens, attention_mask=mask[:, :2], use_cache=False)
        model(inputs_embeds=torch.zeros(2, 2, 32), attention_mask=mask[:, 1:], use_cache=False)
        padding._before(model, (tokens,), {"attention_mask": mask})
        assert padding.mask_of(4).tolist() == [False, True, True, True]
        model(tokens, attention_mask=None, use_cache=False)
        model(tokens, attention_mask=torch.zeros(2, 1, 2, 2), use_cache=False)
    model(tokens, attention_mask=mask[:, :2], use_cache=False)  # a backward may come
    masks = [[False, False, True, True], [False, True, True, True], None, None, None]
    assert [None if one is None else one.tolist() for one, _ in heard] == masks
    assert all(other is None for _, other in heard), "of another number of tokens"
    assert padding.mask_of(4) is None, "after the forward"
    model.own = padding
    other = copy.deepcopy(model)
    hooks = [*other._forward_pre_hooks.values(), *other._forward_hooks.values()]
    assert len(hooks) == 2 and all(hook.__self__ is other.own is not padding for hook in hooks)
    padding.remove()
    assert not model._forward_pre_hooks and not model._forward_hooks
