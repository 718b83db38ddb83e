"""Trainable experts that compute elsewhere from step to step: training is the same, bit for bit without replicas."""

from __future__ import annotations

import copy
import os
import time
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from eplb.planning.placement import Placement
from moe_layer import TrainingBalancer, TrainingState
from moe_layer.collectives import all_gather_rows
from moe_layer.trainable import trainable_experts
from moe_layer.trainable.balance import _in_place
from moe_layer.trainable.publish import Route
from moe_layer.training import abandon_step, clip_grad_norm, no_sync
from moe_layer.weights.owned import OwnedExperts
from tests.distributed import distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, TOP_K, Restless, make_layer

STEPS, FLIPS = (200 if torch.cuda.is_available() else 80), 20


class Stack(nn.Module):
    def __init__(self, group, device, **options):
        super().__init__()
        self.layers = nn.ModuleList(make_layer(group, device, seed, trainable=True, **options) for seed in (1, 2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

    def place(self, seed):
        """Another random placement and shares for each layer, equal on all ranks."""
        policy = Restless(seed)
        for layer in self.layers:
            old = layer.experts.owned.placement
            proposal = policy.propose(np.zeros((1, 1, EXPERTS)), old.lanes_WS[None], None)
            layer.experts.place(Placement(proposal.physical_LWP[0], EXPERTS), proposal.shares_LWP[0])


def tokens(step, rank, device, micro=0):
    random = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(0 if (step + rank) % 5 == 0 else 4 + rank, HIDDEN, generator=random).to(device)


def train(stack, optimizer, step, ranks, device, micro_batches=1, syncs_once=False, group=None):
    """One step with the tokens of `ranks`, one or several, which have different numbers, in some steps none.

    Routers' gradients are summed over `group`, if there is one.
    """
    ranks = [ranks] if isinstance(ranks, int) else ranks
    for micro in range(micro_batches):
        with no_sync(stack) if syncs_once and micro < micro_batches - 1 else nullcontext():
            x = torch.cat([tokens(step, rank, device, micro) for rank in ranks])
            (stack(x) ** 2).sum().backward()
    if group is not None:
        for layer in stack.layers:
            dist.all_reduce(layer.gate.weight.grad, group=group)
    optimizer.step()
    optimizer.zero_grad(set_to_none=step % 2 == 0)


def state_of(optimizer):
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


@pytest.fixture
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoint"))


@distributed(num_ranks=2)
def test_training_goes_on_as_without_moves(rank, num_ranks, group, device, folder):
    still, moving, replicated = (
        Stack(group, device, num_redundant_experts=count, recompute=recompute)
        for count, recompute in ((0, False), (0, True), (num_ranks, False))
    )
    assert moving.layers[0].experts.matrices().down_SHI is moving.layers[0].experts.down_proj, "nothing is sent"
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3) for one in (still, moving, replicated)]
    for step in range(STEPS):
        for stack, optimizer in zip((still, moving, replicated), optimizers, strict=True):
            if step % (STEPS // FLIPS) == 1 and stack is not still:
                stack.place(step)
            train(stack, optimizer, step, rank, device, micro_batches(step), stack is not still, group)
        if step == STEPS // 2 - 1:
            dcp.save({"training": TrainingState(replicated, optimizers[2])}, checkpoint_id=folder)
    assert moving.layers[0].experts.owned.placement != still.layers[0].experts.owned.placement
    for name, parameter in still.named_parameters():
        assert torch.equal(moving.get_parameter(name), parameter), name
        error = (replicated.get_parameter(name) - parameter).abs().max() / parameter.abs().max()
        assert error <= 1e-6, f"{name} is off by {error:.1e}"
    for one, other in zip(state_of(optimizers[0]), state_of(optimizers[1]), strict=True):
        assert torch.equal(one, other), "the optimizer's state is that of the same experts"
    check_a_restart_on_one_rank(still, group, device, folder)
    # What was saved here is loaded under another placement, and the first forward has it.
    x = torch.randn(3, HIDDEN, device=device)
    with torch.no_grad():
        expected = replicated(x)
        again = Stack(group, device, num_redundant_experts=num_ranks)
        again.place(1)
        again.load_state_dict(replicated.state_dict())
        assert torch.equal(again(x), expected) and torch.equal(copy.deepcopy(replicated)(x), expected)
        for layer in replicated.layers:
            layer.experts.down_proj.data.mul_(2)
        assert torch.equal(replicated(x), expected), "nobody has been told"
        for layer in replicated.layers:
            layer.experts.publish()
        assert not torch.equal(replicated(x), expected)
    check_what_is_sent(rank, group, device)
    check_steps_that_fail(rank, group, device)
    check_ranks_that_differ(rank, group, device)
    check_waiting_gradients(rank, group, device)
    check_writes_that_nobody_was_told_of(group, device)
    check_deadlines(rank, group, device)
    check_a_lost_peer(rank, group, device)  # the last: rank 1 ends there


def micro_batches(step):
    return 1 + 2 * (step % 16 == 1)


def check_a_restart_on_one_rank(still, group, device, folder):
    """What two ranks with replicas wrote in the middle: one rank, with all experts and tokens, comes to the same end."""
    alone = Stack(None, device)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    dcp.load({"training": TrainingState(alone, optimizer)}, checkpoint_id=folder, no_dist=True)
    for step in range(STEPS // 2, STEPS):
        train(alone, optimizer, step, (0, 1), device, micro_batches(step))
    for name, parameter in still.named_parameters():
        whole = all_gather_rows(parameter.detach(), group) if ".experts." in name else parameter
        error = (alone.get_parameter(name) - whole).abs().max() / whole.abs().max()
        assert error <= 1e-6, f"restarted on one rank: {name} is off by {error:.1e}"


def away(group, device, **options):
    """Whose experts compute elsewhere, each in one replica."""
    stack = Stack(group, device, **options)
    stack.place(7)
    return stack


def counted(monkeypatch, calls):
    for name in ("publish", "collect"):
        original = getattr(Route, name)
        monkeypatch.setattr(Route, name, lambda *given, name=name, run=original: (calls.append(name), run(*given))[1])


def check_what_is_sent(rank, group, device):
    """Of 2 layers with 2 tensors each: with `no_sync` once a step, however many micro-batches."""
    stack, calls = away(group, device), []
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted(monkeypatch, calls)
        for syncs_once, times in ((True, 1), (False, 3)):
            for step in range(2):
                calls.clear()
                train(stack, optimizer, step, rank, device, 3, syncs_once)
                assert calls.count("publish") == calls.count("collect") == 4 * times, (syncs_once, step)


def twins(group, device):
    """One whose experts compute elsewhere and one that never fails, with optimizers."""
    stacks = away(group, device), Stack(group, device)
    return *stacks, *(torch.optim.AdamW(one.parameters(), lr=1e-2) for one in stacks)


def raising(run, call, fails_after):
    """`run`, whose call of this number raises, after its exchange or in its place."""
    left = [call]

    def wrapped(*given):
        left[0] -= 1
        result = run(*given) if fails_after or left[0] else None
        if not left[0]:
            raise RuntimeError("planted")
        return result

    return wrapped


def check_ranks_that_differ(rank, group, device):
    """Rank 0 has come to the end of a backward, with whole gradients; rank 1 fails behind the last exchange."""
    layers = [make_layer(group, device, trainable=True, router=None) for _ in range(2)]
    moved = np.roll(layers[0].experts.owned.placement.lanes_WS, 1, axis=0)
    ids = torch.arange(2 * 5, device=device).view(5, 2) % EXPERTS
    weights = torch.full(ids.shape, 0.5, device=device)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)

    def backward(layer):
        layer(x, expert_ids=ids, expert_weights=weights).square().sum().backward()

    failing, twin = layers
    failing.experts.place(Placement(moved, EXPERTS))
    backward(twin)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rank == 1:
            monkeypatch.setattr(Route, "collect", raising(Route.collect, 2, fails_after=True))
            with pytest.raises(RuntimeError, match=r"returning gradients .* failed on rank 1.*abandon_step.*planted"):
                backward(failing)
        else:
            backward(failing)
    assert failing.experts.copies.is_stale == (rank == 0), "else nothing is tested"
    if rank == 1:
        for act in (failing.experts.matrices, lambda: failing.experts.place(Placement(moved, EXPERTS))):
            with pytest.raises(RuntimeError, match=r"returning gradients .* did not come to its end on this rank"):
                act()
    abandon_step(failing)
    assert all(parameter.grad is None for parameter in failing.parameters())
    backward(failing)
    assert all(torch.equal(one.grad, same.grad) for one, same in zip(*map(nn.Module.parameters, layers), strict=True))


def check_steps_that_fail(rank, group, device):
    """After each, training goes on as if the step had not been begun, bit for bit."""
    failing, twin, optimizer, other = twins(group, device)

    def attempt(micro_batches=1):
        for micro in range(micro_batches):
            with no_sync(failing) if micro < micro_batches - 1 else nullcontext():
                (failing(tokens(50, rank, device, micro)) ** 2).sum().backward()

    def a_loss_is_nan():
        failing(tokens(50, rank, device))  # and no backward

    def gradients_are_nan():
        (failing(tokens(50, rank, device)) * float("nan")).sum().backward()
        optimizer.zero_grad()

    def between_micro_batches():
        with no_sync(failing):
            failing(tokens(50, rank, device)).sum().backward()
        abandon_step(failing)

    def in_the_middle_of_a_backward():
        """On all ranks, between the two layers."""
        handle = failing.layers[0].register_forward_hook(
            lambda module, inputs, y: y.register_hook(lambda grad: 1 / 0) and None
        )
        with pytest.raises(ZeroDivisionError):
            attempt(2)
        handle.remove()
        abandon_step(failing)

    def while_weights_are_sent():
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(Route, "publish", raising(Route.publish, 2, fails_after=False))
            with pytest.raises(RuntimeError, match=r"sending weights .* failed on rank \d.*checkpoint.*planted"):
                attempt()
        with pytest.raises(RuntimeError, match=r"sending weights .* did not come to its end"):
            failing.layers[0].experts.matrices()
        abandon_step(failing)

    def while_experts_are_placed():
        """Rank 0 has placed them, rank 1 has not."""
        failing.place(8)
        experts = failing.layers[1].experts
        seen = experts.owned.placement
        lanes_WS = np.roll(seen.lanes_WS, 1, axis=0)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if rank == 1:
                run = raising(trainable_experts.all_gather_rows, 1, fails_after=True)
                monkeypatch.setattr(trainable_experts, "all_gather_rows", run)
                with pytest.raises(RuntimeError, match=r"agreeing on a placement .* failed on rank 1"):
                    experts.place(Placement(lanes_WS, EXPERTS))
            else:
                experts.place(Placement(lanes_WS, EXPERTS))
        assert (experts.owned.placement == seen) == (rank == 1)
        abandon_step(failing)
        assert experts.owned.is_at_home and not failing.layers[0].experts.owned.is_at_home
        failing.place(9)

    for step, fails in enumerate(
        (
            a_loss_is_nan,
            gradients_are_nan,
            between_micro_batches,
            in_the_middle_of_a_backward,
            while_weights_are_sent,
            while_experts_are_placed,
        )
    ):
        fails()
        for stack, steps in ((failing, optimizer), (twin, other)):
            train(stack, steps, step, rank, device)
        for name, parameter in twin.named_parameters():
            assert torch.equal(failing.get_parameter(name), parameter), f"{fails.__name__}: {name}"
    for one, same in zip(state_of(optimizer), state_of(other), strict=True):
        assert torch.equal(one, same)


def check_waiting_gradients(rank, group, device):
    """Nothing passes over them."""
    stack = away(group, device)
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-2)
    with no_sync(stack):
        for step in range(2):
            stack(tokens(step, rank, device)).sum().backward()
    assert all(layer.experts.down_proj.grad is None for layer in stack.layers)
    for act in (
        lambda: clip_grad_norm(stack, 1.0),
        lambda: stack.place(1),
        lambda: TrainingState(stack, optimizer).state_dict(),
    ):
        with pytest.raises(RuntimeError, match=r"gradients of 2 backwards within no_sync\(\) wait"):
            act()
    with pytest.raises(ZeroDivisionError), no_sync(stack):
        _ = 1 / 0
    stack(tokens(2, rank, device)).sum().backward()
    clip_grad_norm(stack, 1.0)
    assert all(layer.experts.down_proj.grad is not None for layer in stack.layers)


