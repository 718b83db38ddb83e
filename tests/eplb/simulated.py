"""What stands for streams, rounds and transfers where several ranks run in one process (`simulation.py`)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eplb.config import EplbConfig
from eplb.connect import Connected
from eplb.controller import EplbController
from eplb.gate import Gate
from eplb.relocation.communicator import Communicator, Transfer, TransferBatch
from eplb.relocation.pool import SlotPool
from eplb.rounds.protocol import Work
from eplb.streams import DeviceStreams
from eplb.worker import Worker
from eplb.worker.planning import Planning

if TYPE_CHECKING:
    from tests.eplb.simulation import World


class SimulatedFaultError(RuntimeError):
    """What the simulation throws at the code under test."""


class SimEvent:
    """As CUDA's: it may be recorded again, and a wait is for what was recorded last when it was asked for."""

    def __init__(self) -> None:
        self.num_recorded = self.num_happened = 0

    def query(self) -> bool:
        return self.num_happened == self.num_recorded


class SimStream:
    """Runs its items one by one, when the scheduler says so; an item may refuse to run yet."""

    def __init__(self) -> None:
        self.items: deque[Callable[[], bool]] = deque()

    def record_event(self, event: SimEvent | None = None) -> SimEvent:
        event = event or SimEvent()
        number = event.num_recorded = event.num_recorded + 1
        self.enqueue(lambda: setattr(event, "num_happened", max(number, event.num_happened)))
        return event

    def wait_event(self, event: SimEvent) -> None:
        number = event.num_recorded
        self.items.append(lambda: event.num_happened >= number)

    def enqueue(self, work: Callable[[], object]) -> None:
        self.items.append(lambda: work() is None or True)

    def advance(self) -> bool:
        if self.items and self.items[0]():
            self.items.popleft()
            return True
        return False


class SimStreams:
    """`DeviceStreams` of one simulated rank: a side stream, and as many compute streams as forwards use.

    Attributes:
        computes: by number; 0 is the one that runs first.
        now: the number of the current one.
    """

    def __init__(self, faults: Faults, num_computes: int = 3) -> None:
        self.device = torch.device("cpu")
        self.side = SimStream()
        self.computes = [SimStream() for _ in range(num_computes)]
        self.now = 0
        self._faults = faults
        self.gate = Gate(self)

    def current(self) -> SimStream:
        return self.computes[self.now]

    def current_handle(self) -> int:
        return self.now

    def run(self, stream: SimStream, work: Callable[[], object]) -> None:
        self._faults.maybe("streams.run")
        stream.enqueue(work)

    def prepared(self, work: Callable[[], object]) -> Callable[[], object]:
        return lambda: self.run(self.current(), work)

    def make_event(self) -> tuple[SimEvent, Callable[[SimStream], object]]:
        event = SimEvent()
        return event, lambda stream: stream.record_event(event)

    def is_capturing(self) -> bool:
        return False

    def is_captured(self, stream: SimStream) -> bool:
        return False

    def adopt_thread(self) -> None:
        raise AssertionError("the simulation has no threads")

    def drain(self) -> None:
        """Until no stream can go on."""
        while any([stream.advance() for stream in (self.side, *self.computes)]):
            pass


