"""Relocations by hand in the middle of a stream of forwards, on one rank with the local dispatcher.

I3: a forward, its backward and its recomputation see one table version from end to end. I5: no output depends on the
placement. The worker's own relocations are in `test_serving.py`.
"""

import sys
import threading
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eplb import EplbConfig, EplbController
from eplb.communicator import LocalCommunicator
from eplb.fill import WaveFill
from eplb.load_window import LoadWindowRecorder
from eplb.plan import LayerUpdate, Wave
from eplb.pool import SlotState
from moe_layer import MoELayer
from tests.moe_layer.reference import give_unit_scale
from tests.moe_layer.relocation import Relocator, moved

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_pair(device: str, dtype: torch.dtype = torch.float32, **options) -> tuple[MoELayer, MoELayer]:
    """A registered layer, and a twin that never moves."""
    layer, twin = (
        give_unit_scale(MoELayer(32, 16, 8, 2, num_shadow_slots=2, device=device, dtype=dtype, **options))
        for _ in range(2)
    )
    EplbController(EplbConfig(use_async=False)).register(layer)
    settle(device)
    return layer, twin


def settle(device: str) -> None:
    """What the test wrote into slots itself is there, before the side stream reads or writes them."""
    if device == "cuda":
        torch.cuda.synchronize()


