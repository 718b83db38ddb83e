"""What communicators are made of: ends of a wave, a pace, a board, staging memory."""

import threading

import pytest
import torch

from eplb.peer_memory import over_store, virtual_peers
from eplb.relocation.communicator.base import Awaited, Transfer, ends_of
from eplb.relocation.communicator.board import Board
from eplb.relocation.communicator.copies import _copy
from eplb.relocation.communicator.pace import Pace
from eplb.relocation.communicator.staging import Staging
from eplb.relocation.communicator.symm_mem import SymmMemCommunicator
from tests.eplb.simulated import SimStream

KIB = 1 << 10


class Now:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


# ---- ends


def test_a_wave_is_sorted_by_the_ends_that_are_here():
    a, b, c, d, e = torch.zeros(5, 1, dtype=torch.uint8)
    both = Transfer(b, c, 0)
    ends = ends_of([Transfer(a, None, 2), both, Transfer(None, d, 1), Transfer(e, None, 1)])
    assert ends.here == [both]
    assert [(slab.data_ptr(), peer) for slab, peer in ends.sends] == [(a.data_ptr(), 2), (e.data_ptr(), 1)]
    assert [(slab.data_ptr(), peer) for slab, peer in ends.receives] == [(d.data_ptr(), 1)]


# ---- pace


def test_without_a_bound_all_is_granted_at_once():
    assert Pace(None).grant(10**15) == 10**15


def test_a_burst_and_then_the_rate():
    now = Now()
    pace = Pace(1024 * KIB, now)  # 4 ms carry 4 KiB: a burst is 256 KiB
    assert pace.grant(1000 * KIB) == 256 * KIB
    assert pace.grant(1000 * KIB) == 0
    now.seconds = 0.24
    pace.look()
    assert pace.grant(1000 * KIB) == 0, "too small a piece"
    assert pace.grant(100 * KIB) == 100 * KIB, "what is left of a slab may be small"
    now.seconds = 0.5
    assert pace.grant(1000 * KIB) == 0, "what came due since the last look"
    pace.look()
    assert pace.grant(1000 * KIB) == 256 * KIB
    now.seconds = 100.0
    pace.look()
    assert pace.grant(1000 * KIB) == 256 * KIB, "idle time earns no more than a burst"


@pytest.mark.parametrize("rate", [1_000_003, 123_456_789, 10**11])
def test_never_more_than_the_rate_and_a_burst(rate):
    now, total, generator = Now(), 0, torch.Generator().manual_seed(rate)
    pace = Pace(rate, now)
    burst = max(256 * KIB, rate * 0.004)
    for step in torch.rand(2000, generator=generator).tolist():
        now.seconds += 0.002 * step
        pace.look()
        granted = pace.grant(10**12)
        assert granted % 256 == 0
        total += granted
        assert total <= rate * now.seconds + burst + 1
    assert total > 0.95 * rate * now.seconds, "and not much less"


# ---- board


def test_a_board_tells_batches_and_ranks_apart():
    boards = [Board(view) for view in virtual_peers(3, Board.num_bytes(3, 4), torch.device("cpu"))]
    assert boards[0].capacity == 4
    boards[0].offer(reader=2, index=3, batch=1, slot=77)
    boards[1].offer(reader=2, index=3, batch=1, slot=0)
    assert boards[2].offered(owner=0, index=3, batch=1) == 77
    assert boards[2].offered(owner=1, index=3, batch=1) == 0, "slot 0 is one, too"
    assert boards[2].offered(owner=0, index=3, batch=2) is None
    assert boards[2].offered(owner=0, index=2, batch=1) is None
    assert boards[1].offered(owner=0, index=3, batch=1) is None
    boards[0].offer(reader=2, index=3, batch=2, slot=(1 << 32) - 1)
    assert boards[2].offered(owner=0, index=3, batch=2) == (1 << 32) - 1
    assert [boards[0].finished(rank) for rank in range(3)] == [0, 0, 0]
    boards[1].finish(5)
    assert [boards[0].finished(rank) for rank in range(3)] == [0, 5, 0]


# ---- staging


