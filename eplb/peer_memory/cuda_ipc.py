"""Peer memory: processes of one host on GPUs, through CUDA IPC. Several ranks may be on one GPU."""

import pickle
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import reduce_tensor

from eplb.peer_memory.base import PeerMemory, view_of
from eplb.peer_memory.exchange import Exchange
from eplb.peer_memory.together import together


def share(tensors: Sequence[torch.Tensor], rank: int, exchange: Exchange) -> list[list[torch.Tensor]]:
    """Every rank's tensors, by rank, as this process can read and write them: the same memory. Collective.

    Args:
        tensors: contiguous CUDA tensors of PyTorch's allocator, as many as on the other ranks; to be kept as long as a peer
            uses them.

    Raises:
        RuntimeError: CUDA cannot share a rank's memory, or a device cannot reach a peer's; on all ranks.
    """
    # Pickled inside the step: torch refuses some memory only there.
    _, said = together(exchange, lambda: pickle.dumps([reduce_tensor(tensor) for tensor in tensors]), lambda mine: mine)
    theirs, _ = together(exchange, lambda: [_opened(tensors, one, other == rank) for other, one in enumerate(said)])
    return theirs


def cuda_ipc(num_bytes: int, device: torch.device, rank: int, exchange: Exchange) -> PeerMemory:
    """Buffers of all ranks, zero. Collective. Raises as `share`."""

    def allocate() -> torch.Tensor:
        zeros = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        torch.cuda.current_stream(device).synchronize()
        return zeros

    own, _ = together(exchange, allocate)
    buffers = tuple(tensors[0] for tensors in share([own], rank, exchange))
    return view_of(rank, buffers, "cuda_ipc")


def _opened(tensors: Sequence[torch.Tensor], handles: bytes, is_own: bool) -> list[torch.Tensor]:
    if is_own:
        return list(tensors)
    opened = [rebuild(*arguments) for rebuild, arguments in pickle.loads(handles)]
    for one, own in zip(opened, tensors, strict=True):
        _reach(one, own.device)
    return opened


def _reach(theirs: torch.Tensor, device: torch.device) -> None:
    """Kernels of `device` may use a peer's memory from now on: PyTorch allows it at the first copy."""
    if theirs.device == device:
        return
    if not torch.cuda.can_device_access_peer(device, theirs.device):
        raise RuntimeError(f"{device} cannot reach the memory of {theirs.device}")
    torch.empty(1, dtype=theirs.dtype, device=device).copy_(theirs.view(-1)[:1])
    torch.cuda.current_stream(device).synchronize()
