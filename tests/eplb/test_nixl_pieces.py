"""The communicator "nixl" without NIXL: agents of one process stand for it (`fake_nixl.py`). The real one: `test_nixl.py`."""

import gc
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from eplb.peer_memory import over_store
from eplb.relocation.communicator import NixlCommunicator, Transfer, TransferBatch
from eplb.relocation.communicator.nixl import FarSlab, Window
from eplb.relocation.communicator.notices import Notices
from eplb.relocation.communicator.open_agents import open_agents
from eplb.relocation.pool import SlotPool, TensorSpec
from eplb.streams import streams_of
from tests.eplb.fake_nixl import FakeAgent, FakeDisconnectError

CPU = torch.device("cpu")
SECONDS = 20.0
MIB = 1 << 20


class Ranks:
    """Ranks of this process, connected unless there are errors.

    Args:
        timeout: seconds of each step.
        spoil: does something to a rank's agent when it is made.
        slots: bytes and number of those of each pool, the same on all ranks.
    """

    def __init__(
        self,
        num_ranks: int,
        timeout: float = SECONDS,
        spoil: Callable[[int, FakeAgent], None] = lambda rank, agent: None,
        slots: Sequence[tuple[int, int]] = ((512, 12), (1024, 3)),
    ) -> None:
        self.network: dict[str, FakeAgent] = {}
        self.agents: dict[int, FakeAgent] = {}
        self.pools = [
            [SlotPool([TensorSpec("weight", (slot_bytes,), torch.uint8)], number) for slot_bytes, number in slots]
            for _ in range(num_ranks)
        ]
        self.communicators: dict[int, NixlCommunicator] = {}
        self.errors: dict[int, BaseException] = {}
        store = torch.distributed.HashStore()

        def connect(rank: int) -> None:
            def make(name: str) -> FakeAgent:
                agent = self.agents[rank] = FakeAgent(name, self.network)
                spoil(rank, agent)
                return agent

            exchange = over_store(store, rank, num_ranks, timeout)
            try:
                self.communicators[rank] = open_agents(
                    self.pools[rank], rank, exchange, streams_of(CPU), None, timeout, make
                )
            except Exception as error:
                self.errors[rank] = error

        threads = [threading.Thread(target=connect, args=(rank,), daemon=True) for rank in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3 * timeout)
            assert not thread.is_alive(), "connecting hangs"

    def slab(self, rank: int, slot: int, pool: int = 0) -> torch.Tensor:
        return self.pools[rank][pool].slab(slot)

    def pair(self) -> tuple[TransferBatch, TransferBatch]:
        """Rank 0's slot 2 goes to rank 1's slot 3: the batches of both, which have begun."""
        self.slab(0, 2).fill_(12)
        self.slab(1, 3).fill_(23)
        batches = (
            self.communicators[0].prepare([Transfer(self.slab(0, 2), None, 1)]),
            self.communicators[1].prepare([Transfer(None, self.slab(1, 3), 0)]),
        )
        for batch in batches:
            batch.start()
        return batches


@pytest.fixture
def two() -> Ranks:
    ranks = Ranks(2)
    assert not ranks.errors
    return ranks


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline


# ---- what is moved


def test_slabs_of_all_pools_between_three_ranks():
    ranks = Ranks(3)
    assert not ranks.errors and {one.name for one in ranks.communicators.values()} == {"nixl"}
    for seed in range(20):
        rng = random.Random(seed)
        for rank in range(3):
            for pool in ranks.pools[rank]:
                pool.slab_SB.random_(256, generator=torch.Generator().manual_seed(10 * seed + rank))
        transfers: list[list[Transfer]] = [[], [], []]
        expected = []
        for target_slot in range(6, 12):
            source, target, slot = rng.randrange(3), rng.randrange(3), rng.randrange(6)
            expected.append((target, target_slot, ranks.slab(source, slot).clone()))
            of, to = ranks.slab(source, slot), ranks.slab(target, target_slot)
            if source == target:
                transfers[source].append(Transfer(of, to, source))
            else:
                transfers[source].append(Transfer(of, None, target))
                transfers[target].append(Transfer(None, to, source))
        transfers[0].append(Transfer(ranks.slab(0, 0, pool=1), None, 2))
        transfers[2].append(Transfer(None, ranks.slab(2, 2, pool=1), 0))
        batches = [communicator.prepare(own) for communicator, own in zip(ordered(ranks), transfers, strict=True)]
        for batch in batches:
            batch.start()
        until(lambda batches=batches: all([batch.poll() for batch in batches]))  # type: ignore[misc]
        for target, slot, slab in expected:
            assert torch.equal(ranks.slab(target, slot), slab)
        assert torch.equal(ranks.slab(2, 2, pool=1), ranks.slab(0, 0, pool=1))
        assert all(batch.is_dead() for batch in batches)
        assert not any(agent.reads for agent in ranks.agents.values()), "every handle is given back"


