"""Rebalance, fill: communicators by name."""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb.gloo import GlooGroup
from eplb.groups import Peers
from eplb.peer_memory import over_store, together
from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch
from eplb.relocation.communicator.local import LocalCommunicator
from eplb.relocation.communicator.nccl import NcclCommunicator
from eplb.relocation.communicator.nccl_link import nccl4py
from eplb.relocation.communicator.nixl import NixlCommunicator
from eplb.relocation.communicator.nixl_agent import why_no_agent
from eplb.relocation.communicator.open_agents import open_agents
from eplb.relocation.communicator.open_pools import num_closed, open_pools, why_closed
from eplb.relocation.communicator.symm_mem import SymmMemCommunicator
from eplb.relocation.communicator.torch_gloo import TorchGlooCommunicator
from eplb.relocation.communicator.torch_nccl import TorchNcclCommunicator
from eplb.relocation.pool import SlotPool, SlotState
from eplb.streams import DeviceStreams

COMMUNICATORS = ("auto", "nccl", "nixl", "symm_mem", "torch_gloo", "torch_nccl")
KEEP_A_BOUND = ("symm_mem", "nixl")
"""Those that can be given a number of bytes per second."""

_log = logging.getLogger(__name__)


def choose_communicator(
    name: str,
    device: torch.device,
    group_backend: str,
    dispatch_backends: set[str],
    max_bytes_per_second: int | None = None,
) -> tuple[str, ...]:
    """The names behind "auto", the best first; the ranks take the first that all of them can use.

    A name that was asked for stands alone: nothing is taken in its place.

    Args:
        name: one of `COMMUNICATORS`.
        device: of the slots.
        group_backend: of the group whose ranks exchange experts ("nccl", "gloo", "cpu:gloo,cuda:nccl", …).
        dispatch_backends: "nccl", "gloo", "symm_mem" or "local": what the forwards of the registered layers dispatch with.
        max_bytes_per_second: the bound that is asked for, which only "symm_mem" and "nixl" keep.

    Raises:
        ValueError: unknown name; NCCL without a CUDA device, or beside forwards that use it; "nccl" or "nixl" without its
            package; a bound that cannot be kept.
    """
    if name not in COMMUNICATORS:
        raise ValueError(f"communicator must be one of {', '.join(COMMUNICATORS)}, got {name!r}")
    if name == "nixl" and (problem := why_no_agent()) is not None:
        raise ValueError(f"communicator='nixl' cannot be used: {problem}")
    if max_bytes_per_second is not None:
        if name not in ("auto", *KEEP_A_BOUND):
            raise ValueError(
                f"max_bytes_per_second={max_bytes_per_second} needs communicator='symm_mem', 'nixl' or 'auto', got {name!r}"
            )
        return ("symm_mem",) if name == "auto" else (name,)
    nccl_works = device.type == "cuda" and dist.is_nccl_available()
    beside_nccl = "nccl" in dispatch_backends
    if name == "auto":
        nccl_is_safe = nccl_works and "nccl" in group_backend and not beside_nccl
        return ("symm_mem", "torch_nccl" if nccl_is_safe else "torch_gloo")
    if (name == "torch_nccl" and not nccl_works) or (name == "nccl" and device.type != "cuda"):
        raise ValueError(f"communicator={name!r} needs experts on CUDA devices and NCCL, got device {device}")
    if name in ("nccl", "torch_nccl") and beside_nccl:
        raise ValueError(
            f"communicator={name!r} cannot be used beside NCCL dispatch: two threads drive two NCCL communicators, the "
            "ranks may enqueue them in different orders, and then both hang. Use 'auto', 'symm_mem' or 'torch_gloo'"
        )
    if name == "nccl":
        nccl4py()
    return (name,)


