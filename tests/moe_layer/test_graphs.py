"""Captured CUDA graphs and side streams while experts move."""

import threading
import time

import pytest
import torch

from eplb import EplbConfig, EplbController
from eplb.relocation.pool import SlotState
from moe_layer import MoELayer
from tests.moe_layer.relocation import Relocator, make_pair, poison

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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
            handoff.flip(layer.resident.streams)
            torch.cuda.current_stream().synchronize()
            assert handoff.flipped.query()
            assert computed.query(), "the flip did not wait for the other stream's forward"
            relocator.release(fill, handoff)
            layer.resident.pool.slab_SB[[s for s in range(10) if layer.resident.pool.state(s) is SlotState.FREE]] = 255
            torch.cuda.synchronize()
            assert torch.equal(late, expected)
            with torch.cuda.stream(other):
                assert torch.equal(layer(x), expected)