def check_writes_that_nobody_was_told_of(group, device):
    stack = away(group, device)
    x = torch.randn(3, HIDDEN, device=device)
    with torch.no_grad():
        before = stack(x)
        stack.layers[1].experts.gate_up_proj.mul_(2)
        with pytest.raises(RuntimeError, match=r"gate_up_proj was written .* call experts.publish\(\) on all ranks"):
            stack.layers[1].experts.matrices()
        for layer in stack.layers:
            layer.experts.publish()
        after = stack(x)
        assert not torch.equal(after, before)
        TrainingState(stack, torch.optim.AdamW(stack.parameters())).state_dict()  # writes what they hold
        assert torch.equal(stack(x), after)
        name = "layers.1.experts.gate_up_proj"
        halved = {name: stack.get_parameter(name) / 2}
        assert torch.equal(torch.func.functional_call(stack, halved, x), before)
        assert torch.equal(stack(x), after), "what a functional call has sent does not stay"


def check_deadlines(rank, group, device):
    """A rank that does not come to the way back of the gradients, or to `abandon_step`."""
    if device.type == "cpu":
        hasty = dist.new_group([0, 1], timeout=timedelta(seconds=1))
        stack = away(hasty, device)
        before = [parameter.detach().clone() for parameter in stack.parameters()]
        y = stack(tokens(1, rank, device)).sum()
        start = time.monotonic()
        if rank == 0:
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(Route, "collect", lambda *given: dist.barrier(hasty))  # rank 1 is elsewhere
                with pytest.raises(
                    RuntimeError, match=r"returning gradients .* failed on rank 0.*checkpoint.*TrainingState"
                ):
                    y.backward()
            assert time.monotonic() - start < 20
            with pytest.raises(RuntimeError, match="did not come to its end"):
                stack.layers[1].experts.matrices()
        else:
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(Route, "collect", lambda *given: 1 / 0)
                with pytest.raises(RuntimeError, match=r"failed on rank 1.*division by zero"):
                    y.backward()
        assert all(torch.equal(*pair) for pair in zip(stack.parameters(), before, strict=True))
        dist.barrier(group)
    stack = away(group, device)
    if rank == 0:
        with pytest.raises(TimeoutError, match=r"abandon_step\(\) .* ranks \[1\] did not call it"):
            abandon_step(stack, timeout=0.1)
    dist.barrier(group)


