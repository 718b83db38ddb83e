"""Slabs on their way: the right bytes to the right slot, over each communicator; and which one is chosen."""

import random
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from eplb.groups import Peers, peers_of
from eplb.relocation.communicator import (
    COMMUNICATORS,
    Communicator,
    LocalCommunicator,
    Transfer,
    TransferBatch,
    choose_communicator,
    make_communicator,
)
from eplb.streams import streams_of
from tests.distributed import distributed

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
    communicator = make_communicator("torch_gloo", None, streams, 30.0)
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
    communicator = make_communicator("torch_gloo", met(group), streams, 30.0)
    assert communicator.name == "torch_gloo"
    check_all(communicator, rank, num_ranks, device, group)
    for begun in (True, False):
        check_given_up(communicator, rank, num_ranks, device, begun)
    communicator.close()


@distributed(num_ranks=2, backend="nccl")
def test_nccl(rank, num_ranks, group, device):
    streams = streams_of(device)
    by_host = dist.new_group(backend="gloo")
    communicator = make_communicator("torch_nccl", met(group), streams, 30.0)
    assert communicator.name == "torch_nccl"
    check_all(communicator, rank, num_ranks, device, by_host)
    communicator.close()
    communicator = make_communicator("torch_nccl", met(group), streams, 30.0)  # another, once the first is closed
    check_all(communicator, rank, num_ranks, device, by_host)
    communicator.close()
    check_all(make_communicator("torch_gloo", met(group), streams, 30.0), rank, num_ranks, device, by_host)


def met(group: dist.ProcessGroup) -> Peers:
    """The ranks of a group, when all have come. Collective."""
    peers = peers_of(group)
    assert peers.meet(threading.Event())
    return peers


def check_all(
    communicator: Communicator, rank: int, num_ranks: int, device: torch.device, by_host: dist.ProcessGroup
) -> None:
    check_ranks_far_apart(communicator, rank, device, by_host)
    for seed in range(6):
        check_moves(communicator, rank, num_ranks, device, random_moves(seed, num_ranks))
    # Several per pair in both directions, beside moves within a rank; ranks with nothing to do; nobody with anything.
    check_moves(communicator, rank, num_ranks, device, [(0, 1)] * 4 + [(1, 0)] * 3 + [(1, 1)] * 2 + [(0, 0)])
    check_moves(communicator, rank, num_ranks, device, [(1, 0), (0, 1), (1, 0), (1, 1), (1, 0)])
    check_moves(communicator, rank, num_ranks, device, [(num_ranks - 1, num_ranks - 1)])
    check_moves(communicator, rank, num_ranks, device, [])


def random_moves(seed: int, num_ranks: int) -> list[tuple[int, int]]:
    """(source rank, target rank) of each move, the same on all ranks."""
    rng = random.Random(seed)
    return [(rng.randrange(num_ranks), rng.randrange(num_ranks)) for _ in range(rng.randrange(10))]


def slab_of(rank: int, slot: int, salt: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * salt + 100 * rank + slot)
    return torch.randint(0, 256, (SLOT_BYTES,), dtype=torch.uint8, generator=generator)


def check_moves(
    communicator: Communicator, rank: int, num_ranks: int, device: torch.device, moves: list[tuple[int, int]]
) -> None:
    """Slots 0–9 of each rank are sources, 10 and up are targets; every target gets its own source's bytes."""
    salt = len(moves)
    slab_SB = torch.zeros(10 + len(moves) + 1, SLOT_BYTES, dtype=torch.uint8, device=device)
    for slot in range(10):
        slab_SB[slot] = slab_of(rank, slot, salt)
    expected, transfers = slab_SB.clone(), []
    for number, (source, target) in enumerate(moves):
        slot = (3 * number + 1) % 10
        if target == rank:
            expected[10 + number] = slab_of(source, slot, salt)
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


def one_move(rank: int, device: torch.device) -> tuple[torch.Tensor, list[Transfer]]:
    """A slab of each rank, filled with its rank + 1; rank 0's is to overwrite rank 1's."""
    slab = torch.full((SLOT_BYTES,), rank + 1, dtype=torch.uint8, device=device)
    transfers = [[Transfer(slab, None, 1)], [Transfer(None, slab, 0)]]
    return slab, transfers[rank] if rank < 2 else []


def check_ranks_far_apart(
    communicator: Communicator, rank: int, device: torch.device, by_host: dist.ProcessGroup
) -> None:
    """Until the slower rank starts nothing arrives, and on the faster one nothing blocks."""
    slab, transfers = one_move(rank, device)
    before = slab.clone()
    batch = communicator.prepare(transfers)
    assert not batch.poll(), "it began before it was started"
    dist.barrier(by_host)
    if rank == 1:
        batch.start()
        for _ in range(50):
            assert not batch.poll(), "over, though rank 0 has not begun"
            time.sleep(0.001)
        if communicator.name == "torch_gloo":  # (a look at the device waits for NCCL's kernel, which waits for rank 0)
            assert torch.equal(slab, before)
    dist.barrier(by_host)
    if rank != 1:
        batch.start()
    deadline = time.monotonic() + 30
    while not batch.poll():
        assert time.monotonic() < deadline
    assert torch.equal(slab, torch.full_like(slab, 1) if rank == 1 else before)


def check_given_up(communicator: Communicator, rank: int, num_ranks: int, device: torch.device, begun: bool) -> None:
    """A batch that is polled no more writes no slab, and says that it is dead; the next one is not mixed up with it.

    Args:
        begun: whether rank 1 starts it before it gives it up; the others count on its part either way.
    """
    slab, transfers = one_move(rank, device)
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
    check_moves(communicator, rank, num_ranks, device, [(0, 1), (1, num_ranks - 1), (num_ranks - 1, 0)])


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
        (CUDA, "cpu:gloo,cuda:nccl", {"gloo"}, "torch_nccl"),
    ],
)
def test_the_automatic_choice(device, group_backend, dispatch, expected, nccl):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_communicator("auto", device, group_backend, dispatch) == expected


def test_the_automatic_choice_where_pytorch_has_no_nccl(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert choose_communicator("auto", CUDA, "nccl", {"gloo"}) == "torch_gloo"


@pytest.mark.parametrize("name", ["torch_gloo", "torch_nccl"])
def test_what_is_asked_for_is_what_one_gets(name, nccl):
    assert choose_communicator(name, CUDA, "nccl", {"gloo"}) == name


def test_nccl_beside_nccl_dispatch_is_warned_of(nccl):
    with pytest.warns(UserWarning, match="communicator='torch_nccl' beside NCCL dispatch can hang"):
        assert choose_communicator("torch_nccl", CUDA, "nccl", {"nccl"}) == "torch_nccl"


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