def ordered(ranks: Ranks) -> list[NixlCommunicator]:
    return [ranks.communicators[rank] for rank in range(len(ranks.pools))]


def test_a_sender_waits_for_its_readers_and_they_for_it(two):
    sender, reader = two.pair()
    two.agents[1].holds = True
    assert not reader.poll(), "nothing was offered"
    assert not two.agents[1].reads
    assert not sender.poll() and not sender.poll()  # the offer leaves in the second look
    assert not reader.poll() and len(two.agents[1].reads) == 1
    assert not sender.poll() and not reader.poll(), "the read is under way"
    assert two.slab(1, 3).unique().tolist() == [23]
    two.agents[1].holds = False
    assert not reader.poll() and not sender.poll(), "half of it is there"
    assert two.slab(1, 3).unique().tolist() == [12, 23]
    until(reader.poll)
    assert sender.poll(), "the reader pushes on what it said"
    assert two.slab(1, 3).unique().tolist() == [12]


def test_a_slab_is_not_free_while_a_rank_that_gave_up_still_reads_it(two):
    sender, reader = two.pair()
    two.agents[1].holds = True
    for _ in range(3):
        assert not sender.poll() and not reader.poll()
    assert len(two.agents[1].reads) == 1
    for _ in range(3):
        assert not reader.is_dead() and not sender.is_dead(), "the read is under way"
    later = two.communicators[0].prepare([]), two.communicators[1].prepare([])
    for batch in later:
        batch.start()
    assert all([batch.poll() for batch in later]), "an empty batch neither waits for it nor hides it"
    assert not sender.is_dead() and not reader.is_dead()
    two.agents[1].holds = False
    until(reader.is_dead)
    assert sender.is_dead() and not reader.poll() and not sender.poll()


def test_a_batch_given_up_before_it_began_reads_nothing_and_what_it_was_offered_is_forgotten(two):
    sender = two.communicators[0].prepare([Transfer(two.slab(0, 2), None, 1)])
    reader = two.communicators[1].prepare([Transfer(None, two.slab(1, 3), 0)])
    sender.start()
    assert not sender.poll() and not sender.is_dead(), "the reader may begin at any time"
    assert reader.is_dead() and sender.is_dead() and not reader.poll()
    assert not two.communicators[1].notes._offers
    again = two.pair()
    until(lambda: all([batch.poll() for batch in again]))
    assert two.slab(1, 3).unique().tolist() == [12]


def test_an_offer_that_comes_after_the_batch_was_given_up_is_forgotten(two):
    sender, reader = two.pair()
    assert reader.is_dead()
    assert sender.poll(), "it offers, and knows that nobody reads"
    assert two.agents[1].inbox
    two.communicators[1].notes.look()
    assert not two.communicators[1].notes._offers and not two.agents[1].reads


def test_large_slabs_come_in_pieces(monkeypatch):
    monkeypatch.setattr(Window, "_LARGEST", 4 * MIB)
    ranks = Ranks(2, slots=((9 * MIB + 300, 2),))
    ranks.slab(0, 0).random_(256)
    batches = (
        ranks.communicators[0].prepare([Transfer(ranks.slab(0, 0), None, 1)]),
        ranks.communicators[1].prepare([Transfer(None, ranks.slab(1, 1), 0)]),
    )
    for batch in batches:
        batch.start()
    most = 0

    def look() -> bool:
        nonlocal most
        done = [batch.poll() for batch in batches]
        most = max(most, sum(num_bytes for read in ranks.agents[1].reads for _, _, num_bytes in read.parts))
        return all(done)

    until(look)
    assert 0 < most <= 4 * MIB
    assert torch.equal(ranks.slab(1, 1), ranks.slab(0, 0))


# ---- what fails


@pytest.mark.parametrize("at", ["posting", "later"])
def test_a_read_that_failed_never_says_that_it_is_complete_and_its_slots_are_never_free(two, at):
    sender, reader = two.pair()
    two.agents[1].holds = True
    assert not sender.poll() and not sender.poll()
    if at == "later":
        assert not reader.poll()
    two.agents[1].error = FakeDisconnectError("NIXL_ERR_REMOTE_DISCONNECT")
    with pytest.raises(RuntimeError, match="reading 512 bytes of rank 0 failed: FakeDisconnectError: NIXL_ERR_REMOTE"):
        reader.poll()
    two.agents[1].holds = False
    for _ in range(3):
        assert not reader.poll() and not reader.is_dead() and not sender.is_dead()
    two.communicators[1].close()
    assert two.agents[1].registered, "it may write still"


