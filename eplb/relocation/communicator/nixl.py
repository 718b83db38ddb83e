"""Rebalance, fill: each rank reads slabs from the memory of the others through NIXL, straight into its free slots."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eplb.relocation.communicator.copies import Copies, Piece, StreamCopies, copy_stream
from eplb.relocation.communicator.nixl_agent import Agent
from eplb.relocation.communicator.notices import Notices
from eplb.relocation.communicator.pace import Pace
from eplb.relocation.communicator.pull import PullCommunicator
from eplb.streams import DeviceStreams

_log = logging.getLogger(__name__)

_MOST_READS = 32
"""Handles under way: each is asked for in each look, which takes tens of microseconds."""

_kept: list[object] = []
"""Reads that were under way when their communicator was closed, with their agents and memory; until the process ends.

A handle that nobody refers to cancels its read."""


@dataclass(frozen=True)
class FarSlab:
    """Memory of another rank: slots side by side, or a part of them.

    Attributes:
        device: the number of its device there; 0 for a CPU.
    """

    owner: int
    address: int
    num_bytes: int
    device: int

    def numel(self) -> int:
        return self.num_bytes

    def __getitem__(self, piece: slice, /) -> "FarSlab":
        first, end, step = piece.indices(self.num_bytes)
        assert step == 1
        return replace(self, address=self.address + first, num_bytes=end - first)


@dataclass(frozen=True)
class FarPool:
    """A pool of another rank, as it describes it."""

    address: int
    num_slots: int
    slot_bytes: int
    device: int

    @classmethod
    def of(cls, slab_SB: torch.Tensor) -> "FarPool":
        num_slots, slot_bytes = slab_SB.shape
        return cls(slab_SB.data_ptr(), num_slots, slot_bytes, _number_of(slab_SB.device))


@dataclass(frozen=True)
class Registered:
    """Memory that an agent knows.

    Attributes:
        handle: what the agent calls it.
        tensors: which must live as long.
    """

    handle: Any
    tensors: list[torch.Tensor]


class Window:
    """How many bytes may be on their way at once: as many as the calls into NIXL take little time for.

    Between processes of a host UCX copies inside of these calls, over a network or NVLink behind them. The interpreter's
    lock is free in them, but the worker does nothing else.

    Args:
        clock: seconds.
    """

    _SMALLEST, _LARGEST = 256 << 10, 256 << 20
    _SHORT, _LONG = 0.002, 0.008

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.num_bytes = 4 << 20
        self._in_flight = 0
        self._was_full = False
        self._longest = 0.0

    def open(self) -> int:
        """Bytes that may begin in this look; 0 rather than a small piece. More if all of a full window came in short calls."""
        if self._longest > self._LONG:
            self.num_bytes = max(self._SMALLEST, self.num_bytes // 2)
        elif self._longest < self._SHORT and self._was_full and not self._in_flight:
            self.num_bytes = min(self._LARGEST, self.num_bytes * 2)
        self._longest = 0.0
        free = self._free()
        self._was_full = not free
        return free

    def begin(self, num_bytes: int) -> None:
        self._in_flight += num_bytes
        self._was_full |= not self._free()

    def end(self, num_bytes: int) -> None:
        self._in_flight -= num_bytes

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around calls that post reads or look after them."""
        began = self._clock()
        yield
        self._longest = max(self._longest, self._clock() - began)

    def _free(self) -> int:
        free = self.num_bytes - self._in_flight
        return free if free >= self._SMALLEST else 0