def make_communicator(
    names: Sequence[str],
    peers: Peers | None,
    streams: DeviceStreams,
    timeout: float,
    pools: Sequence[SlotPool] = (),
    max_bytes_per_second: int | None = None,
    max_bytes_in_flight: int | None = None,
    transfer_timeout: float = 60.0,
) -> Communicator:
    """The first of the communicators that all ranks can use, on a group of its own. Collective; blocks until it is connected.

    Args:
        names: from `choose_communicator()`.
        peers: the ranks that exchange experts, after they met; None for one rank, whatever the names.
        streams: of the device that the slots are on.
        timeout: seconds of each step of connecting.
        pools: all that slots are moved in, in the same order on every rank; for "symm_mem", "nixl", and for the host memory of
            "torch_gloo", as much as their free slots.
        max_bytes_per_second: that this rank may copy to its slots; for "symm_mem" and "nixl".
        max_bytes_in_flight: bytes that a wave moves at most; for the host memory of "torch_gloo".
        transfer_timeout: seconds after which the ranks give up a wave; "nccl" aborts it after twice that.

    Raises:
        ValueError: the ranks chose differently, or cannot use the only one.
        RuntimeError, TimeoutError: the ranks did not connect in time.
    """
    for pool in pools:
        pool.list_slabs()  # here, not beside forwards
    if peers is None:
        return LocalCommunicator(streams)
    rank, size = peers.rank, len(peers.ranks)
    exchange = over_store(peers.part("choice"), rank, size, timeout)
    _, said = together(exchange, lambda: (tuple(names), num_closed(pools)), lambda mine: mine)
    for other, (theirs, _) in enumerate(said):
        if theirs != said[0][0]:
            raise ValueError(f"rank 0 would use {said[0][0]} as communicators, but rank {other} {theirs}")
    reason = "it was asked for" if len(names) == 1 else "the ranks can open each other's pools"
    made: Communicator
    for name in names:
        if name == "symm_mem":
            problem = why_closed([closed for _, closed in said], streams.device, exchange)
            if problem is None:
                try:
                    made = open_pools(pools, rank, exchange, streams, max_bytes_per_second)
                except RuntimeError as error:  # on all ranks
                    if len(names) == 1:
                        raise
                    problem = str(error)
                    _log.warning("communicator 'symm_mem' should work, but does not: %s", problem)
                else:
                    break
            if len(names) == 1:
                raise ValueError(f"communicator='symm_mem' cannot be used: {problem}")
            reason = f"'symm_mem' cannot be used: {problem}"
        elif name == "nixl":
            made = open_agents(pools, rank, exchange, streams, max_bytes_per_second, timeout)
            break
        else:
            wave_bytes = _wave_bytes(pools, max_bytes_in_flight)
            made = _over_network(name, peers, streams, timeout, wave_bytes, transfer_timeout)
            break
    _log.info("experts travel by %s between %d ranks, because %s", made.name, size, reason)
    return made


def _wave_bytes(pools: Sequence[SlotPool], max_bytes_in_flight: int | None) -> int:
    """What a wave can bring to this rank: its free slots, if no bound is lower."""
    free = sum(pool.count(SlotState.FREE) * pool.slot_bytes for pool in pools)
    return free if max_bytes_in_flight is None else min(free, max_bytes_in_flight)


def _over_network(
    name: str, peers: Peers, streams: DeviceStreams, timeout: float, wave_bytes: int, transfer_timeout: float
) -> Communicator:
    store, rank, size = peers.part(name), peers.rank, len(peers.ranks)
    if name == "torch_gloo":
        return TorchGlooCommunicator(GlooGroup(store, rank, size, timeout), streams, wave_bytes)
    if name == "torch_nccl":
        return TorchNcclCommunicator(store, rank, size, streams, timeout)
    if name == "nccl":
        exchange = over_store(store, rank, size, timeout)
        return NcclCommunicator(exchange, rank, size, streams, timeout, transfer_timeout)
    raise ValueError(f"communicator must be one of {', '.join(COMMUNICATORS[1:])} here, got {name!r}")


__all__ = [
    "COMMUNICATORS",
    "Communicator",
    "LocalCommunicator",
    "NcclCommunicator",
    "NixlCommunicator",
    "SymmMemCommunicator",
    "TorchGlooCommunicator",
    "TorchNcclCommunicator",
    "Transfer",
    "TransferBatch",
    "choose_communicator",
    "make_communicator",
]