def test_a_state_that_is_an_error_is_one(two):
    sender, reader = two.pair()
    two.agents[1].holds = True
    assert not sender.poll() and not sender.poll() and not reader.poll()
    two.agents[1].reads[0].state = "ERR"
    with pytest.raises(RuntimeError, match="reading 512 bytes of rank 0 failed: NIXL says 'ERR'"):
        reader.poll()


def test_an_owner_that_dies_is_an_error_for_its_readers(two):
    sender, reader = two.pair()
    assert not sender.poll() and not sender.poll()
    two.agents[0].is_dead = True
    with pytest.raises(RuntimeError, match="reading 512 bytes of rank 0 failed"):
        reader.poll()
    assert not reader.is_dead()


def test_a_reader_that_dies_is_an_error_for_its_owner_and_leaves_the_slab_held(two):
    sender, _ = two.pair()
    two.agents[1].is_dead = True
    with pytest.raises(RuntimeError, match="rank 1 cannot be told what to read: NIXL_ERR_REMOTE_DISCONNECT"):
        sender.poll()
    for _ in range(3):
        assert not sender.poll() and not sender.is_dead(), "nobody knows whether the rank reads still"


def test_one_rank_that_cannot_be_told_keeps_no_other_from_hearing(caplog):
    ranks = Ranks(3)
    ranks.agents[0].is_dead = True
    with caplog.at_level(logging.WARNING, "eplb"):
        for _ in range(2):
            batches = (
                ranks.communicators[1].prepare([Transfer(None, ranks.slab(1, 3), 2)]),
                ranks.communicators[2].prepare([Transfer(ranks.slab(2, 2), None, 1)]),
            )
            for batch in batches:
                batch.start()
            until(lambda batches=batches: all([batch.poll() for batch in batches]))  # type: ignore[misc]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["rank 0 cannot be told what was read of its memory: NIXL_ERR_REMOTE_DISCONNECT"] * 2, "once a rank"


def test_messages_of_strangers_are_dropped_and_told(two, caplog):
    notices = two.communicators[0].notes
    assert isinstance(notices, Notices)
    other = Notices(two.agents[1], 1, [two.agents[0].name, two.agents[1].name], 1)
    other.finish(7)
    message = two.agents[0].inbox.pop(two.agents[1].name)[0]
    two.agents[0].inbox = {"somebody": [message], two.agents[1].name: [message[:5]]}
    with caplog.at_level(logging.WARNING, "eplb"):
        notices.look()
    assert [record.getMessage().split(" by the")[0] for record in caplog.records] == [
        f"a notification of {len(message)} bytes",
        "a notification of 5 bytes",
    ]
    assert notices.finished(1) == 0
    two.agents[0].inbox = {two.agents[1].name: [message]}
    notices.look()
    assert notices.finished(1) == 7, "and this is how one is heard"


# ---- closing


def test_closing_gives_memory_and_connections_back(two):
    batches = two.pair()
    until(lambda: all([batch.poll() for batch in batches]))
    for rank in range(2):
        assert two.agents[rank].registered and two.agents[rank].known
        two.communicators[rank].close()
        assert not two.agents[rank].registered and not two.agents[rank].known


def test_a_connection_that_cannot_be_given_back_keeps_no_memory(monkeypatch, caplog):
    ranks = Ranks(3)
    agent, forgotten = ranks.agents[0], []

    def remove(name: str) -> None:
        forgotten.append(name)
        raise FakeDisconnectError("NIXL_ERR_NOT_FOUND")

    monkeypatch.setattr(agent, "remove_remote_agent", remove)
    ranks.communicators[0].close()
    assert len(forgotten) == 2 and not agent.registered
    assert caplog.text.count("was not given back: NIXL_ERR_NOT_FOUND") == 2


def test_closing_beside_a_read_keeps_it_and_what_it_writes(two):
    sender, reader = two.pair()
    two.agents[1].holds = True
    assert not sender.poll() and not sender.poll() and not reader.poll()
    assert not reader.is_dead()
    two.communicators.pop(1).close()
    handle = weakref.ref(two.agents[1].reads.pop())  # NIXL cancels a read whose handle nobody has
    del reader
    gc.collect()
    read = handle()
    assert two.agents[1].registered and read is not None and not read.is_released and read.state == "PROC"


# ---- connecting


