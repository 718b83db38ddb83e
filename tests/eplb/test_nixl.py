"""The communicator "nixl" with the real NIXL, between processes: nothing tears, nothing hangs, all is given back.

`test_communicators.py` has what it does as the others do, `test_nixl_pieces.py` what needs no NIXL.
"""

import gc
import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from eplb.peer_memory import over_store
from eplb.relocation.communicator import NixlCommunicator, Transfer, make_communicator
from eplb.relocation.communicator.nixl_agent import Agent, make_agent, why_no_agent
from eplb.relocation.communicator.open_agents import open_agents
from eplb.relocation.pool import SlotPool, TensorSpec
from eplb.streams import streams_of
from tests.distributed import distributed
from tests.eplb.test_communicators import met, run, settle

pytestmark = pytest.mark.skipif(why_no_agent() is not None, reason=str(why_no_agent()))

SECONDS = 20.0


def connected(group: dist.ProcessGroup, device: torch.device, pool: SlotPool) -> NixlCommunicator:
    communicator = make_communicator(["nixl"], met(group), streams_of(device), SECONDS, [pool])
    assert isinstance(communicator, NixlCommunicator)
    return communicator


def pool_of(num_slots: int, slot_bytes: int, device: torch.device) -> SlotPool:
    return SlotPool([TensorSpec("weight", (slot_bytes,), torch.uint8)], num_slots, device)


@distributed(num_ranks=2)
def test_slabs_of_megabytes_arrive_whole(rank, num_ranks, group, device):
    """Both ranks send two and write over them as soon as they may; what arrived is all of what was there before."""
    pool = pool_of(5, 5_000_100, device)
    communicator = connected(group, device, pool)
    pattern = (torch.arange(pool.slot_bytes, device=device) % 251).to(torch.uint8)
    for wave in range(12):
        value = 20 * wave % 200
        for slot in range(2):
            pool.slab_SB[slot] = pattern + (value + 5 * rank + slot)
        settle(device)
        transfers = [Transfer(pool.slab(slot), None, 1 - rank) for slot in range(2)]
        transfers += [Transfer(None, pool.slab(3 + slot), 1 - rank) for slot in range(2)]
        run(communicator.prepare(transfers))
        pool.slab_SB[:2] = 255  # nobody reads them any more
        for slot in range(2):
            assert torch.equal(pool.slab(3 + slot), pattern + (value + 5 * (1 - rank) + slot)), f"wave {wave}"
    dist.barrier()
    communicator.close()


@distributed(num_ranks=3)
def test_i6_a_rank_that_dies(rank, num_ranks, group, device):
    """Rank 2 offers a slab to rank 0 and is to read one of rank 1, but its process ends: no call of the others hangs."""
    pool = pool_of(4, 3_000_000, device)
    pool.slab_SB[:] = rank
    settle(device)
    communicator = connected(group, device, pool)
    transfers = [
        [Transfer(None, pool.slab(3), 2)],
        [Transfer(pool.slab(0), None, 2)],
        [Transfer(pool.slab(0), None, 0), Transfer(None, pool.slab(3), 1)],
    ][rank]
    batch = communicator.prepare(transfers)
    batch.start()
    dist.barrier()
    if rank == 2:
        batch._fetches = []  # it reads nothing, and says nothing of having read
        communicator.notes.finish = lambda number: None  # type: ignore[method-assign]
        for _ in range(20):
            batch.poll()
            time.sleep(0.01)
        os._exit(0)
    time.sleep(1.0)  # now it is gone
    began, longest, raised = time.monotonic(), 0.0, ""
    while time.monotonic() - began < 3.0:
        at = time.monotonic()
        try:
            assert not batch.poll(), "it says that all was read"
        except RuntimeError as error:
            raised = raised or str(error)
        assert not raised or not batch.is_dead()
        longest = max(longest, time.monotonic() - at)
        time.sleep(0.01)
    assert not batch.is_dead(), "nobody knows what the other process did last"
    if rank == 0:
        assert raised.startswith(f"reading {pool.slot_bytes} bytes of rank 2 failed: ")
        assert "DISCONNECT" in raised
    assert longest < 1.0, f"a look took {longest} s"
    began = time.monotonic()
    communicator.close()
    assert time.monotonic() - began < 1.0


@distributed(num_ranks=2)
def test_closing_gives_back_what_connecting_took(rank, num_ranks, group, device):
    pool = pool_of(4, 1000, device)
    memory = weakref.ref(pool.slab_SB)
    for wave in range(3):
        communicator = connected(group, device, pool)
        agent = weakref.ref(communicator.agent)
        pool.slab_SB[0] = 10 * wave + rank
        settle(device)
        run(communicator.prepare([Transfer(pool.slab(0), None, 1 - rank), Transfer(None, pool.slab(2), 1 - rank)]))
        assert pool.slab(2).unique().tolist() == [10 * wave + 1 - rank]
        dist.barrier()
        communicator.close()
        del communicator
        gc.collect()
        assert agent() is None
    del pool
    gc.collect()
    assert memory() is None


@distributed(num_ranks=2)
def test_a_rank_whose_agent_cannot_be_made(rank, num_ranks, group, device):
    def make(name: str) -> Agent:
        if rank == 1:
            raise OSError("libucp.so: cannot open shared object file")
        return make_agent(name)

    exchange = over_store(met(group).part("here"), rank, num_ranks, SECONDS)
    with pytest.raises(RuntimeError, match=r"libucp\.so: cannot open"):
        open_agents([pool_of(2, 1000, device)], rank, exchange, streams_of(device), None, SECONDS, make)
    # And then all have theirs.
    communicator = connected(group, device, pool_of(2, 1000, device))
    dist.barrier()
    communicator.close()
