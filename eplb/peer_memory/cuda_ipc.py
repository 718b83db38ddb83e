"""Peer memory: processes of one host on GPUs, through CUDA IPC. Several ranks may be on one GPU."""

import inspect
import pickle
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from eplb.peer_memory.base import PeerMemory, view_of
from eplb.peer_memory.exchange import Exchange
from eplb.peer_memory.together import together

_DEVICE = list(inspect.signature(rebuild_cuda_tensor).parameters).index("storage_device")


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
    """A rank's tensors, as memory of this rank's devices, whichever GPU it is on. CUDA refuses where that cannot reach it.

    As memory of the other GPU, PyTorch would make a context of this process there and copy in it: a GPU runs processes by
    turns, and so the owner's forwards and these copies held each other up (94 GB/s between two H200).
    """
    if is_own:
        return list(tensors)
    opened = []
    for own, (rebuild, arguments) in zip(tensors, pickle.loads(handles), strict=True):
        here = list(arguments)
        here[_DEVICE] = own.device.index
        opened.append(rebuild(*here))
    return opened
