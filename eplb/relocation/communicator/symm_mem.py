"""Rebalance, fill: each rank fetches slabs from the memory of the others, straight into its free slots. One host."""

from collections.abc import Sequence

import torch

from eplb.relocation.communicator.board import Board
from eplb.relocation.communicator.copies import Copies, StreamCopies, copy_stream
from eplb.relocation.communicator.pace import Pace
from eplb.relocation.communicator.pull import PullCommunicator
from eplb.streams import DeviceStreams

_kept: list[object] = []
"""Memory of peers that copies were still reading when their communicator was closed; until the process ends."""


class SymmMemCommunicator(PullCommunicator):
    """Copies by the GPU's copy engines: no kernel, no staging, no collective beside those of the forward.

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
        num_slots_WP = [[len(slab_SB) for slab_SB in pools] for pools in slabs_SB]
        super().__init__(slabs_SB[board.rank], num_slots_WP, board, streams, pace)
        self.slabs_SB = [list(pools) for pools in slabs_SB]
        # Made once, as each takes a microsecond of the interpreter.
        self._slabs = [[slab for slab_SB in pools for slab in slab_SB.unbind(0)] for pools in slabs_SB]
        self.stream = copy_stream(streams)

    def copies(self) -> StreamCopies:
        return StreamCopies(self.streams, self.stream)

    def slabs_at(self, owner: int, place: int, count: int) -> torch.Tensor:
        slabs = self._slabs[owner]
        if place + count > len(slabs):
            raise ValueError(f"rank {owner} offers slot {place + count - 1} beyond the {len(slabs)} that it has")
        slab = slabs[place]
        return slab if count == 1 else slab.as_strided((count * slab.numel(),), (1,))

    def let_go(self, copying: Sequence[Copies]) -> None:
        if copying:
            _kept.append(self.slabs_SB)
        self.slabs_SB, self._slabs = [], []
