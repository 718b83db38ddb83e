"""Rebalance, fill: slabs from GPU to GPU over NCCL."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from eplb.relocation.communicator.base import Communicator, Ends, Transfer, TransferBatch, ends_of
from eplb.relocation.communicator.local import LocalCommunicator
from eplb.streams import DeviceStreams, EventLike

# A timeout of torch's own would end the process. What takes too long is given up by the ranks together.
_NEVER = timedelta(days=7)


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
        ends = Ends([], [(outgoing, other) for other in others], list(zip(incoming, others, strict=True)))
        exchanged = self.exchange(ends).record_event()
        deadline = time.monotonic() + timeout
        while not exchanged.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"NCCL did not connect the ranks within {timeout} s")
            time.sleep(0.001)

    def exchange(self, ends: Ends) -> torch.cuda.Stream:
        """Enqueue the transfers between ranks as one group; the current stream, which is returned, waits for them."""
        self.group._start_coalescing()
        for slab, peer in ends.sends:
            self.group.send([slab], peer, 0)
        for slab, peer in ends.receives:
            self.group.recv([slab], peer, 0)
        self.group._end_coalescing().wait()  # the stream waits, the host does not
        return torch.cuda.current_stream(self.streams.device)

    def prepare(self, transfers: Sequence[Transfer]) -> "TorchNcclBatch":
        return TorchNcclBatch(transfers, self)

    def close(self) -> None:
        # Not `shutdown()`, which waits for the other ranks. All that this rank agreed to is over, or its peer is gone.
        self.group.abort()


class TorchNcclBatch(TransferBatch):
    """One group of sends and receives, and the copies that stay on this rank, on the side stream."""

    def __init__(self, transfers: Sequence[Transfer], communicator: TorchNcclCommunicator) -> None:
        self._streams = communicator.streams
        self._ends = ends_of(transfers)
        self._local = communicator.local.prepare(self._ends.here)
        self._exchange = communicator.exchange
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
        if (self._ends.sends or self._ends.receives) and not self._posted:
            self._posted = True
            self._streams.run(self._streams.side, lambda: self._exchange(self._ends))
