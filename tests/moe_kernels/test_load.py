"""Load is counted once for each forward: not in a backward, whatever was traced, and not lost among streams and threads."""

import pytest
import torch

from moe_kernels import (
    ExpertMatrices,
    LoadCounter,
    ReplicaTable,
    RoutingRule,
    local_experts,
    local_forward,
    select_replicas,
    select_replicas_torch,
)
from moe_kernels.replicas import replicas

EXPERTS, HIDDEN = 3, 16


def ops(device, backend):
    """By name, each op that counts, of one argument: a counter to which it adds 2 tokens of 2 experts each."""
    lanes = torch.arange(EXPERTS, dtype=torch.int32, device=device)
    table = ReplicaTable(lanes, lanes)
    ids = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32, device=device)
    x, weights = torch.ones(2, HIDDEN, device=device), torch.ones(2, 2, device=device)
    logits = torch.randn(2, EXPERTS, generator=torch.Generator().manual_seed(0)).to(device)
    matrices = ExpertMatrices(
        torch.ones(EXPERTS, 2 * HIDDEN, HIDDEN, device=device), torch.ones(EXPERTS, HIDDEN, HIDDEN, device=device)
    )
    experts = (matrices, table)
    return {
        "select_replicas": lambda load: select_replicas(ids, table, load, 0, num_lanes=EXPERTS, backend=backend)[0],
        "local_experts": lambda load: local_experts(x, ids, weights, *experts, load, backend=backend),
        "local_forward": lambda load: local_forward(x, logits, *experts, load, 2, RoutingRule(), backend=backend),
        "local_forward of one token": lambda load: torch.cat(
            [
                local_forward(x[t : t + 1], logits[t : t + 1], *experts, load, 2, RoutingRule(), backend=backend)
                for t in (0, 1)
            ]
        ),
    }


def counter(device):
    zeros = torch.zeros(EXPERTS, dtype=torch.int64, device=device)
    return LoadCounter(zeros, torch.ones(1, dtype=torch.int64, device=device))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ops("cpu", "torch"))
def test_nothing_is_counted_in_a_backward(device, name, backend, compiled):
    """What runs there repeats a forward. The op asks when it runs: it was traced in a forward."""
    torch.compiler.reset()
    op, load = ops(device, backend)[name], counter(device)
    if compiled:
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = op(load)
    assert load.load_E.sum() == 4
    x, seen = torch.ones(1, requires_grad=True), []
    y = 2 * x
    y.register_hook(lambda gradient: seen.append(op(load)))
    y.sum().backward()
    assert torch.equal(seen[0], expected)
    assert load.load_E.sum() == 4
    op(load)
    assert load.load_E.sum() == 8


class Watched(torch.Tensor):
    """A counter that says whether another thread could add to it at the same time."""

    def add_(self, other):
        assert replicas._RECORDING.locked()
        return super().add_(other)


def test_threads_on_a_cpu_take_turns_to_count():
    """An addition reads and writes, outside the GIL. (On a GPU the kernels add with atomics: see compile_kernels.py.)"""
    lanes, one = torch.arange(EXPERTS, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
    load_E = torch.zeros(EXPERTS, dtype=torch.int64).as_subclass(Watched)
    ids = torch.tensor([[0, 2]], dtype=torch.int32)
    select_replicas_torch(ids, ReplicaTable(lanes, lanes), LoadCounter(load_E, one), 0, num_lanes=EXPERTS)
    assert load_E.tolist() == [1, 0, 1]
