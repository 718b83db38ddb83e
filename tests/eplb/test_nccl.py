"""Slabs over NCCL by nccl4py: on CPUs a stand-in that is as strict as NCCL, on GPUs NCCL itself."""

import functools
import importlib.util
import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from eplb.config import EplbConfig
from eplb.peer_memory import Exchange, over_store
from eplb.relocation.communicator import (
    NcclCommunicator,
    Transfer,
    choose_communicator,
    make_communicator,
    nccl_link,
)
from eplb.rounds.exchange import LocalAgreement
from eplb.streams import HostStream, streams_of
from eplb.worker.rounds import Rounds
from tests.distributed import distributed
from tests.eplb import fake_nccl4py
from tests.eplb.simulated import SimStream
from tests.eplb.test_communicators import SLOT_BYTES, check_all, check_moves, met, new_slabs, one_move, run, settle

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def skip_on_gpus_without_nccl4py(request):
    on_gpu = any(request.node.get_closest_marker(marker) for marker in ("gpu", "multigpu"))
    if on_gpu and importlib.util.find_spec("nccl") is None:
        pytest.skip("needs nccl4py")


@pytest.fixture
def fake(monkeypatch):
    """The stand-in, in this process."""
    for name in ("nccl", "nccl.core"):
        monkeypatch.setitem(sys.modules, name, None)  # so that they are put back
    fake_nccl4py.install()
    fake_nccl4py.made.clear()
    return fake_nccl4py


def one_host_each(rank: int) -> None:
    """NCCL takes a GPU for one rank of a host only, so let it see as many hosts, which talk over sockets."""
    os.environ["NCCL_HOSTID"] = f"host{rank}"


# ---- over several processes


@distributed(num_ranks=3)
def test_nccl4py(rank, num_ranks, group, device):
    if device.type == "cpu":
        fake_nccl4py.install()
    one_host_each(rank)
    check_nccl(rank, num_ranks, device, group, group)


@distributed(num_ranks=2, backend="nccl")
def test_nccl4py_of_several_gpus(rank, num_ranks, group, device):
    check_nccl(rank, num_ranks, device, group, dist.new_group(backend="gloo"))


@pytest.mark.parametrize("is_killed", [False, True])
@distributed(num_ranks=2, on_cpu=False)
def test_a_rank_that_is_gone_on_a_gpu(rank, num_ranks, group, device, is_killed):
    one_host_each(rank)
    check_a_rank_that_is_gone(rank, device, group, group, is_killed)


@pytest.mark.parametrize("is_killed", [False, True])
@distributed(num_ranks=2, backend="nccl")
def test_a_rank_that_is_gone_of_several_gpus(rank, num_ranks, group, device, is_killed):
    check_a_rank_that_is_gone(rank, device, group, dist.new_group(backend="gloo"), is_killed)
    if rank == 0 and is_killed:
        os._exit(0)  # to destroy the group of NCCL would wait for the rank that was killed


def check_a_rank_that_is_gone(
    rank: int, device: torch.device, group: dist.ProcessGroup, by_host: dist.ProcessGroup, is_killed: bool
) -> None:
    """The transfers that wait for it end, and leave the GPU, within the deadline."""
    communicator = make_communicator(["nccl"], met(group), streams_of(device), 30.0, transfer_timeout=1.0)
    slab = new_slabs(1, device)[0]
    if rank == 1:
        dist.barrier(by_host)
        time.sleep(1.0 if is_killed else 8.0)  # it never begins
        if is_killed:
            os._exit(0)
        communicator.close()
        return
    batch = communicator.prepare([Transfer(None, slab, 1)])
    dist.barrier(by_host)
    batch.start()
    began = time.monotonic()
    why = r"took more than 2\.0 s, twice transfer_timeout"
    with pytest.raises(RuntimeError, match=f"NCCL failed|{why}" if is_killed else why):
        while time.monotonic() - began < 20:
            assert not batch.poll() and not batch.is_dead()
            communicator.watch()
            time.sleep(0.01)
    assert time.monotonic() - began < 4
    while not batch.is_dead():
        assert time.monotonic() - began < 15, "NCCL does not abort"
        time.sleep(0.01)
    communicator.stream.synchronize()
    communicator.close()


