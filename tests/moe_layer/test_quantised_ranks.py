"""Quantised experts that move between two ranks beside twins that do not; and their state dicts meanwhile."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from moe_layer import MoELayer, make_pool, quantize_experts
from tests.distributed import distributed
from tests.moe_layer.quantised import SCHEMES, E, H, I, K, same_bytes
from tests.moe_layer.ranks import DEADLINE, everybody, make_controller


def make_layers(group: dist.ProcessGroup, device: torch.device, shared: bool) -> list[MoELayer]:
    """One of each scheme, equal on all ranks; with `shared` in memory that the other rank can open."""
    layers = []
    for number, quantisation in enumerate(SCHEMES.values()):
        torch.manual_seed(number)
        common = {"num_redundant_experts": 2, "num_shadow_slots": 2, "device": device, "dtype": torch.bfloat16}
        pool = None
        if shared:
            sizes = {"num_ranks": 2, "shared": True, "quantisation": quantisation}
            pool = make_pool(1, H, I, E, **common, **sizes)
        layers.append(MoELayer(H, I, E, K, quantisation=quantisation, process_group=group, pool=pool, **common))
        with torch.no_grad():
            layers[-1].gate.weight.mul_(4)
        layers[-1].experts.state_dict_scope = "all"
    return layers


@torch.no_grad()
def check_relocation(
    rank: int, group: dist.ProcessGroup, device: torch.device, communicator: str, name: str, waves: int
) -> None:
    layers, twins = (make_layers(group, device, shared) for shared in (name == "symm_mem", False))
    for layer, twin in zip(layers, twins, strict=True):
        twin.load_state_dict(layer.state_dict())
    controller = make_controller(group, layers, communicator=communicator)
    random = torch.Generator().manual_seed(rank)
    deadline = time.monotonic() + DEADLINE
    while not everybody(all(layer.resident.current.number >= waves for layer in layers), group, device):
        x = torch.randn(int(torch.randint(9, (1,), generator=random)), H, generator=random).to(device, torch.bfloat16)
        for scheme, layer, twin in zip(SCHEMES, layers, twins, strict=True):
            assert torch.equal(layer(x), twin(x)), f"{scheme} at table version {layer.resident.current.number}"
        controller.step()
        assert time.monotonic() < deadline, controller.health()
    assert controller._worker.rounds.communicator.name == name
    for scheme, layer, twin in zip(SCHEMES, layers, twins, strict=True):
        wanted = twin.state_dict()
        assert all(same_bytes(value, wanted[key]) for key, value in layer.state_dict().items()), scheme
    with controller.quiesced():
        for scheme, layer, twin in zip(SCHEMES, layers, twins, strict=True):
            wanted = twin.state_dict()
            for expert, slots in layer.resident.live_slots().items():
                for slot in slots:
                    for key, rows in layer.resident.pool.tensors.items():
                        assert same_bytes(rows[slot], wanted[f"experts.{key}"][expert]), f"{scheme}: {key} of {expert}"
    controller.close()
    dist.barrier(group)


@torch.no_grad()
def check_state_dicts_by_range(rank: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Each rank saves and loads half of the experts, though its slots hold others."""
    for layer, other in zip(make_layers(group, device, False), make_layers(group, device, False), strict=True):
        whole = layer.state_dict()
        layer.experts.state_dict_scope = "range"
        part = layer.state_dict()
        assert all(
            same_bytes(value, whole[key][4 * rank : 4 * rank + 4]) for key, value in part.items() if "experts" in key
        )
        other.reset_parameters()
        other.load_state_dict(part)
        assert all(same_bytes(value, whole[key]) for key, value in other.state_dict().items())


@torch.no_grad()
def check_quantised_in_place(rank: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Each rank does its own, and equal replicas stay equal: outputs are those of a layer that was loaded so."""
    torch.manual_seed(0)
    common = {"process_group": group, "num_redundant_experts": 2, "device": device, "dtype": torch.bfloat16}
    layer, loaded = MoELayer(H, I, E, K, **common), MoELayer(H, I, E, K, quantisation="int4", **common)
    quantize_experts(layer, "int4")
    layer.experts.state_dict_scope = "all"
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(5 + rank, H, device=device).bfloat16()
    assert torch.equal(layer(x), loaded(x))


@distributed(num_ranks=2)
def test_i4_i5_two_ranks(rank, num_ranks, group, device):
    check_relocation(rank, group, device, "torch_gloo", "torch_gloo", waves=2)
    check_relocation(rank, group, device, "auto", "symm_mem", waves=1)
    check_state_dicts_by_range(rank, group, device)
    check_quantised_in_place(rank, group, device)


@distributed(num_ranks=2, backend="nccl")
def test_i4_i5_two_gpus(rank, num_ranks, group, device):
    check_relocation(rank, group, device, "auto", "symm_mem", waves=8)
    check_state_dicts_by_range(rank, group, device)
    check_quantised_in_place(rank, group, device)
