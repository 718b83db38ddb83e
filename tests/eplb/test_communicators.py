"""Slabs on their way: the right bytes to the right slot, over each communicator; and which one is chosen."""

import functools
import importlib.util
import logging
import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from eplb.groups import Peers, peers_of
from eplb.relocation.communicator import (
    COMMUNICATORS,
    Communicator,
    LocalCommunicator,
    TorchGlooCommunicator,
    Transfer,
    TransferBatch,
    choose_communicator,
    make_communicator,
)
from eplb.relocation.communicator.nixl_agent import why_no_agent
from eplb.relocation.pool import SlotPool, TensorSpec
from eplb.streams import streams_of
from tests.distributed import distributed

Slabs = Callable[[int, torch.device], torch.Tensor]
"""Makes uint8 ``[num_slots, SLOT_BYTES]``, zero."""

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SLOT_BYTES = 1000  # no multiple of anything


def run(batch: TransferBatch, seconds: float = 30.0) -> None:
    batch.start()
    deadline = time.monotonic() + seconds
    while not batch.poll():
        assert time.monotonic() < deadline, "the transfers do not end"
    assert batch.poll(), "over is over"
    assert batch.is_dead()


# ---- on one rank


def test_local_copies(device):
    streams = streams_of(torch.empty(0, device=device).device)
    slab_SB = torch.randint(0, 256, (5, SLOT_BYTES), dtype=torch.uint8, device=device)
    expected = slab_SB.clone()
    expected[3], expected[4] = slab_SB[0], slab_SB[2]
    communicator = make_communicator(["torch_gloo"], None, streams, 30.0)
    assert isinstance(communicator, LocalCommunicator) and communicator.name == "local"
    batch = communicator.prepare([Transfer(slab_SB[0], slab_SB[3], 0), Transfer(slab_SB[2], slab_SB[4], 0)])
    assert not batch.poll() and batch.is_dead(), "nothing has begun"
    assert not torch.equal(slab_SB, expected)
    run(batch)
    assert torch.equal(slab_SB, expected)


def test_an_empty_batch(device):
    streams = streams_of(torch.empty(0, device=device).device)
    run(LocalCommunicator(streams).prepare([]))


# ---- on several ranks


@distributed(num_ranks=3)
def test_gloo(rank, num_ranks, group, device):
    streams = streams_of(device)
    communicator = make_communicator(["torch_gloo"], met(group), streams, 30.0)
    assert communicator.name == "torch_gloo"
    check_all(communicator, rank, num_ranks, device, group)
    for begun in (True, False):
        check_given_up(communicator, rank, num_ranks, device, begun)
    communicator.close()
    # What a wave may bring to four free slots is there from the start, and stays.
    for bound, slots in ((None, 4), (2 * 1024, 2)):
        communicator = make_communicator(
            ["torch_gloo"], met(group), streams, 30.0, [SlotPool(SPECS, 4, device)], max_bytes_in_flight=bound
        )
        assert isinstance(communicator, TorchGlooCommunicator)
        assert [buffer.numel() for buffer in communicator.staging._free] == [slots * 1024] * 2
        for _ in range(3):
            check_moves(communicator, rank, num_ranks, device, [(0, 1), (1, 2), (2, 1), (2, 0)][:slots])
        assert communicator.staging.num_allocated == 2
        communicator.close()


@distributed(num_ranks=2, backend="nccl")
def test_nccl(rank, num_ranks, group, device):
    streams = streams_of(device)
    by_host = dist.new_group(backend="gloo")
    communicator = make_communicator(["torch_nccl"], met(group), streams, 30.0)
    assert communicator.name == "torch_nccl"
    check_all(communicator, rank, num_ranks, device, by_host)
    communicator.close()
    communicator = make_communicator(["torch_nccl"], met(group), streams, 30.0)  # another, once the first is closed
    check_all(communicator, rank, num_ranks, device, by_host)
    communicator.close()
    check_all(make_communicator(["torch_gloo"], met(group), streams, 30.0), rank, num_ranks, device, by_host)


