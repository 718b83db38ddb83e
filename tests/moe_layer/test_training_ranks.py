"""Training over two ranks is training on one with both batches: losses, gradients, norms, weights, under DDP and FSDP2."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_layer import ignore_in_ddp, ignore_in_fsdp
from moe_layer.collectives import all_gather_rows
from moe_layer.training import clip_grad_norm, load_balancing_loss, route, router_z_loss, update_correction_bias
from tests.distributed import distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, TOP_K, make_layer

TOKENS, STEPS = 24, 5  # of each rank
DISPATCHERS = ({"dispatcher": "all_to_all"}, {"dispatcher": "all_gather", "max_tokens": TOKENS})
ONE_SIDED = {"dispatcher": "symm_mem", "max_tokens": TOKENS, "backend": "triton"}


@distributed(num_ranks=2)
def test_two_ranks(rank, num_ranks, group, device):
    check_losses(rank, group, device)
    check_correction_bias(rank, group, device)
    check_norms_that_are_not_finite(rank, group, device)
    for options in DISPATCHERS:
        for trainable in (False, True):
            check_that_other_derivatives_are_refused(group, device, trainable=trainable, **options)
        check_that_other_weights_are_refused(group, device, **options)
        check_training(rank, group, device, wrap_in_ddp, options)
    check_training(rank, group, device, wrap_in_ddp, DISPATCHERS[0], micro_batches=2)
    check_training(rank, group, device, wrap_in_ddp, DISPATCHERS[0], main_grads=True)
    if device.type == "cpu":  # gloo does not gather a GPU's parameters
        for options in DISPATCHERS:
            check_training(rank, group, device, wrap_in_fsdp, options)
    dist.barrier(group)  # gloo's threads then hold no tensor any more, which they could not free while Python ends


@distributed(num_ranks=2, on_cpu=False)  # the interpreter would take minutes
def test_one_sided(rank, num_ranks, group, device):
    check_training(rank, group, device, wrap_in_ddp, ONE_SIDED)
    check_training(rank, group, device, wrap_in_ddp, ONE_SIDED, micro_batches=2)


@distributed(num_ranks=2, backend="nccl")
def test_two_gpus(rank, num_ranks, group, device):
    check_losses(rank, group, device)
    check_correction_bias(rank, group, device)
    check_norms_that_are_not_finite(rank, group, device)
    for wrap in (wrap_in_ddp, wrap_in_fsdp):
        for options in (*DISPATCHERS, ONE_SIDED):
            check_training(rank, group, device, wrap, options)
    check_training(rank, group, device, wrap_in_ddp, DISPATCHERS[0], main_grads=True)


def check_that_other_derivatives_are_refused(group, device, **options):
    """Before anything is sent; the first ones are those without `create_graph=True`."""
    layer = make_layer(group, device, **options)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    found = [torch.autograd.grad(layer(x.tanh()).sum(), x, create_graph=more)[0] for more in (False, True)]
    torch.testing.assert_close(*found)  # routing has another backward where it may be differentiated again
    with pytest.raises(RuntimeError, match="is differentiable once"):
        torch.autograd.grad(found[1].square().sum(), x)
    ids, weights = (
        torch.zeros(TOKENS, TOP_K, dtype=torch.int32, device=device),
        torch.ones(TOKENS, TOP_K, device=device),
    )
    with pytest.raises(RuntimeError, match="several ranks has no derivative in forward mode"):
        torch.func.jvp(lambda x: layer(x, expert_ids=ids, expert_weights=weights), (x.detach(),), (x.detach(),))


def check_that_other_weights_are_refused(group, device, **options):
    """Once the backward has sent all that it sends."""
    layer = make_layer(group, device, **options)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    y = layer(x)
    layer.load_experts({0: {"down_proj": torch.zeros(HIDDEN, layer.intermediate_size, device=device)}})
    with pytest.raises(RuntimeError, match="other weights between a forward and its backward"):
        y.sum().backward()
    layer(x).sum().backward()


class Model(nn.Module):
    """Dense, experts, experts, dense; its loss has both auxiliary ones, of the tokens of all ranks."""

    def __init__(self, group, device, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group = group
        self.first = nn.Linear(HIDDEN, HIDDEN, device=device)
        self.layers = nn.ModuleList(make_layer(group, device, seed, trainable=True, **options) for seed in range(2))
        self.last = nn.Linear(HIDDEN, HIDDEN, device=device)

    def forward(self, x, target):
        x = self.first(x)
        loss = 0
        for layer in self.layers:
            routed = route(layer, x)
            y = checkpoint(
                layer,
                x,
                expert_ids=routed.expert_ids,
                expert_weights=routed.expert_weights,
                use_reentrant=False,
            )
            x = x + y
            loss = loss + 0.02 * load_balancing_loss(routed.logits, routed.expert_ids, group=self.group)
            loss = loss + 0.01 * router_z_loss(routed.logits, group=self.group)
        return loss + F.mse_loss(self.last(x), target)


def every(scalar, group):
    """Of all ranks; over gloo from a GPU too."""
    return all_gather_rows(scalar.view(1), group)


def wrap_in_ddp(model, device):
    ignore_in_ddp(model)
    return DistributedDataParallel(model)


def wrap_in_fsdp(model, device):
    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    # `ModuleList`s are not called; the rest is sharded with the whole.
    return fully_shard(model, mesh=mesh, ignored_params=ignore_in_fsdp(model, mesh))


def check_training(rank, group, device, wrap, options, micro_batches=1, main_grads=False):
    """AdamW with an epsilon that gradients are measured by: without it, it would not see their scale."""
    alone, model = Model(None, device), Model(group, device, **options)
    experts = [parameter for layer in model.layers for parameter in layer.experts.parameters()]
    wrapped = wrap(model, device)
    settings = {"lr": 0.01, "eps": 1e-3, "foreach": False}  # see `ignore_in_fsdp`
    optimizers = [torch.optim.AdamW(one.parameters(), **settings) for one in (alone, wrapped)]
    first = [parameter.detach().clone() for parameter in experts]
    for step in range(STEPS):
        random = torch.Generator().manual_seed(step)
        x, target = (torch.randn(2, TOKENS, HIDDEN, generator=random).to(device) for _ in range(2))
        for optimizer in optimizers:
            optimizer.zero_grad()
        if main_grads:
            for parameter in experts:
                parameter.main_grad = torch.zeros_like(parameter)
        size = TOKENS // micro_batches
        losses = []
        for start in range(0, TOKENS, size):
            part = slice(start, start + size)
            loss = alone(x[:, part].flatten(0, 1), target[:, part].flatten(0, 1)) / micro_batches
            loss.backward()
            own = wrapped(x[rank, part], target[rank, part]) / micro_batches
            own.backward()
            losses.append((loss.detach(), own.detach()))
        for expected, own in losses:
            torch.testing.assert_close(every(own, group).mean(dim=0), expected, rtol=1e-5, atol=0)
        norms = [clip_grad_norm(one, 0.2) for one in (alone, wrapped)]
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
        assert norms[0] > 0.2, "nothing is clipped"
        assert torch.equal(*every(norms[1], group))
        if main_grads:
            for parameter in experts:
                assert parameter.grad is None
                parameter.grad = parameter.main_grad
        for optimizer in optimizers:
            optimizer.step()
    assert all((one - other).abs().max() > 0.005 for one, other in zip(first, experts, strict=True))
    expected = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        found, wanted = parameter.detach(), expected[name].detach()
        found = found.full_tensor() if isinstance(found, DTensor) else found
        if ".experts." in name:
            wanted = wanted[list(model.layers[0].resident.experts)]
        distance = (found - wanted).norm() / wanted.norm()
        assert distance < 1e-5, f"{wrap.__name__} {options} {name}: {distance}"


def check_losses(rank, group, device):
    """The mean over the ranks is the loss of all tokens, value and gradients, also where one rank has fewer or none."""
    for sizes in ((5, 9), (7, 0)):
        random = torch.Generator().manual_seed(3)
        logits = torch.randn(sum(sizes), EXPERTS, generator=random).to(device).requires_grad_()
        ids = logits.detach().topk(TOP_K, dim=1).indices
        mask = (torch.rand(sum(sizes), generator=random) < 0.7).to(device)
        first = sum(sizes[:rank])
        mine = slice(first, first + sizes[rank])
        own = logits.detach()[mine].requires_grad_()
        for expected, found in (
            (load_balancing_loss(logits, ids, mask), load_balancing_loss(own, ids[mine], mask[mine], group)),
            (router_z_loss(logits, mask), router_z_loss(own, mask[mine], group)),
        ):
            (grad,), (own_grad,) = torch.autograd.grad(expected, [logits]), torch.autograd.grad(found, [own])
            torch.testing.assert_close(own_grad / 2, grad[mine])
            torch.testing.assert_close(every(found.detach(), group).mean(dim=0), expected.detach())


def check_correction_bias(rank, group, device):
    bias = torch.zeros(3, device=device)
    update_correction_bias(bias, torch.tensor([[5, 2, 1], [0, 3, 1]][rank], device=device), 0.5, group)
    assert bias.tolist() == [-0.5, -0.5, 0.5]  # of [5, 5, 2]; on rank 1 alone the first would rise


def check_norms_that_are_not_finite(rank, group, device):
    """One rank's expert has no finite gradient: all say so."""
    layer = make_layer(group, device, trainable=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    if rank == 1:
        layer.experts.down_proj.grad[0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 is nan"):
        clip_grad_norm(layer, 1.0, error_if_nonfinite=True)
    assert layer.gate.weight.grad.eq(1).all()
    # A rank whose experts got no gradient at all takes part. Its parameters may also be given as what is spread.
    layer.experts.down_proj.grad = torch.full_like(layer.experts.down_proj, 0.5) if rank == 0 else None
    layer.experts.gate_up_proj.grad = None
    twin = copy.deepcopy(layer.experts)
    wanted = (0.25 * layer.experts.down_proj.numel()) ** 0.5
    twin.down_proj.grad = layer.experts.down_proj.grad
    torch.testing.assert_close(clip_grad_norm(twin.parameters(), 1e6, process_group=group).item(), wanted)
    norm = clip_grad_norm(layer, 1e6)
    torch.testing.assert_close(norm.item(), (wanted**2 + layer.gate.weight.numel()) ** 0.5)
    with pytest.raises(ValueError, match="process_group must be left out where model is a module"):
        clip_grad_norm(layer, 1.0, process_group=group)