def test_memory_that_reads_bring_wrong_is_an_error_on_all_ranks():
    ranks = Ranks(3, spoil=lambda rank, agent: setattr(agent, "corrupts", rank == 1), timeout=3.0)
    assert "what was read of the memory of ranks [0, 2] is not what is there" in str(ranks.errors[1])
    for rank in (0, 2):
        assert "ranks [1] could not read this rank's memory within 2.4 s" in str(ranks.errors[rank])
    assert not ranks.communicators
    assert not any(agent.registered for agent in ranks.agents.values())


def test_reads_that_do_not_end_are_an_error_on_all_ranks_within_the_deadline():
    began = time.monotonic()
    ranks = Ranks(2, spoil=lambda rank, agent: setattr(agent, "holds", rank == 1), timeout=1.0)
    assert time.monotonic() - began < 3.0
    assert "the memory of ranks [0] could not be read within 0.8 s" in str(ranks.errors[1])
    assert "ranks [1] could not read this rank's memory within 0.8 s" in str(ranks.errors[0])
    assert ranks.agents[1].registered and not ranks.agents[0].registered, "a read that is under way keeps its memory"


def test_a_read_that_fails_is_an_error_at_once():
    def spoil(rank: int, agent: FakeAgent) -> None:
        if rank == 1:
            agent.holds = True
            threading.Timer(0.3, lambda: setattr(agent, "error", FakeDisconnectError("gone"))).start()

    ranks = Ranks(2, spoil=spoil, timeout=2.5)
    assert "reading 256 bytes of rank 0 failed: FakeDisconnectError: gone" in str(ranks.errors[1])
    assert 0 in ranks.errors and ranks.agents[1].registered, "it may write still"


def test_a_rank_without_an_agent_is_an_error_on_all_ranks():
    def spoil(rank: int, agent: FakeAgent) -> None:
        if rank == 1:
            raise ImportError("libucp.so is not here")

    ranks = Ranks(3, spoil=spoil)
    assert sorted(ranks.errors) == [0, 1, 2]
    assert all("libucp.so is not here" in str(error) for error in ranks.errors.values())
    assert "rank 1 could not share its memory: ImportError" in str(ranks.errors[0])


def test_pools_that_do_not_go_together_are_an_error_on_all_ranks():
    store, errors = torch.distributed.HashStore(), []

    def connect(rank: int) -> None:
        pools = [SlotPool([TensorSpec("w", (512 + 512 * rank,), torch.uint8)], 2)]
        try:
            open_agents(pools, rank, over_store(store, rank, 2, SECONDS), streams_of(CPU), None, SECONDS)
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=connect, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(errors) == 2 and all("have pools of other slots" in error for error in errors)


# ---- how much at once


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_window_grows_while_calls_are_short_and_shrinks_when_they_are_long():
    clock = Clock()
    window = Window(clock)

    def look(num_bytes: int, seconds: float, ends: int | None = None) -> int:
        """Begin reads, of which some end before the next look; how many bytes may begin then."""
        with window.timed():
            window.begin(num_bytes)
            clock.now += seconds
        window.end(num_bytes if ends is None else ends)
        with window.timed():
            pass  # a short call beside a long one hides nothing
        return window.open()

    assert window.open() == 4 * MIB
    assert look(3 * MIB, 0.001) == 4 * MIB, "it was not used up"
    assert look(4 * MIB, 0.001) == 8 * MIB
    assert look(8 * MIB - 1000, 0.001) == 16 * MIB, "nor would a small piece have begun"
    assert look(16 * MIB, 0.005) == 16 * MIB, "neither short nor long"
    assert look(16 * MIB, 0.001, ends=8 * MIB) == 8 * MIB, "some are on their way: more of them would not be faster"
    assert look(8 * MIB, 0.001, ends=0) == 0
    window.end(16 * MIB)
    assert window.open() == 32 * MIB
    assert [look(0, 0.009) for _ in range(8)] == [
        16 * MIB,
        8 * MIB,
        4 * MIB,
        2 * MIB,
        MIB,
        MIB // 2,
        MIB // 4,
        MIB // 4,
    ]
    while (free := window.open()) < 256 * MIB:
        assert look(free, 0.0) == 2 * free
    assert look(256 * MIB, 0.0) == 256 * MIB, "the largest"


def test_a_slab_of_another_rank_is_cut_as_bytes_are():
    slab = FarSlab(owner=1, address=1000, num_bytes=512, device=3)
    assert slab[100:400] == FarSlab(1, 1100, 300, 3) and slab[500:900].numel() == 12 and slab[:].numel() == 512
