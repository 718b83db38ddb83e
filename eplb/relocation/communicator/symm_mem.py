"""Rebalance, fill: each rank fetches slabs from the memory of the others, straight into its free slots. One host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch
from eplb.relocation.communicator.board import Board
from eplb.relocation.communicator.pace import Pace
from eplb.streams import DeviceStreams, EventLike, StreamLike

_MOST_COPIES = 16
"""That a look enqueues: each takes some ten microseconds of the interpreter, which the thread that serves waits for."""

_kept: list[object] = []
"""Memory of peers that copies were still reading when their communicator was closed; until the process ends."""


class SymmMemCommunicator(Communicator):
    """Copies by the GPU's copy engines: no kernel, no staging, no collective beside those of the forward.

    A rank that sends only says, on the `Board`, in which slots its slabs are, and leaves them alone until the others have
    said that they read nothing any more.

    Args:
        slabs_SB: of every rank and pool, uint8 ``[num_slots, slot_bytes]``, as this process reads them.
        board: of the same ranks.
        streams: of the device that the slots are on.
        pace: of all that this rank copies.

    Attributes:
        stream: where copies are enqueued. On a GPU it is of the lowest priority, and nothing else's: neither tables nor
            flips queue behind a slab.
    """

    name = "symm_mem"

    def __init__(
        self, slabs_SB: Sequence[Sequence[torch.Tensor]], board: Board, streams: DeviceStreams, pace: Pace
    ) -> None:
        self.slabs_SB = [list(pools) for pools in slabs_SB]
        self.board = board
        self.streams = streams
        self.pace = pace
        self.stream: StreamLike = streams.side
        if streams.device.type == "cuda":
            self.stream = torch.cuda.Stream(streams.device, priority=0)
        self._num_batches = 0
        self._open: dict[int, SymmMemBatch] = {}

    def prepare(self, transfers: Sequence[Transfer]) -> "SymmMemBatch":
        return SymmMemBatch(transfers, self)

    def close(self) -> None:
        if any(batch.is_copying for batch in self._open.values()):
            _kept.append(self.slabs_SB)
        self.slabs_SB, self._open = [], {}

    # ---- for batches

    def enter(self, batch: "SymmMemBatch") -> int:
        """The number of a batch that all ranks have agreed to start: they enter them in the same order."""
        self._num_batches += 1
        self._open[self._num_batches] = batch
        return self._num_batches

    def finish(self, number: int) -> None:
        """The batch reads nothing any more. The ranks hear of it when that is true of all before it, too."""
        if self._open.pop(number, None) is not None:
            self.board.finish(min(self._open, default=self._num_batches + 1) - 1)

    def place_of(self, slab: torch.Tensor) -> int:
        """The number of an own slot among those of all pools.

        Raises:
            ValueError: the slab is no slot of the pools that the ranks have opened.
        """
        first = 0
        for slab_SB in self.slabs_SB[self.board.rank]:
            slot, inside = divmod(slab.data_ptr() - slab_SB.data_ptr(), slab_SB.shape[1])
            if 0 <= slot < slab_SB.shape[0]:
                if inside or slab.numel() != slab_SB.shape[1]:
                    break
                return first + slot
            first += slab_SB.shape[0]
        raise ValueError("a slab to send must be a slot of a pool that the ranks opened when they connected")

    def slab_at(self, owner: int, place: int) -> torch.Tensor:
        """A slot of another rank, by the number that it has there."""
        for slab_SB in self.slabs_SB[owner]:
            if place < slab_SB.shape[0]:
                return slab_SB[place]
            place -= slab_SB.shape[0]
        raise ValueError(f"rank {owner} offers slot {place} beyond those that it has")


@dataclass
class _Fetch:
    """A slab to get.

    Attributes:
        source: None until its owner has offered it.
        index: among what this rank gets of `owner`.
        num_copied: how many of its bytes were enqueued.
    """

    source: torch.Tensor | None
    target: torch.Tensor
    owner: int
    index: int
    num_copied: int = 0


class SymmMemBatch(TransferBatch):
    """Offer → fetch in pieces → say so. A step begins when the host has seen the one before complete."""

    def __init__(self, transfers: Sequence[Transfer], communicator: SymmMemCommunicator) -> None:
        self._communicator = communicator
        self._streams = communicator.streams
        self._offers: list[tuple[int, int, int]] = []
        self._fetches: list[_Fetch] = []
        sent, received = [0] * communicator.board.size, [0] * communicator.board.size
        for transfer in transfers:
            peer = transfer.peer
            if transfer.target is not None:
                self._fetches.append(_Fetch(transfer.source, transfer.target, peer, received[peer]))
                received[peer] += transfer.source is None
            elif transfer.source is not None:
                self._offers.append((peer, sent[peer], communicator.place_of(transfer.source)))
                sent[peer] += 1
        if max(sent) > communicator.board.capacity:
            raise ValueError(
                f"a batch sends {max(sent)} slabs to one rank, which has {communicator.board.capacity} slots"
            )
        self._readers = {reader for reader, _, _ in self._offers}
        self._number = 0
        self._began: EventLike | None = None
        self._offered = False
        self._copied: EventLike | None = None
        self._has_copied = False
        self._given_up = False

    def start(self) -> None:
        self._enter()
        # Behind what the side stream was told to wait for: loaded weights here, forwards of dropped layers.
        self._began = self._streams.side.record_event()

    def poll(self) -> bool:
        if self._given_up or self._began is None or not self._began.query():
            return False
        if not self._offered:
            for reader, index, place in self._offers:
                self._communicator.board.offer(reader, index, self._number, place)
            self._offered = True
        if self._fetches:
            self._fetch()
        if self._fetches or self.is_copying:
            return False
        self._communicator.finish(self._number)
        return self._is_read()

    def is_dead(self) -> bool:
        # The ranks wait for the word of a batch that never began here, too: its number is taken, and it reads nothing.
        self._enter()
        self._given_up = True
        if self.is_copying:
            return False
        self._communicator.finish(self._number)
        return self._is_read()

    @property
    def is_copying(self) -> bool:
        """Whether a copy that was enqueued may still read or write."""
        if not self._has_copied:
            return False
        if self._copied is None:  # enqueueing failed half-way
            self._copied = self._communicator.stream.record_event()
        return not self._copied.query()

    def _enter(self) -> None:
        if not self._number:
            self._number = self._communicator.enter(self)

    def _is_read(self) -> bool:
        """Whether no other rank reads a slab of this one for this batch any more."""
        return all(self._communicator.board.finished(reader) >= self._number for reader in self._readers)

    def _fetch(self) -> None:
        pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._communicator.pace.look()
        for fetch in self._fetches:
            if fetch.source is None:
                fetch.source = self._offered_by(fetch)
                if fetch.source is None:
                    continue
            while (wanted := fetch.target.numel() - fetch.num_copied) and len(pieces) < _MOST_COPIES:
                granted = self._communicator.pace.grant(wanted)
                if not granted:
                    break
                piece = slice(fetch.num_copied, fetch.num_copied + granted)
                pieces.append((fetch.target[piece], fetch.source[piece]))
                fetch.num_copied += granted
        if pieces:
            self._has_copied, self._copied = True, None
            try:
                self._streams.run(self._communicator.stream, lambda: _copy(pieces))
            except BaseException:
                self._given_up = True  # some of the pieces are missing
                raise
            self._copied = self._communicator.stream.record_event()
        self._fetches = [fetch for fetch in self._fetches if fetch.num_copied < fetch.target.numel()]

    def _offered_by(self, fetch: _Fetch) -> torch.Tensor | None:
        place = self._communicator.board.offered(fetch.owner, fetch.index, self._number)
        if place is None:
            return None
        source = self._communicator.slab_at(fetch.owner, place)
        if source.numel() != fetch.target.numel():
            raise ValueError(f"rank {fetch.owner} offers {source.numel()} bytes for a slot of {fetch.target.numel()}")
        return source


def _copy(pieces: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in pieces:
        target.copy_(source, non_blocking=True)
