"""Peer memory: a buffer on every rank, and the table of their addresses, as one rank sees them.

The one-sided dispatcher and the pulling communicator use nothing else.
"""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class PeerMemory:
    """One rank's view. All ranks' buffers have the same size.

    Attributes:
        rank: this rank's number, an index of the other two.
        buffers: uint8 ``[num_bytes]``, one for each rank: `buffers[rank]` is the own one, writes to another are seen there.
        addresses_W: int64 ``[W]`` on the device, where they begin.
        source: what they are made of: "virtual", "shared_memory", "cuda_ipc" or "symmetric".
        keep: whatever must live as long as the buffers do.
    """

    rank: int
    buffers: tuple[torch.Tensor, ...]
    addresses_W: torch.Tensor
    source: str
    keep: Any = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """W, the number of ranks."""
        return len(self.buffers)

    @property
    def own(self) -> torch.Tensor:
        return self.buffers[self.rank]


def view_of(rank: int, buffers: tuple[torch.Tensor, ...], source: str, keep: Any = None) -> PeerMemory:
    """`PeerMemory` of these buffers."""
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64)
    return PeerMemory(rank, buffers, addresses.to(buffers[rank].device), source, keep)