@pytest.mark.parametrize("pinned", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_staging_is_kept_from_wave_to_wave(pinned):
    staging = Staging(1000, pinned)
    addresses = set()
    for num_bytes in (1000, 10, 0, 500):
        buffers = [staging.take(num_bytes), staging.take(1000)]
        assert all(buffer.is_pinned() == pinned for buffer in buffers)
        assert buffers[0].data_ptr() != buffers[1].data_ptr()
        addresses |= {buffer.data_ptr() for buffer in buffers}
        for buffer in buffers:
            staging.give(buffer)
    assert len(addresses) == 2 and staging.num_allocated == 2


def test_a_larger_wave_gets_a_larger_buffer_which_is_kept():
    staging = Staging(1000, False)
    large = staging.take(5000)
    assert large.numel() == 5000 and staging.num_allocated == 3
    staging.give(large)
    assert staging.take(4000) is large and staging.num_allocated == 3
    other = staging.take(1000)
    assert other.numel() == 1000 and staging.num_allocated == 3, "the other one of the start is still there"


# ---- peer memory, by hand


class ByHand:
    """Two ranks in this process whose streams go on when the test says so; each has one pool of four slots of 512 bytes."""

    def __init__(self, rate: int | None = None, slot_bytes: tuple[int, int] = (512, 512)) -> None:
        self.now = Now()
        slabs_SB = [
            torch.arange(4, dtype=torch.uint8)[:, None] + torch.full((4, size), 10 * r).byte()
            for r, size in enumerate(slot_bytes, start=1)
        ]
        self.slabs_SB = slabs_SB
        boards = [Board(view) for view in virtual_peers(2, Board.num_bytes(2, 4), torch.device("cpu"))]
        self.streams = [Streams(), Streams()]
        self.ranks = [
            SymmMemCommunicator([[one] for one in slabs_SB], board, streams, Pace(rate, self.now))  # type: ignore[arg-type]
            for board, streams in zip(boards, self.streams, strict=True)
        ]

    def prepare(self, source: int, target: int):
        """Rank 0's slot to rank 1's: the batches of both."""
        return (
            self.ranks[0].prepare([Transfer(self.slabs_SB[0][source], None, 1)]),
            self.ranks[1].prepare([Transfer(None, self.slabs_SB[1][target], 0)]),
        )


class Streams:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.side = SimStream()
        self.fails = False

    def run(self, stream, work) -> None:
        if self.fails:
            raise RuntimeError("no")
        stream.enqueue(work)

    def drain(self) -> None:
        while self.side.advance():
            pass


def test_a_sender_waits_for_its_own_stream_and_for_the_readers():
    pair = ByHand()
    sender, reader = pair.prepare(2, 3)
    sender.start()
    reader.start()
    pair.streams[1].drain()
    assert not sender.poll() and not reader.poll()
    pair.streams[1].drain()
    assert pair.slabs_SB[1][3, 0] == 23, "what the sender's stream still writes is not read"
    assert reader.awaits is Awaited.STEP
    pair.streams[0].drain()
    assert not sender.poll(), "nobody has read it"
    assert not reader.poll(), "it has only begun"
    assert sender.awaits is Awaited.STEP and reader.awaits is Awaited.COPIES
    assert not sender.poll()
    pair.streams[1].drain()
    assert pair.slabs_SB[1][3].unique().tolist() == [12]
    assert not sender.poll(), "the reader has not seen yet that its copy is complete"
    assert reader.poll() and sender.poll() and reader.is_dead() and sender.is_dead()


def test_a_slab_is_not_free_while_a_peer_that_gave_up_still_reads_it():
    pair = ByHand()
    sender, reader = pair.prepare(2, 3)
    sender.start()
    reader.start()
    pair.streams[0].drain()
    pair.streams[1].drain()
    sender.poll()
    reader.poll()
    assert not sender.is_dead() and not reader.is_dead(), "the copy is under way"
    later = pair.prepare(0, 1)  # the next batch neither waits for it nor hides it
    for batch in later:
        batch.start()
    assert not sender.is_dead() and not reader.is_dead()
    pair.streams[0].drain()
    pair.streams[1].drain()
    assert not sender.is_dead()
    assert reader.is_dead() and sender.is_dead()
    later[0].poll()
    assert not later[1].poll()
    pair.streams[1].drain()
    assert later[1].poll() and later[0].poll()
    assert pair.slabs_SB[1][1].unique().tolist() == [10]


def test_a_batch_given_up_before_it_began_here_reads_nothing_later():
    pair = ByHand()
    sender, reader = pair.prepare(2, 3)
    sender.start()
    pair.streams[0].drain()
    assert not sender.poll() and not sender.is_dead(), "the reader may begin at any time"
    assert reader.is_dead()
    assert sender.is_dead()
    assert not reader.poll()
    pair.streams[1].drain()
    assert pair.slabs_SB[1][3, 0] == 23


def test_a_batch_whose_copy_failed_never_says_that_it_is_complete():
    pair = ByHand()
    sender, reader = pair.prepare(2, 3)
    sender.start()
    reader.start()
    pair.streams[0].drain()
    pair.streams[1].drain()
    sender.poll()
    pair.streams[1].fails = True
    with pytest.raises(RuntimeError, match="no"):
        reader.poll()
    pair.streams[1].fails = False
    assert not reader.poll() and not reader.is_dead(), "what was enqueued may be under way"
    pair.streams[1].drain()
    assert not reader.poll() and reader.is_dead() and sender.is_dead()


def test_slabs_come_in_pieces_under_a_bound():
    pair = ByHand(rate=1)
    pair.ranks[1].pace.grant(
        256 * KIB - 256
    )  # what is left of the burst is half a slab; pieces that small are not made
    sender, reader = pair.prepare(2, 3)
    for batch in (sender, reader):
        batch.start()
    for streams in pair.streams:
        streams.drain()
    assert not sender.poll() and not reader.poll() and reader.awaits is Awaited.PACE
    pair.streams[1].drain()
    assert pair.slabs_SB[1][3, 0] == 23
    pair.now.seconds = 256.0
    assert not reader.poll() and reader.awaits is Awaited.COPIES
    pair.streams[1].drain()
    assert reader.poll() and pair.slabs_SB[1][3].unique().tolist() == [12]


def test_a_look_begins_a_few_copies_and_more_are_due_at_once(monkeypatch):
    monkeypatch.setattr("eplb.relocation.communicator.pull._MOST_COPIES", 1)
    pair = ByHand()
    transfers = [Transfer(slot, pair.slabs_SB[1][3 - number], 1) for number, slot in enumerate(pair.slabs_SB[1][:2])]
    batch = pair.ranks[1].prepare(transfers)
    batch.start()
    pair.streams[1].drain()
    assert not batch.poll() and batch.awaits is Awaited.TURN
    assert not batch.poll() and batch.awaits is Awaited.COPIES
    pair.streams[1].drain()
    assert batch.poll() and torch.equal(pair.slabs_SB[1][2:].flip(0), pair.slabs_SB[1][:2])


def test_slabs_of_another_size_or_place_are_refused():
    pair = ByHand()
    for slab in (pair.slabs_SB[0][1, :256], pair.slabs_SB[0].view(-1)[256:768], torch.zeros(512, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="must be a slot of a pool"):
            pair.ranks[0].prepare([Transfer(slab, None, 1)])
    pair = ByHand(slot_bytes=(512, 256))
    sender, reader = pair.prepare(0, 0)
    for batch in (sender, reader):
        batch.start()
    for streams in pair.streams:
        streams.drain()
    sender.poll()
    with pytest.raises(ValueError, match="rank 0 offers 512 bytes for 256 in 1 slots"):
        reader.poll()


def two_pools(ranks: list[list[int]]) -> tuple[list[list[torch.Tensor]], list[SymmMemCommunicator], Streams]:
    """Ranks whose pools have as many slots of 256 bytes, each pool in memory of its own; slots count up over all of a rank."""
    streams, num_ranks = Streams(), len(ranks)
    boards = [Board(view) for view in virtual_peers(num_ranks, Board.num_bytes(num_ranks, 16), torch.device("cpu"))]
    slabs_SB = []
    for rank, counts in enumerate(ranks):
        numbers = (torch.arange(sum(counts)) + 20 * rank).byte()[:, None].repeat(1, 256)
        slabs_SB.append([part.clone() for part in numbers.split(counts)])
    communicators = [SymmMemCommunicator(slabs_SB, board, streams, Pace(None, Now())) for board in boards]  # type: ignore[arg-type]
    return slabs_SB, communicators, streams


@pytest.mark.parametrize(
    ("sources", "targets", "copies"),
    [
        ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [768, 512]),  # no more than three
        ([0, 1, 3], [0, 1, 2], [512, 256]),  # apart there
        ([0, 1, 2], [0, 1, 3], [512, 256]),  # apart here
        ([2, 1, 0], [2, 1, 0], [256, 256, 256]),  # not in this order
        ([5, 6], [0, 1], [256, 256]),  # in two pools there
        ([0, 1], [6, 7], [256, 256]),  # in two pools here
    ],
)
def test_slabs_side_by_side_here_and_there_are_one_copy(monkeypatch, sources, targets, copies):
    monkeypatch.setattr("eplb.relocation.communicator.pull._LONGEST_RUN", 3)
    slabs_SB, (owner, reader), streams = two_pools([[6, 6], [7, 5]])
    slots = [[slab for slab_SB in pools for slab in slab_SB] for pools in slabs_SB]
    batches = [
        owner.prepare([Transfer(slots[0][one], None, 1) for one in sources]),
        reader.prepare([Transfer(None, slots[1][one], 0) for one in targets]),
    ]
    seen: list[int] = []
    post = batches[1].copies.post
    batches[1].copies.post = lambda pieces: (seen.extend(target.numel() for target, _ in pieces), post(pieces))[1]
    for _ in range(4):
        for batch in batches:
            batch.start() if not batch._number else batch.poll()
        streams.drain()
    assert seen == copies
    for source, target in zip(sources, targets, strict=True):
        assert slots[1][target].unique().tolist() == [source]
    others = set(range(12)) - set(targets)
    assert all(slots[1][one].unique().tolist() == [20 + one] for one in others)


def test_slabs_are_copied_in_the_order_of_the_plan_whoever_offers_first():
    """The plan spreads them over the owners; owner by owner, all ranks would read from the same one at first."""
    now, size = Now(), 256 * KIB  # a bound that lets one slab go at a time
    boards = [Board(view) for view in virtual_peers(3, Board.num_bytes(3, 4), torch.device("cpu"))]
    slabs_SB = [torch.full((4, size), rank, dtype=torch.uint8) for rank in range(3)]
    streams = [Streams() for _ in range(3)]
    ranks = [
        SymmMemCommunicator([[one] for one in slabs_SB], board, stream, Pace(1, now))  # type: ignore[arg-type]
        for board, stream in zip(boards, streams, strict=True)
    ]
    reader = ranks[0].prepare([Transfer(None, slabs_SB[0][slot], 1 + slot % 2) for slot in range(4)])
    reader.start()
    streams[0].drain()
    for owner in (2, 1):  # in this order
        sender = ranks[owner].prepare([Transfer(slabs_SB[owner][slot], None, 0) for slot in range(2)])
        sender.start()
        streams[owner].drain()
        sender.poll()
    for count in range(1, 5):
        reader.poll()
        streams[0].drain()
        assert slabs_SB[0][:, -1].tolist() == [1, 2, 1, 2][:count] + [0] * (4 - count)
        now.seconds += size


@pytest.mark.gpu
def test_copies_between_slots_start_no_kernel():
    """They are to leave the multiprocessors to the forward."""
    slabs = list(torch.arange(20, dtype=torch.uint8, device="cuda")[:, None].repeat(1, 1 << 20).unbind(0))
    pieces = list(zip(slabs[:10], slabs[10:], strict=True))
    _copy(pieces)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _copy(pieces)
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert {event.name for event in on_device} == {"Memcpy DtoD (Device -> Device)"} and len(on_device) == 10
    assert [slab[-1].item() for slab in slabs] == [*range(10, 20)] * 2


# ---- connecting together


def test_a_step_that_fails_on_one_rank_fails_on_all():
    from eplb.peer_memory import together

    store, errors = torch.distributed.HashStore(), {}

    def rank(number: int) -> None:
        exchange = over_store(store, number, 2, 10.0)
        assert together(exchange, lambda: number, lambda mine: mine + 1) == (number, [1, 2])
        try:
            together(exchange, lambda: 1 // number)
        except RuntimeError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert "could not share its memory" in errors[0]
    assert errors[1] == "rank 0 could not share its memory: ZeroDivisionError: integer division or modulo by zero"
