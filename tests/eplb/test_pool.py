"""The slot pool: layout, states, readers, sharing."""

import threading

import pytest
import torch

from eplb import SlotPool, TensorSpec
from eplb.relocation.pool import ALIGNMENT, SlotState

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


def test_tensors_are_aligned_dense_views_of_the_slab(device):
    pool = SlotPool(SPECS, 4, device)
    starts = {"weight": 0, "scale": 256, "codes": 512}
    for spec in SPECS:
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
    ],
    ids=str,
)
def test_refused(specs, num_slots, message):
    with pytest.raises(ValueError, match=message):
        SlotPool(specs, num_slots)


# ---- states


def test_the_life_of_a_slot():
    pool = make_pool(2)
    assert [pool.state(slot) for slot in range(2)] == [SlotState.FREE] * 2
    slot = pool.allocate()
    assert slot == 0 and pool.state(0) is SlotState.FILLING
    pool.publish([0])
    assert pool.state(0) is SlotState.LIVE
    pool.retire([0])
    assert pool.state(0) is SlotState.RETIRING
    pool.release([0])
    assert pool.state(0) is SlotState.FREE
    assert pool.allocate() == 0  # the lowest, so that runs repeat


def test_a_fill_given_up():
    pool = make_pool(2)
    pool.allocate()
    pool.quarantine([0])
    assert pool.state(0) is SlotState.QUARANTINED
    assert pool.allocate() == 1, "a quarantined slot is not written"
    pool.release([0, 1])
    assert pool.count(SlotState.FREE) == 2


def test_reserve_takes_the_lowest_free_slots_or_none():
    pool = make_pool(5)
    assert pool.allocate() == 0
    assert pool.reserve(2) == [1, 2]
    assert pool.count(SlotState.LIVE) == 2
    with pytest.raises(ValueError, match="pool has 2 free slots of 5, but 3 are needed"):
        pool.reserve(3)
    assert pool.count(SlotState.FREE) == 2, "a refused reservation took slots"
    assert pool.reserve(2) == [3, 4]
    assert pool.reserve(0) == []


def test_allocate_from_a_full_pool_names_the_states():
    pool = make_pool(3)
    pool.reserve(2)
    pool.retire([1])
    pool.allocate()
    with pytest.raises(RuntimeError, match=r"no free slot among 3: .*'filling': 1.*'live': 1.*'retiring': 1"):
        pool.allocate()


def put(state: SlotState) -> SlotPool:
    """A pool whose slot 0 is in `state`."""
    pool = make_pool(1)
    if state is not SlotState.FREE:
        pool.allocate()
    if state in (SlotState.LIVE, SlotState.RETIRING):
        pool.publish([0])
    if state is SlotState.RETIRING:
        pool.retire([0])
    if state is SlotState.QUARANTINED:
        pool.quarantine([0])
    assert pool.state(0) is state
    return pool


ALLOWED = {
    ("publish", SlotState.FILLING): SlotState.LIVE,
    ("retire", SlotState.LIVE): SlotState.RETIRING,
    ("quarantine", SlotState.FILLING): SlotState.QUARANTINED,
    ("release", SlotState.FILLING): SlotState.FREE,
    ("release", SlotState.RETIRING): SlotState.FREE,
    ("release", SlotState.QUARANTINED): SlotState.FREE,
}


@pytest.mark.parametrize("state", SlotState)
@pytest.mark.parametrize("action", ["publish", "retire", "quarantine", "release"])
def test_i1_only_these_transitions(action, state):
    """Above all a live slot never becomes free or filling."""
    pool = put(state)
    if (action, state) in ALLOWED:
        getattr(pool, action)([0])
        assert pool.state(0) is ALLOWED[action, state]
    else:
        with pytest.raises(AssertionError, match=f"slot 0 cannot go from {state.value}"):
            getattr(pool, action)([0])
        assert pool.state(0) is state


# ---- readers


def test_i1_a_slot_that_is_read_is_not_free_until_its_last_reader_is_done():
    pool = make_pool(1)
    pool.reserve(1)
    pool.begin_read([0])
    pool.begin_read([0])
    pool.retire([0])
    pool.release([0])
    assert pool.state(0) is SlotState.QUARANTINED
    pool.end_read([0])
    assert pool.state(0) is SlotState.QUARANTINED
    with pytest.raises(RuntimeError, match="no free slot"):
        pool.allocate()
    pool.end_read([0])
    assert pool.state(0) is SlotState.FREE


def test_readers_change_nothing_of_a_slot_that_nobody_releases():
    pool = make_pool(1)
    pool.reserve(1)
    pool.begin_read([0])
    pool.end_read([0])
    assert pool.state(0) is SlotState.LIVE
    with pytest.raises(AssertionError, match="slot 0 has no reader"):
        pool.end_read([0])


def test_a_slot_freed_after_its_reader_can_be_read_and_freed_again():
    pool = make_pool(1)
    for _ in range(2):
        pool.allocate()
        pool.publish([0])
        pool.begin_read([0])
        pool.retire([0])
        pool.release([0])
        pool.end_read([0])
        assert pool.state(0) is SlotState.FREE


# ---- sharing, threads


def test_layers_share_the_free_slots():
    pool = make_pool(7)
    first, second = pool.reserve(3), pool.reserve(3)
    assert first == [0, 1, 2] and second == [3, 4, 5]
    slot = pool.allocate()  # one for whichever layer moves
    pool.publish([slot])
    pool.retire([first[0]])
    pool.release([first[0]])
    assert pool.allocate() == first[0]


def test_two_threads_never_get_the_same_slot():
    pool, taken, errors = make_pool(8), [], []

    def worker() -> None:
        try:
            for _ in range(300):
                slot = pool.allocate()
                taken.append(slot)
                assert taken.count(slot) == 1, "two threads hold one slot"
                taken.remove(slot)
                pool.release([slot])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and pool.count(SlotState.FREE) == 8
