"""Experts that move between ranks while their layers serve, beside twins that do not. Several checks to a test."""

import gc
import importlib.util
import os
import threading
import time
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from eplb.relocation.communicator.nixl_agent import why_no_agent
from eplb.relocation.pool import SlotState
from moe_layer import make_pool
from tests.distributed import distributed
from tests.moe_layer.ranks import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    Restless,
    Service,
    everybody,
    make_controller,
    make_layer,
    tokens,
    wait_until,
)
from tests.moe_layer.reference import give_unit_scale
from tests.moe_layer.relocation import as_is, checkpointed, checkpointed_reentrant


def make_service(
    rank, group, device, dtype=torch.float32, controller_group=None, redundant=None, shared=False, ours=None, **options
) -> Service:
    """Two layers of a model that share a pool, and one with a pool of its own; CPU processes can open both if `shared`.

    ours: arguments of the layers that move alone.
    """
    ours = ours or {}
    num_ranks = dist.get_world_size(group)
    redundant = num_ranks if redundant is None else redundant
    pool, own = (
        make_pool(
            num_layers,
            HIDDEN,
            INTERMEDIATE,
            EXPERTS,
            num_redundant_experts=redundant,
            num_ranks=num_ranks,
            num_shadow_slots=2,
            device=device,
            dtype=dtype,
            shared=shared,
        )
        for num_layers in (2, 1)
    )
    common = {"num_redundant_experts": redundant, "dtype": dtype}
    layers = [
        make_layer(group, device, seed=1, pool=pool, **common, **ours),
        make_layer(group, device, seed=2, pool=pool, **common, **ours),
        make_layer(group, device, seed=3, pool=own, num_shadow_slots=2, **common, **ours),
    ]
    twins = [make_layer(group, device, seed=seed, **common) for seed in (1, 2, 3)]
    # Two models, one of them with a dense module too, and a third that is dense.
    models = [torch.nn.Sequential(torch.nn.Linear(2, 2), *layers[:2]), layers[2], torch.nn.Linear(2, 2)]
    controller = make_controller(controller_group or group, models, **options)
    return Service(rank, group, device, layers, twins, controller)


def at_rest(service: Service) -> bool:
    return service.controller.health().phase == "IDLE"


def assert_rested(service: Service) -> None:
    """No slot is lost, and every expert has its weights in all its replicas (I1, I2, I4)."""
    pools = {id(layer.resident.pool): layer.resident.pool for layer in service.layers}
    for pool in pools.values():
        # The worker frees what it replaced a moment after the ranks have agreed that grace is over.
        wait_until(lambda pool=pool: not pool.count(SlotState.RETIRING), "old slots are freed")
        states = {state: pool.count(state) for state in SlotState if pool.count(state)}
        live = sum(layer.resident.num_physical_per_rank for layer in service.layers if layer.resident.pool is pool)
        assert states == {SlotState.LIVE: live, SlotState.FREE: pool.num_slots - live}
    for layer, twin in zip(service.layers, service.twins, strict=True):
        layer.resident.current.placement.validate()
        wanted = twin.state_dict()  # collective
        for expert, slots in layer.resident.live_slots().items():
            for slot in slots:
                for name in ("gate_up_proj", "down_proj"):
                    weight = layer.resident.pool.tensors[name][slot]
                    assert torch.equal(weight, wanted[f"experts.{name}"][expert]), f"expert {expert} in slot {slot}"


def drained(service: Service) -> None:
    """Serve until nothing is under way and nothing begins: the controllers are held as while weights are loaded."""
    with service.controller.quiesced():
        assert_rested(service)
        service.assert_well()


def moved_by(service: Service, waves: int):
    start = service.controller.metrics().waves
    return lambda: service.controller.metrics().waves >= start + waves


@distributed(num_ranks=2, timeout=150)
def test_i5_two_ranks(rank, num_ranks, group, device):
    service = make_service(rank, group, device)
    service.serve_until(moved_by(service, 12), "relocations")
    drained(service)
    check_different_step_rates(service)
    check_state_dicts_while_moving(service)
    check_loading_at_different_times(service)
    check_loading_behind_a_long_queue(service)
    service.controller.close()
    check_gradients_across_flips(rank, group, device)
    check_another_controller_beside_a_backward_to_come(rank, group, device)
    check_a_main_thread_that_does_not_step(rank, group, device)
    check_steps_beside_forwards_on_another_thread(rank, group, device)


