"""Saving and loading in logical order, on one rank; `test_expert_parallel.py` has the rest."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from eplb import EplbConfig, EplbController
from moe_layer import MoELayer
from moe_layer.weights.logical import LogicalWeights
from moe_layer.weights.versions import Held
from tests.moe_layer.reference import give_unit_scale
from tests.moe_layer.relocation import Relocator


def make_layer(device: str, **options) -> MoELayer:
    return MoELayer(16, 8, 4, 2, device=device, **options)


def make_moved(device: str) -> MoELayer:
    """A layer whose experts lie in other slots than they began in."""
    layer = give_unit_scale(make_layer(device), seed=4)
    relocator = Relocator([layer])
    for expert in (2, 0, 3, 2):
        relocator.move(expert)
    assert layer.resident.current.placement.lanes_WS[0].tolist() != [0, 1, 2, 3, -1]
    return layer


def assert_equal_states(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_names_shapes_and_order(device):
    layer = make_layer(device, router="minimax_m2")
    state = layer.state_dict(prefix="mlp.")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "mlp.gate.weight": (4, 16),
        "mlp.gate.e_score_correction_bias": (4,),
        "mlp.experts.gate_up_proj": (4, 16, 16),
        "mlp.experts.down_proj": (4, 16, 8),
    }
    for expert, (slot,) in layer.resident.live_slots().items():
        assert torch.equal(state["mlp.experts.gate_up_proj"][expert], layer.resident.pool.tensors["gate_up_proj"][slot])
        assert torch.equal(state["mlp.experts.down_proj"][expert], layer.resident.pool.tensors["down_proj"][slot])


def test_saved_tensors_are_copies(device):
    layer = make_layer(device)
    before = layer.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items() if name.startswith("experts.")}
    give_unit_scale(layer, seed=9)
    for name, tensor in kept.items():
        assert torch.equal(before[name], tensor)


def test_the_same_whatever_the_placement(device):
    layer = give_unit_scale(make_layer(device))
    relocator = Relocator([layer])
    x = torch.randn(6, 16, device=device)
    with torch.no_grad():
        state, y = layer.state_dict(), layer(x)
        for expert in (1, 3, 1, 0, 2):
            relocator.move(expert)
            assert_equal_states(layer.state_dict(), state)
            assert torch.equal(layer(x), y)


def test_loads_into_another_placement(device):
    moved, x = make_moved(device), torch.randn(6, 16, device=device)
    fresh = make_layer(device)
    assert str(fresh.load_state_dict(moved.state_dict())) == "<All keys matched successfully>"
    with torch.no_grad():
        assert torch.equal(fresh(x), moved(x))
    other = give_unit_scale(make_layer(device), seed=8)
    moved.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(moved(x), other(x))
    assert_equal_states(moved.state_dict(), other.state_dict())


def test_loading_leaves_other_layers_of_a_shared_pool_alone(device):
    from moe_layer import make_pool

    pool = make_pool(2, 16, 8, 4, device=device)
    layers = [give_unit_scale(make_layer(device, pool=pool), seed=seed) for seed in (1, 2)]
    Relocator(layers).move(3, layer=0)
    kept = layers[1].state_dict()
    layers[0].load_state_dict(make_moved(device).state_dict())
    assert_equal_states(layers[1].state_dict(), kept)
    assert_equal_states(layers[0].state_dict(), make_moved(device).state_dict())


def test_loads_another_dtype(device):
    half = make_moved(device).half()
    layer = make_layer(device)
    layer.load_state_dict(half.state_dict())
    assert layer.state_dict()["experts.down_proj"].dtype == torch.float32
    assert torch.equal(layer.state_dict()["experts.down_proj"], half.state_dict()["experts.down_proj"].float())


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("strict", [False, True])
def test_another_shape_is_an_error_and_writes_nothing(strict, name, device):
    layer = make_moved(device)
    before = layer.state_dict()
    wrong = {key: tensor + 1 for key, tensor in before.items()}
    wrong[f"experts.{name}"] = wrong[f"experts.{name}"][:3]
    with pytest.raises(RuntimeError, match=rf"size mismatch for experts\.{name}: \(3, .*\) in .* but \(4, .*\)"):
        layer.load_state_dict(wrong, strict=strict)
    after = layer.state_dict()
    for part in ("gate_up_proj", "down_proj"):
        assert torch.equal(after[f"experts.{part}"], before[f"experts.{part}"])


def test_missing_and_unexpected_keys(device):
    layer = make_moved(device)
    state = layer.state_dict()
    before = dict(state)
    down = state.pop("experts.down_proj")
    state["experts.up_bias"] = down
    state["experts.gate_up_proj"] = state["experts.gate_up_proj"] + 1
    with pytest.raises(
        RuntimeError,
        match=r'(?s)Missing key.*"experts.down_proj".*Unexpected key.*"experts.up_bias"|'
        r'(?s:Unexpected key.*"experts.up_bias".*Missing key.*"experts.down_proj")',
    ):
        layer.load_state_dict(state)
    result = layer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["experts.down_proj"] and result.unexpected_keys == ["experts.up_bias"]
    assert torch.equal(layer.state_dict()["experts.gate_up_proj"], before["experts.gate_up_proj"] + 1)
    assert torch.equal(layer.state_dict()["experts.down_proj"], before["experts.down_proj"])


def test_assigning_is_refused(device):
    layer = make_moved(device)
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"assign=True cannot be had for experts: its weights live in the slots"):
        layer.load_state_dict({name: tensor + 1 for name, tensor in before.items()}, assign=True)
    for part in ("gate_up_proj", "down_proj"):
        assert torch.equal(layer.state_dict()[f"experts.{part}"], before[f"experts.{part}"])


def test_the_range_of_a_single_rank_is_everything(device):
    layer = make_moved(device)
    assert layer.experts.state_dict_scope == "range"
    mine = layer.state_dict()
    layer.experts.state_dict_scope = "all"
    assert_equal_states(layer.state_dict(), mine)


def test_unknown_scope(device):
    layer = make_layer(device)
    layer.experts.state_dict_scope = "mine"
    with pytest.raises(ValueError, match="state_dict_scope must be 'all' or 'range', got 'mine'"):
        layer.state_dict()


def test_in_host_memory_on_request(device):
    layer = make_moved(device)
    state = layer.state_dict()
    assert all(tensor.device.type == device for tensor in state.values())
    layer.experts.state_dict_on_host = True
    on_host = layer.state_dict()
    assert all(tensor.device.type == "cpu" for name, tensor in on_host.items() if name.startswith("experts."))
    assert_equal_states({name: tensor.to(device) for name, tensor in on_host.items()}, state)


# ---- single experts


def test_load_experts_writes_what_it_is_given_and_nothing_else(device):
    layer, other = make_moved(device), give_unit_scale(make_layer(device), seed=8)
    wanted = layer.state_dict()
    new = other.state_dict()
    EplbController(EplbConfig()).register(layer)
    layer.load_experts(
        {
            2: {"down_proj": new["experts.down_proj"][2].cpu()},
            0: {name: new[f"experts.{name}"][0].double().float() for name in ("gate_up_proj", "down_proj")},
        }
    )
    wanted["experts.down_proj"][[0, 2]] = new["experts.down_proj"][[0, 2]]
    wanted["experts.gate_up_proj"][0] = new["experts.gate_up_proj"][0]
    assert_equal_states(layer.state_dict(), wanted)
    layer.load_experts({})
    layer.load_experts({1: {}})
    relocator = Relocator([layer])
    relocator.version = layer.resident.current.number
    relocator.move(2)  # what was written is what moves
    assert_equal_states(layer.state_dict(), wanted)


GOOD = {"down_proj": torch.zeros(16, 8)}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({4: GOOD}, "experts 0 to 3, got the expert 4"),
        ({-1: GOOD}, "experts 0 to 3, got the expert -1"),
        ({"1": GOOD}, "experts 0 to 3, got the expert '1'"),
        ({True: GOOD}, "experts 0 to 3, got the expert True"),
        ({1: {"up_proj": GOOD["down_proj"]}}, "among .*down_proj.*, got 'up_proj'"),
        ({1: {"down_proj": torch.zeros(8, 16)}}, r"down_proj of expert 1 must be .*\(16, 8\), got \(8, 16\)"),
        ({1: {"down_proj": [0.0]}}, "down_proj of expert 1 must be a tensor"),
        ({1: {"down_proj": torch.zeros(16, 8).int()}}, "down_proj of expert 1 must have dtype torch.float32"),
        ({1: {"down_proj": torch.zeros(16, 8, device="meta")}}, "must hold values"),
    ],
)
def test_load_experts_refuses_all_of_what_it_cannot_write_in_part(weights, message, trainable, device):
    layer = give_unit_scale(make_layer(device, trainable=trainable))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        layer.load_experts({0: GOOD, **weights})
    assert_equal_states(layer.state_dict(), before)


def test_a_registered_layer_loads_before_and_after_its_controller_steps(device):
    layer, other = make_moved(device), give_unit_scale(make_layer(device), seed=8)
    with EplbController(
        EplbConfig(step_interval=2, window_size=2, window_samples=1, round_interval=1e-3)
    ) as controller:
        controller.register(layer)
        layer.load_state_dict(other.state_dict())
        assert_equal_states(layer.state_dict(), other.state_dict())
        for _ in range(5):
            controller.step()
        layer.load_state_dict(make_moved(device).state_dict())
        assert_equal_states(layer.state_dict(), make_moved(device).state_dict())
        controller.step()


def test_drawing_weights_anew_and_load_experts_wait_for_relocations_as_loading_does(device):
    layer = make_layer(device)
    before = layer.state_dict()

    @contextmanager
    def quiesced():
        raise TimeoutError("relocations are under way")
        yield

    layer.resident.quiesced = quiesced
    for write in (layer.reset_parameters, lambda: layer.load_experts({0: GOOD})):
        with pytest.raises(TimeoutError, match="under way"):
            write()
    assert_equal_states(layer.state_dict(), before)


@pytest.mark.parametrize("write", ["load_experts", "load_state_dict", "reset_parameters"])
def test_every_replica_on_this_rank_is_written(write, device):
    """Two replicas of expert 0, as a policy may place them on one rank."""
    layer, new = make_layer(device), give_unit_scale(make_layer(device), seed=7).state_dict()
    layer.resident.live_slots = lambda: {0: [0, 4], 1: [1], 2: [2], 3: [3]}
    if write == "load_experts":
        layer.load_experts({0: {name: new[f"experts.{name}"][0] for name in layer.resident.pool.tensors}})
    elif write == "load_state_dict":
        layer.load_state_dict(new)
    else:
        layer.reset_parameters()
    for rows in layer.resident.pool.tensors.values():
        assert rows[0].any() and torch.equal(rows[0], rows[4])


@pytest.mark.parametrize("write", ["load_experts", "load_state_dict", "reset_parameters"])
def test_weights_go_where_experts_are_when_relocations_have_come_to_rest(write, device):
    """A relocation that is under way when writing begins ends before the first byte is written."""
    layer, new = make_layer(device), give_unit_scale(make_layer(device), seed=7).state_dict()

    @contextmanager
    def quiesced():
        Relocator([layer]).move(2)
        yield

    layer.resident.quiesced = quiesced
    if write == "load_experts":
        layer.load_experts({expert: {name: new[f"experts.{name}"][expert] for name in GOOD} for expert in range(4)})
    elif write == "load_state_dict":
        layer.load_state_dict(new)
    else:
        torch.manual_seed(5)
        layer.reset_parameters()
        torch.manual_seed(5)
        new = make_layer(device).state_dict()
    state = layer.state_dict()
    assert layer.resident.current.number == 1
    assert all(torch.equal(state[f"experts.{name}"], new[f"experts.{name}"]) for name in GOOD)


def test_the_owner_of_an_expert_between_two_ranks_flips(monkeypatch, device):
    """Rank 0 has given expert 2 up by flipping, rank 1 does not have it before it flips: it is still where it was."""
    said = {"live": [[0, 1], [1, 3]], "retiring": [[2, 1], [0]]}

    def gather(mine, *_):
        assert mine.view(2, 4).tolist() == [[True, True, False, False], [False, True, True, False]]
        flags = torch.zeros(2, 2, 4, dtype=torch.bool)
        for rank in range(2):
            flags[rank, 0, said["live"][rank]] = True
            flags[rank, 1, said["retiring"][rank]] = True
        return flags.flatten(1)

    monkeypatch.setattr("moe_layer.weights.logical.all_gather_flags", gather)
    logical = LogicalWeights(make_layer(device).resident, [range(2), range(2, 4)], object(), 1.0)
    assert logical._owners(said["live"][0], said["retiring"][0]) == [0, 0, 0, 1]


@pytest.mark.parametrize("write", ["load_experts", "load_state_dict", "reset_parameters"])
@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_a_backward_refuses_weights_that_its_forward_did_not_have(run, write, device):
    """As PyTorch does where a parameter is written in place, and in compiled code here too."""
    layer = make_layer(device)
    experts = layer.experts
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if run == "compiled" else layer
    x = torch.randn(5, layer.hidden_size, device=device, requires_grad=True)
    y = forward(x)
    {
        "load_experts": lambda: layer.load_experts({2: {"down_proj": experts.state_dict()["down_proj"][1]}}),
        "load_state_dict": lambda: experts.load_state_dict(experts.state_dict()),
        "reset_parameters": lambda: experts.reset_parameters(7),
    }[write]()
    message = "modified by an inplace" if run == "compiled" else "other weights between a forward and its backward"
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()
    for _ in range(2):
        forward(x).sum().backward()


def test_a_layer_that_is_cast_before_a_backward_leaves_the_gradient_as_it_was(device):
    """The graph keeps the weights that it has read."""
    layer = make_layer(device)
    x = torch.randn(5, layer.hidden_size, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    y = layer(x)
    layer.to(torch.bfloat16)
    y.sum().backward()
    assert torch.equal(x.grad, expected)


def test_loading_nothing_leaves_backwards_as_they_are(device):
    layer = make_layer(device)
    x = torch.randn(5, layer.hidden_size, device=device, requires_grad=True)
    y = layer(x)
    layer.load_experts({})
    layer.load_experts({0: {}})
    y.sum().backward()
    assert x.grad is not None


def test_what_a_forward_holds_keeps_no_layer_alive(device):
    layer = make_layer(device)
    x = torch.randn(5, layer.hidden_size, device=device, requires_grad=True)
    with layer.resident.choice() as pin:
        held = Held(layer.experts, pin)
    experts = weakref.ref(layer.experts)
    del layer, x
    gc.collect()
    assert experts() is None
    held.end_backward()
    with pytest.raises(RuntimeError, match="other weights between a forward and its backward"):
        held.end_backward(read_again=True)