def check_nccl(
    rank: int, num_ranks: int, device: torch.device, group: dist.ProcessGroup, by_host: dist.ProcessGroup
) -> None:
    make = functools.partial(make_communicator, ["nccl"])
    communicator = make(met(group), streams_of(device), 30.0)
    assert isinstance(communicator, NcclCommunicator) and communicator.name == "nccl"
    check_all(communicator, rank, num_ranks, device, by_host)
    for begun in (True, False):
        check_given_up(communicator, rank, num_ranks, device, by_host, begun)
    check_several_batches(communicator, rank, device, by_host)
    communicator.watch()
    dist.barrier(by_host)
    communicator.close()
    communicator._link.wait_for_end(15.0)  # where much else runs, it takes longer than `close()` waits
    assert communicator.is_ended
    with pytest.raises(RuntimeError, match="nothing is moved any more"):
        communicator.prepare([])
    communicator = make(met(group), streams_of(device), 30.0)  # another, once the first is closed
    check_moves(communicator, rank, num_ranks, device, [(0, 1), (1, 0), (1, num_ranks - 1)])
    dist.barrier(by_host)
    if rank == 1:
        communicator.close()
    dist.barrier(by_host)
    if rank != 1:
        for _ in range(50):  # a rank that leaves is no failure on the others
            communicator.watch()
            time.sleep(0.01)
        communicator.close()


def check_given_up(
    communicator: NcclCommunicator,
    rank: int,
    num_ranks: int,
    device: torch.device,
    by_host: dist.ProcessGroup,
    begun: bool,
) -> None:
    """A rank that gives a batch up does its part of it all the same, and the next one is not mixed up with it."""
    _, transfers = one_move(rank, device, new_slabs)
    batch = communicator.prepare(transfers)
    if rank == 1:
        if begun:
            batch.start()
        assert not batch.is_dead(), "rank 0 may begin at any time"
    dist.barrier(by_host)
    if rank != 1:
        run(batch)
    dist.barrier(by_host)
    deadline = time.monotonic() + 10
    while not batch.is_dead():
        assert time.monotonic() < deadline
    check_moves(communicator, rank, num_ranks, device, [(0, 1), (1, num_ranks - 1), (num_ranks - 1, 0)])


def check_several_batches(
    communicator: NcclCommunicator, rank: int, device: torch.device, by_host: dist.ProcessGroup
) -> None:
    """They may be under way at once, if all ranks start them in one order; bytes go where they belong."""
    slab_SB = new_slabs(12, device)
    slab_SB[:6] = torch.arange(1, 7, device=device, dtype=torch.uint8)[:, None] * (1 if rank == 0 else 10)
    settle(device)
    dist.barrier(by_host)
    if rank > 1:
        return
    batches = [
        communicator.prepare([Transfer(slab_SB[i], None, 1 - rank), Transfer(None, slab_SB[6 + i], 1 - rank)])
        for i in range(6)
    ]
    for batch in batches:
        batch.start()
    deadline = time.monotonic() + 30
    while not all([batch.poll() for batch in reversed(batches)]):
        assert time.monotonic() < deadline
    expected = slab_SB[:6] // 10 if rank == 1 else slab_SB[:6] * 10
    assert torch.equal(slab_SB[6:], expected)


# ---- on one GPU, by NCCL itself


def alone(communicator_streams=None, **options) -> NcclCommunicator:
    streams = communicator_streams or streams_of(torch.device("cuda", torch.cuda.current_device()))
    return NcclCommunicator(lambda mine: [mine], 0, 1, streams, 30.0, options.pop("transfer_timeout", 60.0), **options)


