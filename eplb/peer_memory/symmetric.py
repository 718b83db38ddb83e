"""Peer memory: several GPUs of one host, through PyTorch's symmetric memory. Multicast is not used."""

import torch
import torch.distributed as dist

from eplb.peer_memory.base import PeerMemory, view_of
from eplb.peer_memory.exchange import Exchange
from eplb.peer_memory.together import together


def symmetric(num_bytes: int, device: torch.device, group: dist.ProcessGroup, exchange: Exchange) -> PeerMemory:
    """Buffers of all ranks of a group, each on a GPU of its own, zero. Collective.

    Raises:
        RuntimeError: a rank could not make or open them, on all ranks.
    """

    def connect() -> PeerMemory:
        import torch.distributed._symmetric_memory as symmetric_memory  # late: a CPU's PyTorch may lack it

        own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(own, group.group_name)
        ranks = range(dist.get_world_size(group))
        buffers = tuple(handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in ranks)
        own.zero_()
        torch.cuda.synchronize(device)
        return view_of(dist.get_rank(group), buffers, "symmetric", (own, handle))

    memory, _ = together(exchange, connect)  # so nobody writes before all are zero
    return memory
