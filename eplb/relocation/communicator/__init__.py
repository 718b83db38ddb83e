"""Rebalance, fill: communicators by name."""

import warnings

import torch
import torch.distributed as dist

from eplb.gloo import GlooGroup
from eplb.groups import Peers
from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch
from eplb.relocation.communicator.local import LocalCommunicator
from eplb.relocation.communicator.torch_gloo import TorchGlooCommunicator
from eplb.relocation.communicator.torch_nccl import TorchNcclCommunicator
from eplb.streams import DeviceStreams

COMMUNICATORS = ("auto", "torch_gloo", "torch_nccl")


def choose_communicator(name: str, device: torch.device, group_backend: str, dispatch_backends: set[str]) -> str:
    """The name behind "auto", and the rules for a name that was asked for.

    "auto" is NCCL only where the group has it and no forward uses it: elsewhere gloo, staged through the host.

    Args:
        name: one of `COMMUNICATORS`.
        device: of the slots.
        group_backend: of the group whose ranks exchange experts ("nccl", "gloo", "cpu:gloo,cuda:nccl", …).
        dispatch_backends: "nccl", "gloo" or "local": what the forwards of the registered layers dispatch with.

    Raises:
        ValueError: unknown name; NCCL without a CUDA device.
    """
    if name not in COMMUNICATORS:
        raise ValueError(f"communicator must be one of {', '.join(COMMUNICATORS)}, got {name!r}")
    nccl_works = device.type == "cuda" and dist.is_nccl_available()
    if name == "auto":
        return (
            "torch_nccl" if nccl_works and "nccl" in group_backend and "nccl" not in dispatch_backends else "torch_gloo"
        )
    if name == "torch_nccl" and not nccl_works:
        raise ValueError(f"communicator='torch_nccl' needs experts on CUDA devices and NCCL, got device {device}")
    if name == "torch_nccl" and "nccl" in dispatch_backends:
        warnings.warn(
            "communicator='torch_nccl' beside NCCL dispatch can hang: two threads drive two NCCL communicators, and the "
            "ranks may enqueue them in different orders. 'auto' avoids it.",
            stacklevel=2,
        )
    return name


def make_communicator(name: str, peers: Peers | None, streams: DeviceStreams, timeout: float) -> Communicator:
    """The communicator that `choose_communicator()` named, on a group of its own. Collective; blocks until it is connected.

    Args:
        name: "torch_gloo" or "torch_nccl".
        peers: the ranks that exchange experts, after they met; None for one rank, whatever the name.
        streams: of the device that the slots are on.
        timeout: seconds to connect.

    Raises:
        ValueError: another name.
        RuntimeError: the ranks did not connect in time.
    """
    if peers is None:
        return LocalCommunicator(streams)
    store, rank, size = peers.part(name), peers.rank, len(peers.ranks)
    if name == "torch_gloo":
        return TorchGlooCommunicator(GlooGroup(store, rank, size, timeout), streams)
    if name == "torch_nccl":
        return TorchNcclCommunicator(store, rank, size, streams, timeout)
    raise ValueError(f"communicator must be 'torch_gloo' or 'torch_nccl' here, got {name!r}")


__all__ = [
    "COMMUNICATORS",
    "Communicator",
    "LocalCommunicator",
    "TorchGlooCommunicator",
    "TorchNcclCommunicator",
    "Transfer",
    "TransferBatch",
    "choose_communicator",
    "make_communicator",
]