def check_a_lost_peer(rank, group, device):
    stack = away(group, device)
    before = [parameter.detach().clone() for parameter in stack.parameters()]
    if rank == 1:
        Route.publish = lambda *given: os._exit(0)
        stack(tokens(1, rank, device))
    with pytest.raises(RuntimeError, match=r"sending weights .* ranks \[0, 1\] failed on rank 0.*last checkpoint"):
        stack(tokens(1, rank, device))
    with pytest.raises(RuntimeError, match=r"sending weights .* did not come to its end"):
        stack.layers[0].experts.matrices()
    assert all(torch.equal(*pair) for pair in zip(stack.parameters(), before, strict=True))


@distributed(num_ranks=2)
def test_the_balancer(rank, num_ranks, group, device):
    stack = Stack(group, device, num_redundant_experts=num_ranks, router=None)
    balancer = TrainingBalancer(stack, group, interval=3)
    ids = torch.tensor([[2, 3]] * 12 + [[1, 2], [3, 4], [5, 6], [7, 0]], device=device)  # rank 0 alone has both
    weights = torch.full(ids.shape, 0.5, device=device)
    x = torch.randn(len(ids), HIDDEN, device=device)

    def loads():
        loads_W = np.zeros(num_ranks)
        experts = stack.layers[0].experts.owned
        for expert, load in enumerate(torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()):
            here = experts.placement.lanes_WS == expert
            loads_W += load * (experts.shares_WS * here).sum(axis=1)
        return loads_W

    before = loads()
    for step in range(6):
        for layer in stack.layers:
            layer(x, expert_ids=ids, expert_weights=weights).sum().backward()
        assert balancer.step() == (step in (2, 5))
    after = loads()
    assert before.max() / before.mean() > 1.3 and after.max() / after.mean() < 1.05
    assert balancer.num_moved > 0 and after.sum() == pytest.approx(len(ids) * TOP_K)
    experts = stack.layers[0].experts
    experts.down_proj.main_grad = torch.zeros_like(experts.down_proj)
    with pytest.raises(ValueError, match="cannot have a main_grad"):
        stack.layers[0](x, expert_ids=ids, expert_weights=weights)
    del experts.down_proj.main_grad
    with pytest.raises(ValueError, match="no trainable layer"):
        TrainingBalancer(nn.Linear(2, 2), group)
    own = np.roll(experts.owned.placement.lanes_WS, rank, axis=0)
    with pytest.raises(ValueError, match="must be equal on all ranks"):
        experts.place(Placement(own, EXPERTS))