@pytest.mark.gpu
def test_a_rank_that_sends_to_itself():
    """One rank alone, through all of the interface; NCCL lets a rank send to itself inside of a group."""
    communicator = alone()
    device = communicator.streams.device
    assert str(torch.cuda.nccl.version()[0]) in communicator.library
    assert len(nccl_link._loaded()) == 1
    slab_SB = torch.randint(0, 256, (8, SLOT_BYTES), dtype=torch.uint8, device=device)
    expected = slab_SB.clone()
    expected[5], expected[6], expected[7] = slab_SB[0], slab_SB[3], slab_SB[2]
    settle(device)
    transfers = [Transfer(slab_SB[s], None, 0) for s in (0, 3)] + [Transfer(None, slab_SB[t], 0) for t in (5, 6)]
    batch = communicator.prepare([*transfers, Transfer(slab_SB[2], slab_SB[7], 0)])
    assert not batch.poll()
    run(batch)
    assert torch.equal(slab_SB, expected)
    run(communicator.prepare([]))
    communicator.close()
    assert communicator.is_ended


@pytest.mark.gpu
def test_transfers_beside_a_graph_that_is_captured():
    """NCCL enqueues on a thread of its own; the capture on the main thread goes on."""
    communicator = alone()
    device = communicator.streams.device
    slab_SB = torch.randint(0, 256, (2, 1 << 20), dtype=torch.uint8, device=device)
    settle(device)
    errors: list[BaseException] = []
    begin, end = threading.Event(), threading.Event()

    def work() -> None:
        try:
            communicator.streams.adopt_thread()
            begin.wait(20)
            for _ in range(50):
                run(communicator.prepare([Transfer(slab_SB[0], None, 0), Transfer(None, slab_SB[1], 0)]))
        except BaseException as error:
            errors.append(error)
        finally:
            end.set()

    thread = threading.Thread(target=work)
    thread.start()
    x, graph = torch.ones(1000, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        begin.set()
        y, num = x + 1, 0
        while not end.is_set():
            y, num = y + 1, num + 1
            time.sleep(0.001)
    thread.join(30)
    assert not errors, errors
    graph.replay()
    assert torch.equal(y, x + 1 + num)
    assert torch.equal(slab_SB[1], slab_SB[0])
    communicator.close()


# ---- two ranks by hand


class Now:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Streams:
    """Those of one rank: program order while it connects, simulated ones after `hold()`."""

    device = CPU

    def __init__(self) -> None:
        self.side = HostStream()

    def adopt_thread(self) -> None:
        pass

    def run(self, stream, work) -> None:
        stream.enqueue(work) if isinstance(stream, SimStream) else work()


def drain(*streams: SimStream) -> None:
    while any([stream.advance() for stream in streams]):
        pass


class Pair:
    """Two ranks in this process whose streams and clock go on when the test says so."""

    def __init__(self) -> None:
        store, self.now = dist.HashStore(), Now()
        made: list[NcclCommunicator | None] = [None, None]

        def connect(rank: int) -> None:
            exchange = over_store(store, rank, 2, 10.0)
            made[rank] = NcclCommunicator(exchange, rank, 2, Streams(), 10.0, 5.0, self.now)

        in_threads(connect)
        self.ranks = [communicator for communicator in made if communicator is not None]
        self.fakes = sorted(fake_nccl4py.made, key=lambda fake: fake.rank)
        for communicator in self.ranks:
            communicator.watch()  # lets go of what it connected with
            communicator.streams.side, communicator.stream = SimStream(), SimStream()
        self.slabs_SB = [
            torch.arange(4, dtype=torch.uint8)[:, None] + torch.full((4, 64), 10 * r).byte() for r in (1, 2)
        ]

    def prepare(self, source: int, target: int):
        """Rank 0's slab to rank 1's: the batches of both."""
        return (
            self.ranks[0].prepare([Transfer(self.slabs_SB[0][source], None, 1)]),
            self.ranks[1].prepare([Transfer(None, self.slabs_SB[1][target], 0)]),
        )


def in_threads(work) -> None:
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if errors:
        raise errors[0]


def test_nothing_is_enqueued_beside_nccl_and_no_event_before_it(fake):
    pair = Pair()
    sender, reader = pair.prepare(2, 3)
    pair.fakes[1].holds = True
    sender.start()
    reader.start()
    drain(pair.ranks[0].streams.side, pair.ranks[0].stream)
    assert not reader.poll()
    drain(pair.ranks[1].streams.side, pair.ranks[1].stream)
    assert not pair.ranks[1].stream.items, "NCCL is still at it"
    assert not reader.poll(), "an event that was recorded before NCCL enqueued the transfers is worth nothing"
    pair.fakes[1].holds = False
    assert not reader.poll()
    assert len(pair.ranks[1].stream.items) == 2, "the transfers and the event"
    assert pair.slabs_SB[1][3].unique().tolist() == [23]
    drain(pair.ranks[0].stream, pair.ranks[1].stream)
    assert sender.poll() and reader.poll() and sender.is_dead() and reader.is_dead()
    assert pair.slabs_SB[1][3].unique().tolist() == [12]


def test_transfers_are_behind_what_the_side_stream_was_given_before(fake):
    """Weights that were loaded just before."""
    pair = Pair()
    sender, reader = pair.prepare(2, 3)
    pair.ranks[0].streams.side.enqueue(lambda: pair.slabs_SB[0][2].fill_(99))
    sender.start()
    reader.start()
    for _ in range(3):
        drain(pair.ranks[0].stream, pair.ranks[1].stream, pair.ranks[1].streams.side)
        assert not sender.poll() and not reader.poll()
    drain(pair.ranks[0].streams.side, pair.ranks[0].stream, pair.ranks[1].stream)
    assert sender.poll() and reader.poll()
    assert pair.slabs_SB[1][3].unique().tolist() == [99]


def test_copies_on_a_rank_are_part_of_its_batch(fake):
    pair = Pair()
    slab_SB = pair.slabs_SB[0]
    batch = pair.ranks[0].prepare([Transfer(slab_SB[0], slab_SB[1], 0), Transfer(slab_SB[2], None, 1)])
    batch.start()
    for _ in range(3):
        assert not batch.poll() and not batch.is_dead(), "the copy on this rank is on the side stream"
        pair.ranks[0].stream.advance()
    side = pair.ranks[0].streams.side
    assert side.advance()  # the event that the transfers wait for
    drain(pair.ranks[0].stream)
    assert not pair.ranks[0].stream.items
    assert not batch.poll() and not batch.is_dead()
    drain(side)
    assert batch.poll() and batch.is_dead() and slab_SB[1].unique().tolist() == [10]


def test_a_batch_waits_until_nccl_has_enqueued_the_one_before(fake):
    pair = Pair()
    first, second = pair.prepare(0, 1), pair.prepare(2, 3)
    pair.fakes[0].holds = True
    for sender, reader in (first, second):
        sender.start()
        reader.start()
    pair.fakes[0].holds = False
    batches = [*second, *first]
    for _ in range(20):
        drain(*(stream for rank in pair.ranks for stream in (rank.streams.side, rank.stream)))
        done = [batch.poll() for batch in batches]
    assert all(done)
    assert pair.slabs_SB[1][:, 0].tolist() == [20, 10, 22, 12]


def test_transfers_of_a_rank_that_is_gone_are_aborted_in_time(fake):
    pair = Pair()
    sender, reader = pair.prepare(2, 3)
    reader.start()
    side, stream = pair.ranks[1].streams.side, pair.ranks[1].stream
    pair.now.seconds = 9.9  # the ranks give waves up after 5 s
    for _ in range(3):
        pair.ranks[1].watch()
        drain(side, stream)
        assert not reader.poll() and not reader.is_dead()
    assert stream.items and not pair.fakes[1].num_aborts
    pair.now.seconds = 10.1
    with pytest.raises(
        RuntimeError, match=r"took more than 10.0 s, twice transfer_timeout: another rank is gone or hangs"
    ):
        pair.ranks[1].watch()
    pair.ranks[1].watch()  # says so once
    wait_until_ended(pair.ranks[1])
    assert pair.fakes[1].num_aborts == 1 and reader.is_dead()
    drain(stream)
    assert not stream.items, "nothing waits on the GPU any more"
    assert pair.slabs_SB[1][3, 0] == 23
    with pytest.raises(RuntimeError, match="close the controller and make another, on all ranks"):
        pair.prepare(0, 1)
    sender.start()  # comes late, and waits in vain: its own deadline ends it
    pair.now.seconds = 20.2
    pair.fakes[0].holds = True
    with pytest.raises(RuntimeError, match="twice transfer_timeout"):
        pair.ranks[0].watch()
    wait_until_ended(pair.ranks[0])
    drain(pair.ranks[0].streams.side)
    assert sender.is_dead()
    for communicator in pair.ranks:
        communicator.close()
    assert [one.num_aborts for one in pair.fakes] == [1, 1]


def wait_until_ended(communicator: NcclCommunicator) -> None:
    deadline = time.monotonic() + 10
    while not communicator.is_ended:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_transfers_that_are_complete_are_no_reason_to_abort(fake):
    pair = Pair()
    sender, reader = pair.prepare(2, 3)
    for batch in (sender, reader):
        batch.start()
    for _ in range(3):
        drain(*(stream for rank in pair.ranks for stream in (rank.streams.side, rank.stream)))
        for rank in pair.ranks:
            rank.watch()  # nobody polls
    pair.now.seconds = 1000.0
    for rank in pair.ranks:
        rank.watch()
    assert sender.poll() and reader.poll()


def test_an_error_of_nccl_ends_all_transfers(fake):
    pair = Pair()
    sender, reader = pair.prepare(2, 3)
    never = pair.prepare(0, 1)[1]
    reader.start()
    pair.fakes[1].status = fake.REMOTE_ERROR
    with pytest.raises(RuntimeError, match=r"NCCL failed: remote process exited or .*: a cable was cut"):
        reader.poll()
    with pytest.raises(RuntimeError, match=r"nothing is moved any more .*NCCL failed: remote process exited"):
        reader.poll()
    with pytest.raises(RuntimeError, match="nothing is moved any more"):
        never.start()
    wait_until_ended(pair.ranks[1])
    drain(pair.ranks[1].streams.side)
    assert reader.is_dead() and never.is_dead() and pair.fakes[1].num_aborts == 1
    assert not sender.poll()


def test_an_abort_that_fails_frees_no_slot(fake, monkeypatch, caplog):
    pair = Pair()
    _, reader = pair.prepare(2, 3)
    reader.start()

    def fails() -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(pair.fakes[1], "abort", fails)
    pair.ranks[1].close()
    drain(pair.ranks[1].streams.side)
    assert not pair.ranks[1].is_ended and not reader.is_dead()
    assert "NCCL could not abort its transfers: what they touch stays out of use" in caplog.text


def test_the_worker_looks_after_transfers_when_it_agrees_with_nobody_any_more():
    looked: list[int] = []
    communicator = SimpleNamespace(watch=lambda: looked.append(1), close=lambda: None)
    connection = SimpleNamespace(poll=lambda: (LocalAgreement(), communicator), missing=(), cancel=lambda: None)
    rounds = Rounds(connection, EplbConfig(), 0, time.monotonic, lambda: None)  # type: ignore[arg-type]
    rounds.connect()
    rounds.is_lost = True
    rounds.connect()
    rounds.connect()
    assert len(looked) == 2


# ---- connecting


def test_a_rank_that_does_not_connect(fake):
    store = dist.HashStore()
    exchange = over_store(store, 1, 2, 10.0)
    said = threading.Thread(target=exchange, args=(_nothing(),))
    said.start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"NCCL did not connect the ranks within 0\.3 s"):
        NcclCommunicator(over_store(store, 0, 2, 10.0), 0, 2, Streams(), 0.3, 5.0)
    assert 0.3 <= time.monotonic() - began < 5
    said.join(10)
    assert [one.num_aborts for one in fake.made] == [1]