@distributed(num_ranks=4, timeout=150, on_cpu=False)
def test_i5_four_ranks(rank, num_ranks, group, device):
    service = make_service(rank, group, device, dtype=torch.bfloat16)
    service.serve_until(moved_by(service, 5), "relocations")
    drained(service)
    service.controller.close()
    check_inside_step(rank, group, device)
    check_failures_inside_step(rank, group, device)
    check_loading_between_steps(rank, group, device)
    check_no_redundant_experts(rank, group, device)


ONE_SIDED = {"dispatcher": "symm_mem", "max_tokens": 11}


@distributed(num_ranks=4, timeout=200, on_cpu=False)
def test_i5_one_sided_dispatch_over_ipc(rank, num_ranks, group, device):
    """Four processes on one GPU."""
    service = make_service(rank, group, device, dtype=torch.bfloat16, ours=ONE_SIDED)
    service.serve_until(moved_by(service, 5), "relocations", seconds=100)
    check_replays(service, flips=20)
    drained(service)
    service.controller.close()


@distributed(num_ranks=2, backend="nccl", timeout=200)
def test_i5_one_sided_dispatch_over_symmetric_memory(rank, num_ranks, group, device):
    service = make_service(rank, group, device, dtype=torch.bfloat16, ours=ONE_SIDED)
    service.serve_until(moved_by(service, 12), "relocations")
    check_replays(service, flips=1000)
    drained(service)
    service.controller.close()


@distributed(num_ranks=2, timeout=150)
def test_i6_ranks_that_leave_or_die(rank, num_ranks, group, device):
    check_one_rank_closes(rank, group, device)
    check_one_rank_dies(rank, group, device)  # the last: a process is gone then


@distributed(num_ranks=2, backend="nccl", timeout=150)
def test_i5_nccl_dispatch_with_gloo_relocation(rank, num_ranks, group, device):
    check_pair(rank, group, device, group, "torch_gloo")
    check_gradients_across_flips(rank, group, device)


@distributed(num_ranks=2, backend="nccl", timeout=150)
def test_i5_nccl_dispatch_with_relocation_over_peer_memory(rank, num_ranks, group, device):
    check_pair(rank, group, device, group, "auto", "symm_mem")
    check_gradients_across_flips(rank, group, device)


@distributed(num_ranks=2, backend="nccl", timeout=150)
def test_i5_gloo_dispatch_with_nccl_relocation(rank, num_ranks, group, device):
    check_pair(rank, dist.new_group(backend="gloo"), device, group, "torch_nccl")


@pytest.mark.skipif(importlib.util.find_spec("nccl") is None, reason="needs nccl4py")
@distributed(num_ranks=2, timeout=150, on_cpu=False)
def test_i5_gloo_dispatch_with_relocation_by_nccl4py(rank, num_ranks, group, device):
    """Two processes on one GPU, which NCCL takes for two hosts, because it gives a GPU to one rank of a host only."""
    os.environ["NCCL_HOSTID"] = f"host{rank}"
    check_pair(rank, group, device, group, "nccl")
    check_one_rank_dies(rank, group, device, communicator="nccl", transfer_timeout=1.0)  # a process is gone then


@pytest.mark.skipif(importlib.util.find_spec("nccl") is None, reason="needs nccl4py")
@distributed(num_ranks=2, backend="nccl", timeout=150)
def test_i5_gloo_dispatch_with_relocation_by_nccl4py_over_two_gpus(rank, num_ranks, group, device):
    check_pair(rank, dist.new_group(backend="gloo"), device, group, "nccl")


@distributed(num_ranks=2, timeout=150)
def test_i5_gloo_dispatch_with_relocation_over_peer_memory(rank, num_ranks, group, device):
    check_pair(rank, group, device, group, "auto", "symm_mem")


needs_nixl = pytest.mark.skipif(why_no_agent() is not None, reason=str(why_no_agent()))


@needs_nixl
@distributed(num_ranks=2, timeout=150)
def test_i5_gloo_dispatch_with_relocation_over_nixl(rank, num_ranks, group, device):
    check_pair(rank, group, device, group, "nixl")


@needs_nixl
@distributed(num_ranks=2, timeout=150)
def test_i6_ranks_that_leave_or_die_over_nixl(rank, num_ranks, group, device):
    check_one_rank_closes(rank, group, device, communicator="nixl")
    check_one_rank_dies(rank, group, device, communicator="nixl")  # the last: a process is gone then


