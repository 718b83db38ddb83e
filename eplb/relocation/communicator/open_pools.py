"""Rebalance, fill: opens the pools of all ranks of a host to each other, for the communicator "symm_mem"."""

from collections.abc import Sequence

import torch

from eplb.peer_memory import Exchange, HostMemory, share, share_host, together, why_not
from eplb.peer_memory.base import view_of
from eplb.relocation.communicator.board import Board
from eplb.relocation.communicator.pace import Pace
from eplb.relocation.communicator.symm_mem import SymmMemCommunicator
from eplb.relocation.pool import SlotPool
from eplb.streams import DeviceStreams


def num_closed(pools: Sequence[SlotPool]) -> int:
    """How many of this rank's pools are in CPU memory that other processes cannot open."""
    return sum(pool.device.type == "cpu" and pool.host_memory is None for pool in pools)


def why_closed(nums_closed: Sequence[int], device: torch.device, exchange: Exchange) -> str | None:
    """Why the ranks cannot open each other's pools; None if they can, as far as is known. Collective, equal on all ranks.

    Args:
        nums_closed: every rank's `num_closed()`.
    """
    for rank, number in enumerate(nums_closed):
        if number:
            return (
                f"{number} pools of rank {rank} are in CPU memory that other processes cannot open: "
                "make them with SlotPool(..., shared=True)"
            )
    return why_not(device, exchange)


def agree_on_slots(pools: Sequence[SlotPool], exchange: Exchange) -> list[list[tuple[int, int]]]:
    """Number and bytes of the slots of every rank's pools. Collective.

    Raises:
        RuntimeError: the ranks' pools do not go together; on all ranks.
    """
    sizes = [(pool.num_slots, pool.slot_bytes) for pool in pools]
    _, said = together(exchange, lambda: None, lambda _: sizes)
    for other, theirs in enumerate(said):
        if [slot_bytes for _, slot_bytes in theirs] != [slot_bytes for _, slot_bytes in said[0]]:
            raise RuntimeError(f"ranks 0 and {other} have pools of other slots: {said[0]}, {theirs} (number, bytes)")
    return said


def open_pools(
    pools: Sequence[SlotPool], rank: int, exchange: Exchange, streams: DeviceStreams, rate: int | None
) -> SymmMemCommunicator:
    """The communicator of ranks whose pools can be opened. Collective.

    Args:
        pools: this rank's; those of all ranks in the same order, with slots of the same size.
        rate: bytes per second that this rank may copy; None: no bound.

    Raises:
        RuntimeError: a rank could not open another's memory, or the ranks' pools do not go together; on all ranks.
    """
    said = agree_on_slots(pools, exchange)
    opened = _opened(pools, rank, exchange, streams)
    slabs_SB = [
        [memory.view(size) for memory, size in zip(memories, theirs, strict=True)]
        for memories, theirs in zip(opened, said, strict=True)
    ]
    capacity = max(sum(num_slots for num_slots, _ in theirs) for theirs in said)
    page, _ = together(exchange, lambda: HostMemory(Board.num_bytes(len(said), capacity)))
    pages = tuple(memories[0] for memories in share_host([page], rank, exchange))
    return SymmMemCommunicator(slabs_SB, Board(view_of(rank, pages, "shared_memory")), streams, Pace(rate))


def _opened(
    pools: Sequence[SlotPool], rank: int, exchange: Exchange, streams: DeviceStreams
) -> list[list[torch.Tensor]]:
    if streams.device.type != "cuda":
        memories = [pool.host_memory for pool in pools]
        return share_host([memory for memory in memories if memory is not None], rank, exchange)
    streams.adopt_thread()  # opening memory must not break a graph that another thread captures
    # On a stream of its own, which is waited for: not on one where forwards run.
    with torch.cuda.stream(torch.cuda.Stream(streams.device)):
        return share([pool.slab_SB for pool in pools], rank, exchange)