def _nothing() -> bytes:
    import pickle

    return pickle.dumps(("", b""))


def test_a_rank_that_cannot_load_nccl_keeps_no_other_waiting(fake, monkeypatch):
    store, errors = dist.HashStore(), {}
    monkeypatch.setattr(fake, "get_version", lambda: SimpleNamespace(libnccl=None))
    fake.install()

    def connect(rank: int) -> None:
        try:
            NcclCommunicator(over_store(store, rank, 2, 10.0), rank, 2, Streams(), 10.0, 5.0)
        except RuntimeError as error:
            errors[rank] = str(error)

    in_threads(connect)
    assert "this rank could not load NCCL: nccl4py finds no libnccl.so.2" in errors[0] and errors[0] == errors[1]
    assert not fake.made


def test_a_second_libnccl_is_refused(fake, monkeypatch):
    monkeypatch.setattr(nccl_link, "_loaded", lambda: ["/a/libnccl.so.2", "/b/libnccl.so.2"])
    exchange: Exchange = lambda mine: [mine]  # noqa: E731
    with pytest.raises(RuntimeError, match=r"that PyTorch has loaded, but there are /a/libnccl.so.2, /b/libnccl.so.2"):
        NcclCommunicator(exchange, 0, 1, Streams(), 10.0, 5.0)


