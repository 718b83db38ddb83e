"""Relocations by hand in the middle of a stream of forwards, on one rank with the local dispatcher.

I3: a forward, its backward and its recomputation see one table version from end to end. I5: no output depends on the
placement. The worker's own relocations are in `test_serving.py`.
"""

import contextlib
import sys
import threading

import pytest
import torch

from eplb.load_window import LoadWindowRecorder
from eplb.planning.plan import LayerUpdate, Wave
from eplb.relocation.communicator import LocalCommunicator
from eplb.relocation.fill import WaveFill
from eplb.relocation.pool import SlotState
from moe_layer import MoELayer, make_pool
from tests.moe_layer.relocation import (
    Relocator,
    as_is,
    checkpointed,
    checkpointed_reentrant,
    make_pair,
    moved,
    poison,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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
    assert layer.resident.current.number == 10
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
    with torch.no_grad():
        for expert in (0, 4):
            versions = resident.versions.ungraced
            fill = relocator.fill(0, expert)
            assert resident.pool.count(SlotState.FILLING) == 1
            fill.abandon()
            assert resident.pool.count(SlotState.QUARANTINED) == 1
            while not fill.bury():
                pass
            assert resident.pool.count(SlotState.FREE) == 2 and resident.versions.ungraced == versions
            assert torch.equal(layer(x), twin(x)) and resident.current is versions[0]
            relocator.move(expert)
            assert torch.equal(layer(x), twin(x)) and resident.current.number == relocator.version


def test_several_updates_in_one_wave_flip_together(device):
    pairs = [make_pair(device) for _ in range(3)]
    layers = [layer for layer, _ in pairs]
    relocator = Relocator(layers)
    residents = relocator.residents
    updates = []
    for index, expert in ((0, 2), (2, 5)):
        one = moved(residents[index].newest.placement, expert)
        updates.append(LayerUpdate(index, one.moves, one.placement, one.shares_WS))
    streams = relocator.streams
    fill = WaveFill(Wave(tuple(updates)), 1, (1, 0), residents, LocalCommunicator(streams), streams)
    fill.start()
    while not fill.poll():
        pass
    assert (fill.num_moves, fill.num_bytes) == (2, 2 * residents[0].pool.slot_bytes)
    handoff = relocator.publish(fill)
    relocator.flip(handoff)
    relocator.release(fill, handoff)
    assert [resident.current.number for resident in residents] == [1, 0, 1]
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [as_is, checkpointed, checkpointed_reentrant])
def test_i3_a_flip_between_forward_and_backward_does_not_change_the_gradient_of_x(run, dtype, device):
    """One flip: there is at most one version that is not graced."""
    layer, twin = make_pair(device, dtype)
    relocator = Relocator([layer])
    random = torch.Generator().manual_seed(0)
    grads = []
    for one in (layer, twin):
        one.gate.requires_grad_()  # whose gradient the experts' outputs decide
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
    assert not resident.held_by(0)
    assert resident.held_by(1)
    Relocator([layer]).move_without_grace(3)
    late = layer(x)
    y.sum().backward()
    del y
    assert resident.held_by(1), "z's backward is still to come"
    z.sum().backward(retain_graph=True)
    assert resident.held_by(1), "z's graph was retained: its backward may run again"
    z.sum().backward()
    del z
    if device == "cuda":
        torch.cuda.synchronize()
    assert not resident.held_by(1)
    assert resident.held_by(2), "the forward after the flip pins the new version"
    del late
    assert not resident.held_by(2)


def test_a_graph_that_is_dropped_without_a_backward_pins_nothing(device):
    layer, _ = make_pair(device)
    x = torch.randn(5, 32, device=device, requires_grad=True)
    y = layer(x)
    assert layer.resident.held_by(1)
    del y
    assert not layer.resident.held_by(1)


def test_a_loss_that_is_kept_after_its_backward_pins_nothing(device):
    layer, _ = make_pair(device)
    x = torch.randn(5, 32, device=device, requires_grad=True)
    loss = layer(x).sum()
    assert layer.resident.held_by(1) == {0: 1}
    loss.backward(retain_graph=True)
    assert layer.resident.held_by(1) == {0: 1}, "another backward may come"
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    assert layer.resident.held_by(1) == {} and loss.grad_fn is not None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_serving_pins_nothing(context, device):
    layer, _ = make_pair(device)
    with context():
        y = layer(torch.randn(5, 32, device=device))
    assert not layer.resident.held_by(1)
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
        layer.resident.held_by(1)
    for thread in threads:
        thread.join()
    assert not errors
    if device == "cuda":
        torch.cuda.synchronize()
    assert not layer.resident.held_by(1)


def test_a_layer_that_is_dropped_or_fails_to_be_made_gives_its_slots_back(device, monkeypatch):
    pool = make_pool(1, 32, 16, 8, device=device)
    for _ in range(2):
        layer = MoELayer(32, 16, 8, 2, pool=pool, device=device)
        layer(torch.randn(3, 32, device=device, requires_grad=True)).sum().backward()
        del layer
        assert pool.count(SlotState.FREE) == 9
    monkeypatch.setattr(MoELayer, "reset_parameters", lambda self: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        MoELayer(32, 16, 8, 2, pool=pool, device=device)
    assert pool.count(SlotState.FREE) == 9
