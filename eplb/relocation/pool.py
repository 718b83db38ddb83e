"""The slots of one rank: where physical experts live."""

import enum
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

# Every tensor of a slot, and every slot, starts at a multiple of this many bytes. 256 covers TMA's 16 and 128, and keeps
# the alignment of an expert's weights the same in all slots, on which the bits of a CPU's matrix product may depend.
ALIGNMENT = 256


@dataclass(frozen=True)
class TensorSpec:
    """One of the tensors that belong to an expert: a weight, a scale, a bias, …"""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SlotState(enum.Enum):
    """What a slot is at the moment; the *shadow* slots of the glossary are the first two."""

    FREE = "free"
    FILLING = "filling"
    LIVE = "live"
    RETIRING = "retiring"
    QUARANTINED = "quarantined"


class SlotPool:
    """`num_slots` slabs of bytes on one device, each holding everything that belongs to one expert.

    One expert is one contiguous slab: its tensors cannot be separated by a move (I4), and a move is one copy.
    Layers whose experts have the same tensors may share a pool, and with it the free slots.

    Attributes:
        slab_SB: the memory, uint8 ``[num_slots, slot_bytes]``. Its address never changes.
        tensors: by name, a view ``[num_slots, *shape]`` of the slab; dense inside a slot, padded between slots.
    """

    def __init__(self, specs: Sequence[TensorSpec], num_slots: int, device: torch.device | str = "cpu") -> None:
        if not specs:
            raise ValueError("specs must name at least one tensor")
        if len({spec.name for spec in specs}) != len(specs):
            raise ValueError(f"specs must have distinct names, got {[spec.name for spec in specs]}")
        if any(size <= 0 for spec in specs for size in spec.shape):
            raise ValueError(f"specs must have positive sizes, got {[(spec.name, spec.shape) for spec in specs]}")
        if num_slots <= 0:
            raise ValueError(f"num_slots must be positive, got {num_slots}")
        self.specs = tuple(specs)
        self.num_slots = num_slots
        self.slot_bytes = sum(_aligned(spec.num_bytes) for spec in specs)
        self.slab_SB = torch.empty(num_slots, self.slot_bytes, dtype=torch.uint8, device=device)
        self.tensors: dict[str, torch.Tensor] = {}
        offset = 0
        for spec in specs:
            inner = torch.empty(spec.shape, device="meta").stride()
            self.tensors[spec.name] = torch.as_strided(
                self.slab_SB.view(spec.dtype),
                (num_slots, *spec.shape),
                (self.slot_bytes // spec.dtype.itemsize, *inner),
                offset // spec.dtype.itemsize,
            )
            offset += _aligned(spec.num_bytes)
        self._lock = threading.Lock()
        self._states = [SlotState.FREE] * num_slots
        self._readers = [0] * num_slots
        self._release_after_read = [False] * num_slots

    @property
    def device(self) -> torch.device:
        return self.slab_SB.device

    def slab(self, slot: int) -> torch.Tensor:
        """All bytes of one slot, uint8 ``[slot_bytes]``: what a move copies."""
        return self.slab_SB[slot]

    def state(self, slot: int) -> SlotState:
        with self._lock:
            return self._states[slot]

    def count(self, state: SlotState) -> int:
        """How many slots are in `state`."""
        with self._lock:
            return self._states.count(state)

    def allocate(self) -> int:
        """Take a free slot to fill it. The lowest one, so that runs repeat.

        Raises:
            RuntimeError: no slot is free.
        """
        with self._lock:
            if SlotState.FREE not in self._states:
                raise RuntimeError(f"no free slot among {self.num_slots}: {self._census()}")
            slot = self._states.index(SlotState.FREE)
            self._states[slot] = SlotState.FILLING
            return slot

    def reserve(self, num_slots: int) -> list[int]:
        """Take `num_slots` slots for a layer's first placement; they are live at once.

        Raises:
            ValueError: fewer slots are free. Nothing was taken.
        """
        with self._lock:
            free = [slot for slot, state in enumerate(self._states) if state is SlotState.FREE]
            if len(free) < num_slots:
                raise ValueError(f"pool has {len(free)} free slots of {self.num_slots}, but {num_slots} are needed")
            for slot in free[:num_slots]:
                self._states[slot] = SlotState.LIVE
            return free[:num_slots]

    def publish(self, slots: Iterable[int]) -> None:
        """Filled slots become live: a table that names them was published."""
        self._move(slots, (SlotState.FILLING,), SlotState.LIVE)

    def retire(self, slots: Iterable[int]) -> None:
        """Live slots that the newest table names no more; older tables still may."""
        self._move(slots, (SlotState.LIVE,), SlotState.RETIRING)

    def quarantine(self, slots: Iterable[int]) -> None:
        """Slots that a transfer given up may still write."""
        self._move(slots, (SlotState.FILLING,), SlotState.QUARANTINED)

    def release(self, slots: Iterable[int]) -> None:
        """Slots that nobody can name or write any more become free; one that is still read does so after its last reader."""
        taken = (SlotState.FILLING, SlotState.RETIRING, SlotState.QUARANTINED)
        with self._lock:
            for slot in slots:
                self._check(slot, taken, SlotState.FREE)
                if self._readers[slot]:
                    self._states[slot] = SlotState.QUARANTINED
                    self._release_after_read[slot] = True
                else:
                    self._states[slot] = SlotState.FREE

    def begin_read(self, slots: Iterable[int]) -> None:
        """A transfer starts to read these slots: until `end_read` they are not written, whoever releases them."""
        with self._lock:
            for slot in slots:
                self._readers[slot] += 1

    def end_read(self, slots: Iterable[int]) -> None:
        with self._lock:
            for slot in slots:
                assert self._readers[slot] > 0, f"slot {slot} has no reader"
                self._readers[slot] -= 1
                if self._readers[slot] == 0 and self._release_after_read[slot]:
                    self._release_after_read[slot] = False
                    self._states[slot] = SlotState.FREE

    def _move(self, slots: Iterable[int], sources: tuple[SlotState, ...], target: SlotState) -> None:
        with self._lock:
            for slot in slots:
                self._check(slot, sources, target)
                self._states[slot] = target

    def _check(self, slot: int, sources: tuple[SlotState, ...], target: SlotState) -> None:
        state = self._states[slot]
        assert state in sources, f"slot {slot} cannot go from {state.value} to {target.value}"

    def _census(self) -> dict[str, int]:
        return {state.value: self._states.count(state) for state in SlotState if state in self._states}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
