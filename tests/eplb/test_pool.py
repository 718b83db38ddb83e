"""The slot pool: layout, which slots are free, sharing."""

import contextlib
import gc
import threading
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from eplb import SlotPool, TensorSpec
from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Move, Wave
from eplb.planning.shares import equal_shares
from eplb.relocation.communicator import LocalCommunicator
from eplb.relocation.fill import WaveFill
from eplb.relocation.pool import ALIGNMENT, NoFreeSlot, SlotHold, SlotState
from eplb.relocation.resident import ResidentExperts
from eplb.relocation.versions import Version, Versions
from eplb.streams import HostStreams, streams_of

SPECS = (
    TensorSpec("weight", (3, 5), torch.float32),  # 60 bytes → 256
    TensorSpec("scale", (3,), torch.bfloat16),  # 6 bytes → 256
    TensorSpec("codes", (300,), torch.uint8),  # 300 bytes → 512
)


def make_pool(num_slots: int = 4) -> SlotPool:
    return SlotPool(SPECS, num_slots)


# ---- layout


def test_bytes_of_a_slot():
    pool = make_pool()
    assert [spec.num_bytes for spec in SPECS] == [60, 6, 300]
    assert pool.slot_bytes == 256 + 256 + 512
    assert pool.slab_SB.shape == (4, 1024) and pool.slab_SB.dtype == torch.uint8
    assert ALIGNMENT == 256


@pytest.mark.parametrize(
    ("specs", "starts"),
    [
        (SPECS, {"weight": 0, "scale": 256, "codes": 512}),
        (SPECS[::-1], {"codes": 0, "scale": 512, "weight": 768}),  # what follows one that is larger than the alignment
    ],
    ids=["largest_last", "largest_first"],
)
def test_tensors_are_aligned_dense_views_of_the_slab(device, specs, starts):
    pool = SlotPool(specs, 4, device)
    for spec in specs:
        tensor = pool.tensors[spec.name]
        assert tensor.shape == (4, *spec.shape) and tensor.dtype == spec.dtype
        assert tensor.untyped_storage().data_ptr() == pool.slab_SB.untyped_storage().data_ptr()
        for slot in range(4):
            assert tensor[slot].is_contiguous()
            assert tensor[slot].data_ptr() == pool.slab(slot).data_ptr() + starts[spec.name]
            assert (tensor[slot].data_ptr() - pool.slab_SB.data_ptr()) % ALIGNMENT == 0


def test_i4_everything_of_an_expert_moves_with_its_slab():
    pool = make_pool()
    for spec in SPECS:
        for slot in range(4):
            pool.tensors[spec.name][slot] = slot + 1
    pool.slab(3).copy_(pool.slab(0))
    for spec in SPECS:
        assert [int(pool.tensors[spec.name][slot].min()) for slot in range(4)] == [1, 2, 3, 1]
        assert [int(pool.tensors[spec.name][slot].max()) for slot in range(4)] == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("specs", "num_slots", "message"),
    [
        ((), 4, "specs must name at least one tensor"),
        ((SPECS[0], SPECS[0]), 4, r"specs must have distinct names, got \['weight', 'weight'\]"),
        ((TensorSpec("w", (3, 0), torch.float32),), 4, r"specs must have positive sizes, got \[\('w', \(3, 0\)\)\]"),
        ((TensorSpec("w", (-1,), torch.float32),), 4, "specs must have positive sizes"),
        (SPECS, 0, "num_slots must be positive, got 0"),
        (SPECS, -2, "num_slots must be positive, got -2"),
        (SPECS, None, "num_slots must be positive, got None"),
        (SPECS, 1.5, r"num_slots must be positive, got 1\.5"),
        (("weight",), 4, "specs must be TensorSpecs with a torch.dtype, got 'weight'"),
        ((TensorSpec("w", (3,), "f"),), 4, "specs must be TensorSpecs with a torch.dtype, got .*'f'"),
        ((TensorSpec("w", None, torch.int8),), 4, "specs must have shapes that are tuples of integers, got .*None"),
    ],
    ids=str,
)
def test_refused(specs, num_slots, message):
    with pytest.raises(ValueError, match=message):
        SlotPool(specs, num_slots)


# ---- I1: which slots are free


def place(pool: SlotPool, num_experts: int, num_lanes: int | None = None) -> Versions:
    """A layer's first version: experts 0, 1, … in its first lanes."""
    lanes = [*range(num_experts), *[-1] * ((num_lanes or num_experts) - num_experts)]
    placement = Placement(np.array([lanes]), num_experts)
    return pool.place(placement, equal_shares(placement), 0)


