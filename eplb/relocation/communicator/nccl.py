"""Rebalance, fill: slabs from GPU to GPU over NCCL, without a `ProcessGroup`: `NcclCommunicator`, through nccl4py."""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from eplb.peer_memory import Exchange, together
from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch, ends_of
from eplb.relocation.communicator.copies import copy_stream
from eplb.relocation.communicator.local import LocalCommunicator
from eplb.relocation.communicator.nccl_link import NcclLink, check_library, new_id
from eplb.streams import DeviceStreams, EventLike

_MOMENT = 2.0
"""Seconds that `close()` waits at most for NCCL to abort, which takes half of one."""


class NcclCommunicator(Communicator):
    """As `TorchNcclCommunicator`, with the same rule: not beside a forward that uses NCCL itself.

    What differs: no call of it blocks, so it connects within a deadline, and transfers that wait for a rank that is gone do
    not stay on the GPU for ever. After twice `transfer_timeout` it aborts them. (After once the ranks give their wave up, if
    they can still agree on anything, and the transfers may end yet.) It moves nothing any more then.

    Args:
        exchange: between the ranks. All must have come.
        rank, size: of this rank among those that exchange experts.
        streams: of the device that the slots are on.
        timeout: seconds to connect.
        transfer_timeout: seconds after which the ranks give up a wave.
        clock: seconds.

    Attributes:
        stream: what NCCL enqueues on. Nothing else does, as nothing may while NCCL itself is at it.
        library: the libnccl that is used.

    Raises:
        RuntimeError: a rank has no nccl4py or another libnccl, or the ranks did not connect in time.
    """

    name = "nccl"

    def __init__(
        self,
        exchange: Exchange,
        rank: int,
        size: int,
        streams: DeviceStreams,
        timeout: float,
        transfer_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.streams = streams
        self.local = LocalCommunicator(streams)
        self._patience = 2 * transfer_timeout
        self._clock = clock
        self._waiting: deque[NcclBatch] = deque()
        self._posting: NcclBatch | None = None
        self._open: list[NcclBatch] = []
        self._trouble: str | None = None
        streams.adopt_thread()  # NCCL allocates memory, which must not break a graph that another thread captures
        self.stream = copy_stream(streams)
        (self.library, _), said = together(
            exchange, lambda: (check_library(), new_id() if rank == 0 else b""), lambda mine: mine[1], "load NCCL"
        )
        self._link = NcclLink(said[0], rank, size)
        try:
            self._connect(rank, size, timeout)
        except BaseException:
            self.close()
            raise

    def _connect(self, rank: int, size: int, timeout: float) -> None:
        """Exchange a byte with every other rank: NCCL connects two of them in their first exchange."""
        buffers = torch.empty(size, 1, dtype=torch.uint8, device=self.streams.device)
        others = [other for other in range(size) if other != rank]
        batch = self.prepare(
            [Transfer(buffers[rank], None, other) for other in others]
            + [Transfer(None, buffers[other], other) for other in others]
        )
        deadline = self._clock() + timeout
        batch.start()  # posted as soon as NCCL has made the communicator
        while not (batch.poll() and self._link.is_ready()):
            if self._clock() > deadline:
                raise RuntimeError(f"NCCL did not connect the ranks within {timeout} s")
            time.sleep(0.001)

    def prepare(self, transfers: Sequence[Transfer]) -> "NcclBatch":
        self._check()
        return NcclBatch(transfers, self)

    def watch(self) -> None:
        if self._trouble is None:
            self.push()
        self._open = [batch for batch in self._open if not batch.is_over]
        if self._open and self._trouble is None and self._clock() - self._open[0].began_at > self._patience:
            self._end(
                f"transfers took more than {self._patience} s, twice transfer_timeout: another rank is gone or hangs"
            )
            self._check()

    def close(self) -> None:
        # Not `destroy()`, which waits for the other ranks. All that this rank agreed to is over, or its peer is gone.
        self._end("it is closed")
        self._link.wait_for_end(_MOMENT)

    # ---- for batches

    @property
    def is_broken(self) -> bool:
        """Whether transfers were aborted, or are just now."""
        return self._trouble is not None

    @property
    def is_ended(self) -> bool:
        """Whether NCCL touches no slab any more."""
        return self._link.is_ended

    def enter(self, batch: "NcclBatch") -> None:
        """Post its transfers as soon as NCCL takes any. All ranks enter their batches in the same order."""
        self._check()
        batch.began_at = self._clock()
        self._open.append(batch)
        self._waiting.append(batch)
        self.push()

    def push(self) -> None:
        """See how far NCCL is with enqueueing a batch, and post the next.

        Raises:
            RuntimeError: NCCL failed, now or before.
        """
        self._check()
        try:
            while self._link.is_ready():
                if self._posting is not None:
                    self._posting.event = self.stream.record_event()
                    self._posting = None
                if not self._waiting:
                    return
                self._posting = self._waiting.popleft()
                self.stream.wait_event(self._posting.ready)
                self._link.post(self._posting.sends, self._posting.receives, self.stream)
        except Exception as error:
            self._end(f"{type(error).__name__}: {error}")
            raise

    def _check(self) -> None:
        if self._trouble is not None:
            raise RuntimeError(
                f"NCCL's transfers were aborted, and nothing is moved any more ({self._trouble}): "
                "close the controller and make another, on all ranks"
            )

    def _end(self, why: str) -> None:
        if self._trouble is None:
            self._trouble = why
            self._waiting.clear()
            self._posting = None
            self._link.end(kept=list(self._open))


class NcclBatch(TransferBatch):
    """One group of sends and receives, and the copies that stay on this rank, on the side stream.

    Attributes:
        sends, receives: slabs, each with the other rank.
        ready: of the side stream, when the batch began: weights that were loaded before are complete then.
        began_at: by the communicator's clock.
        event: behind the transfers; None until NCCL has enqueued them.
    """

    def __init__(self, transfers: Sequence[Transfer], communicator: NcclCommunicator) -> None:
        self._communicator = communicator
        here, self.sends, self.receives = ends_of(transfers)
        self._local = communicator.local.prepare(here)
        self.ready: EventLike
        self.began_at = 0.0
        self.event: EventLike | None = None
        self._has_entered = False

    def start(self) -> None:
        self._enter()
        self._local.start()

    def poll(self) -> bool:
        if not self._has_entered:
            return False
        if not self.is_over:
            self._communicator.push()
        return self.is_over and self._local.poll()

    def is_dead(self) -> bool:
        if not self.is_over and not self._communicator.is_broken:
            self._enter()  # the others' kernels wait for this rank's part
            self._communicator.push()
        return (self.is_over or self._communicator.is_ended) and self._local.is_dead()

    @property
    def is_over(self) -> bool:
        """Whether this host has seen the transfers between ranks complete, if there are any."""
        if not self.sends and not self.receives:
            return True
        return self.event is not None and self.event.query()

    def _enter(self) -> None:
        if not self._has_entered:
            self._has_entered = True
            if self.sends or self.receives:
                self.ready = self._communicator.streams.side.record_event()
                self._communicator.enter(self)
