"""What a controller is given, and what a registered layer no longer lets anybody do."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from eplb import EplbConfig, EplbController, RelocatableLayer
from eplb.relocation.pool import SlotState
from moe_layer import MoELayer, make_pool
from tests.moe_layer.reference import give_unit_scale
from tests.moe_layer.relocation import Relocator

QUICK = {"step_interval": 2, "window_size": 2, "window_samples": 1, "round_interval": 1e-3, "heartbeat_interval": 2e-3}


def make_layer(device: str, **options) -> MoELayer:
    return give_unit_scale(MoELayer(16, 8, 4, 2, device=device, **options))


class Model(nn.Module):
    """Two MoE layers, one of them deep inside, between dense ones."""

    def __init__(self, device: str, **options) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, device=device)
        self.moe = make_layer(device, **options)
        self.deep = nn.ModuleDict(
            {"block": nn.Sequential(nn.Linear(16, 16, device=device), make_layer(device, **options))}
        )


# ---- registering


def test_finds_every_layer_of_a_model_and_says_how_many(device):
    model, controller = Model(device), EplbController()
    assert isinstance(model.moe, RelocatableLayer) and not isinstance(model.first, RelocatableLayer)
    assert controller.register(model) == 2
    assert model.moe.resident.controller is controller
    assert model.deep["block"][1].resident.controller is controller
    assert controller.register(make_layer(device)) == 1  # a layer is a model too


@pytest.mark.parametrize("dense_first", [False, True])
def test_a_dense_model_beside_one_with_experts(dense_first, device):
    dense, drafter = nn.Linear(16, 16, device=device), Model(device)
    with EplbController(EplbConfig(**QUICK, use_async=False)) as controller:
        found = [controller.register(model) for model in ([dense, drafter] if dense_first else [drafter, dense])]
        assert sorted(found) == [0, 2]
        for _ in range(6):
            controller.step()
        assert controller.metrics().proposals == 3 and controller.health().last_error is None


def test_step_without_any_moe_layer_says_so(device):
    controller = EplbController()
    with pytest.raises(RuntimeError, match=r"step\(\) without any MoE layer: register\(\) a model that has one first"):
        controller.step()
    assert controller.register(nn.Linear(4, 4, device=device)) == 0
    with pytest.raises(RuntimeError, match=r"step\(\) without any MoE layer"):
        controller.step()
    assert controller.register(make_layer(device)) == 1  # it is not too late
    controller.step()
    controller.close()


def test_a_layer_is_registered_once(device):
    model, controller = Model(device), EplbController()
    controller.register(model.moe)
    for other in (controller, EplbController()):
        with pytest.raises(ValueError, match="is registered with a controller already"):
            other.register(model)
        assert model.deep["block"][1].resident.controller is None, "half of a refused model is registered"
    controller.close()
    assert EplbController().register(model) == 2  # free again


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"trainable": True}, "experts are parameters"), ({"num_shadow_slots": 0}, "num_shadow_slots=0")],
    ids=str,
)
@pytest.mark.parametrize("use_async", [False, True])
def test_what_cannot_move_is_refused(use_async, options, reason, device):
    layer = make_layer(device, **options)
    with pytest.raises(ValueError, match=f"a layer of the model cannot be relocated: .*{reason}"):
        EplbController(EplbConfig(use_async=use_async)).register(layer)
    assert layer.resident.controller is None


# ---- what a registered layer, and one that shares its pool, refuses


REFUSALS = {
    "to(dtype)": (lambda layer: layer.to(torch.float16), "moving or casting the experts"),
    "half": (lambda layer: layer.half(), "moving or casting the experts"),
    "bfloat16": (lambda layer: nn.Sequential(layer).bfloat16(), "moving or casting the experts"),
    "to(device)": (lambda layer: layer.to("meta"), "moving or casting the experts"),
    "deepcopy": (copy.deepcopy, "deepcopy"),
    "to_empty": (lambda layer: layer.to_empty(device="meta"), "moving or casting the experts"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("bound", ["registered", "shared"])
def test_refused_with_the_reason_and_the_layer_as_it_was(bound, refusal, device):
    action, name = REFUSALS[refusal]
    if bound == "registered":
        layer, reason = make_layer(device), "registered with an EplbController"
        EplbController().register(layer)
    else:
        pool = make_pool(2, 16, 8, 4, device=device)
        layer, _other = make_layer(device, pool=pool), make_layer(device, pool=pool)
        reason = "shares its pool"
    x = torch.randn(5, 16, device=device)
    addresses = layer.resident.pool.slab_SB.data_ptr(), layer.resident.table.lanes_P.data_ptr()
    with torch.no_grad():
        expected = layer(x)
    with pytest.raises(RuntimeError, match=f"(?s){name}.* is refused: .*{reason}"):
        action(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert addresses == (layer.resident.pool.slab_SB.data_ptr(), layer.resident.table.lanes_P.data_ptr())
    assert layer.gate.weight.dtype == torch.float32


@pytest.mark.parametrize("bound", [False, True])
def test_what_changes_nothing_is_allowed(bound, device):
    layer, x = make_layer(device), torch.randn(5, 16, device=device)
    if bound:
        EplbController().register(layer)
    with torch.no_grad():
        expected = layer(x)
        for same in (layer.to(device), layer.float(), layer.eval(), layer.requires_grad_(False)):
            assert torch.equal(same(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casting_before_registering(dtype, device):
    layer = make_layer(device)
    relocator = Relocator([layer])
    for expert in (3, 1):
        relocator.move(expert)
    expected = {name: tensor.to(dtype) for name, tensor in layer.state_dict().items()}
    layer(torch.randn(5, 16, device=device))
    load = layer.resident.load_E.clone()
    assert layer.to(dtype) is layer
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(layer.resident.load_E, load)
    fresh = MoELayer(16, 8, 4, 2, device=device, dtype=dtype)
    fresh.load_state_dict(expected)
    x = torch.randn(5, 16, device=device, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), fresh(x))
    assert EplbController().register(layer) == 1


def test_a_copy_is_equal_and_independent(device):
    layer = make_layer(device, router="minimax_m2")
    layer(torch.randn(5, 16, device=device))
    layer.requires_grad_()
    layer.eval()
    other = copy.deepcopy(layer)
    x = torch.randn(5, 16, device=device)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(other(x), expected)
        assert torch.equal(other.resident.load_E, layer.resident.load_E)
        assert not other.training and other.gate.weight.requires_grad
        give_unit_scale(other, seed=9)
        assert torch.equal(layer(x), expected)
        assert not torch.equal(other(x), expected)


def test_a_copy_of_a_layer_whose_experts_have_moved(device):
    layer = make_layer(device)
    relocator = Relocator([layer])
    for expert in (3, 1):
        relocator.move(expert)
    other = copy.deepcopy(layer)
    x = torch.randn(5, 16, device=device)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_copy_of_a_cast_layer(device):
    layer = make_layer(device).half()
    other = copy.deepcopy(layer)
    x = torch.randn(5, 16, device=device, dtype=torch.float16)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


# ---- a pool for several layers


def test_layers_share_a_pool_and_its_free_slots(device):
    pool = make_pool(3, 16, 8, 4, num_shadow_slots=1, device=device)
    layers = [make_layer(device, pool=pool) for _ in range(3)]
    for seed, layer in enumerate(layers):
        give_unit_scale(layer, seed=seed)
    assert pool.count(SlotState.FREE) == 1
    slots = [slot for layer in layers for slots in layer.resident.live_slots().values() for slot in slots]
    assert sorted(slots) == list(range(12))
    alone = [give_unit_scale(MoELayer(16, 8, 4, 2, device=device), seed=seed) for seed in range(3)]
    relocator = Relocator(layers)
    x = torch.randn(7, 16, device=device)
    with torch.no_grad():
        for expert in range(4):
            for index in range(3):
                relocator.move(expert, layer=index)
                for layer, twin in zip(layers, alone, strict=True):
                    assert torch.equal(layer(x), twin(x))
    assert pool.count(SlotState.FREE) == 1 and pool.count(SlotState.LIVE) == 12
    # The free slot went round: no layer has the slots that it began with.
    assert sorted(slot for (slot,) in layers[0].resident.live_slots().values()) != [0, 1, 2, 3]


def test_a_model_with_a_shared_pool_is_registered_and_steps(device):
    pool = make_pool(2, 16, 8, 4, device=device)
    with EplbController(EplbConfig(**QUICK, use_async=False)) as controller:
        assert controller.register(Model(device, pool=pool)) == 2
        for _ in range(6):
            controller.step()
        assert controller.metrics().proposals == 3 and controller.health().last_error is None


# ---- serving on one rank


def test_warm_up_is_not_counted_but_computes(device):
    layer, x = make_layer(device), torch.randn(5, 16, device=device)
    controller = EplbController()
    controller.register(layer)
    with torch.no_grad():
        expected = layer(x)
        counted = layer.resident.load_E.clone()
        with controller.warm_up():
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer.resident.load_E, counted)
        with pytest.raises(KeyError), controller.warm_up():
            with controller.warm_up():
                layer(x)
            layer(x)
            raise KeyError
        layer(x)
    assert torch.equal(layer.resident.load_E, 2 * counted), "after a warm-up that failed nothing is counted"


@pytest.mark.parametrize("use_async", [False, True])
def test_one_rank_has_nothing_to_move_and_stays_well(use_async, device):
    layer, twin = make_layer(device), make_layer(device)
    with EplbController(EplbConfig(**QUICK, use_async=use_async)) as controller:
        assert controller.health().state == "idle" and controller.metrics().rounds == 0
        controller.register(layer)
        with torch.no_grad():
            for _ in range(20):
                x = torch.randn(5, 16, device=device)
                assert torch.equal(layer(x), twin(x))
                controller.step()
        health, metrics = controller.health(), controller.metrics()
        assert health.state in ("idle", "rebalancing") and health.last_error is None and health.version == 0
        assert (metrics.plans, metrics.moved_experts, metrics.failures) == (0, 0, 0)
        if not use_async:
            assert (metrics.windows, metrics.proposals, metrics.balancedness) == (10, 10, 1.0)
    assert controller.health().state == "closed"
    assert layer.resident.controller is None


def test_close_is_bounded_idempotent_and_leaves_the_layer_serving(device):
    layer, x = make_layer(device), torch.randn(5, 16, device=device)
    controller = EplbController(EplbConfig(**QUICK))
    controller.register(layer)
    with torch.no_grad():
        expected = layer(x)
        controller.step()
        assert any(thread.name == "eplb-worker" for thread in threading.enumerate())
        controller.close()
        controller.close()
        assert not any(thread.name == "eplb-worker" for thread in threading.enumerate())
        assert torch.equal(layer(x), expected)
        controller.step()  # a runner that goes on
        assert layer.half().gate.weight.dtype == torch.float16  # bound to nothing any more


def test_a_layer_dies_with_its_last_reference(device):
    """The controller's and the pins' references must not keep hundreds of megabytes alive."""
    layer = make_layer(device)
    controller = EplbController(EplbConfig(**QUICK))
    controller.register(layer)
    controller.step()
    layer(torch.randn(5, 16, device=device, requires_grad=True)).sum().backward()
    controller.close()
    slab = weakref.ref(layer.resident.pool)
    del layer, controller
    gc.collect()
    assert slab() is None