def moved(layer: Versions, lane: int, slot: int) -> Version:
    """The next version, in which `lane` is in another slot."""
    slots = list(layer.newest.slots_S)
    slots[lane] = slot
    return replace(layer.newest, number=layer.newest.number + 1, slots_S=tuple(slots))


def test_i1_the_life_of_a_slot():
    pool = make_pool(2)
    layer = place(pool, 1)
    assert pool.states() == [SlotState.LIVE, SlotState.FREE]
    hold = pool.hold()
    hold.read(0)
    assert hold.take() == 1
    assert pool.states() == [SlotState.LIVE, SlotState.FILLING]
    layer.publish(moved(layer, 0, 1))
    assert pool.states() == [SlotState.RETIRING, SlotState.LIVE]
    hold.end()
    assert pool.states() == [SlotState.RETIRING, SlotState.LIVE]
    with pytest.raises(AssertionError, match="version 0 is current"):
        layer.grace_before(1)
    layer.current = layer.newest
    assert pool.states() == [SlotState.RETIRING, SlotState.LIVE]
    layer.grace_before(1)
    assert pool.states() == [SlotState.FREE, SlotState.LIVE]
    assert pool.hold().take() == 0


def test_a_transfer_given_up_keeps_its_slots_until_it_is_over():
    pool = make_pool(2)
    hold, other = pool.hold(), pool.hold()
    assert hold.take() == 0  # the lowest, so that runs repeat
    hold.is_abandoned = True
    assert pool.states() == [SlotState.QUARANTINED, SlotState.FREE]
    assert other.take() == 1, "a quarantined slot is not written"
    hold.end()
    hold.end()
    assert pool.states() == [SlotState.FREE, SlotState.FILLING]


def test_i1_a_slot_that_is_read_is_not_free_until_its_last_reader_is_done():
    pool = make_pool(1)
    layer = place(pool, 1)
    readers = [pool.hold(), pool.hold()]
    for reader in readers:
        reader.read(0)
    assert pool.state(0) is SlotState.LIVE
    del layer
    assert pool.state(0) is SlotState.QUARANTINED
    readers[0].end()
    assert pool.state(0) is SlotState.QUARANTINED
    with pytest.raises(NoFreeSlot, match=r"no free slot among 1: .*'quarantined': 1"):
        pool.hold().take()
    readers[1].end()
    assert pool.state(0) is SlotState.FREE


@pytest.mark.parametrize("seed", range(20))
def test_i1_free_is_named_by_nobody_and_touched_by_nobody(seed):
    """Against a model that keeps every version and transfer by hand."""
    random = Random(seed)
    pool = make_pool(12)
    layers = [place(pool, 3, 4), place(pool, 2, 3)]
    holds: list[tuple[SlotHold, Versions, int]] = []
    for _ in range(200):
        layer = random.choice(layers)
        match random.randrange(4):
            case 0 if pool.count(SlotState.FREE):
                hold = pool.hold()
                hold.read(random.choice(layer.newest.slots_S[:2]))
                before = pool.states()
                slot = hold.take()
                assert before[slot] is SlotState.FREE
                holds.append((hold, layer, slot))
            case 1 if holds:
                hold, owner, slot = holds.pop(random.randrange(len(holds)))
                if random.random() < 0.7:
                    owner.publish(moved(owner, random.randrange(2), slot))
                hold.end()
            case 2:
                layer.current = layer.newest
            case 3:
                layer.grace_before(layer.current.number)
        named = {slot for one in layers for version in one.ungraced for slot in version.slots_S}
        touched = {slot for hold, _, _ in holds for slot in (*hold.reads, *hold.writes)}
        free = [slot for slot, state in enumerate(pool.states()) if state is SlotState.FREE]
        assert free == sorted(set(range(12)) - named - touched) and pool.num_free() == len(free)
        if holds and random.random() < 0.2:
            holds[-1][0].is_abandoned = not holds[-1][0].is_abandoned
        assert pool.num_quarantined() == pool.count(SlotState.QUARANTINED)


def test_placing_takes_the_lowest_free_slots_or_none():
    pool = make_pool(5)
    assert pool.hold().take() == 0
    first = place(pool, 2, 3)
    assert first.newest.slots_S == (1, 2, -1)
    with pytest.raises(ValueError, match="pool has 2 free slots of 5, but 3 are needed"):
        place(pool, 3)
    assert pool.count(SlotState.FREE) == 2, "a refused layer took slots"
    assert place(pool, 2).newest.slots_S == (3, 4)