# ---- the checks; all are collective


@torch.no_grad()
def check_replays(service: Service, flips: int) -> None:
    """A graph of all layers, replayed while their tables flip: the bits of twins that never move."""
    x = tokens(service.rank, 1, service.device, torch.bfloat16)
    wanted = [twin(x) for twin in service.twins]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for layer in service.layers:
            layer(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier(service.group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [layer(x) for layer in service.layers]
    start, deadline = service.controller.metrics().flips, time.monotonic() + 100
    while not everybody(service.controller.metrics().flips >= start + flips, service.group, service.device):
        for _ in range(10):
            graph.replay()
            service.controller.step()
        assert all(torch.equal(y, one) for y, one in zip(outputs, wanted, strict=True))
        service.layers[0].executor.dispatcher.raise_if_failed()
        assert time.monotonic() < deadline, service.controller.health()


def check_pair(
    rank: int,
    group: dist.ProcessGroup,
    device: torch.device,
    controller_group: dist.ProcessGroup,
    communicator: str,
    expected: str | None = None,
) -> None:
    """Forwards in `group` beside relocation by a communicator; by `expected`, if "auto" is asked for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    service = make_service(
        rank, group, device, dtype, controller_group, shared=expected == "symm_mem", communicator=communicator
    )
    service.serve_until(moved_by(service, 12), "relocations")
    assert service.controller._worker.rounds.communicator.name == (expected or communicator)
    drained(service)
    check_different_step_rates(service)
    check_state_dicts_while_moving(service)
    service.controller.close()


def check_different_step_rates(service: Service) -> None:
    """Rank 0 steps after every forward, rank 1 after every third: their tables differ in between."""
    apart = 0
    start, goal = service.controller.metrics().waves, service.controller.metrics().waves + 6
    every = 1 + 2 * (service.rank % 2)
    while not everybody(service.controller.metrics().waves >= goal, service.group, service.device):
        service.forward()
        if service.num_steps % every == 0:
            service.controller.step()
        versions = torch.tensor([max(layer.resident.current.number for layer in service.layers)] * 2, device="cpu")
        if dist.get_backend(service.group) == "nccl":
            versions = versions.to(service.device)
        versions[1] *= -1
        dist.all_reduce(versions, op=dist.ReduceOp.MAX, group=service.group)
        apart += int(versions.sum().item() > 0)
        assert service.num_steps < 20_000, f"{start} → {goal}: {service.controller.health()}"
    assert apart > 0, "the ranks flipped in the same steps: nothing was tested"


@torch.no_grad()
def check_state_dicts_while_moving(service: Service) -> None:
    """Saving in the middle of relocations gives what was loaded; loading waits for them and writes all replicas."""
    for layer, twin in zip(service.layers, service.twins, strict=True):
        for _ in range(3):
            service.forward()
            service.controller.step()
            saved = layer.state_dict()
            for name, tensor in twin.state_dict().items():
                assert torch.equal(saved[name], tensor), name
    for seed in (11, 12):
        for layer, twin in zip(service.layers, service.twins, strict=True):
            give_unit_scale(twin, seed)
            layer.load_state_dict(twin.state_dict())
            service.forward()
        service.serve_until(moved_by(service, 2), "relocations after loading")
    drained(service)


@torch.no_grad()
def check_loading_at_different_times(service: Service) -> None:
    """One rank has loaded before another begins: until that one has too, nothing moves over what is new."""
    for seed in (21, 22):
        states = []
        for twin in service.twins:
            states.append(give_unit_scale(twin, seed).state_dict())  # collective

        def load(states: Sequence[dict[str, torch.Tensor]] = states) -> None:
            for layer, state in zip(service.layers, states, strict=True):
                layer.load_state_dict(state)

        is_early = service.rank % 2 == 0
        with service.controller.quiesced():
            for _ in range(5):  # a load window ends: a relocation is due
                for layer in service.layers:
                    layer(tokens(service.rank, 1, service.device, layer.gate.weight.dtype))
                service.controller.step()
            everybody(True, service.group, service.device)
            if is_early:
                load()
        if not is_early:
            time.sleep(0.2)
            load()
        everybody(True, service.group, service.device)
        service.serve_until(moved_by(service, 2), "relocations after loading")
    drained(service)


@torch.no_grad()
def check_loading_behind_a_long_queue(service: Service) -> None:
    """On a GPU loading only enqueues the writes: a fill that begins right after it must not read what was there before."""
    if service.device.type != "cuda":
        return
    for seed in (31, 32, 33):
        for layer, twin in zip(service.layers, service.twins, strict=True):
            give_unit_scale(twin, seed)
            state = twin.state_dict()
            torch.cuda._sleep(1_000_000_000)  # about half a second
            layer.load_state_dict(state)
        time.sleep(0.3)  # the worker may begin, with the windows that came before
        service.serve_until(moved_by(service, 2), "relocations after loading")
    drained(service)


def check_inside_step(rank, group, device) -> None:
    """use_async=False: all within step(), on all ranks in the same step; and no thread."""
    service = make_service(rank, group, device, use_async=False)
    assert service.controller.health().state == "idle"
    for step in range(1, 13):
        service.forward()
        service.controller.step()
        versions = torch.tensor([layer.resident.current.number for layer in service.layers])
        others = versions.clone()
        dist.all_reduce(others, op=dist.ReduceOp.MAX, group=group)
        assert torch.equal(versions, others), f"step {step}: ranks have different tables"
        assert service.controller.metrics().plans == step // 4
        assert at_rest(service)
    assert not any(thread.name == "eplb-worker" and thread.is_alive() for thread in threading.enumerate())
    assert_rested(service)
    service.assert_well()
    assert service.controller.metrics().flips >= service.controller.metrics().waves
    service.controller.close()


def check_failures_inside_step(rank, group, device) -> None:
    """use_async=False: a rank that loses its load window, in whichever way, keeps nobody waiting (I6)."""
    service = make_service(rank, group, device, use_async=False, peer_timeout=60.0)
    failing = {4: (0, "_download"), 8: (0, "_snapshot"), 12: (2, "_download"), 16: (2, "_snapshot")}
    for step in range(1, 25):
        service.forward()
        if step == 1:
            service.controller.step()
            continue
        (recorder,) = service.controller._windows.values()
        failing_rank, name = failing.get(step, (-1, ""))
        if rank == failing_rank:
            setattr(recorder, name, failing_once(recorder, name))
        started = time.monotonic()
        service.controller.step()
        assert time.monotonic() - started < 30.0, f"step {step}: waited for rank {failing_rank}, whose {name}() failed"
        if step == 20:
            before = service.controller.metrics().waves
    assert service.controller.metrics().waves > before, "it does not recover"
    failed = service.controller.health().last_error
    assert (failed is not None and "lost on purpose" in failed) == (rank in (0, 2)), failed
    versions = torch.tensor([layer.resident.current.number for layer in service.layers])
    others = versions.clone()
    dist.all_reduce(others, op=dist.ReduceOp.MAX, group=group)
    assert torch.equal(versions, others), "ranks have different tables"
    assert_rested(service)
    service.controller.close()


def check_loading_between_steps(rank, group, device) -> None:
    """use_async=False: no rank is left in a round of a step that is over, which none would answer while it loads."""
    options = {"policy": "static", "heartbeat_interval": 30.0, "quiesce_timeout": 20.0, "peer_timeout": 60.0}
    service = make_service(rank, group, device, use_async=False, **options)
    for step in range(1, 9):
        service.forward()
        time.sleep(0.01 * (rank % 2))
        service.controller.step()
        if step in (1, 4, 6, 8):
            for layer, twin in zip(service.layers, service.twins, strict=True):
                layer.load_state_dict(twin.state_dict())
    service.forward()
    assert service.controller.metrics().proposals == 2 and service.controller.health().last_error is None
    service.controller.close()


def failing_once(recorder, name):
    """In place of a method of `recorder`: raises, and puts the method back."""
    method = getattr(recorder, name)

    def fail(*_):
        setattr(recorder, name, method)
        raise OSError("lost on purpose")

    return fail


def check_no_redundant_experts(rank, group, device) -> None:
    """Every expert has one replica: experts swap ranks."""
    service = make_service(rank, group, device, redundant=0, use_async=False)
    for _ in range(8):
        service.forward()
        service.controller.step()
    assert_rested(service)
    service.assert_well()
    service.controller.close()


def check_gradients_across_flips(rank, group, device, **options) -> None:
    """I3 over ranks: forward, flip on all ranks, backward. The old version is not graced before."""

    for run in (as_is, checkpointed, checkpointed_reentrant):
        common = {"seed": 4, "num_redundant_experts": 2, "num_shadow_slots": 2, **options}
        layer, twin = (make_layer(group, device, **common) for _ in range(2))
        layer.gate.requires_grad_()  # whose gradient the experts' outputs decide
        twin.gate.requires_grad_()
        service = Service(rank, group, device, [layer], [twin], make_controller(group, [layer]))
        controller = service.controller
        for number in range(3):
            # In the middle of nothing, so that the next version to be published comes after the forward.
            with controller.quiesced():
                x = torch.randn(7 - 4 * rank, HIDDEN, generator=torch.Generator().manual_seed(number)).to(device)
                x.requires_grad_()
                y = run(layer, x)
                version = layer.resident.current.number
            flipped = lambda: layer.resident.current.number > version  # noqa: B023, E731
            service.serve_until(flipped, f"a flip ({run.__name__})")
            pinned = run is not checkpointed_reentrant  # its first forward runs without gradients and pins nothing
            if pinned:
                assert controller.health().phase == "GRACE"
                for _ in range(20):
                    service.forward()
                    controller.step()
                    time.sleep(0.002)
                assert controller.health().phase == "GRACE", "graced although a backward is to come"
                assert layer.resident.current.number == version + 1
            y.square().sum().backward()
            grad, gate_grad = x.grad.clone(), layer.gate.weight.grad.clone()
            if pinned:
                assert y.grad_fn is not None
            del y
            gc.collect()
            x.grad = None
            twin.zero_grad()
            run(twin, x).square().sum().backward()
            assert torch.equal(grad, x.grad), f"{run.__name__}: {(grad - x.grad).abs().max()}"
            assert torch.equal(gate_grad, twin.gate.weight.grad)
            layer.zero_grad()
            service.serve_until(lambda: layer.resident.current.number > version + 1, "grace, and a next version")  # noqa: B023
        drained(service)
        controller.close()


def check_another_controller_beside_a_backward_to_come(rank, group, device) -> None:
    """I3: also a controller that is made after a flip leaves the slots of a forward before it until the backward is over."""
    for seed in range(3):
        layer, twin = (make_layer(group, device, seed=5, num_redundant_experts=2, num_shadow_slots=4) for _ in range(2))
        service = Service(rank, group, device, [layer], [twin], make_controller(group, [layer], policy=Restless(seed)))
        service.controller.step()
        with service.controller.quiesced():
            x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
            y = layer(x)
            version = layer.resident.current.number
        service.serve_until(lambda: layer.resident.current.number > version, "a flip")  # noqa: B023
        service.controller.close()
        service.controller = make_controller(group, [layer], policy=Restless(seed + 100), grace_timeout=0.1)
        stalled = lambda: service.controller.health().state == "grace_stalled"  # noqa: B023, E731
        service.serve_until(stalled, "the backward to come is waited for")
        assert "backward" in service.controller.health().reason
        y.square().sum().backward()
        del y
        gc.collect()
        grad, x.grad = x.grad.clone(), None
        twin(x).square().sum().backward()
        assert torch.equal(grad, x.grad), f"{(grad - x.grad).abs().max()}"
        service.serve_until(moved_by(service, 2), "relocations by the other controller")
        with service.controller.quiesced():
            assert_rested(service)
        service.controller.close()


def check_steps_beside_forwards_on_another_thread(rank, group, device) -> None:
    """I3, I5, I8: a flip at any point of a forward changes no bit. The main thread does nothing but step."""
    layer, twin = (make_layer(group, device, seed=6, num_redundant_experts=2, num_shadow_slots=2) for _ in range(2))
    service = Service(rank, group, device, [layer], [twin], make_controller(group, [layer]))
    done, errors = threading.Event(), []

    moved_often = moved_by(service, 10)

    def serve() -> None:
        try:
            enough = lambda: service.num_steps >= 200 and moved_often()  # noqa: E731
            service.serve_until(enough, "relocations beside forwards", step=lambda number: False)
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    while not done.wait(0.002):
        service.controller.step()
    thread.join()
    assert not errors, errors
    service.serve_until(moved_by(service, 1), "relocations by one thread")
    drained(service)
    service.controller.close()


def check_a_main_thread_that_does_not_step(rank, group, device) -> None:
    """Grace stalls and says so; rank 0 has the new table, rank 1 the old one, and both serve. Then it goes on."""
    service = make_service(rank, group, device, grace_timeout=0.1, transfer_timeout=5.0)
    controller = service.controller
    published = lambda: controller.health().version > 0  # noqa: E731
    # Rank 0's fourth step ends a load window and begins a relocation: rank 1 stops stepping before.
    service.serve_until(published, "a first version", step=lambda number: rank == 0 or number < 4)
    service.serve_until(
        lambda: controller.health().state == "grace_stalled", "the stall is shown", step=lambda number: rank == 0
    )
    assert controller.health().phase == "GRACE" and controller.health().seconds_waiting > 0.1
    versions = {layer.resident.current.number for layer in service.layers}
    assert versions <= ({0, 1} if rank == 0 else {0}) and (rank == 1 or 1 in versions)
    for layer, twin in zip(service.layers, service.twins, strict=True):  # also experts that no rank's own table names
        saved, wanted = layer.state_dict(), twin.state_dict()
        assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    retiring = sum(layer.resident.pool.count(SlotState.RETIRING) for layer in service.layers)
    for _ in range(10):
        service.forward()
        if rank == 0:
            controller.step()
    assert controller.health().version == 1, "a wave was published although another is not graced"
    assert sum(layer.resident.pool.count(SlotState.RETIRING) for layer in service.layers) == retiring
    assert controller.metrics().failures == 0

    service.serve_until(moved_by(service, 4), "it goes on")
    service.serve_until(lambda: controller.health().state != "grace_stalled", "the stall is over")
    drained(service)
    controller.close()


def check_one_rank_closes(rank, group, device, **options) -> None:
    service = make_service(rank, group, device, **options)
    service.serve_until(moved_by(service, 3), "relocations")
    if rank == 1:
        started = time.monotonic()
        service.controller.close()
        assert time.monotonic() - started < 4.0
        assert service.controller.health().state == "closed"
    else:
        wait_until(lambda: service.controller.health().state == "peer_left", "rank 0 hears that rank 1 left")
        assert service.controller.health().departed == (1,)
    waves = service.controller.metrics().waves
    for _ in range(20):
        service.forward()
        service.controller.step()
    assert service.controller.metrics().waves == waves
    assert service.controller.metrics().failures == 0
    for layer, twin in zip(service.layers, service.twins, strict=True):
        saved, wanted = layer.state_dict(), twin.state_dict()
        assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
        give_unit_scale(twin, 21)
        layer.load_state_dict(twin.state_dict())
    service.forward()
    service.controller.close()


def check_one_rank_dies(rank, group, device, **options) -> None:
    service = make_service(rank, group, device, peer_timeout=2.0, **options)
    service.serve_until(moved_by(service, 2), "relocations")
    weights = service.twins[0].state_dict()
    if rank == 1:
        os._exit(0)
    controller = service.controller
    wait_until(lambda: controller.health().state == "lost", "the loss is shown")
    health = controller.health()
    assert health.last_error is not None and controller.metrics().failures >= 1
    versions = [layer.resident.current.number for layer in service.layers]
    states = [
        [layer.resident.pool.state(slot) for slot in range(layer.resident.pool.num_slots)] for layer in service.layers
    ]
    for _ in range(30):
        controller.step()
        time.sleep(0.002)
    assert controller.health().state == "lost"
    after = [layer.resident.current.number for layer in service.layers]
    assert all(new - old in (0, 1) for new, old in zip(after, versions, strict=True)), (
        "more than the one published version"
    )
    for layer, before in zip(service.layers, states, strict=True):
        pool = layer.resident.pool
        for slot, state in enumerate(before):
            # Nothing that anybody may name is ever free to be written again.
            assert not (state in (SlotState.LIVE, SlotState.RETIRING) and pool.state(slot) is SlotState.FREE)
    slabs = [layer.resident.pool.slab_SB.clone() for layer in service.layers]
    for layer, slab in zip(service.layers, slabs, strict=True):
        wanted = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        with pytest.raises(RuntimeError, match="the ranks cannot agree"):
            layer.load_state_dict(wanted)
        assert torch.equal(layer.resident.pool.slab_SB, slab), "loaded although the ranks may have different tables"
    started = time.monotonic()
    controller.close()
    assert time.monotonic() - started < 6.0
    assert controller.health().state == "closed"
    if device.type == "cuda":
        torch.cuda.synchronize()  # nothing waits for the rank that is gone
