"""Checkpoints of training: what 2 ranks wrote goes on over 1, 2 and 4 ranks, each expert with its own moments."""

from __future__ import annotations

import functools
import logging
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from eplb.planning.placement import Placement
from moe_layer import TrainingBalancer, TrainingState, ignore_in_ddp
from moe_layer.collectives import all_gather_rows
from tests.distributed import distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, TOP_K, Restless, make_layer

BEFORE, AFTER = 4, 8  # steps before and after the checkpoint
TOKENS = 24  # of all ranks together

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a checkpoint of one process


class Model(nn.Module):
    def __init__(self, group, device, **options):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(HIDDEN, HIDDEN, device=device)
        self.layers = nn.ModuleList(make_layer(group, device, seed, trainable=True, **options) for seed in (1, 2))

    def forward(self, x):
        x = self.dense(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def place(model, seed):
    """Another random placement for each layer, equal on all ranks. On one rank there is none."""
    policy = Restless(seed)
    for layer in model.layers:
        owned = layer.experts.owned
        if owned.num_ranks > 1:
            proposal = policy.propose(np.zeros((1, 1, EXPERTS)), owned.placement.lanes_WS[None], None)
            layer.experts.place(Placement(proposal.physical_LWP[0], EXPERTS), proposal.shares_LWP[0])


def train(model, optimizer, steps, group, device):
    """The same tokens, over however many ranks; gradients of what every rank has are summed over them."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    for step in steps:
        place(model, step)
        x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(step))[rank::ranks].to(device)
        (model(x) ** 2).sum().backward()
        for name, parameter in model.named_parameters():
            if group is not None and ".experts." not in name:
                dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def whole(model, optimizer, group):
    """Weights and optimizer state by name, experts' of all ranks together; on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in {"weight": parameter.detach(), **optimizer.state[parameter]}.items():
            is_spread = group is not None and ".experts." in name and value.dim() > 0
            if isinstance(value, DTensor):  # not `full_tensor()`, which over gloo crashes on a GPU
                value, is_spread = value.to_local(), True
            found[f"{name} {key}"] = (all_gather_rows(value, group) if is_spread else value).cpu().clone()
    return found


def from_rank_0(value):
    box = [value]
    dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


@pytest.fixture
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoint"))


@distributed(num_ranks=4)
def test_two_ranks_write_and_others_go_on(rank, num_ranks, group, device, folder):
    pair = dist.new_group([0, 1])
    saved = later = None
    if rank < 2:
        model = Model(pair, device)
        optimizer = adamw(model)
        train(model, optimizer, range(BEFORE), pair, device)
        saved = whole(model, optimizer, pair)
        state = TrainingState(model, optimizer)
        one = state.state_dict()["model"]["layers.0.experts.down_proj"]
        assert isinstance(one, DTensor) and one.shape[0] == EXPERTS, "all experts are one tensor"
        assert one.to_local().data_ptr() == model.layers[0].experts.down_proj.data_ptr(), "nothing is copied"
        dcp.save({"training": state}, checkpoint_id=folder, process_group=pair)
        train(model, optimizer, range(BEFORE, BEFORE + AFTER), pair, device)
        later = whole(model, optimizer, pair)
    saved, later = from_rank_0(saved), from_rank_0(later)
    assert any(not torch.equal(saved[name], later[name]) for name in saved)

    alone = dist.new_group([0])
    for ranks, readers, experts_group in ((2, pair, pair), (4, group, group), (1, alone, None)):
        if rank >= ranks:
            continue
        other = Model(experts_group, device)
        spoil(other)
        optimizer = adamw(other)
        place(other, 77)
        with mock.patch.object(logging.getLogger("moe_layer.trainable.checkpoint"), "info") as told:
            dcp.load({"training": TrainingState(other, optimizer)}, checkpoint_id=folder, process_group=readers)
        assert told.called == (ranks != 2), "it is said where experts do not compute where they did"
        assert_equal(whole(other, optimizer, experts_group), saved, f"{ranks} ranks, what was read")
        train(other, optimizer, range(BEFORE, BEFORE + AFTER), experts_group, device)
        found = whole(other, optimizer, experts_group)
        if ranks == 2:
            assert_equal(found, later, "the run that went on")
        for name, value in found.items():  # relative to the tensor's largest element: sums over ranks round otherwise
            error = (value - later[name]).abs().max() / later[name].abs().max()
            assert error <= 1e-6, f"{ranks} ranks: {name} is off by {error:.1e}"
    if rank == 0:
        dcp.save({"training": TrainingState(other, optimizer)}, checkpoint_id=f"{folder}/alone", process_group=alone)
    alone_then = from_rank_0(whole(other, optimizer, None) if rank == 0 else None)
    check_balancer(rank, group, pair, device, folder)
    check_two_copies(group, [pair, dist.new_group([2, 3])][rank // 2], device, alone_then, folder)
    if rank < 2:
        check_wrapped(pair, device, alone_then, folder)
        check_replicas(pair, device, alone_then, folder)
        check_refusals(pair, device)


def check_two_copies(group, own, device, expected, folder):
    """Two pairs of ranks, each with all experts: expert parallelism within data parallelism."""
    for name, following in (("alone", "copies"), ("copies", None)):
        model = Model(own, device)
        spoil(model)
        optimizer = adamw(model)
        dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=f"{folder}/{name}")
        assert_equal(whole(model, optimizer, own), expected, f"two copies, {name}")
        if following is not None:
            dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=f"{folder}/{following}")
            written = dcp.FileSystemReader(f"{folder}/{following}").read_metadata().state_dict_metadata
            chunks = written["training.optimizer.state.layers.0.experts.down_proj.exp_avg"].chunks
            assert sorted(chunk.offsets[0] for chunk in chunks) == [0, EXPERTS // 2], "each expert is written once"
    dist.barrier(group)


def check_wrapped(pair, device, expected, folder):
    """What one rank wrote is read under FSDP2, written from there, and read under DDP."""
    sharded = Model(pair, device)
    experts = {one for layer in sharded.layers for one in layer.experts.parameters()}
    mesh = dist.device_mesh.DeviceMesh.from_group(pair, device.type)
    fully_shard(sharded, mesh=mesh, ignored_params=experts)
    spoil(sharded)
    optimizer = adamw(sharded, foreach=True)  # the default on a GPU, with which this mixture cannot step
    dcp.load({"training": TrainingState(sharded, optimizer)}, checkpoint_id=f"{folder}/alone", process_group=pair)
    assert isinstance(sharded.dense.weight, DTensor)
    assert_equal(whole(sharded, optimizer, pair), expected, "FSDP2")
    assert optimizer.param_groups[0]["foreach"] is True, "how to step is the reader's own"
    assert TrainingState(sharded, optimizer).state_dict()["optimizer"]["param_groups"][0]["foreach"] is True
    optimizer = adamw(sharded, foreach=False)
    dcp.load({"training": TrainingState(sharded, optimizer)}, checkpoint_id=f"{folder}/alone", process_group=pair)
    for parameter in sharded.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # it has kept its own foreach
    assert all(value["step"] == BEFORE + AFTER + 1 for value in optimizer.state.values())
    optimizer = adamw(sharded, foreach=True)
    dcp.load({"training": TrainingState(sharded, optimizer)}, checkpoint_id=f"{folder}/alone", process_group=pair)
    dcp.save({"training": TrainingState(sharded, optimizer)}, checkpoint_id=f"{folder}/fsdp", process_group=pair)

    plain = Model(pair, device)
    compiled = torch.compile(plain, backend="eager")
    assert "_orig_mod.layers.0.experts.down_proj" in ignore_in_ddp(compiled)
    wrapped = DistributedDataParallel(compiled, process_group=pair)
    spoil(plain)
    optimizer = adamw(wrapped)
    dcp.load({"training": TrainingState(wrapped, optimizer)}, checkpoint_id=f"{folder}/fsdp", process_group=pair)
    assert_equal(whole(plain, optimizer, pair), expected, "DDP")


def check_replicas(pair, device, expected, folder):
    """Copies of the weights follow in the next forward."""
    replicated = Model(pair, device, num_redundant_experts=2)
    x = torch.randn(5, HIDDEN, device=device)
    with torch.no_grad():
        before = replicated(x)
    optimizer = adamw(replicated)
    dcp.load({"training": TrainingState(replicated, optimizer)}, checkpoint_id=f"{folder}/alone", process_group=pair)
    assert_equal(whole(replicated, optimizer, pair), expected, "replicas")
    with torch.no_grad():
        after = replicated(x)
        for layer in replicated.layers:
            layer.experts.publish()
        assert torch.equal(replicated(x), after) and not torch.equal(after, before)

    # Interrupted under a placement with replicas: it goes on there, with the same bits.
    for seed in (1, 2):
        place(replicated, seed)
        two_steps(replicated, optimizer, seed, pair, device)
    dcp.save({"training": TrainingState(replicated, optimizer)}, checkpoint_id=f"{folder}/placed", process_group=pair)
    resumed = Model(pair, device, num_redundant_experts=2)
    spoil(resumed)
    other = adamw(resumed)
    dcp.load({"training": TrainingState(resumed, other)}, checkpoint_id=f"{folder}/placed", process_group=pair)
    for mine, theirs in zip(resumed.layers, replicated.layers, strict=True):
        assert mine.experts.owned.placement == theirs.experts.owned.placement
        np.testing.assert_array_equal(mine.experts.owned.shares_WS, theirs.experts.owned.shares_WS)
    for one, its in ((replicated, optimizer), (resumed, other)):
        two_steps(one, its, 3, pair, device)
    assert_equal(whole(resumed, other, pair), whole(replicated, optimizer, pair), "it went on where its experts were")
    fewer = Model(pair, device)  # without replicas there are other lanes
    with mock.patch.object(logging.getLogger("moe_layer.trainable.checkpoint"), "info") as told:
        dcp.load({"training": TrainingState(fewer, adamw(fewer))}, checkpoint_id=f"{folder}/placed", process_group=pair)
    assert told.call_args.args[1] == ["layers.0.experts", "layers.1.experts"]
    assert fewer.layers[0].experts.owned.is_at_home


def two_steps(model, optimizer, seed, group, device):
    """Two steps under the placement that there is."""
    for step in range(2):
        generator = torch.Generator().manual_seed(100 * seed + 10 * step + dist.get_rank(group))
        (model(torch.randn(9, HIDDEN, generator=generator).to(device)) ** 2).sum().backward()
        for name, parameter in model.named_parameters():
            if ".experts." not in name:
                dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        optimizer.zero_grad()


class Seen:
    """A policy that is a pure function: other loads have other placements. It keeps how many tokens it saw."""

    def __init__(self):
        self.totals = []

    def propose(self, load_LNE, physical_LWP, topology):
        self.totals.append(int(load_LNE.sum()))
        return Restless(int((load_LNE * (1 + np.arange(EXPERTS))).sum())).propose(load_LNE, physical_LWP, topology)


def check_balancer(rank, group, pair, device, folder):
    """Interrupted between two looks at the load: the next look comes when it would have come, with what it would have seen."""
    interval, counted = 3, 3 * TOKENS * TOP_K * 2  # of 2 layers

    def made(ranks):
        model = Model(ranks, device, num_redundant_experts=dist.get_world_size(ranks))
        policy = Seen()
        balancer = TrainingBalancer(model, ranks, interval=interval, policy=policy)
        return model, adamw(model), balancer, policy.totals

    def go_on(model, optimizer, balancer, steps, ranks):
        num_ranks, own = dist.get_world_size(ranks), dist.get_rank(ranks)
        for step in steps:
            x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(step))[own::num_ranks].to(device)
            (model(x) ** 2).sum().backward()
            for name, parameter in model.named_parameters():
                if ".experts." not in name:
                    dist.all_reduce(parameter.grad, group=ranks)
            optimizer.step()
            optimizer.zero_grad()
            assert balancer.step() == (step % interval == interval - 1), step

    if rank < 2:
        model, optimizer, balancer, totals = made(pair)
        go_on(model, optimizer, balancer, range(5), pair)
        assert totals == [counted] and balancer.num_moved > 0
        state = TrainingState(model, optimizer, balancer)
        dcp.save({"training": state}, checkpoint_id=f"{folder}/balancer", process_group=pair)
        resumed, other, its_balancer, its_totals = made(pair)
        with torch.no_grad():
            resumed(torch.randn(3 + rank, HIDDEN, device=device))  # counted, but not in the run that is read
        state = TrainingState(resumed, other, its_balancer)
        dcp.load({"training": state}, checkpoint_id=f"{folder}/balancer", process_group=pair)
        assert its_balancer.num_moved == balancer.num_moved
        go_on(model, optimizer, balancer, range(5, 8), pair)
        go_on(resumed, other, its_balancer, range(5, 8), pair)
        assert totals == [counted] * 2 and its_totals == [counted] and its_balancer.num_moved == balancer.num_moved
        for mine, theirs in zip(resumed.layers, model.layers, strict=True):
            assert mine.experts.owned.placement == theirs.experts.owned.placement
        assert_equal(whole(resumed, other, pair), whole(model, optimizer, pair), "it went on with its balancer")
        with pytest.raises(ValueError, match="balancer must be of layers of model"):
            TrainingState(model, optimizer, its_balancer)
        with pytest.raises(ValueError, match=r"must be of \(layers, experts\) = \(2, 8\), got \(1, 8\)"):
            balancer.load_state_dict({**balancer.state_dict(), "window": [[0] * EXPERTS]})
        with pytest.raises(CheckpointException, match=r"Missing key .*: training\.balancer"):
            state = TrainingState(model, optimizer, balancer)
            dcp.load({"training": state}, checkpoint_id=f"{folder}/alone", process_group=pair)
    dist.barrier(group)
    more, optimizer, balancer, totals = made(group)
    dcp.load({"training": TrainingState(more, optimizer, balancer)}, checkpoint_id=f"{folder}/balancer")
    go_on(more, optimizer, balancer, range(5, 6), group)
    assert totals == [counted], "what two ranks had counted, and a step of four"


def check_refusals(pair, device):
    model = Model(pair, device)
    optimizer = adamw(model)
    down = model.layers[1].experts.down_proj
    optimizer.state[down]["mean"] = torch.zeros(3, HIDDEN, device=device)
    with pytest.raises(
        ValueError, match=r"'mean' of layers.1.experts.down_proj must be .* 4 experts, .* shape \(3, 24\)"
    ):
        TrainingState(model, optimizer).state_dict()
    away = Model(pair, device).to("meta")
    with pytest.raises(ValueError, match=r"layers.0.experts.gate_up_proj must be a plain tensor .* on the meta device"):
        TrainingState(away, []).state_dict()


def spoil(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


def assert_equal(found, expected, what):
    assert found.keys() == expected.keys(), what
    for name, value in found.items():
        assert torch.equal(value, expected[name]), f"{what}: {name} differs"


def sgd(model, momentum=0.0):
    return torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=0.1, momentum=momentum)


@pytest.mark.parametrize("make_optimizer", [adamw, sgd, functools.partial(sgd, momentum=0.9)])
def test_parameters_without_optimizer_state(make_optimizer, device, folder):
    """Saving makes up no state that training would go on from, and reading restores that there was none."""

    def save(name):
        dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=f"{folder}/{name}")

    def load(name):
        spoil(other)
        other_optimizer.param_groups[0]["lr"] = 0.5
        dcp.load({"training": TrainingState(other, other_optimizer)}, checkpoint_id=f"{folder}/{name}")
        assert other_optimizer.param_groups[0]["lr"] == 1e-2
        return whole(other, other_optimizer, None)

    model = Model(None, device)
    optimizer = make_optimizer(model)
    (model(torch.randn(5, HIDDEN, device=device)) ** 2).sum().backward()
    grads = [(parameter, parameter.grad, parameter.grad.clone()) for parameter in model.parameters()]
    fresh = whole(model, optimizer, None)
    save("fresh")
    assert_equal(whole(model, optimizer, None), fresh, "saved before the first step")
    assert len(fresh) == len(grads), "weights alone"
    assert all(parameter.grad is grad and torch.equal(grad, value) for parameter, grad, value in grads)
    assert optimizer.param_groups[0]["lr"] == 1e-2

    model.dense.weight.grad = model.dense.bias.grad = None
    optimizer.step()
    partly = whole(model, optimizer, None)
    save("partly")
    assert_equal(whole(model, optimizer, None), partly, "saved after a step of some parameters")

    other = Model(None, device)
    other_optimizer = make_optimizer(other)
    for name, expected in (("partly", partly), ("fresh", fresh), ("partly", partly)):
        assert_equal(load(name), expected, name)