@distributed(num_ranks=3)
def test_peer_memory(rank, num_ranks, group, device):
    pool = shared_pool(30, device)
    communicator = by("symm_mem", group, device, [pool, shared_pool(rank + 1, device)])
    check_pulling(communicator, pool, rank, num_ranks, group, device)
    check_several_pools("symm_mem", rank, num_ranks, group, device)
    dist.barrier()
    communicator.close()


needs_nixl = pytest.mark.skipif(why_no_agent() is not None, reason=str(why_no_agent()))


@needs_nixl
@distributed(num_ranks=3)
def test_nixl(rank, num_ranks, group, device):
    pool = SlotPool(SPECS, 30, device)
    communicator = by("nixl", group, device, [pool, SlotPool(SPECS, rank + 1, device)])
    check_pulling(communicator, pool, rank, num_ranks, group, device)
    check_several_pools("nixl", rank, num_ranks, group, device)
    dist.barrier()
    communicator.close()


@pytest.mark.parametrize("name", ["symm_mem", pytest.param("nixl", marks=needs_nixl)])
@distributed(num_ranks=2, backend="nccl")
def test_memory_of_several_gpus(rank, num_ranks, group, device, name):
    by_host = dist.new_group(backend="gloo")
    pool = shared_pool(30, device)
    communicator = by(name, group, device, [pool])
    check_all(communicator, rank, num_ranks, device, by_host, functools.partial(slots_of, pool))
    dist.barrier(by_host)
    communicator.close()


@pytest.mark.parametrize("name", ["symm_mem", pytest.param("nixl", marks=needs_nixl)])
@distributed(num_ranks=2)
def test_a_bound_of_bytes_per_second(rank, num_ranks, group, device, name):
    """4 MB at 10 MB/s take 0.4 s, less the first burst; in pieces, and nothing blocks in between."""
    pool = shared_pool(8, device, slot_bytes=1_000_000)
    communicator = by(name, group, device, [pool], rate=10_000_000)
    pool.slab_SB[:4] = torch.arange(1, 5, device=device, dtype=torch.uint8)[:, None] + 10 * rank
    settle(device)
    transfers = [Transfer(pool.slab(slot), None, 1 - rank) for slot in range(4)]
    transfers += [Transfer(None, pool.slab(4 + slot), 1 - rank) for slot in range(4)]
    dist.barrier()
    batch = communicator.prepare(transfers)
    began = time.monotonic()
    batch.start()
    while not batch.poll():
        assert time.monotonic() - began < 60
        if time.monotonic() - began < 0.1:
            assert not pool.slab_SB[6:].any(), "half has come in a quarter of the time"
        time.sleep(0.001)
    took = time.monotonic() - began
    num_bytes = 4 * pool.slot_bytes
    assert took > (num_bytes - (256 << 10)) / 10_000_000 - 0.01, f"{num_bytes} bytes in {took} s"
    assert torch.equal(pool.slab_SB[4:], pool.slab_SB[:4] + (10 if rank == 0 else -10))
    dist.barrier()
    communicator.close()


@distributed(num_ranks=2)
def test_the_choice_is_made_together_and_logged(rank, num_ranks, group, device):
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("eplb.relocation.communicator")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    auto, streams = ["symm_mem", "torch_gloo"], streams_of(device)
    communicator = make_communicator(auto, met(group), streams, 30.0, [shared_pool(4, device)])
    assert communicator.name == "symm_mem"
    assert said == ["experts travel by symm_mem between 2 ranks, because the ranks can open each other's pools"]
    communicator.close()
    if device.type == "cpu":  # one rank's memory is enough for all to do without
        pools = [shared_pool(4, device) if rank == 0 else SlotPool(SPECS, 4, device)]
        communicator = make_communicator(auto, met(group), streams, 30.0, pools)
        assert communicator.name == "torch_gloo"
        assert "because 'symm_mem' cannot be used: 1 pools of rank 1 are in CPU memory" in said[-1]
        check_moves(communicator, rank, num_ranks, device, [(0, 1), (1, 0)])
        communicator.close()
        with pytest.raises(
            ValueError, match=r"communicator='symm_mem' cannot be used: .* SlotPool\(..., shared=True\)"
        ):
            make_communicator(["symm_mem"], met(group), streams, 30.0, pools)
    pools = [shared_pool(4, device) for _ in range(1 + rank)]
    with pytest.raises(RuntimeError, match="ranks 0 and 1 have pools of other slots"):
        make_communicator(["symm_mem"], met(group), streams, 30.0, pools)
    with pytest.raises(ValueError, match=r"rank 0 would use .*torch_gloo.* but rank 1 .*symm_mem"):
        make_communicator([["torch_gloo"], ["symm_mem"]][rank], met(group), streams, 30.0, pools)