# ---- when it is asked for


@pytest.mark.parametrize("group_backend", ["gloo", "nccl"])
@pytest.mark.parametrize("dispatch", ["gloo", "local", "symm_mem"])
def test_it_needs_no_process_group_of_nccl(group_backend, dispatch, fake, monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert choose_communicator("nccl", CUDA, group_backend, {dispatch}) == ("nccl",)
    assert "nccl" not in choose_communicator("auto", CUDA, group_backend, {dispatch}), "never without being asked"


@pytest.mark.parametrize("dispatch", [{"nccl"}, {"local", "nccl"}])
def test_nccl_beside_nccl_dispatch_is_refused(dispatch, fake):
    with pytest.raises(ValueError, match="communicator='nccl' cannot be used beside NCCL dispatch"):
        choose_communicator("nccl", CUDA, "gloo", dispatch)


def test_a_cpu_is_refused(fake):
    with pytest.raises(ValueError, match="communicator='nccl' needs experts on CUDA devices and NCCL, got device cpu"):
        choose_communicator("nccl", CPU, "gloo", {"gloo"})


def test_without_nccl4py_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nccl.core", None)
    with pytest.raises(ValueError, match=r"communicator='nccl' needs the package nccl4py.*install 'moe-layer\[nccl\]'"):
        choose_communicator("nccl", CUDA, "gloo", {"gloo"})


def test_it_keeps_no_bound_of_bytes_per_second(fake):
    assert EplbConfig(communicator="nccl").communicator == "nccl"
    with pytest.raises(ValueError, match="max_bytes_per_second=5 needs communicator='symm_mem', 'nixl' or 'auto'"):
        EplbConfig(communicator="nccl", max_bytes_per_second=5)
    with pytest.raises(
        ValueError, match="max_bytes_per_second=5 needs communicator='symm_mem', 'nixl' or 'auto', got 'nccl'"
    ):
        choose_communicator("nccl", CUDA, "gloo", {"gloo"}, 5)
