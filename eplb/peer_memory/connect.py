"""Peer memory: buffers of ranks that are processes, made of what they all have."""

import logging
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from eplb.peer_memory.base import PeerMemory
from eplb.peer_memory.cuda_ipc import cuda_ipc
from eplb.peer_memory.exchange import Exchange
from eplb.peer_memory.shared_memory import shared_memory
from eplb.peer_memory.symmetric import symmetric

SOURCES = ("auto", "shared_memory", "cuda_ipc", "symmetric")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """Where a rank is.

    Attributes:
        host: a name of the host that no other has.
        device: type of the device.
        gpu: what no other GPU is called; empty on a CPU.
        reaches_all: whether its GPU reaches the memory of all others that it sees.
    """

    host: str
    device: str
    gpu: str
    reaches_all: bool


def connect_peers(
    num_bytes: int,
    device: torch.device,
    rank: int,
    exchange: Exchange,
    source: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> PeerMemory:
    """A buffer of `num_bytes` on every rank, zero, and this rank's view of all. Collective.

    Args:
        device: of the own buffer.
        rank: this rank, in the order of `exchange`.
        exchange: between the ranks.
        source: "shared_memory" (CPUs of one host), "cuda_ipc" (GPUs of one host), "symmetric" (PyTorch's symmetric memory;
            each rank has a GPU of its own; needs `group`), or "auto": the last of these that all ranks can use, and the choice
            is logged.
        group: of the same ranks.

    Raises:
        ValueError: the source does not go with where the ranks are, on all of them.
        RuntimeError: a rank could not connect, on all of them.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    said = exchange(pickle.dumps(_place(device)))
    places: list[_Place] = [pickle.loads(one) for one in said]
    chosen, reason = _choose(source, places, group is not None)
    _log.info("peer memory of %d bytes on each of %d ranks: %s, because %s", num_bytes, len(places), chosen, reason)
    if chosen == "shared_memory":
        return shared_memory(num_bytes, rank, exchange)
    if chosen == "cuda_ipc":
        return cuda_ipc(num_bytes, device, rank, exchange)
    assert group is not None
    return symmetric(num_bytes, device, group, exchange)


def why_not(device: torch.device, exchange: Exchange) -> str | None:
    """Why the ranks cannot have peer memory; None if they can. Collective, equal on all ranks."""
    places = [pickle.loads(one) for one in exchange(pickle.dumps(_place(device)))]
    try:
        _choose("auto", places, False)
    except ValueError as error:
        return str(error)
    return None


def _place(device: torch.device) -> _Place:
    host = socket.gethostname() + (_BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "")
    if device.type != "cuda":
        return _Place(host, device.type, "", True)
    own = torch.cuda.current_device() if device.index is None else device.index
    others = [one for one in range(torch.cuda.device_count()) if one != own]
    reaches_all = all(torch.cuda.can_device_access_peer(own, other) for other in others)
    return _Place(host, "cuda", str(torch.cuda.get_device_properties(own).uuid), reaches_all)


def _choose(source: str, places: list[_Place], has_group: bool) -> tuple[str, str]:
    """The source and the reason for it, the same on all ranks."""
    hosts, devices = {place.host for place in places}, {place.device for place in places}
    if len(hosts) > 1:
        raise ValueError(f"peer memory needs all ranks on one host, but they are on {len(hosts)}")
    if len(devices) > 1:
        raise ValueError(f"peer memory needs ranks on one type of device, but they are on {sorted(devices)}")
    on_cuda = devices == {"cuda"}
    if (source == "shared_memory" and on_cuda) or (source in ("cuda_ipc", "symmetric") and not on_cuda):
        raise ValueError(f"source={source!r} does not go with ranks on {devices.pop()!r}")
    if not on_cuda:
        return "shared_memory", "the ranks are on CPUs of one host"
    num_gpus = len({place.gpu for place in places})
    apart = num_gpus == len(places)
    if num_gpus > 1 and not all(place.reaches_all for place in places):
        raise ValueError("peer memory needs GPUs that reach each other's memory (peer-to-peer), but some do not")
    if source == "symmetric" and not (apart and has_group):
        raise ValueError(
            f"source='symmetric' needs a GPU for each rank and a process group, but {len(places)} ranks have {num_gpus} GPUs"
        )
    if source == "cuda_ipc":
        return source, "it was asked for"
    if source == "symmetric" or (apart and has_group):
        return "symmetric", "each rank has a GPU of its own"
    return "cuda_ipc", "ranks share a GPU" if not apart else "there is no process group"
