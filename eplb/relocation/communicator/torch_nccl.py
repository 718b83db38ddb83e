"""Slabs from GPU to GPU over NCCL."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch
from eplb.relocation.communicator.local import LocalCommunicator
from eplb.streams import DeviceStreams, EventLike


class TorchNcclCommunicator(Communicator):
    """The fastest way between GPUs, but not beside a forward that uses NCCL itself.

    Two NCCL communicators whose kernels the ranks enqueue in different orders can wait for each other for ever; a
    worker that fills slots at its own pace beside NCCL dispatch is such a case.

    Args:
        group: an NCCL group of the controller's own; nothing else may use it.
        streams: of the device that the slots are on.
    """

    name = "torch_nccl"

    def __init__(self, group: dist.ProcessGroup, streams: DeviceStreams) -> None:
        self.group = group
        self.streams = streams
        self.local = LocalCommunicator(streams)

    def connect(self) -> None:
        """Exchange a byte with every other rank. Collective.

        NCCL connects two ranks in their first exchange, which blocks the host until both have come to it: here, on the
        main thread and together, and not in a worker that must not wait.
        """
        others = [rank for rank in range(dist.get_world_size(self.group)) if rank != dist.get_rank(self.group)]
        device = self.streams.device
        outgoing = torch.zeros(1, dtype=torch.uint8, device=device)
        incoming = [torch.empty_like(outgoing) for _ in others]
        operations = [dist.P2POp(dist.isend, outgoing, group=self.group, group_peer=rank) for rank in others]
        operations += [
            dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=rank)
            for rank, buffer in zip(others, incoming, strict=True)
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        torch.cuda.synchronize(device)

    def prepare(self, transfers: Sequence[Transfer]) -> "NcclBatch":
        return NcclBatch(transfers, self)


class NcclBatch(TransferBatch):
    """One group of sends and receives, and the copies that stay on this rank, on the side stream."""

    def __init__(self, transfers: Sequence[Transfer], communicator: TorchNcclCommunicator) -> None:
        self._streams = communicator.streams
        here = [transfer for transfer in transfers if transfer.source is not None and transfer.target is not None]
        self._local = communicator.local.prepare(here)
        self._operations = [
            dist.P2POp(operation, slab, group=communicator.group, group_peer=transfer.peer)
            for transfer in transfers
            for operation, slab, other in (
                (dist.isend, transfer.source, transfer.target),
                (dist.irecv, transfer.target, transfer.source),
            )
            if slab is not None and other is None
        ]
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
        if self._operations and not self._posted:
            self._posted = True
            self._streams.run(self._streams.side, self._exchange)

    def _exchange(self) -> None:
        for work in dist.batch_isend_irecv(self._operations):
            work.wait()  # the side stream waits, the host does not
