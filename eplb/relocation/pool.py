"""Rebalance, fill and grace: `SlotPool`, where a rank's experts live, and which slots are free (I1, I4)."""

import enum
import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eplb.peer_memory.host_memory import HostMemory
from eplb.planning.placement import Placement
from eplb.relocation.table_words import TableWords
from eplb.relocation.versions import Version, Versions

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
    """What a slot is at the moment; follows from versions and transfers.

    Live: the newest version of a layer names it. Retiring: only older ones do. Filling: a transfer writes it.
    Quarantined: nothing names it, but a transfer that was given up may write it, or one may read it.
    """

    FREE = "free"
    FILLING = "filling"
    LIVE = "live"
    RETIRING = "retiring"
    QUARANTINED = "quarantined"


class NoFreeSlot(RuntimeError):  # noqa: N818 - a wait for slots, not an error of the program
    """A wave needs a slot, and none is free now. Those of retiring versions and pending transfers will be."""


class SlotHold:
    """The slots that one transfer reads and writes: none of them is free until `end()`.

    Attributes:
        is_abandoned: the transfer was given up, but may still write.
    """

    def __init__(self, pool: "SlotPool") -> None:
        self._pool = pool
        self.reads: list[int] = []
        self.writes: list[int] = []
        self.is_abandoned = False

    def read(self, slot: int) -> None:
        """The transfer will read `slot`, which a version names now."""
        self.read_many([slot])

    def read_many(self, slots: Sequence[int]) -> None:
        """As `read()`, of several."""
        with self._pool._lock:
            self.reads += slots

    def take(self) -> int:
        """Take a free slot to write it. The lowest one, so that runs repeat.

        Raises:
            NoFreeSlot: there is none.
        """
        return self.take_many(1)[0]

    def take_many(self, count: int) -> list[int]:
        """Take `count` free slots, the lowest ones: one look at the pool, however many.

        Raises:
            NoFreeSlot: there are fewer. None was taken.
        """
        if not count:
            return []
        pool = self._pool
        with pool._lock:
            free = pool._free()
            if len(free) < count:
                few = "no free slot" if count == 1 else f"{len(free)} free slots, not {count},"
                raise NoFreeSlot(f"{few} among {pool.num_slots}: {pool._census()}")
            self.writes += free[:count]
            return free[:count]

    def end(self) -> None:
        """The transfer touches nothing any more. A second call does nothing."""
        with self._pool._lock:
            if self in self._pool._holds:
                self._pool._holds.remove(self)


