"""Rebalance, fill: `Board`, on which the ranks of a host tell each other what may be read, and what they have read."""

import numpy as np

from eplb.peer_memory.base import PeerMemory

_SHIFT = 32  # a word: the number of the batch above, what is said of it below


class Board:
    """A page for each rank, which it alone writes and all read; nothing waits.

    Each word says what it means by itself, with the number of its batch, and is written at once: the order in which others
    see several words does not matter. Batches count from 1, alike on all ranks.

    Args:
        pages: of host memory, each of `num_bytes()`, zero at first.
    """

    def __init__(self, pages: PeerMemory) -> None:
        self.rank, self.size = pages.rank, pages.size
        self._pages = [buffer.view(-1).numpy().view(np.int64) for buffer in pages.buffers]
        self._capacity = (len(self._pages[0]) - 1) // self.size

    @staticmethod
    def num_bytes(size: int, capacity: int) -> int:
        """Of a page for `size` ranks, each of which reads up to `capacity` slabs of another in one batch."""
        return 8 * (1 + size * capacity)

    @property
    def capacity(self) -> int:
        """How many slabs can be offered to one rank in a batch."""
        return self._capacity

    def look(self) -> None:
        """What is said is seen at once."""

    def offer(self, reader: int, index: int, batch: int, slot: int) -> None:
        """The `index`-th slab that `reader` gets of this rank in the batch is in `slot`, complete."""
        assert 0 <= index < self._capacity and 0 <= slot < 1 << _SHIFT
        self._pages[self.rank][1 + reader * self._capacity + index] = (batch << _SHIFT) | slot

    def offered(self, owner: int, index: int, batch: int) -> int | None:
        """The slot of the `index`-th slab that this rank gets of `owner` in the batch; None if it has not said so yet."""
        word = int(self._pages[owner][1 + self.rank * self._capacity + index])
        return word & ((1 << _SHIFT) - 1) if word >> _SHIFT == batch else None

    def finish(self, batch: int) -> None:
        """This rank will read nothing any more for the batches up to this one."""
        self._pages[self.rank][0] = batch

    def finished(self, reader: int) -> int:
        """The last batch that `reader` has said this of; 0 at first."""
        return int(self._pages[reader][0])
