"""Published quantised checkpoints over two ranks: each loads its own experts, they move, and are saved as the same bytes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from moe_layer import quantisation_of
from moe_layer.hf import load_experts_from, save_experts_to, swap_experts
from tests.distributed import distributed
from tests.moe_layer import published
from tests.moe_layer.hf.models import logits_of, make_tokens, relative
from tests.moe_layer.hf.quantised import FAMILIES, lean_model, write_published
from tests.moe_layer.hf.test_quantised import said_by
from tests.moe_layer.hf.test_ranks import GREEDY, shared_folder
from tests.moe_layer.quantised import same_bytes
from tests.moe_layer.ranks import DEADLINE, everybody, make_controller

# On one rank the sums over a token's experts have another order, after which fp8 may round otherwise.
CLOSE = {"fp8_block": 2e-2, "mxfp4": 1e-5}


def check(family: str, rank: int, group: dist.ProcessGroup, device: torch.device, folder: Path) -> None:
    one, source = FAMILIES[family], folder / family
    if rank == 0:
        write_published(one, source)
    dist.barrier(group)
    quantisation, tokens = quantisation_of(source), make_tokens(str(device), (2, 5 + 3 * rank))
    alone, model = lean_model(source, device), lean_model(source, device)
    swap_experts(alone, quantisation=quantisation)
    load_experts_from(alone, source, progress=False)
    swap_experts(model, group, quantisation=quantisation, num_redundant_experts=2)
    assert load_experts_from(model, source, progress=False) == 2 * 5
    expected = logits_of(model, tokens)
    blocks = (of.get_submodule("model.layers.1.mlp.experts") for of in (model, alone))
    assert (
        relative(*(said_by(experts, one.sizes["hidden_size"], device) for experts in blocks)) < CLOSE[one.quantisation]
    )

    controller = make_controller(group, [model], num_redundant_experts=2)
    experts, deadline = model.get_submodule("model.layers.0.mlp.experts"), time.monotonic() + DEADLINE
    while not everybody(experts.resident.current.number >= 2, group, device):
        assert torch.equal(logits_of(model, tokens), expected), experts.resident.current.number
        controller.step()
        assert time.monotonic() < deadline, controller.health()
    save_experts_to(model, folder / f"{family}-saved", like=source)
    said = model.generate(tokens, max_new_tokens=3, synced_gpus=True, **GREEDY)
    if one.quantisation != "fp8_block":
        assert torch.equal(said, alone.generate(tokens, max_new_tokens=3, **GREEDY))
    assert said.shape == (2, 8 + 3 * rank)
    controller.close()
    back, tensors = published.read(folder / f"{family}-saved"), published.read(source)
    assert back.keys() == {name for name in tensors if ".experts." in name}
    assert all(same_bytes(value, tensors[name]) for name, value in back.items())
    dist.barrier(group)


@distributed(num_ranks=2)
def test_over_two_ranks(rank, num_ranks, group, device):
    with shared_folder(rank, group) as folder:
        for family in ("deepseek_v3", "gpt_oss"):
            check(family, rank, group, device, Path(folder))


@distributed(num_ranks=2, backend="nccl")
def test_over_two_gpus(rank, num_ranks, group, device):
    with shared_folder(rank, group) as folder:
        for family in ("deepseek_v3", "gpt_oss"):
            check(family, rank, group, device, Path(folder))