class NixlCommunicator(PullCommunicator):
    """Reads by whatever UCX finds between two ranks: shared memory, NVLink, RDMA, TCP.

    Args:
        agent: of this rank, which knows those of the others.
        memory: that is registered with it: the pools, above all.
        own_SB: this rank's pools, uint8 ``[num_slots, slot_bytes]``.
        names: of the agents, by rank.
        far_pools: of all ranks.
        notices: between the same agents.
        streams: of the device that the slots are on.
        pace: of all that this rank copies.
    """

    name = "nixl"

    def __init__(
        self,
        agent: Agent,
        memory: "Registered",
        own_SB: Sequence[torch.Tensor],
        names: Sequence[str],
        far_pools: Sequence[Sequence[FarPool]],
        notices: Notices,
        streams: DeviceStreams,
        pace: Pace,
    ) -> None:
        num_slots_WP = [[pool.num_slots for pool in pools] for pools in far_pools]
        super().__init__(own_SB, num_slots_WP, notices, streams, pace)
        self.agent = agent
        self.names = list(names)
        self.stream = copy_stream(streams)
        self.window = Window()
        self._memory = memory
        self._far_pools = far_pools

    def copies(self) -> "NixlCopies":
        return NixlCopies(self)

    def slabs_at(self, owner: int, place: int, count: int) -> FarSlab:
        for pool in self._far_pools[owner]:
            if place < pool.num_slots:
                count = min(count, pool.num_slots - place)
                return FarSlab(owner, pool.address + place * pool.slot_bytes, count * pool.slot_bytes, pool.device)
            place -= pool.num_slots
        raise ValueError(f"rank {owner} offers slot {place} beyond those that it has")

    def let_go(self, copying: Sequence[Copies]) -> None:
        if copying:
            _kept.append((self.agent, self._memory, copying))
        else:
            for name in self.names:
                if name != self.agent.name:
                    self._forget(name)
            self.agent.deregister_memory(self._memory.handle)
        del self.agent, self._memory

    def _forget(self, name: str) -> None:
        try:
            self.agent.remove_remote_agent(name)
        except Exception as error:  # the rest is given back all the same
            _log.warning("the connection to the agent %r was not given back: %s", name, error)


class NixlCopies(Copies):
    """A read for each look and rank; what stays on this rank is copied on a stream.

    A read is never cancelled. One that failed is under way for good, because nobody can tell whether it writes still.
    """

    def __init__(self, communicator: NixlCommunicator) -> None:
        self._agent = communicator.agent
        self._names = communicator.names
        self._memory = "DRAM" if communicator.streams.device.type == "cpu" else "VRAM"
        self._window = communicator.window
        self._here = StreamCopies(communicator.streams, communicator.stream)
        self._reads: list[_Read] = []
        self._failed: list[_Read] = []
        self._failure: Exception | None = None

    def room(self) -> int:
        self._look_after_reads()
        return self._window.open() if len(self._reads) < _MOST_READS else 0

    def post(self, pieces: Sequence[Piece]) -> None:
        here: list[Piece] = []
        by_owner: dict[int, list[tuple[torch.Tensor, FarSlab]]] = {}
        for target, source in pieces:
            if isinstance(source, FarSlab):
                by_owner.setdefault(source.owner, []).append((target, source))
            else:
                here.append((target, source))
        if here:
            self._here.post(here)
        if by_owner:
            with self._window.timed():
                for owner, parts in by_owner.items():
                    self._read(owner, parts)

    def _read(self, owner: int, parts: Sequence[tuple[torch.Tensor, FarSlab]]) -> None:
        to = [(target.data_ptr(), target.numel(), _number_of(target.device)) for target, _ in parts]
        of = [(source.address, source.num_bytes, source.device) for _, source in parts]
        local, remote = (self._agent.get_xfer_descs(one, self._memory) for one in (to, of))
        handle = self._agent.initialize_xfer("READ", local, remote, self._names[owner])
        read = _Read(handle, owner, sum(source.num_bytes for _, source in parts))
        self._window.begin(read.num_bytes)
        self._reads.append(read)
        self._note(read, self._agent.transfer)
        self.raise_failed()

    def are_under_way(self) -> bool:
        self._look_after_reads()
        return bool(self._reads or self._failed) or self._here.are_under_way()

    def owners(self) -> set[int]:
        """The ranks whose memory is being read, or whose reads failed."""
        return {read.owner for read in (*self._reads, *self._failed)}

    def raise_failed(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _look_after_reads(self) -> None:
        if self._reads:
            with self._window.timed():
                for read in list(self._reads):
                    self._note(read, self._agent.check_xfer_state)

    def _note(self, read: "_Read", ask: Callable[[Any], str]) -> None:
        """Ask how a read is, and keep what is said."""
        try:
            state: object = ask(read.handle)
        except Exception as error:
            state = error
        if state == "PROC":
            return
        self._reads.remove(read)
        self._window.end(read.num_bytes)
        if state == "DONE":
            self._agent.release_xfer_handle(read.handle)
            return
        self._failed.append(read)
        self._failure = RuntimeError(f"reading {read.num_bytes} bytes of rank {read.owner} failed: {_said(state)}")
        self._failure.__cause__ = state if isinstance(state, Exception) else None


@dataclass(eq=False)
class _Read:
    handle: Any
    owner: int
    num_bytes: int


def _said(state: object) -> str:
    return f"{type(state).__name__}: {state}" if isinstance(state, Exception) else f"NIXL says {state!r}"


def _number_of(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index