def test_several_slots_are_taken_together_or_none():
    pool = make_pool(4)
    layer = place(pool, 1)
    hold = pool.hold()
    with pytest.raises(NoFreeSlot, match=r"3 free slots, not 4, among 4"):
        hold.take_many(4)
    assert hold.writes == []
    assert hold.take_many(0) == [] and hold.take_many(2) == [1, 2] and hold.writes == [1, 2]
    assert pool.states() == [SlotState.LIVE, SlotState.FILLING, SlotState.FILLING, SlotState.FREE] and layer


def test_no_free_slot_names_the_states():
    pool = make_pool(3)
    layer = place(pool, 1)
    hold = pool.hold()
    layer.publish(moved(layer, 0, hold.take()))
    hold.take()
    with pytest.raises(NoFreeSlot, match=r"no free slot among 3: .*'filling': 1.*'live': 1.*'retiring': 1"):
        pool.hold().take()


# ---- sharing, dropping, threads


def test_layers_share_the_free_slots():
    pool = make_pool(7)
    first, second = place(pool, 3), place(pool, 3)
    assert first.newest.slots_S == (0, 1, 2) and second.newest.slots_S == (3, 4, 5)
    hold = pool.hold()  # one slot for whichever layer moves
    first.publish(moved(first, 0, hold.take()))
    hold.end()
    first.current = first.newest
    first.grace_before(1)
    assert pool.hold().take() == 0


def make_resident(pool: SlotPool) -> ResidentExperts:
    return ResidentExperts(
        num_experts=3,
        num_redundant_experts=0,
        num_shadow_slots=1,
        rank=0,
        num_ranks=1,
        pool=pool,
        streams=HostStreams(),
    )


def test_a_layer_that_is_dropped_gives_its_slots_back_at_once():
    """Without the garbage collector: nothing leads in a circle."""
    pool = make_pool(4)
    gc.disable()
    try:
        for _ in range(3):
            layer = make_resident(pool)
            with layer.choice() as pin:
                pass
            held = layer.pin()
            assert pool.count(SlotState.FREE) == 1
            held.release()
            del layer, held
            assert pool.count(SlotState.FREE) == 1, "a pin still needs the slots"
            del pin
            assert pool.count(SlotState.FREE) == 4
    finally:
        gc.enable()


def test_a_layer_whose_constructor_fails_gives_its_slots_back(monkeypatch):
    pool = make_pool(4)
    monkeypatch.setattr("eplb.relocation.resident.Pins", lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        make_resident(pool)
    assert pool.count(SlotState.FREE) == 4


def test_a_fill_waits_for_the_forwards_of_a_layer_that_was_dropped():
    pool = make_pool(8)
    kept, dropped = make_resident(pool), make_resident(pool)
    del dropped
    assert pool.count(SlotState.FREE) == 5 and pool.has_dropped_layers
    joined = []
    kept.streams.gate.join = joined.append
    lanes = kept.newest.placement.lanes_WS.copy()
    lanes[0, 0], lanes[0, 3] = -1, 0
    placement = Placement(lanes, 3)
    wave = Wave((LayerUpdate(0, (Move(0, 0, 0, 0, 3),), placement, equal_shares(placement)),))
    WaveFill(wave, 1, (1, 0), [kept], LocalCommunicator(kept.streams), kept.streams)
    assert joined == [kept.streams.side] and not pool.has_dropped_layers


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_a_pool_and_a_layer_on_meta_get_memory_later(default):
    with torch.device(default):
        pool = SlotPool(SPECS, 4, "meta")
        layer = ResidentExperts(
            num_experts=3,
            num_redundant_experts=0,
            num_shadow_slots=1,
            rank=0,
            num_ranks=1,
            pool=pool,
            streams=streams_of(torch.device("meta")),
        )
        assert {tensor.device.type for tensor in pool.tensors.values()} == {"meta"}
        assert layer.table.lanes_P.is_meta and layer.load_E.is_meta
        real = layer.copied_to(SlotPool(SPECS, 4, "cpu"), streams_of(torch.device("cpu")))
    assert real.current.slots_S == layer.current.slots_S == (0, 1, 2, -1)
    assert real.table.lane_to_slot_S.tolist() == [0, 1, 2, -1] and real.table.lanes_P.tolist() == [0, 1, 2]
    assert real.load_E.tolist() == [0, 0, 0] and real.load_increment_1.tolist() == [1]
    assert not real.pool.slab_SB.any(), "free and new slots hold zeros"


def test_i8_two_threads_never_get_the_same_slot(switch_often):
    pool, taken, errors = make_pool(8), [], []
    lock = threading.Lock()

    def worker() -> None:
        try:
            for _ in range(100):
                hold = pool.hold()
                slot = hold.take()
                with lock:
                    assert slot not in taken, "two threads hold one slot"
                    taken.append(slot)
                with lock:
                    taken.remove(slot)
                hold.end()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and pool.count(SlotState.FREE) == 8
