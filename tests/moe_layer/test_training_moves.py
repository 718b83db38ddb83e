"""Trainable experts that compute elsewhere from step to step: training is the same, bit for bit without replicas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from eplb.planning.placement import Placement
from moe_layer import TrainingBalancer
from moe_layer.balance import _in_place
from moe_layer.owned import OwnedExperts
from tests.distributed import distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, TOP_K, Restless, make_layer

STEPS = 20


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


def train(stack, optimizer, step, rank, device, micro_batches=1):
    """One step; the ranks have different numbers of tokens, in some steps none."""
    for micro in range(micro_batches):
        random = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
        x = torch.randn(0 if (step + rank) % 5 == 0 else 4 + rank, HIDDEN, generator=random).to(device)
        (stack(x) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=step % 2 == 0)


def state_of(optimizer):
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


@distributed(num_ranks=2)
def test_training_goes_on_as_without_moves(rank, num_ranks, group, device):
    still, moving, replicated = (
        Stack(group, device, num_redundant_experts=count, recompute=recompute)
        for count, recompute in ((0, False), (0, True), (num_ranks, False))
    )
    assert moving.layers[0].experts.matrices().down_SHI is moving.layers[0].experts.down_proj, "nothing is sent"
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (still, moving, replicated)]
    for step in range(STEPS):
        for stack, optimizer in zip((still, moving, replicated), optimizers, strict=True):
            if step % 2 and stack is not still:
                stack.place(step)
            train(stack, optimizer, step, rank, device, micro_batches=1 + step % 2)
    assert moving.layers[0].experts.owned.placement != still.layers[0].experts.owned.placement
    for name, parameter in still.named_parameters():
        assert torch.equal(moving.get_parameter(name), parameter), name
        torch.testing.assert_close(replicated.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    for one, other in zip(state_of(optimizers[0]), state_of(optimizers[1]), strict=True):
        assert torch.equal(one, other), "the optimizer's state is that of the same experts"
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
