"""Peer memory: memory of a CPU process that other processes of its host can open. Linux only."""

import mmap
import os
import weakref

import torch

from eplb.peer_memory.exchange import Exchange
from eplb.peer_memory.together import together


class HostMemory:
    """A file without a name, mapped: nothing of it is left when the processes that map it have ended.

    Attributes:
        tensor: the memory, zero at first, uint8 ``[num_bytes]``; it lives as long as a view of it.
        path: where processes of the same host and user can open it while this object lives.

    Raises:
        OSError: no room.
        ValueError: this system has no files without names.
    """

    def __init__(self, num_bytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise ValueError("memory that processes share needs Linux (memfd_create)")
        descriptor = os.memfd_create("moe-layer")
        weakref.finalize(self, os.close, descriptor)
        os.posix_fallocate(descriptor, 0, num_bytes)  # now, not when a page is first written
        self.tensor = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"


def share_host(memories: list[HostMemory], rank: int, exchange: Exchange) -> list[list[torch.Tensor]]:
    """Every rank's memories, by rank, uint8 ``[num_bytes]``, as this process can read and write them. Collective.

    Raises:
        RuntimeError: a rank could not open another's, on all ranks.
    """
    _, said = together(exchange, lambda: [(one.path, one.tensor.numel()) for one in memories], lambda mine: mine)

    def open_all() -> list[list[torch.Tensor]]:
        return [
            [one.tensor for one in memories] if other == rank else [_opened(*one) for one in theirs]
            for other, theirs in enumerate(said)
        ]

    opened, _ = together(exchange, open_all)
    return opened


def _opened(path: str, num_bytes: int) -> torch.Tensor:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
    finally:
        os.close(descriptor)