def poison(layer: MoELayer, slot: int, device: str) -> None:
    """Nobody may read this slot any more: NaN."""
    layer.resident.pool.slab(slot).fill_(255)
    settle(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_i5_outputs_are_bitwise_equal_through_every_stage_of_a_wave(dtype, device):
    layer, twin = make_pair(device, dtype)
    relocator = Relocator([layer])
    pool = layer.resident.pool
    random = torch.Generator().manual_seed(0)

    def serve(num_tokens: int) -> None:
        x = torch.randn(num_tokens, 32, generator=random).to(device, dtype)
        assert torch.equal(layer(x), twin(x))

    with torch.no_grad():
        for number, expert in enumerate([3, 0, 3, 7, 5, 0, 1, 2, 4, 6]):
            slot = layer.resident.live_slots()[expert][0]
            serve(number)  # 0 tokens too
            fill = relocator.fill(0, expert)
            assert pool.count(SlotState.FILLING) == 1
            serve(5)
            handoff = relocator.publish(fill)
            assert (pool.state(slot), pool.count(SlotState.LIVE)) == (SlotState.RETIRING, 8)
            serve(9)
            relocator.flip(handoff)
            serve(3)
            assert layer.resident.live_slots()[expert][0] != slot
            relocator.release(fill, handoff)
            assert pool.state(slot) is SlotState.FREE
            serve(17)
    assert layer.resident.table.version == 10
    assert torch.equal(layer.resident.load_E, twin.resident.load_E)


def test_i5_one_token_alone_while_experts_move(device):
    """The kernels for a single token, natively or in the interpreter."""
    layer, twin = make_pair(device, torch.bfloat16, backend="triton")
    relocator = Relocator([layer])
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    with torch.no_grad():
        expected = twin(x)
        assert expected.any()
        for expert in layer.gate.choose(layer.gate(x))[1].flatten().tolist():
            old = layer.resident.live_slots()[expert][0]
            fill = relocator.fill(0, expert)
            assert torch.equal(layer(x), expected)
            handoff = relocator.publish(fill)
            relocator.flip(handoff)
            assert torch.equal(layer(x), expected)
            relocator.release(fill, handoff)
            poison(layer, old, device)
            assert torch.equal(layer(x), expected)


def test_an_old_slot_that_is_overwritten_after_grace_changes_nothing(device):
    """That the flip really leads away from the old slot: else the test above could not fail."""
    layer, twin = make_pair(device)
    relocator = Relocator([layer])
    x = torch.randn(20, 32, device=device)
    with torch.no_grad():
        for expert in range(8):
            old = layer.resident.live_slots()[expert][0]
            relocator.move(expert)
            poison(layer, old, device)
            assert torch.equal(layer(x), twin(x))


def test_a_wave_that_is_given_up_changes_nothing_and_gives_its_slots_back(device):
    layer, twin = make_pair(device)
    relocator = Relocator([layer])
    resident, x = layer.resident, torch.randn(9, 32, device=device)
    lanes = list(resident.lane_slots)
    with torch.no_grad():
        for expert in (0, 4):
            fill = relocator.fill(0, expert)
            assert resident.lane_slots != lanes
            fill.abandon()
            assert resident.pool.count(SlotState.QUARANTINED) == 1
            while not fill.bury():
                pass
            assert resident.pool.count(SlotState.FREE) == 2 and resident.lane_slots == lanes
            assert torch.equal(layer(x), twin(x)) and resident.table.version == 0
            relocator.move(expert)
            relocator.version = resident.table.version = 0
            lanes = list(resident.lane_slots)
            assert torch.equal(layer(x), twin(x))


def test_several_updates_in_one_wave_flip_together(device):
    pairs = [make_pair(device) for _ in range(3)]
    layers = [layer for layer, _ in pairs]
    relocator = Relocator(layers)
    residents = relocator.residents
    placements = [resident.table.placement for resident in residents]
    updates = []
    for index, expert in ((0, 2), (2, 5)):
        one = moved(placements[index], expert)
        updates.append(LayerUpdate(index, one.moves, one.placement, one.shares_WS))
    streams = relocator.streams
    fill = WaveFill(Wave(tuple(updates)), 1, (1, 0), residents, placements, LocalCommunicator(streams), streams)
    fill.start()
    while not fill.poll():
        pass
    assert (fill.num_moves, fill.num_bytes) == (2, 2 * residents[0].pool.slot_bytes)
    handoff = relocator.publish(fill)
    relocator.flip(handoff)
    relocator.release(fill, handoff)
    assert [resident.table.version for resident in residents] == [1, 0, 1]
    x = torch.randn(9, 32, device=device)
    with torch.no_grad():
        for layer, twin in pairs:
            assert torch.equal(layer(x), twin(x))


def test_load_windows_are_exact_while_experts_move(device):
    """The counters are of logical experts: a relocation attributes nothing to the wrong one, or to the wrong window."""
    layer, _ = make_pair(device)
    recorder = LoadWindowRecorder([layer.resident], layer.resident.streams, interval=4, window_size=3, num_samples=3)
    relocator = Relocator([layer])
    random = torch.Generator().manual_seed(0)
    routed = []
    with torch.no_grad():
        for step in range(1, 13):
            x = torch.randn(step, 32, generator=random).to(device)
            routed.append(layer.gate.choose(layer.gate(x))[1].flatten().bincount(minlength=8).tolist())
            fill = relocator.fill(0, step % 8)
            layer(x[: step // 2])
            handoff = relocator.publish(fill)
            relocator.flip(handoff)
            layer(x[step // 2 :])
            relocator.release(fill, handoff)
            if recorder.step(step):
                window = None
                while window is None:
                    window = recorder.poll()
                assert window.tolist() == routed[-3:]
    assert len(routed) == 12


# ---- I3 with gradients


def as_is(layer, x):
    return layer(x)


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def checkpointed_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [as_is, checkpointed, checkpointed_reentrant])
def test_i3_a_flip_between_forward_and_backward_does_not_change_the_gradient_of_x(run, dtype, device):
    """One flip: there is at most one version that is not graced."""
    layer, twin = make_pair(device, dtype)
    relocator = Relocator([layer])
    random = torch.Generator().manual_seed(0)
    grads = []
    for one in (layer, twin):
        x = torch.randn(20, 32, generator=random.manual_seed(1)).to(device, dtype).requires_grad_()
        y = run(one, x)
        if one is layer:
            relocator.move_without_grace(5)
        y.square().sum().backward()
        grads.append((y.detach(), x.grad, one.gate.weight.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    assert grads[0][1].abs().sum() > 0


def test_i3_a_version_is_not_graced_until_the_backward_is_done_and_freed(device):
    layer, _ = make_pair(device)
    resident = layer.resident
    x = torch.randn(5, 32, device=device, requires_grad=True)
    y = layer(x)
    z = layer(x)
    assert not resident.is_pinned_before(0)
    assert resident.is_pinned_before(1)
    Relocator([layer]).move_without_grace(3)
    late = layer(x)
    y.sum().backward()
    del y
    assert resident.is_pinned_before(1), "z's backward is still to come"
    z.sum().backward(retain_graph=True)
    assert resident.is_pinned_before(1), "z's graph was retained: its backward may run again"
    z.sum().backward()
    del z
    if device == "cuda":
        torch.cuda.synchronize()
    assert not resident.is_pinned_before(1)
    assert resident.is_pinned_before(2), "the forward after the flip pins the new version"
    del late
    assert not resident.is_pinned_before(2)


def test_a_graph_that_is_dropped_without_a_backward_pins_nothing(device):
    layer, _ = make_pair(device)
    x = torch.randn(5, 32, device=device, requires_grad=True)
    y = layer(x)
    assert layer.resident.is_pinned_before(1)
    del y
    assert not layer.resident.is_pinned_before(1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_serving_pins_nothing(context, device):
    layer, _ = make_pair(device)
    with context():
        y = layer(torch.randn(5, 32, device=device))
    assert not layer.resident.is_pinned_before(1)
    del y


def test_pins_from_several_threads(device, request):
    """Pins are made and freed on autograd's and on users' threads while the worker looks."""
    layer, _ = make_pair(device)
    errors = []
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)

    def train() -> None:
        try:
            for _ in range(60):
                x = torch.randn(3, 32, device=device, requires_grad=True)
                layer(x).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        layer.resident.is_pinned_before(1)
    for thread in threads:
        thread.join()
    assert not errors
    if device == "cuda":
        torch.cuda.synchronize()
    assert not layer.resident.is_pinned_before(1)


# ---- CUDA graphs


def captured(layer: MoELayer, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """The forward of `layer` as a graph over the static input `x`, and its static output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles the kernels
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    return graph, y


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_i5_graph_replays_across_flips_are_bitwise_equal(dtype, num_tokens):
    layer, twin = make_pair("cuda", dtype)
    relocator = Relocator([layer])
    x = torch.zeros(num_tokens, 32, device="cuda", dtype=dtype)
    with torch.no_grad():
        graph, y = captured(layer, x)
        counted = layer.resident.load_E.clone()
        for number, expert in enumerate([3, 0, 3, 7, 5, 0, 1, 2, 4, 6]):
            x.copy_(torch.randn(num_tokens, 32, device="cuda"))
            graph.replay()
            expected = twin(x)
            assert torch.equal(y, expected)
            fill = relocator.fill(0, expert)
            graph.replay()
            assert torch.equal(y, expected)
            handoff = relocator.publish(fill)
            graph.replay()  # enqueued before the flip, not waited for
            relocator.flip(handoff)
            graph.replay()
            assert torch.equal(y, expected)
            old = [slot for slot in range(10) if layer.resident.pool.state(slot) is SlotState.RETIRING]
            relocator.release(fill, handoff)
            poison(layer, old[0], "cuda")
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected), f"replay after flip {number + 1}"
        assert (layer.resident.load_E - counted).sum() == 10 * 5 * num_tokens * 2


@pytest.mark.gpu
def test_warm_up_is_not_counted_under_replay_either():
    layer, _ = make_pair("cuda")
    controller = layer.resident.controller
    x = torch.randn(24, 32, device="cuda")
    with torch.no_grad():
        with controller.warm_up():
            graph, _ = captured(layer, x)
            graph.replay()
        torch.cuda.synchronize()
        assert layer.resident.load_E.sum() == 0
        graph.replay()
    torch.cuda.synchronize()
    assert layer.resident.load_E.sum() == 48


@pytest.mark.gpu
def test_a_capture_while_waves_are_filled_is_not_invalidated():
    """Another thread fills, polls events and gets memory all the while, as the worker does."""
    layer, twin = make_pair("cuda")
    relocator = Relocator([layer])
    stop, ready, errors, fills = threading.Event(), threading.Event(), [], []

    def relocate() -> None:
        try:
            relocator.streams.adopt_thread()
            number = 0
            while not stop.is_set():
                fill = relocator.fill(0, number % 8)
                fill.abandon()
                while not fill.bury():
                    pass
                torch.empty(1 << 20, device="cuda")
                torch.empty(1 << 16, pin_memory=True)
                fills.append(number)
                number += 1
                ready.set()
        except Exception as error:
            errors.append(error)
            ready.set()

    thread = threading.Thread(target=relocate)
    thread.start()
    try:
        assert ready.wait(30)
        x = torch.randn(24, 32, device="cuda")
        with torch.no_grad():
            for _ in range(5):
                before = len(fills)
                graph, y = captured(layer, x)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(y, twin(x))
                while len(fills) <= before and not errors:
                    pass  # at least one wave per capture
    finally:
        stop.set()
        thread.join()
    assert not errors


@pytest.mark.gpu
def test_a_capture_beside_a_worker_that_works():
    """The controller's own thread: rounds, windows brought to the host, events polled, while graphs are captured."""
    layer, twin = make_pair("cuda")
    layer.resident.controller.close()
    config = EplbConfig(
        step_interval=1,
        window_size=1,
        window_samples=1,
        round_interval=1e-3,
        heartbeat_interval=1e-3,
        peer_timeout=30.0,
    )
    with torch.no_grad(), EplbController(config) as controller:
        controller.register(layer)
        x = torch.randn(24, 32, device="cuda")
        deadline = time.monotonic() + 60
        number = 0
        while number < 5 or controller.metrics().windows < 20:
            assert time.monotonic() < deadline, controller.health()
            graph, y = captured(layer, x)
            for _ in range(10):
                graph.replay()
                controller.step()
            torch.cuda.synchronize()
            assert torch.equal(y, twin(x))
            number += 1
        assert controller.health().last_error is None and controller.metrics().failures == 0


@pytest.mark.gpu
def test_steps_while_capturing_do_nothing_and_the_graph_sees_later_flips():
    layer, twin = make_pair("cuda")
    controller = layer.resident.controller
    x = torch.randn(24, 32, device="cuda")
    controller.step()
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
            controller.step()
        Relocator([layer]).move(4)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, twin(x))
    assert controller.health().last_error is None


@pytest.mark.gpu
def test_a_flip_is_ordered_against_forwards_on_other_streams():
    """The controller's own flip, not ours: it must wait for, and be waited for by, every stream that ran a forward."""
    layer, twin = make_pair("cuda")
    controller = layer.resident.controller
    controller.step()
    relocator = Relocator([layer])
    other = torch.cuda.Stream()
    x = torch.randn(64, 32, device="cuda")
    torch.cuda.synchronize()
    with torch.no_grad():
        expected = twin(x)
        torch.cuda.synchronize()
        for expert in (1, 6, 1, 3):
            fill = relocator.fill(0, expert)
            handoff = relocator.publish(fill)
            with torch.cuda.stream(other):
                torch.cuda._sleep(50_000_000)  # tens of milliseconds: the forward comes long after the flip was called
                late = layer(x)
                computed = other.record_event()
            controller._flip(handoff)
            torch.cuda.current_stream().synchronize()
            assert handoff.flipped.query()
            assert computed.query(), "the flip did not wait for the other stream's forward"
            relocator.release(fill, handoff)
            layer.resident.pool.slab_SB[[s for s in range(10) if layer.resident.pool.state(s) is SlotState.FREE]] = 255
            torch.cuda.synchronize()
            assert torch.equal(late, expected)
            with torch.cuda.stream(other):
                assert torch.equal(layer(x), expected)
