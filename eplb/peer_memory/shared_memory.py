"""Peer memory: processes of one host on CPUs, through memory-mapped files without names."""

from eplb.peer_memory.base import PeerMemory, view_of
from eplb.peer_memory.exchange import Exchange
from eplb.peer_memory.host_memory import HostMemory, share_host
from eplb.peer_memory.together import together


def shared_memory(num_bytes: int, rank: int, exchange: Exchange) -> PeerMemory:
    """Buffers of all ranks, zero. Collective.

    Raises:
        RuntimeError: a rank has no room or could not open another's, on all ranks.
    """
    own, _ = together(exchange, lambda: HostMemory(num_bytes))
    buffers = tuple(memories[0] for memories in share_host([own], rank, exchange))
    return view_of(rank, buffers, "shared_memory")
