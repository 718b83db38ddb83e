"""A layer that starts from a saved placement: the same outputs, no moves; what does not fit is refused."""

import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb import EplbConfig, EplbController, Placement, load_placements, save_placements
from eplb.planning.policy import Topology, make_policy
from moe_layer import MoELayer, make_pool
from tests.distributed import distributed
from tests.moe_layer.ranks import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    Service,
    everybody,
    make_controller,
    make_layer,
    tokens,
)


def shares_by_expert(version):
    """By rank."""
    lanes = zip(version.placement.lanes_WS.tolist(), version.shares_WS.tolist(), strict=True)
    return [{e: share for e, share in zip(lanes_S, shares_S, strict=True) if e >= 0} for lanes_S, shares_S in lanes]


@distributed(2)
def test_a_restart_goes_on_where_the_experts_were(rank, num_ranks, group, device):
    folder = tempfile.TemporaryDirectory()
    path = [f"{folder.name}/placements.json"]
    dist.broadcast_object_list(path, 0, group=group)  # of rank 0
    common = {"num_redundant_experts": 4, "num_shadow_slots": 2}
    layers = [make_layer(group, device, seed=seed, **common) for seed in (1, 2)]
    twins = [make_layer(group, device, seed=seed) for seed in (1, 2)]
    controller = make_controller(group, layers)
    with controller:
        service = Service(rank, group, device, layers, twins, controller)
        service.serve_until(lambda: controller.metrics().waves > 4, "experts move")
        with controller.quiesced():
            expected = [layer.resident.newest for layer in layers]
            if rank == 0:
                controller.save_placements(path[0])
            everybody(True, group, device)
    weights = [layer.state_dict() for layer in layers]

    saved = load_placements(path[0])
    assert any(not np.array_equal(one.placement.lanes_WS, saved[0].placement.lanes_WS) for one in saved[1:])
    # One more shadow slot than before, and a pool for both.
    pool = make_pool(
        2,
        HIDDEN,
        INTERMEDIATE,
        EXPERTS,
        num_redundant_experts=4,
        num_shadow_slots=3,
        num_ranks=num_ranks,
        device=device,
    )
    common |= {"num_shadow_slots": 3, "pool": pool}
    again = [make_layer(group, device, seed=9, placement=one, **common) for one in saved]
    everybody(True, group, device)
    folder.cleanup()
    for layer, state, version in zip(again, weights, expected, strict=True):
        layer.load_state_dict(state)
        start = layer.resident.current
        np.testing.assert_array_equal(start.placement.compact(), version.placement.compact())
        assert shares_by_expert(start) == shares_by_expert(version)
    controller = make_controller(group, again)
    with controller:
        service = Service(rank, group, device, again, twins, controller)
        service.forward()
        service.serve_until(lambda: controller.metrics().waves > 2, "experts move on")
        service.assert_well()


@distributed(2)
def test_ranks_that_start_differently_are_told(rank, num_ranks, group, device):
    placements = [
        Placement(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), EXPERTS),
        Placement(np.array([[0, 1, 2, 4], [3, 5, 6, 7]]), EXPERTS),
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_placements(f"{folder}/file", placements)
        saved = load_placements(f"{folder}/file")
    with pytest.raises(ValueError, match=r"placement must be the same on all ranks: that of the ranks \[1\]"):
        make_layer(group, device, placement=saved[rank])
    layer = make_layer(group, device, placement=saved[1])  # and nothing is left behind
    twin = make_layer(group, device)
    x = tokens(rank, 3, device)
    with torch.no_grad():
        assert torch.equal(layer(x), twin(x))
    assert layer.resident.live_slots().keys() == set(placements[1].lanes_WS[rank].tolist())


def saved_layers(tmp_path, *placements):
    save_placements(tmp_path / "file", placements)
    return load_placements(tmp_path / "file")