class SlotPool:
    """`num_slots` slabs of bytes on one device, each holding everything that belongs to one expert.

    One expert is one contiguous slab: its tensors cannot be separated by a move (I4), and a move is one copy.
    Layers whose experts have the same tensors may share a pool, and with it the free slots. The pool knows its layers
    weakly: those that are dropped give their slots back.

    On the device "meta" it has no memory; `ResidentExperts.copied_to()` gives a layer that of another pool.

    Args:
        shared: put a CPU's memory where other processes of the host can open it, as the communicator "symm_mem" needs it. A
            GPU's memory can always be opened, and "meta" has none.

    Attributes:
        slab_SB: the memory, uint8 ``[num_slots, slot_bytes]``. Its address never changes.
        tensors: by name, a view ``[num_slots, *shape]`` of the slab; dense inside a slot, padded between slots.
        table_words: for the tables of its layers, which so lie side by side.
        host_memory: what other processes can open of a CPU's memory; None if it is not shared.
        has_dropped_layers: forwards of layers that are gone may still read slots that are free, on their own streams.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        num_slots: int,
        device: torch.device | str = "cpu",
        *,
        shared: bool = False,
    ) -> None:
        if not specs:
            raise ValueError("specs must name at least one tensor")
        for spec in specs:
            if not isinstance(spec, TensorSpec) or not isinstance(spec.dtype, torch.dtype):
                raise ValueError(f"specs must be TensorSpecs with a torch.dtype, got {spec!r}")
            if not isinstance(spec.shape, (tuple, list)) or not all(
                isinstance(one, (int, np.integer)) for one in spec.shape
            ):
                raise ValueError(f"specs must have shapes that are tuples of integers, got {spec!r}")
        if len({spec.name for spec in specs}) != len(specs):
            raise ValueError(f"specs must have distinct names, got {[spec.name for spec in specs]}")
        if any(size <= 0 for spec in specs for size in spec.shape):
            raise ValueError(f"specs must have positive sizes, got {[(spec.name, spec.shape) for spec in specs]}")
        if not isinstance(num_slots, (int, np.integer)) or num_slots <= 0:
            raise ValueError(f"num_slots must be positive, got {num_slots!r}")
        self.specs = tuple(specs)
        self.num_slots = int(num_slots)
        self.slot_bytes = sum(_aligned(spec.num_bytes) for spec in specs)
        on_host = torch.device(device).type == "cpu"
        self.host_memory = HostMemory(num_slots * self.slot_bytes) if shared and on_host else None
        if self.host_memory is not None:
            self.slab_SB = self.host_memory.tensor.view(num_slots, self.slot_bytes)
        else:
            self.slab_SB = torch.zeros(num_slots, self.slot_bytes, dtype=torch.uint8, device=device)
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
        self.table_words = TableWords(self.slab_SB.device)
        self.has_dropped_layers = False
        self._slabs: list[torch.Tensor] | None = None
        self._lock = threading.Lock()
        self._layers: list[weakref.ref[Versions]] = []
        self._holds: list[SlotHold] = []

    @property
    def device(self) -> torch.device:
        return self.slab_SB.device

    def slab(self, slot: int) -> torch.Tensor:
        """All bytes of one slot, uint8 ``[slot_bytes]``: what a move copies."""
        return self.slab_SB[slot]

    def list_slabs(self) -> list[torch.Tensor]:
        """All slabs. Made once, as each takes a microsecond of the interpreter, and a wave needs many."""
        if self._slabs is None:
            self._slabs = list(self.slab_SB.unbind(0))
        return self._slabs

    # ---- who has which slot

    def place(self, placement: Placement, shares_WS: np.ndarray, rank: int) -> Versions:
        """Give a layer slots for its first version; they are free again when what is returned is freed.

        Raises:
            ValueError: too few slots are free. Nothing was taken.
        """
        lanes = placement.lanes_WS[rank].tolist()
        needed = sum(expert >= 0 for expert in lanes)
        with self._lock:
            free = self._free()
            if len(free) < needed:
                raise ValueError(f"pool has {len(free)} free slots of {self.num_slots}, but {needed} are needed")
            slots = iter(free)
            first = Version(0, placement, shares_WS, tuple(next(slots) if expert >= 0 else -1 for expert in lanes))
            versions = Versions(first)
            self._layers.append(weakref.ref(versions))
            return versions

    def hold(self, versions: Versions | None = None) -> SlotHold:
        """For one transfer, which then says what it reads and writes; with `versions`, it reads all that they name."""
        hold = SlotHold(self)
        with self._lock:
            if versions is not None:
                hold.reads = [slot for version in versions.ungraced for slot in version.slots_S if slot >= 0]
            self._holds.append(hold)
        return hold

    def count(self, state: SlotState) -> int:
        """How many slots are in `state`."""
        return self.states().count(state)

    def num_free(self) -> int:
        """As `count(SlotState.FREE)`, without a look at what the others are."""
        with self._lock:
            return len(self._free())

    def num_quarantined(self) -> int:
        """As `count(SlotState.QUARANTINED)`, at a cost of the slots under transfer and not of all: each tick asks."""
        with self._lock:
            if not any(hold.reads or (hold.is_abandoned and hold.writes) for hold in self._holds):
                return 0
            is_suspect = np.zeros(self.num_slots + 1, dtype=bool)
            for hold in self._holds:
                is_suspect[hold.reads] = True
                if hold.is_abandoned:
                    is_suspect[hold.writes] = True
            for hold in self._holds:
                if not hold.is_abandoned:
                    is_suspect[hold.writes] = False
            is_suspect[self._named()] = False
            return int(is_suspect[:-1].sum())

    def state(self, slot: int) -> SlotState:
        return self.states()[slot]

    def states(self) -> list[SlotState]:
        """Of all slots."""
        with self._lock:
            return self._states()

    def _versions(self) -> list[Versions]:
        layers = [(one, one()) for one in self._layers]
        alive = [versions for _, versions in layers if versions is not None]
        if len(alive) < len(layers):
            self._layers = [one for one, versions in layers if versions is not None]
            self.has_dropped_layers = True
        return alive

    def _named(self) -> np.ndarray:
        """The slots that versions name; with -1, for empty lanes."""
        named = [version.slot_of_lane_S for layer in self._versions() for version in layer.ungraced]
        return np.concatenate(named or [np.empty(0, dtype=np.int64)])

    def _free(self) -> list[int]:
        """I1: a slot is free if and only if no version of any layer names it and no transfer touches it."""
        is_free = np.ones(self.num_slots + 1, dtype=bool)  # the last entry is where -1 leads
        is_free[self._named()] = False
        for hold in self._holds:
            is_free[hold.reads] = is_free[hold.writes] = False
        free: list[int] = np.flatnonzero(is_free[:-1]).tolist()
        return free

    def _states(self) -> list[SlotState]:
        """What `_free()` says, and why; for those who look on."""
        states = [SlotState.QUARANTINED] * self.num_slots
        for slot in self._free():
            states[slot] = SlotState.FREE
        for hold in self._holds:
            for slot in hold.writes:
                states[slot] = SlotState.QUARANTINED if hold.is_abandoned else SlotState.FILLING
        lists = [layer.ungraced for layer in self._versions()]
        for state, versions in ((SlotState.RETIRING, sum(lists, ())), (SlotState.LIVE, [one[-1] for one in lists])):
            for version in versions:
                for slot in version.slots_S:
                    if slot >= 0:
                        states[slot] = state
        return states

    def _census(self) -> dict[str, int]:
        states = self._states()
        return {state.value: states.count(state) for state in SlotState if state in states}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