class Faults:
    """Throws at any of the points that ask it, while `probability` is above 0 and the code under test runs."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.probability = 0.0
        self.armed = False
        self.thrown: dict[str, int] = {}

    def maybe(self, point: str) -> None:
        if self.armed and self._rng.random() < self.probability:
            self.thrown[point] = self.thrown.get(point, 0) + 1
            raise SimulatedFaultError(point)


class SimBus:
    """Carries rounds and slabs between the simulated ranks."""

    def __init__(self, num_ranks: int, rng: random.Random) -> None:
        self.num_ranks = num_ranks
        self.rng = rng
        self.rounds: list[dict[int, np.ndarray | None]] = []
        self.lengths: list[int] = []
        self.heard: list[set[int]] = []
        self.batches: list[dict[int, SimBatch]] = []
        self.next_round = [0] * num_ranks
        self.next_batch = [0] * num_ranks

    def enter_round(self, rank: int, message: np.ndarray | None, length: int, kind: str) -> int:
        number = self.next_round[rank]
        self.next_round[rank] += 1
        if number == len(self.rounds):
            self.rounds.append({})
            self.lengths.append(length)
            self.heard.append(set())
        assert self.lengths[number] == length, f"rank {rank} says {length} words in round {number} ({kind})"
        self.rounds[number][rank] = message
        return number

    def deliver(self) -> bool:
        """Somebody hears a round that is complete."""
        for number in range(max(0, len(self.rounds) - 2), len(self.rounds)):  # nobody is further behind than a round
            messages = self.rounds[number]
            waiting = [rank for rank in range(self.num_ranks) if rank not in self.heard[number]]
            if len(messages) == self.num_ranks and waiting:
                self.heard[number].add(self.rng.choice(waiting))
                return True
        return False

    def start_batch(self, batch: SimBatch) -> None:
        number = self.next_batch[batch.rank]
        self.next_batch[batch.rank] += 1
        if number == len(self.batches):
            self.batches.append({})
        self.batches[number][batch.rank] = batch

    def carry(self) -> bool:
        """Some bytes of some transfer arrive: torn on purpose."""
        ready = []
        for members in self.batches[-8:]:
            for batch in members.values():
                for index, arrival in enumerate(batch.arrivals):
                    if arrival.done:
                        continue
                    source = members.get(arrival.peer)
                    if source is not None:
                        ready.append((batch, index, source))
        if not ready:
            return False
        batch, index, source = self.rng.choice(ready)
        batch.arrivals[index].advance(source.departures[(batch.rank, batch.arrivals[index].order)])
        return True


class Arrival:
    """One slab on its way to this rank, in two halves."""

    def __init__(self, target: torch.Tensor, peer: int, order: int, on_write: Callable[[torch.Tensor], None]) -> None:
        self.target, self.peer, self.order, self._on_write = target, peer, order, on_write
        self._halves = 0

    @property
    def done(self) -> bool:
        return self._halves == 2

    def advance(self, source: torch.Tensor) -> None:
        middle = self.target.numel() // 2
        part = slice(0, middle) if self._halves == 0 else slice(middle, None)
        self._on_write(self.target)
        self.target[part].copy_(source[part])
        self._halves += 1


class SimBatch(TransferBatch):
    def __init__(self, rank: int, transfers: Sequence[Transfer], world: World) -> None:
        self.rank = rank
        self._bus = world.bus
        self._faults = world.faults
        self._posted = False
        self.arrivals: list[Arrival] = []
        self.departures: dict[tuple[int, int], torch.Tensor] = {}
        sent: dict[int, int] = {}
        received: dict[int, int] = {}
        for transfer in transfers:
            if transfer.source is not None:
                order = sent[transfer.peer] = sent.get(transfer.peer, -1) + 1
                self.departures[(transfer.peer, order)] = transfer.source
            if transfer.target is not None:
                order = received[transfer.peer] = received.get(transfer.peer, -1) + 1
                arrival = Arrival(transfer.target, transfer.peer, order, lambda slab: world.check_write(rank, slab))
                self.arrivals.append(arrival)

    def start(self) -> None:
        self._faults.maybe("batch.start")
        self._post()

    def poll(self) -> bool:
        self._faults.maybe("batch.poll")
        return self._is_over()

    def is_dead(self) -> bool:
        self._post()
        return self._is_over()

    def _post(self) -> None:
        if not self._posted:
            self._posted = True
            self._bus.start_batch(self)

    def _is_over(self) -> bool:
        """Nothing arrives here, and nobody reads from here, any more."""
        number = next((n for n, members in enumerate(self._bus.batches) if members.get(self.rank) is self), None)
        if number is None:
            return False
        members = self._bus.batches[number]
        readers = {peer for peer, _ in self.departures}
        read = all(
            peer in members and all(arrival.done for arrival in members[peer].arrivals if arrival.peer == self.rank)
            for peer in readers
        )
        return read and all(arrival.done for arrival in self.arrivals)


class SimCommunicator(Communicator):
    name = "simulated"

    def __init__(self, rank: int, world: World) -> None:
        self._rank, self._world = rank, world

    def prepare(self, transfers: Sequence[Transfer]) -> SimBatch:
        self._world.faults.maybe("communicator.prepare")
        return SimBatch(self._rank, transfers, self._world)


class SimExchange:
    def __init__(self, rank: int, number: int, world: World, root_only: bool) -> None:
        self._rank, self._number, self._world, self._root_only = rank, number, world, root_only

    def done(self) -> bool:
        return self._world.is_cut_off(self._rank) or self._rank in self._world.bus.heard[self._number]

    def result(self) -> list[np.ndarray]:
        if self._world.is_cut_off(self._rank):
            raise SimulatedFaultError("connection closed by peer")
        messages = self._world.bus.rounds[self._number]
        ranks = [0] if self._root_only else range(self._world.num_ranks)
        return [messages[rank] for rank in ranks]  # type: ignore[misc]


class SimAgreement:
    def __init__(self, rank: int, world: World) -> None:
        self._rank, self._world = rank, world

    def all_gather(self, message: np.ndarray, notify: Callable[[], None]) -> SimExchange:
        del notify
        self._world.faults.maybe("agreement.all_gather")
        number = self._world.bus.enter_round(self._rank, message.copy(), len(message), "all_gather")
        return SimExchange(self._rank, number, self._world, root_only=False)

    def broadcast(self, message: np.ndarray | None, length: int, notify: Callable[[], None]) -> SimExchange:
        del notify
        self._world.faults.maybe("agreement.broadcast")
        number = self._world.bus.enter_round(self._rank, message, length, "broadcast")
        return SimExchange(self._rank, number, self._world, root_only=True)

    def close(self) -> None:
        pass


class SimTransport:
    def __init__(self, rank: int, world: World) -> None:
        self._rank, self._world = rank, world

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(range(self._world.num_ranks))

    def check(self, config: EplbConfig, device: torch.device, dispatch_backends: Iterable[str]) -> None:
        pass

    def connect(
        self,
        config: EplbConfig,
        streams: DeviceStreams,
        dispatch_backends: Iterable[str],
        pools: Sequence[SlotPool],
        notify: Callable[[], None],
    ) -> Connected:
        return Connected(SimAgreement(self._rank, self._world), SimCommunicator(self._rank, self._world))


class DoneHere:
    """A `Job` that has run on the calling thread."""

    def __init__(self, work: Callable[[], Any], notify: Callable[[], None]) -> None:
        self._error: Exception | None = None
        try:
            self._value = work()
        except Exception as error:
            self._error = error

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


class SimLock:
    """In place of a worker's lock: where it is let go of, the main thread may act in the middle of a tick."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        posted = self._worker.inbox.posted
        assert posted is None or self._worker.health.version >= posted.version, "tables could be ahead of health()"


class SimController(EplbController):
    """Its worker ticks when the scheduler says so."""

    def _run_in_background(self, worker: Worker, streams: DeviceStreams) -> None:
        del streams
        worker.mailbox.lock = SimLock(worker)  # type: ignore[assignment]
        worker.planning.start = DoneHere
        self._watch_windows(worker.planning)

    @staticmethod
    def _watch_windows(planning: Planning) -> None:
        """No load window is used twice."""
        sent, seen = planning.sent, []

        def sent_once(work: Work) -> None:
            window_NA = planning._unsent.get(work)
            assert window_NA is None or not any(window_NA is earlier for earlier in seen), "a window is sent twice"
            seen.append(window_NA)
            sent(work)

        planning.sent = sent_once  # type: ignore[method-assign]

    @property
    def worker(self) -> Worker:
        assert self._worker is not None
        return self._worker