@distributed(num_ranks=2)
def test_a_step_that_fails(rank, num_ranks, group, device):
    """Rank 1 leaves a backward out. Rank 0 is told within the deadline, and no rank has lost or changed a weight."""
    # Compiles, which takes longer than the deadline allows.
    warm = Stack(group, device, num_redundant_experts=num_ranks)
    train(warm, torch.optim.AdamW(warm.parameters(), lr=1e-2), 1, rank, device)
    short = dist.new_group(timeout=timedelta(seconds=4))
    stack = Stack(short, device, num_redundant_experts=num_ranks)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2)
    train(stack, optimizer, 1, rank, device)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    with torch.no_grad():
        expected = stack(x)
    weights = {name: value.clone() for name, value in stack.state_dict().items()}
    loss = (stack(x) ** 2).sum()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"another of the 2 ranks .* each backward, .* load them"):
            loss.backward()
    dist.barrier(group)
    for name, value in stack.state_dict().items():
        assert torch.equal(value, weights[name]), name
    again = Stack(group, device, num_redundant_experts=num_ranks)
    again.load_state_dict(stack.state_dict())
    with torch.no_grad():
        assert torch.allclose(again(x), expected, atol=1e-6)


def test_what_stays_keeps_its_lane():
    lanes, shares = _in_place(np.array([[3, 1]]), np.array([[2, 3]]), np.array([[0.25, 0.75]]))
    assert lanes.tolist() == [[3, 2]] and shares.tolist() == [[0.75, 0.25]]


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        ([[0, 1], [2, 3]], "must fill"),
        ([[0, 1, -1], [2, 3, 0]], "1 lanes empty"),
        ([[0, 1, 2], [1, 2, 0]], "expert 3 has no replica"),
    ],
)
def test_placements_that_do_not_fit(lanes, message):
    owned = OwnedExperts(4, 0, 2, torch.device("cpu"), num_redundant_experts=2)
    before = owned.table.lanes_P.tolist()
    with pytest.raises(ValueError, match=message):
        owned.place(Placement(np.array(lanes), 4))
    assert owned.table.lanes_P.tolist() == before and not owned.is_at_home


def test_one_rank_has_nowhere_to_go(device):
    layer = make_layer(None, device, trainable=True)
    with pytest.raises(ValueError, match="several ranks"):
        layer.experts.place(layer.experts.owned.placement)
