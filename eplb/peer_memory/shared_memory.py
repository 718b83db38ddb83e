"""Peer memory: processes of one host on CPUs, through memory-mapped files that have no name any more once all are connected."""

import mmap
import os
import tempfile
from pathlib import Path

import torch

from eplb.peer_memory.base import PeerMemory, view_of
from eplb.peer_memory.exchange import Exchange

_FOLDER = Path("/dev/shm")


def shared_memory(num_bytes: int, exchange: Exchange) -> PeerMemory:
    """Buffers of all ranks, zero. Collective.

    Raises:
        OSError: no room.
    """
    folder = _FOLDER if _FOLDER.is_dir() else Path(tempfile.gettempdir())
    descriptor, path = tempfile.mkstemp(prefix="moe-layer-", dir=folder)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # now, not when a page is first written
        paths = [said.decode() for said in exchange(path.encode())]
        maps = []
        for other in paths:
            opened = os.open(other, os.O_RDWR)
            try:
                maps.append(mmap.mmap(opened, num_bytes))
            finally:
                os.close(opened)
        exchange(b"")  # all have opened all
    finally:
        os.close(descriptor)
        os.unlink(path)
    buffers = tuple(torch.frombuffer(one, dtype=torch.uint8) for one in maps)
    return view_of(paths.index(path), buffers, "shared_memory", maps)
