"""The bound of a forward's tokens: what it refuses, and the turns that a dispatcher with static buffers takes."""

import re

import pytest
import torch

from moe_kernels import build_schedule, combine, count_experts
from moe_layer import Dispatched, MoELayer
from tests.moe_layer.ranks import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K
from tests.moe_layer.reference import give_unit_scale


class Turns:
    """All lanes are this rank's; at most `max_tokens` tokens in a turn. Notes what each turn was given."""

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens
        self.turns = []

    def backend(self, device):
        return "gloo"

    def dispatch(self, x_TH, weights_TK, lanes_TK, counts_L, backend, max_tokens=None):
        self.turns.append((max_tokens, len(x_TH)))
        assert counts_L.tolist() == [int((lanes_TK == lane).sum()) for lane in range(len(counts_L))]
        lanes_N = lanes_TK.reshape(-1).contiguous()

        def schedule(block_m, extra_m):
            return build_schedule(lanes_N, counts_L, block_m=block_m, extra_m=extra_m, backend=backend)

        return Dispatched(x_TH, lanes_TK.shape[1], weights_TK.reshape(-1), schedule, max_tokens or len(x_TH))

    def combine(self, rows_NH, dispatched, lanes_TK, backend):
        return combine(rows_NH, lanes_TK.contiguous(), backend=backend)


def make(device, **options):
    return give_unit_scale(MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, device=device, **options), seed=0)


def batch(num_tokens, device):
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens)).to(device)


@pytest.mark.parametrize(
    ("num_tokens", "bound", "turns"),
    [
        pytest.param(5, None, [(8, 5)], id="the constructor's bound"),
        pytest.param(5, 6, [(6, 5)], id="a smaller bound"),
        pytest.param(8, 8, [(8, 8)], id="the same bound"),
        pytest.param(9, 9, [(8, 8), (1, 1)], id="one token more"),
        pytest.param(20, 21, [(8, 8), (8, 8), (5, 4)], id="three turns"),
        pytest.param(3, 24, [(8, 3), (8, 0), (8, 0)], id="as many turns as another rank needs"),
        pytest.param(0, 9, [(8, 0), (1, 0)], id="no tokens at all"),
    ],
)
def test_turns(num_tokens, bound, turns, device):
    """Every forward, and every backward that repeats it, takes the turns that the bound asks for, whatever the batch."""
    layer, twin = make(device, dispatcher=Turns(8), max_tokens=8), make(device)
    dispatcher = layer.executor.dispatcher
    x = batch(num_tokens, device)
    with torch.no_grad():
        y = layer(x, max_tokens=bound)
        assert dispatcher.turns == turns
        torch.testing.assert_close(y, twin(x))
    assert layer.resident.load_E.sum() == num_tokens * TOP_K
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for one, leaf, options in ((layer, leaves[0], {"max_tokens": bound}), (twin, leaves[1], {})):
        one(leaf, **options).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert dispatcher.turns == 3 * turns


def test_a_dispatcher_without_static_buffers_takes_one_turn(device):
    layer = make(device, dispatcher=Turns(None), max_tokens=8)
    with torch.no_grad():
        layer(batch(20, device), max_tokens=24)
    assert layer.executor.dispatcher.turns == [(None, 20)]


def test_turns_under_autocast(device):
    layer = make(device, dispatcher=Turns(8), max_tokens=8)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        layer(batch(12, device), max_tokens=12)
    assert layer.executor.dispatcher.turns == [(8, 8), (4, 4)]


@pytest.mark.parametrize("shape", [(9, HIDDEN), (3, 3, HIDDEN)], ids=str)
@pytest.mark.parametrize("of", ["local", 8, None])
def test_too_many_tokens(of, shape, device):
    """The promise is kept by every dispatcher, and nothing is counted or sent before it is checked."""
    dispatcher = of if of == "local" else Turns(of)
    layer = make(device, dispatcher=dispatcher, max_tokens=8)
    x = torch.zeros(shape, device=device)
    for options, bound in (({}, 8), ({"max_tokens": 7}, 7)):
        with torch.no_grad(), pytest.raises(ValueError, match=f"x has 9 tokens, more than max_tokens={bound}"):
            layer(x, **options)
    assert layer.resident.load_E.sum() == 0 and layer.max_tokens == 8
    assert dispatcher == "local" or not dispatcher.turns
    with torch.no_grad():
        layer(x, max_tokens=9)
    layer_without = make(device)
    with torch.no_grad(), pytest.raises(ValueError, match="x has 9 tokens, more than max_tokens=8"):
        layer_without(x, max_tokens=8)


@pytest.mark.parametrize("bound", [0, -1, 2.0, True, "8"])
def test_a_bound_of_a_forward_names_itself(bound, device):
    layer = make(device)
    with pytest.raises(ValueError, match=f"max_tokens must be an integer of at least 1, got {re.escape(repr(bound))}"):
        layer(batch(1, device), max_tokens=bound)


def test_counts_of_lanes(device):
    lanes = torch.tensor([[0, 3], [-1, 3], [5, 0]], dtype=torch.int32, device=device)
    assert count_experts(lanes, 6).tolist() == [2, 0, 0, 2, 0, 1]
    assert count_experts(lanes[:0], 2).tolist() == [0, 0]
    assert count_experts(lanes, 6).dtype == torch.int32