def test_how_to_step_is_the_readers(device, folder):
    """`foreach` and `fused` exclude each other: one that was saved must not join the other."""
    options = [{"fused": True}, {"foreach": True}, {"foreach": False}, {}]
    for number, (writer, reader) in enumerate(zip(options, [*options[1:], options[0]], strict=True)):
        models = [Model(None, device) for _ in range(2)]
        optimizers = [adamw(model, **how) for model, how in zip(models, (writer, reader), strict=True)]
        train(models[0], optimizers[0], range(2), None, device)
        dcp.save({"training": TrainingState(models[0], optimizers[0])}, checkpoint_id=f"{folder}/{number}")
        optimizers[0].param_groups[0]["lr"] = 0.5
        dcp.load({"training": TrainingState(models[1], optimizers[1])}, checkpoint_id=f"{folder}/{number}")
        group = optimizers[1].param_groups[0]
        assert (group["fused"], group["foreach"], group["lr"]) == (reader.get("fused"), reader.get("foreach"), 1e-2)
        assert_equal(whole(models[1], optimizers[1], None), whole(models[0], optimizers[0], None), f"{reader}")
        train(models[1], optimizers[1], range(2, 3), None, device)
        assert all(state["step"] == 3 for state in optimizers[1].state.values())


def test_errors_name_what_is_wrong(device, folder):
    model = Model(None, device)
    optimizer = adamw(model)
    with pytest.raises(ValueError, match=r"got 1 others, the first of shape \(2, 3\): make the optimizer after"):
        TrainingState(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(2, 3))]))
    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)

    smaller = Model(None, device, intermediate_size=8)
    with pytest.raises(CheckpointException, match=r"Size mismatch between saved torch.Size\(\[8, .*layers.0.experts"):
        dcp.load({"training": TrainingState(smaller, adamw(smaller))}, checkpoint_id=folder)
    model.more = nn.Linear(2, 2, device=device)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: training.*more"):
        dcp.load({"training": TrainingState(model, adamw(model))}, checkpoint_id=folder)