def test_what_does_not_fit_is_refused(tmp_path, device):
    two_ranks, fewer, ours = saved_layers(
        tmp_path,
        Placement(np.arange(8).reshape(2, 4), 8),
        Placement(np.arange(6).reshape(1, 6), 6),
        Placement(np.arange(8)[None, ::-1], 8),
    )
    sizes = (HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
    for given, message in [
        (two_ranks, "8 logical experts on 2 ranks with 4 physical experts each, but the layer has 8 .* on 1 ranks"),
        (fewer, "placement is of 6 logical experts on 1 ranks"),
        ([ours], r"placement must be one of the list that eplb\.load_placements\(\) returns"),
        ("file", "placement must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            MoELayer(*sizes, placement=given, device=device)
    assert MoELayer(*sizes, placement=ours, trainable=True, device=device).experts.owned.is_at_home, (
        "one rank: no copies"
    )
    layer = MoELayer(*sizes, placement=ours, device=device)
    assert layer.resident.current.placement.num_lanes == 9


def test_a_layer_without_memory_starts_there_too(tmp_path, device):
    (saved,) = saved_layers(tmp_path, Placement(np.array([[5, 3, 1, 7, 0, 2, 4, 6]]), EXPERTS))
    state = MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, device=device).state_dict()
    layer = MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, placement=saved, device="meta").to_empty(device=device)
    layer.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    start = layer.resident.current
    np.testing.assert_array_equal(start.placement.compact(), saved.placement.compact())
    down = layer.resident.pool.tensors["down_proj"]
    for expert, (slot,) in layer.resident.live_slots().items():
        assert torch.equal(down[slot], state["experts.down_proj"][expert])


def test_a_controller_saves_what_is_published(tmp_path):
    layer = make_layer(None, torch.device("cpu"))
    config = EplbConfig(use_async=False)
    with EplbController(config) as controller:
        with pytest.raises(ValueError, match="placements of no layer"):
            controller.save_placements(tmp_path / "file")
        controller.register(layer)
        controller.save_placements(tmp_path / "file")  # before the first step
    controller.save_placements(tmp_path / "file")  # and after the last
    (saved,) = load_placements(tmp_path / "file")
    np.testing.assert_array_equal(saved.placement.compact(), layer.resident.newest.placement.compact())


@distributed(2)
def test_a_plan_made_offline_is_a_start_that_needs_no_move(rank, num_ranks, group, device):
    """Planned for the routing of a first run: the policy then leaves it where it is."""
    options = {"num_redundant_experts": 4, "router": None, "device": device}
    ids = torch.tensor([[4, 5]] * 6 + [[0, 2], [3, 4], [5, 6], [7, 1]], device=device)

    def serve(layer, controller, count):
        for _ in range(count):
            x = torch.ones(len(ids), HIDDEN, device=device)
            layer(x, expert_ids=ids, expert_weights=torch.ones_like(ids, dtype=torch.float32))
            controller.step()

    load = np.bincount(ids.flatten().cpu().numpy(), minlength=EXPERTS)
    start = Placement.initial(EXPERTS, 4, num_ranks, 6)
    proposal = make_policy("adaptive").propose(load[None, None], start.lanes_WS[None], Topology(num_ranks))
    assert not np.array_equal(np.sort(proposal.physical_LWP[0], axis=1), start.compact())
    with tempfile.TemporaryDirectory() as folder:
        save_placements(f"{folder}/file", [Placement(proposal.physical_LWP[0], EXPERTS)], [proposal.shares_LWP[0]])
        (saved,) = load_placements(f"{folder}/file")
    with torch.no_grad():
        for placement, moves in ((saved, False), (None, True)):
            layer = MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, process_group=group, placement=placement, **options)
            with make_controller(group, [layer], policy="adaptive", use_async=False) as controller:
                serve(layer, controller, 8)
                assert controller.metrics().proposals >= 2 and controller.metrics().failures == 0
                assert bool(controller.metrics().moved_experts) is moves
                everybody(True, group, device)
