"""Before the first rebalance: connects the ranks of a controller, from the first `step()` on."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from eplb.config import EplbConfig
from eplb.gloo import GlooGroup
from eplb.groups import Peers, check_member, peers_of, ranks_of
from eplb.relocation.communicator import Communicator, LocalCommunicator, choose_communicator, make_communicator
from eplb.relocation.pool import SlotPool
from eplb.rounds.exchange import Agreement, GlooAgreement, LocalAgreement
from eplb.streams import DeviceStreams


class Connection(Protocol):
    """On its way to the other ranks; nothing here blocks."""

    def poll(self) -> tuple[Agreement, Communicator] | None:
        """What reaches the other ranks, once all have come; None until then. The caller closes both.

        Raises:
            Exception: they cannot be reached, and never will be.
        """
        ...

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks, by their numbers in the default group, that had not come when somebody last looked."""
        ...

    def cancel(self) -> None:
        """Nobody will poll any more: give everything back."""
        ...


class Transport(Protocol):
    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks that are reached, in the order of their ranks here; empty if there is one alone."""
        ...

    def check(self, config: EplbConfig, device: torch.device, dispatch_backends: Iterable[str]) -> None:
        """Raises ValueError if `connect()` could not do what the config asks for."""
        ...

    def connect(
        self,
        config: EplbConfig,
        streams: DeviceStreams,
        dispatch_backends: Iterable[str],
        pools: Sequence[SlotPool],
        notify: Callable[[], None],
    ) -> Connection:
        """Begin to connect this rank. Every rank does so, in the same order of its controllers; returns at once.

        Args:
            streams: of the device that the slots are on.
            dispatch_backends: what the forwards of the registered layers use: "local", "gloo", "nccl", "symm_mem".
            pools: in whose slots they hold experts, in the same order on every rank.
            notify: called, on any thread, when `poll()` has an answer.
        """
        ...


class Connected:
    """A connection that is there from the beginning."""

    missing: tuple[int, ...] = ()

    def __init__(self, agreement: Agreement, communicator: Communicator) -> None:
        self._both = agreement, communicator

    def poll(self) -> tuple[Agreement, Communicator]:
        return self._both

    def cancel(self) -> None:
        """Nothing is under way."""


class TorchTransport:
    """Over groups of our own beside a torch.distributed process group; None: one rank, nothing to reach.

    Raises:
        ValueError: this rank is not in the group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        check_member(process_group)
        self._group = process_group

    @property
    def ranks(self) -> tuple[int, ...]:
        return ranks_of(self._group)

    def check(self, config: EplbConfig, device: torch.device, dispatch_backends: Iterable[str]) -> None:
        self._choose(config, device, dispatch_backends)

    def _choose(self, config: EplbConfig, device: torch.device, dispatch_backends: Iterable[str]) -> tuple[str, ...]:
        group_backend = str(dist.get_backend(self._group)) if self._group is not None else "gloo"
        return choose_communicator(
            config.communicator, device, group_backend, set(dispatch_backends), config.required_bytes_per_second
        )

    def connect(
        self,
        config: EplbConfig,
        streams: DeviceStreams,
        dispatch_backends: Iterable[str],
        pools: Sequence[SlotPool],
        notify: Callable[[], None],
    ) -> Connection:
        if self._group is None or not self.ranks:
            return Connected(LocalAgreement(), LocalCommunicator(streams))
        names = self._choose(config, streams.device, dispatch_backends)
        peers, timeout = peers_of(self._group), config.connect_timeout

        def connect() -> Communicator:
            return make_communicator(
                names,
                peers,
                streams,
                timeout,
                pools,
                config.bytes_per_second,
                config.max_bytes_in_flight,
                config.transfer_timeout,
            )

        return ConnectionThread(peers, connect, timeout, notify)


class ConnectionThread(threading.Thread):
    """Waits for the other ranks in the store, however long it takes, and connects to them when all have come.

    On a thread of its own because the store, gloo and NCCL block: for a rank that does not come, and for one that hosts
    the store and is stopped.

    Args:
        make: the communicator, when all ranks have come; collective.
        timeout: seconds that connecting may take once all ranks have come.
    """

    def __init__(
        self, peers: Peers, make: Callable[[], Communicator], timeout: float, notify: Callable[[], None]
    ) -> None:
        super().__init__(name="eplb-connect", daemon=True)
        self._peers = peers
        self._make = make
        self._timeout = timeout
        self._notify = notify
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._both: tuple[Agreement, Communicator] | None = None
        self._error: BaseException | None = None
        self.missing = tuple(number for rank, number in enumerate(peers.ranks) if rank != peers.rank)
        self.start()

    def run(self) -> None:
        try:
            if self._peers.meet(self._cancelled, self._look):
                self.missing = ()
                self._connect()
        except BaseException as error:  # whatever it is, the worker must hear of it
            self._error = error
        self._notify()

    def _look(self) -> None:
        self.missing = self._peers.missing()

    def _connect(self) -> None:
        peers = self._peers
        group = GlooGroup(peers.part("rounds"), peers.rank, len(peers.ranks), self._timeout)
        try:
            communicator = self._make()
        except BaseException:
            group.close()
            raise
        with self._lock:
            if not self._cancelled.is_set():
                self._both = GlooAgreement(group), communicator
                return
        communicator.close()
        group.close()

    def poll(self) -> tuple[Agreement, Communicator] | None:
        if self._error is not None:
            raise RuntimeError(f"the ranks could not be connected: {self._error}") from self._error
        with self._lock:
            both, self._both = self._both, None
        return both

    def cancel(self) -> None:
        with self._lock:
            self._cancelled.set()
            both, self._both = self._both, None
        for made in both or ():
            made.close()
