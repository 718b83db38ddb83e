"""Rebalance, fill: makes the NIXL agents of all ranks, and lets each read a little of every other, for "nixl"."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from eplb.peer_memory import Exchange, together
from eplb.relocation.communicator.nixl import FarPool, FarSlab, NixlCommunicator, NixlCopies, Registered
from eplb.relocation.communicator.nixl_agent import Agent, make_agent
from eplb.relocation.communicator.notices import Notices
from eplb.relocation.communicator.open_pools import agree_on_slots
from eplb.relocation.communicator.pace import Pace
from eplb.relocation.pool import SlotPool
from eplb.streams import DeviceStreams

_PROOF_BYTES = 256
_PAUSE = 0.001


@dataclass(frozen=True)
class _Here:
    """What this rank has.

    Attributes:
        proof: random bytes that the others read, uint8 ``[256]``; they are `proof_bytes`.
        read_WB: where those of the others come, uint8 ``[ranks, 256]``.
    """

    agent: Agent
    memory: Registered
    pools_SB: list[torch.Tensor]
    proof_bytes: bytes
    proof: torch.Tensor
    read_WB: torch.Tensor


@dataclass(frozen=True)
class _Said:
    """What a rank says of itself."""

    name: str
    metadata: bytes
    pools: list[FarPool]
    proof_at: FarSlab
    proof: bytes


def open_agents(
    pools: Sequence[SlotPool],
    rank: int,
    exchange: Exchange,
    streams: DeviceStreams,
    rate: int | None,
    timeout: float,
    make: Callable[[str], Agent] = make_agent,
) -> NixlCommunicator:
    """The communicator of ranks that read each other's pools through NIXL. Collective; blocks until all have done so.

    Args:
        pools: this rank's; those of all ranks in the same order, with slots of the same size.
        rate: bytes per second that this rank may copy; None: no bound.
        timeout: seconds of each step.
        make: an agent by its name.

    Raises:
        RuntimeError: a rank could not make its agent or read another's memory, or the ranks' pools do not go together; on
            all ranks.
    """
    sizes = agree_on_slots(pools, exchange)
    streams.adopt_thread()  # memory is allocated here, which must not break a graph that another thread captures
    here, said = together(
        exchange, lambda: _prepare(pools, rank, len(sizes), streams, make), lambda here: _describe(here, rank)
    )
    others = [theirs for other, theirs in enumerate(said) if other != rank]
    together(exchange, lambda: [here.agent.add_remote_agent(theirs.metadata) for theirs in others])
    names = [one.name for one in said]
    capacity = max(sum(num_slots for num_slots, _ in theirs) for theirs in sizes)
    notices = Notices(here.agent, rank, names, capacity)
    communicator = NixlCommunicator(
        here.agent,
        here.memory,
        here.pools_SB,
        names,
        [one.pools for one in said],
        notices,
        streams,
        Pace(rate),
    )
    copies = communicator.copies()
    try:
        # Less than the other ranks wait in the exchange behind it: they shall hear why, and not of this rank's absence.
        together(exchange, lambda: _meet(here, said, rank, copies, notices, 0.8 * timeout))
    except BaseException:
        communicator.let_go([copies] if copies.are_under_way() else [])
        raise
    return communicator


def _prepare(
    pools: Sequence[SlotPool], rank: int, num_ranks: int, streams: DeviceStreams, make: Callable[[str], Agent]
) -> _Here:
    proof_bytes = os.urandom(_PROOF_BYTES)
    with _aside(streams.device):
        proof = torch.frombuffer(bytearray(proof_bytes), dtype=torch.uint8).to(streams.device)
        read_WB = torch.zeros(num_ranks, _PROOF_BYTES, dtype=torch.uint8, device=streams.device)
    agent = make(f"moe-layer-{rank}-{uuid.uuid4().hex}")  # on a GPU the thread has its context by now
    pools_SB = [pool.slab_SB for pool in pools]
    tensors = [*pools_SB, proof, read_WB]
    memory = Registered(agent.register_memory(tensors), tensors)
    return _Here(agent, memory, pools_SB, proof_bytes, proof, read_WB)


def _describe(here: _Here, rank: int) -> _Said:
    at = FarPool.of(here.proof[None])
    return _Said(
        here.agent.name,
        here.agent.get_agent_metadata(),
        [FarPool.of(slab_SB) for slab_SB in here.pools_SB],
        FarSlab(rank, at.address, at.slot_bytes, at.device),
        here.proof_bytes,
    )


def _meet(here: _Here, said: Sequence[_Said], rank: int, copies: NixlCopies, notices: Notices, timeout: float) -> None:
    """Read every other rank's proof, and be read by all: what does not work shows here, and not in the first wave.

    Two agents connect in their first messages, for which both must look.
    """
    deadline = time.monotonic() + timeout
    others = [other for other in range(len(said)) if other != rank]
    copies.post([(here.read_WB[other], said[other].proof_at) for other in others])
    while copies.are_under_way():
        copies.raise_failed()
        notices.look()
        _wait(deadline, f"the memory of ranks {sorted(copies.owners())} could not be read within {timeout:.3g} s")
    copies.raise_failed()
    with _aside(here.read_WB.device):
        read = here.read_WB.cpu()
    wrong = [other for other in others if read[other].numpy().tobytes() != said[other].proof]
    if wrong:
        raise RuntimeError(f"what was read of the memory of ranks {wrong} is not what is there")
    for other in others:
        notices.greet(other)
    while missing := set(others) - notices.greeted_by:
        notices.look()
        _wait(deadline, f"ranks {sorted(missing)} could not read this rank's memory within {timeout:.3g} s")
    for _ in range(3):  # a greeting that could not leave at once; nobody looks here before the first wave
        notices.look()
        time.sleep(_PAUSE)


def _wait(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(problem)
    time.sleep(_PAUSE)


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On a stream that is waited for, and on which no forwards run."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
