"""Rebalance, fill: the protocol by which each rank pulls slabs out of the slots of others, whatever carries the bytes."""

import itertools
import operator
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from eplb.relocation.communicator.base import Awaited, Communicator, Transfer, TransferBatch
from eplb.relocation.communicator.copies import Copies, Piece, Source
from eplb.relocation.communicator.pace import Pace
from eplb.streams import DeviceStreams, EventLike

_MOST_COPIES = 64
"""That a look begins: each takes some microseconds, of the driver's locks if not of the interpreter's."""
_LONGEST_RUN = 8
"""Slabs side by side that are one copy. A copy engine pauses for 2 µs between two copies, as long as 1 MB takes. No more than
that, as with long runs all ranks would read from the same one at the same time."""


class Notes(Protocol):
    """What the ranks tell each other: `Board` on one host, `Notices` over a network. Nothing waits.

    Batches count from 1, alike on all ranks.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def capacity(self) -> int:
        """How many slabs can be offered to one rank in a batch."""
        ...

    def look(self) -> None:
        """Hear what the others have said, and push on what was said here."""
        ...

    def offer(self, reader: int, index: int, batch: int, slot: int) -> None:
        """The `index`-th slab that `reader` gets of this rank in the batch is in `slot`, complete.

        Raises:
            RuntimeError: `reader` cannot be told.
        """
        ...

    def offered(self, owner: int, index: int, batch: int) -> int | None:
        """The slot of the `index`-th slab that this rank gets of `owner` in the batch; None if it has not said so yet."""
        ...

    def finish(self, batch: int) -> None:
        """This rank will read nothing any more for the batches up to this one. Tells all ranks that can be told."""
        ...

    def finished(self, reader: int) -> int:
        """The last batch that `reader` has said this of; 0 at first."""
        ...


class PullCommunicator(Communicator):
    """A rank that sends only says in which slots its slabs are, and leaves them alone until all have read them.

    A rank that receives copies them into its free slots, and says then that it reads nothing any more.

    Args:
        own_SB: this rank's pools, uint8 ``[num_slots, slot_bytes]``.
        num_slots_WP: of the pools of each rank.
        notes: between the same ranks.
        streams: of the device that the slots are on.
        pace: of all that this rank copies.
    """

    def __init__(
        self,
        own_SB: Sequence[torch.Tensor],
        num_slots_WP: Sequence[Sequence[int]],
        notes: Notes,
        streams: DeviceStreams,
        pace: Pace,
    ) -> None:
        # By rank: the places at which a pool begins, so that the slab before lies elsewhere.
        self._firsts = [frozenset(itertools.accumulate(counts, initial=0)) for counts in num_slots_WP]
        self._places: dict[int, tuple[int, int]] = {}  # by address of an own slot: its number, its bytes
        for slab_SB in own_SB:
            (num_slots, slot_bytes), first = slab_SB.shape, slab_SB.data_ptr()
            for slot in range(num_slots):
                self._places[first + slot * slot_bytes] = len(self._places), slot_bytes
        self.notes = notes
        self.streams = streams
        self.pace = pace
        self._num_batches = 0
        self._open: dict[int, PullBatch] = {}

    def prepare(self, transfers: Sequence[Transfer]) -> "PullBatch":
        return PullBatch(transfers, self)

    def close(self) -> None:
        copying = [batch.copies for batch in self._open.values() if batch.is_copying]
        self._places, self._open = {}, {}
        self.let_go(copying)

    @abstractmethod
    def copies(self) -> Copies:
        """For one batch."""

    @abstractmethod
    def slabs_at(self, owner: int, place: int, count: int) -> Source:
        """As many slots of another rank side by side, by the number that the first has there among those of all pools.

        Raises:
            ValueError: there is no such slot.
        """

    @abstractmethod
    def let_go(self, copying: Sequence[Copies]) -> None:
        """Give everything back but what these may still touch, and need for it."""

    # ---- for batches

    def enter(self, batch: "PullBatch") -> int:
        """The number of a batch that all ranks have agreed to start: they enter them in the same order."""
        self._num_batches += 1
        self._open[self._num_batches] = batch
        return self._num_batches

    def finish(self, number: int) -> None:
        """The batch reads nothing any more. The ranks hear of it when that is true of all before it, too."""
        if self._open.pop(number, None) is not None:
            self.notes.finish(min(self._open, default=self._num_batches + 1) - 1)

    def place_of(self, slab: torch.Tensor) -> int:
        """The number of an own slot among those of all pools.

        Raises:
            ValueError: the slab is no slot of the pools that the ranks have opened.
        """
        place, num_bytes = self._places.get(slab.data_ptr(), (0, 0))
        if slab.numel() != num_bytes:
            raise ValueError("a slab must be a slot of a pool that the ranks opened when they connected")
        return place

    def place_if_any(self, slab: torch.Tensor) -> int:
        """As `place_of()`, but -1 for memory elsewhere, into which slabs may be copied, too."""
        return self._places.get(slab.data_ptr(), (-1, 0))[0]

    def are_neighbours(self, rank: int, place: int, next_place: int) -> bool:
        """Whether the second slot of a rank lies directly behind the first."""
        return next_place == place + 1 and next_place not in self._firsts[rank]


class PullBatch(TransferBatch):
    """Offer → fetch in pieces → say so. A step begins when the host has seen the one before complete.

    Attributes:
        copies: of what it fetches.
    """

    def __init__(self, transfers: Sequence[Transfer], communicator: PullCommunicator) -> None:
        self._communicator = communicator
        self._notes = communicator.notes
        self.copies = communicator.copies()
        self._offers: dict[int, list[int]] = {}  # by reader: places of what it gets of this rank
        # By owner: number in the batch, index among what it sends here, place and target of what it has not offered yet.
        self._awaited: dict[int, deque[tuple[int, int, int, torch.Tensor]]] = {}
        # Number, target and source of what has not begun, the first one last.
        self._fetches: list[tuple[int, torch.Tensor, Source]] = []
        received = [0] * self._notes.size
        for number, (source, target, peer) in enumerate(transfers):
            if target is None:
                assert source is not None
                self._offers.setdefault(peer, []).append(communicator.place_of(source))
            elif source is None:
                awaited = number, received[peer], communicator.place_if_any(target), target
                self._awaited.setdefault(peer, deque()).append(awaited)
                received[peer] += 1
            else:
                self._fetches.append((number, target, source))
        self._fetches.reverse()
        sent = max(map(len, self._offers.values()), default=0)
        if sent > self._notes.capacity:
            raise ValueError(f"a batch sends {sent} slabs to one rank, which has {self._notes.capacity} slots")
        self._number = 0
        self.is_under_way = False
        self._began: EventLike | None = None
        self._offered = False
        self._given_up = False

    def start(self) -> None:
        self._enter()
        # Behind what the side stream was told to wait for: loaded weights here, forwards of dropped layers.
        self._began = self._communicator.streams.side.record_event()

    def poll(self) -> bool:
        if self._given_up or self._began is None or not self._began.query():
            return False
        self._notes.look()
        try:
            if not self._offered:
                for reader, places in self._offers.items():
                    for index, place in enumerate(places):
                        self._notes.offer(reader, index, self._number, place)
                self._offered = True
            self.awaits = Awaited.STEP
            if self._awaited:
                self._look_for_offers()
            if self._fetches:
                self._fetch()
            is_copying = self.is_copying
            self.copies.raise_failed()
        except BaseException:
            self._given_up = True  # some of the pieces are missing, or of the offers
            raise
        if self._awaited or self._fetches:
            return False
        if is_copying:
            self.awaits = self.copies.awaits
            return False
        self._communicator.finish(self._number)
        return self._is_read()

    def is_dead(self) -> bool:
        # The ranks wait for the word of a batch that never began here, too: its number is taken, and it reads nothing.
        self._enter()
        self._given_up = True
        self._notes.look()
        if self.is_copying:
            return False
        self._communicator.finish(self._number)
        return self._is_read()

    @property
    def is_copying(self) -> bool:
        """Whether a copy that began may still read or write."""
        return self.copies.are_under_way()

    def _enter(self) -> None:
        if not self._number:
            self._number = self._communicator.enter(self)

    def _is_read(self) -> bool:
        """Whether no other rank reads a slab of this one for this batch any more."""
        return all(self._notes.finished(reader) >= self._number for reader in self._offers)

    def _look_for_offers(self) -> None:
        communicator, rank = self._communicator, self._notes.rank
        for owner, awaited in list(self._awaited.items()):
            run: list[tuple[int, int, int, torch.Tensor]] = []  # number, place there, place here, target
            while awaited:
                number, index, here, target = awaited[0]
                there = self._notes.offered(owner, index, self._number)
                if there is None:
                    break
                if run and not (
                    len(run) < _LONGEST_RUN
                    and communicator.are_neighbours(owner, run[-1][1], there)
                    and communicator.are_neighbours(rank, run[-1][2], here)
                ):
                    self._add(owner, run)
                    run = []
                run.append((number, there, here, target))
                awaited.popleft()
            else:
                del self._awaited[owner]
            if run:
                self._add(owner, run)
        # In the order of the plan, which spreads them over the owners.
        self._fetches.sort(key=operator.itemgetter(0), reverse=True)

    def _add(self, owner: int, run: list[tuple[int, int, int, torch.Tensor]]) -> None:
        """Slabs that lie side by side, there and here, are one fetch."""
        number, there, _, target = run[0]
        if len(run) > 1:
            target = target.as_strided((len(run) * target.numel(),), (1,))  # on into the slots behind
        source = self._communicator.slabs_at(owner, there, len(run))
        if source.numel() != target.numel():
            raise ValueError(f"rank {owner} offers {source.numel()} bytes for {target.numel()} in {len(run)} slots")
        self._fetches.append((number, target, source))

    def _fetch(self) -> None:
        """Begin what the bound, and whatever carries the bytes, allow now."""
        pieces: list[Piece] = []
        pace, room = self._communicator.pace, self.copies.room()
        pace.look()
        while self._fetches and room > 0 and len(pieces) < _MOST_COPIES:
            number, target, source = self._fetches[-1]
            num_bytes = target.numel()
            granted = pace.grant(min(room, num_bytes))
            if not granted:
                self.awaits = Awaited.STEP if self._awaited else Awaited.PACE
                break
            self._fetches.pop()
            if granted < num_bytes:
                self._fetches.append((number, target[granted:], source[granted:]))
                target, source = target[:granted], source[:granted]
            pieces.append((target, source))
            room -= granted
        if self._fetches and len(pieces) == _MOST_COPIES:
            self.awaits = Awaited.TURN
        if pieces:
            self.is_under_way = True
            self.copies.post(pieces)