SPECS = [TensorSpec("weight", (SLOT_BYTES,), torch.uint8)]


def shared_pool(num_slots: int, device: torch.device, slot_bytes: int = SLOT_BYTES) -> SlotPool:
    return SlotPool([TensorSpec("weight", (slot_bytes,), torch.uint8)], num_slots, device, shared=True)


def slots_of(pool: SlotPool, num_slots: int, device: torch.device) -> torch.Tensor:
    """Slots of a pool in place of `new_slabs()`; whole ones, which are a little longer than the experts."""
    del device
    pool.slab_SB.zero_()
    return pool.slab_SB[:num_slots]


def by(
    name: str, group: dist.ProcessGroup, device: torch.device, pools: list[SlotPool], rate: int | None = None
) -> Communicator:
    communicator = make_communicator([name], met(group), streams_of(device), 30.0, pools, rate)
    assert communicator.name == name
    return communicator


def check_pulling(
    communicator: Communicator,
    pool: SlotPool,
    rank: int,
    num_ranks: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Whatever ranks do that read each other's slots."""
    slabs = functools.partial(slots_of, pool)
    check_all(communicator, rank, num_ranks, device, group, slabs)
    for begun in (True, False):
        check_given_up(communicator, rank, num_ranks, device, begun, slabs)
    foreign = new_slabs(1, device)[0]
    with pytest.raises(ValueError, match="a slab must be a slot of a pool"):
        communicator.prepare([Transfer(foreign, None, (rank + 1) % num_ranks)])
    check_moves(communicator, rank, num_ranks, device, [(2, 0), (0, 1), (1, 2)], slabs)


def check_several_pools(name: str, rank: int, num_ranks: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Slots of each size come from the pool that they are in, though every rank has another number of them."""
    pools = [shared_pool(2 + rank, device), shared_pool(3, device, 300), shared_pool(4 - rank, device, 700)]
    communicator = by(name, group, device, pools)
    for number, pool in enumerate(pools):
        pool.slab_SB[:] = 10 * (1 + rank) + number
    settle(device)
    to, of = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    last = [pool.slab(pool.num_slots - 1) for pool in pools]
    transfers = [Transfer(slab, None, to) for slab in last]
    transfers += [Transfer(None, pool.slab(0), of) for pool in pools]
    run(communicator.prepare(transfers))
    assert [pool.slab(0).unique().tolist() for pool in pools] == [[10 * (1 + of) + number] for number in range(3)]
    dist.barrier()
    communicator.close()


def met(group: dist.ProcessGroup) -> Peers:
    """The ranks of a group, when all have come. Collective."""
    peers = peers_of(group)
    assert peers.meet(threading.Event())
    return peers


def new_slabs(num_slots: int, device: torch.device) -> torch.Tensor:
    """Memory to move slabs in, zero, where the communicator does not care whose it is."""
    return torch.zeros(num_slots, SLOT_BYTES, dtype=torch.uint8, device=device)


def check_all(
    communicator: Communicator,
    rank: int,
    num_ranks: int,
    device: torch.device,
    by_host: dist.ProcessGroup,
    slabs: Slabs = new_slabs,
) -> None:
    check_ranks_far_apart(communicator, rank, device, by_host, slabs)
    for seed in range(6):
        check_moves(communicator, rank, num_ranks, device, random_moves(seed, num_ranks), slabs)
    # Several per pair in both directions, beside moves within a rank; ranks with nothing to do; nobody with anything.
    check_moves(communicator, rank, num_ranks, device, [(0, 1)] * 4 + [(1, 0)] * 3 + [(1, 1)] * 2 + [(0, 0)], slabs)
    check_moves(communicator, rank, num_ranks, device, [(1, 0), (0, 1), (1, 0), (1, 1), (1, 0)], slabs)
    check_moves(communicator, rank, num_ranks, device, [(num_ranks - 1, num_ranks - 1)], slabs)
    check_moves(communicator, rank, num_ranks, device, [], slabs)


def settle(device: torch.device) -> None:
    """What was enqueued is there for all streams."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_moves(seed: int, num_ranks: int) -> list[tuple[int, int]]:
    """(source rank, target rank) of each move, the same on all ranks."""
    rng = random.Random(seed)
    return [(rng.randrange(num_ranks), rng.randrange(num_ranks)) for _ in range(rng.randrange(10))]


def slab_of(rank: int, slot: int, salt: int, num_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * salt + 100 * rank + slot)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def check_moves(
    communicator: Communicator,
    rank: int,
    num_ranks: int,
    device: torch.device,
    moves: list[tuple[int, int]],
    slabs: Slabs = new_slabs,
) -> None:
    """Slots 0–9 of each rank are sources, 10 and up are targets; every target gets its own source's bytes."""
    salt = len(moves)
    slab_SB = slabs(10 + len(moves) + 1, device)
    for slot in range(10):
        slab_SB[slot] = slab_of(rank, slot, salt, slab_SB.shape[1])
    settle(device)
    expected, transfers = slab_SB.clone(), []
    for number, (source, target) in enumerate(moves):
        slot = (3 * number + 1) % 10
        if target == rank:
            expected[10 + number] = slab_of(source, slot, salt, slab_SB.shape[1])
        if rank in (source, target):
            transfers.append(
                Transfer(
                    slab_SB[slot] if rank == source else None,
                    slab_SB[10 + number] if rank == target else None,
                    target if rank == source else source,
                )
            )
    batch = communicator.prepare(transfers)
    run(batch)
    assert torch.equal(slab_SB, expected), f"rank {rank}, moves {moves}"


def one_move(rank: int, device: torch.device, slabs: Slabs) -> tuple[torch.Tensor, list[Transfer]]:
    """A slab of each rank, filled with its rank + 1; rank 0's is to overwrite rank 1's."""
    slab = slabs(1, device)[0].fill_(rank + 1)
    settle(device)
    transfers = [[Transfer(slab, None, 1)], [Transfer(None, slab, 0)]]
    return slab, transfers[rank] if rank < 2 else []


def check_ranks_far_apart(
    communicator: Communicator, rank: int, device: torch.device, by_host: dist.ProcessGroup, slabs: Slabs
) -> None:
    """Until the slower rank starts nothing arrives, and on the faster one nothing blocks."""
    slab, transfers = one_move(rank, device, slabs)
    before = slab.clone()
    batch = communicator.prepare(transfers)
    assert not batch.poll(), "it began before it was started"
    dist.barrier(by_host)
    if rank == 1:
        batch.start()
        for _ in range(50):
            assert not batch.poll(), "over, though rank 0 has not begun"
            time.sleep(0.001)
        if device.type == "cpu" or communicator.name not in (
            "nccl",
            "torch_nccl",
        ):  # (a look at the device waits for NCCL's kernel, which waits for rank 0)
            assert torch.equal(slab, before)
    dist.barrier(by_host)
    if rank != 1:
        batch.start()
    deadline = time.monotonic() + 30
    while not batch.poll():
        assert time.monotonic() < deadline
    assert torch.equal(slab, torch.full_like(slab, 1) if rank == 1 else before)


def check_given_up(
    communicator: Communicator,
    rank: int,
    num_ranks: int,
    device: torch.device,
    begun: bool,
    slabs: Slabs = new_slabs,
) -> None:
    """A batch that is polled no more writes no slab, and says that it is dead; the next one is not mixed up with it.

    Args:
        begun: whether rank 1 starts it before it gives it up; the others count on its part either way.
    """
    slab, transfers = one_move(rank, device, slabs)
    before = slab.clone()
    batch = communicator.prepare(transfers)
    if rank == 1:
        if begun:
            batch.start()
            for _ in range(5):
                assert not batch.poll()
                time.sleep(0.001)
        batch.is_dead()
    dist.barrier()
    if rank != 1:
        run(batch)
    dist.barrier()
    if rank == 1:
        deadline = time.monotonic() + 10
        while not batch.is_dead():
            assert time.monotonic() < deadline
        time.sleep(0.02)
        assert torch.equal(slab, before)
    check_moves(communicator, rank, num_ranks, device, [(0, 1), (1, num_ranks - 1), (num_ranks - 1, 0)], slabs)


# ---- which one


@pytest.fixture
def nccl(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)


@pytest.mark.parametrize(
    ("device", "group_backend", "dispatch", "expected"),
    [
        (CPU, "gloo", {"gloo"}, "torch_gloo"),
        (CPU, "cpu:gloo,cuda:nccl", {"gloo"}, "torch_gloo"),
        (CUDA, "gloo", {"gloo"}, "torch_gloo"),  # the group has no NCCL
        (CUDA, "nccl", {"nccl"}, "torch_gloo"),  # NCCL on two threads can hang
        (CUDA, "nccl", {"local", "nccl"}, "torch_gloo"),
        (CUDA, "nccl", {"gloo"}, "torch_nccl"),
        (CUDA, "nccl", {"local"}, "torch_nccl"),
        (CUDA, "nccl", {"symm_mem"}, "torch_nccl"),
        (CUDA, "cpu:gloo,cuda:nccl", {"gloo"}, "torch_nccl"),
    ],
)
def test_the_automatic_choice(device, group_backend, dispatch, expected, nccl):
    assert choose_communicator("auto", device, group_backend, dispatch) == ("symm_mem", expected)


def test_the_automatic_choice_where_pytorch_has_no_nccl(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert choose_communicator("auto", CUDA, "nccl", {"gloo"}) == ("symm_mem", "torch_gloo")


def test_the_automatic_choice_of_one_that_keeps_a_bound(nccl):
    assert choose_communicator("auto", CUDA, "nccl", {"gloo"}, 10**9) == ("symm_mem",)


def test_a_bound_that_cannot_be_kept(nccl):
    with pytest.raises(
        ValueError, match="max_bytes_per_second=5 needs communicator='symm_mem', 'nixl' or 'auto', got 'torch_nccl'"
    ):
        choose_communicator("torch_nccl", CUDA, "nccl", {"gloo"}, 5)


@pytest.mark.parametrize("name", ["symm_mem", "torch_gloo", "torch_nccl"])
@pytest.mark.parametrize("dispatch", ["gloo", "local", "symm_mem"])
def test_what_is_asked_for_is_what_one_gets(name, dispatch, nccl):
    assert choose_communicator(name, CUDA, "nccl", {dispatch}) == (name,)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("dispatch", ["gloo", "local", "nccl", "symm_mem"])
def test_nixl_goes_with_everything(device, dispatch, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for bound in (None, 10**9):
        assert choose_communicator("nixl", device, "nccl", {dispatch}, bound) == ("nixl",)


def test_nixl_where_it_is_not_installed_is_refused_and_not_replaced(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"communicator='nixl' cannot be used: .* pip install nixl-cu13, or moe-layer with"
    ):
        choose_communicator("nixl", CUDA, "nccl", {"gloo"})


@pytest.mark.parametrize("dispatch", [{"nccl"}, {"local", "nccl"}])
def test_nccl_beside_nccl_dispatch_is_refused(dispatch, nccl):
    with pytest.raises(
        ValueError, match=r"communicator='torch_nccl' cannot be used beside NCCL dispatch.*Use 'auto', 'symm_mem' or"
    ):
        choose_communicator("torch_nccl", CUDA, "nccl", dispatch)


def test_nccl_on_a_cpu_is_refused_and_not_replaced(nccl):
    with pytest.raises(
        ValueError, match="communicator='torch_nccl' needs experts on CUDA devices and NCCL, got device cpu"
    ):
        choose_communicator("torch_nccl", CPU, "nccl", {"gloo"})


def test_nccl_where_pytorch_has_none_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match=r"communicator='torch_nccl' needs .* NCCL"):
        choose_communicator("torch_nccl", CUDA, "gloo", {"gloo"})


def test_unknown_names():
    with pytest.raises(
        ValueError, match=f"communicator must be one of {', '.join(COMMUNICATORS)}.* got 'carrier_pigeon'"
    ):
        choose_communicator("carrier_pigeon", CPU, "gloo", {"gloo"})
