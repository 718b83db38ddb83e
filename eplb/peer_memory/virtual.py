"""Peer memory: virtual ranks, which are all in this process and on one device; for tests and benchmarks."""

import torch

from eplb.peer_memory.base import PeerMemory, view_of


def virtual_peers(num_ranks: int, num_bytes: int, device: torch.device) -> list[PeerMemory]:
    """The views of `num_ranks` ranks of this process, zeroed."""
    buffers = tuple(torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_ranks))
    return [view_of(rank, buffers, "virtual") for rank in range(num_ranks)]
