"""Rebalance, fill: slabs from GPU to GPU over NCCL."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch
from eplb.relocation.communicator.local import LocalCommunicator
from eplb.streams import DeviceStreams, EventLike

# A timeout of torch's own would end the process. What takes too long is given up by the ranks together.
_NEVER = timedelta(days=7)


@dataclass(frozen=True)
class Send:
    slab: torch.Tensor
    peer: int


@dataclass(frozen=True)
class Receive:
    slab: torch.Tensor
    peer: int


class TorchNcclCommunicator(Communicator):
    """The fastest way between GPUs, but not beside a forward that uses NCCL itself.

    Two NCCL communicators whose kernels the ranks enqueue in different orders can wait for each other for ever; a
    worker that fills slots at its own pace beside NCCL dispatch is such a case.

    The group is no group of `torch.distributed`'s registry, for the reasons that `eplb.gloo` gives.

    Args:
        store: of this group alone.
        rank, size: of this rank among those that exchange experts. All must have come.
        streams: of the device that the slots are on.
        timeout: seconds to connect.

    Raises:
        RuntimeError: the ranks did not connect in time.
    """

    name = "torch_nccl"

    def __init__(self, store: dist.Store, rank: int, size: int, streams: DeviceStreams, timeout: float) -> None:
        self.streams = streams
        self.local = LocalCommunicator(streams)
        streams.adopt_thread()  # connecting allocates memory, which must not break a graph that another thread captures
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        # (Any: PyTorch's stubs do not know its transfers.)
        self.group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        try:
            self._connect(rank, size, timeout)
        except BaseException:
            self.close()
            raise

    def _connect(self, rank: int, size: int, timeout: float) -> None:
        """Exchange a byte with every other rank.

        NCCL connects two ranks in their first exchange, which blocks the host until both have come to it: here, together,
        and not in a worker that must not wait.
        """
        outgoing = torch.zeros(1, dtype=torch.uint8, device=self.streams.device)
        others = [other for other in range(size) if other != rank]
        incoming = [torch.empty_like(outgoing) for _ in others]
        sends = [Send(outgoing, other) for other in others]
        receives = [Receive(buffer, other) for buffer, other in zip(incoming, others, strict=True)]
        exchanged = self.exchange([*sends, *receives]).record_event()
        deadline = time.monotonic() + timeout
        while not exchanged.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"NCCL did not connect the ranks within {timeout} s")
            time.sleep(0.001)

    def exchange(self, ends: Sequence["Send | Receive"]) -> torch.cuda.Stream:
        """Enqueue the transfers as one group; the current stream, which is returned, waits for them."""
        self.group._start_coalescing()
        for end in ends:
            if isinstance(end, Send):
                self.group.send([end.slab], end.peer, 0)
            else:
                self.group.recv([end.slab], end.peer, 0)
        self.group._end_coalescing().wait()  # the stream waits, the host does not
        return torch.cuda.current_stream(self.streams.device)

    def prepare(self, transfers: Sequence[Transfer]) -> "NcclBatch":
        return NcclBatch(transfers, self)

    def close(self) -> None:
        # Not `shutdown()`, which waits for the other ranks. All that this rank agreed to is over, or its peer is gone.
        self.group.abort()


class NcclBatch(TransferBatch):
    """One group of sends and receives, and the copies that stay on this rank, on the side stream."""

    def __init__(self, transfers: Sequence[Transfer], communicator: TorchNcclCommunicator) -> None:
        self._streams = communicator.streams
        here = [transfer for transfer in transfers if transfer.source is not None and transfer.target is not None]
        self._local = communicator.local.prepare(here)
        self._exchange = communicator.exchange
        self._ends: list[Send | Receive] = []
        for transfer in transfers:
            if transfer.source is not None and transfer.target is None:
                self._ends.append(Send(transfer.source, transfer.peer))
            elif transfer.target is not None and transfer.source is None:
                self._ends.append(Receive(transfer.target, transfer.peer))
        self._event: EventLike | None = None
        self._posted = False

    def start(self) -> None:
        self._post()
        self._local.start()
        self._event = self._streams.side.record_event()

    def poll(self) -> bool:
        return self._event is not None and self._event.query()

    def is_dead(self) -> bool:
        # The others' kernels wait for this rank's part, on a stream that all their later work stands behind.
        self._post()
        if self._event is None:
            self._event = self._streams.side.record_event()
        return self._event.query()

    def _post(self) -> None:
        if self._ends and not self._posted:
            self._posted = True
            self._streams.run(self._streams.side, lambda: self._exchange(self._ends))
