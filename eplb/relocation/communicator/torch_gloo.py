"""Rebalance, fill: slabs over gloo, staged through host memory (pinned, if the slots are on a GPU)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb.gloo import GlooGroup
from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch, ends_of
from eplb.relocation.communicator.local import LocalCommunicator
from eplb.relocation.communicator.staging import Staging
from eplb.streams import DeviceStreams, EventLike


class TorchGlooCommunicator(Communicator):
    """Works beside anything: it shares neither GPU kernels nor connections with the forward's collectives.

    One all-to-all a wave, because gloo's point-to-point works cannot be polled (their `is_completed()` stays False
    until somebody blocks in `wait()`: measured with torch 2.13).

    Args:
        group: a gloo group of the controller's own; nothing else may use it.
        streams: of the device that the slots are on.
        wave_bytes: the bytes that a wave is expected to bring here and to take from here, at most: the host memory for them
            is kept from the start. Larger waves get more.
    """

    name = "torch_gloo"

    def __init__(self, group: GlooGroup, streams: DeviceStreams, wave_bytes: int = 0) -> None:
        self.group = group
        self.streams = streams
        on_gpu = streams.device.type != "cpu"
        if on_gpu:
            streams.adopt_thread()  # to pin memory must not break a graph that another thread captures
        self.staging = Staging(wave_bytes, pinned=on_gpu)
        self.local = LocalCommunicator(streams)

    def prepare(self, transfers: Sequence[Transfer]) -> "GlooBatch":
        return GlooBatch(transfers, self)

    def close(self) -> None:
        self.group.close()


class GlooBatch(TransferBatch):
    """Device → host (event) → gloo → host → device (event); each step begins when the one before is seen complete."""

    def __init__(self, transfers: Sequence[Transfer], communicator: TorchGlooCommunicator) -> None:
        self._group = communicator.group
        self._streams = communicator.streams
        self._staging = communicator.staging
        num_ranks = self._group.size
        here, sends, receives = ends_of(transfers)
        self._local = communicator.local.prepare(here)
        self._sources, self._send_splits = _by_peer(sends, num_ranks)
        self._targets, self._receive_splits = _by_peer(receives, num_ranks)
        num_bytes = [sum(self._send_splits), sum(self._receive_splits)]
        self._buffers = [self._staging.take(number) for number in num_bytes]
        self._outgoing, self._incoming = (
            buffer[:number] for buffer, number in zip(self._buffers, num_bytes, strict=True)
        )
        self._downloaded: EventLike | None = None
        self._exchange: dist.Work | None = None
        self._uploaded: EventLike | None = None

    def start(self) -> None:
        self._local.start()
        self._streams.run(self._streams.side, self._download)
        self._downloaded = self._streams.side.record_event()

    def poll(self) -> bool:
        if self._downloaded is None or not self._downloaded.query():
            return False
        exchange = self._posted()
        if not exchange.is_completed():
            return False
        if self._uploaded is None:
            exchange.wait()  # does not block: it raises what went wrong, if anything did
            self._streams.run(self._streams.side, self._upload)
            self._uploaded = self._streams.side.record_event()
        if not self._uploaded.query():
            return False
        self._give_back()
        return self._local.poll()

    def is_dead(self) -> bool:
        # Collectives pair up by their order on each rank: also a wave that was given up must take part in its own, or the
        # next one would meet it. gloo touches the staging buffers alone, so what may still reach a slot is what was
        # enqueued on the side stream; a batch given up is polled, and so uploaded, no more.
        exchange = self._posted()
        enqueued = (self._downloaded, self._uploaded)
        if not all(event is None or event.query() for event in enqueued):
            return False
        if exchange.is_completed():
            self._give_back()  # else gloo keeps them until it is, and they are not used again
        return self._local.is_dead()

    def _give_back(self) -> None:
        while self._buffers:
            self._staging.give(self._buffers.pop())

    def _posted(self) -> dist.Work:
        if self._exchange is None:
            self._exchange = self._group.all_to_all(
                self._incoming, self._outgoing, self._receive_splits, self._send_splits
            )
        return self._exchange

    def _download(self) -> None:
        for source, buffer in zip(self._sources, _split(self._outgoing, self._sources), strict=True):
            buffer.copy_(source, non_blocking=True)

    def _upload(self) -> None:
        for target, buffer in zip(self._targets, _split(self._incoming, self._targets), strict=True):
            target.copy_(buffer, non_blocking=True)


def _by_peer(ends: list[tuple[torch.Tensor, int]], num_ranks: int) -> tuple[list[torch.Tensor], list[int]]:
    """The slabs of one direction in the order of the peers, and each peer's bytes."""
    ordered = sorted(ends, key=lambda end: end[1])
    splits = [0] * num_ranks
    for slab, peer in ordered:
        splits[peer] += slab.numel()
    return [slab for slab, _ in ordered], splits


def _split(buffer: torch.Tensor, slabs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.split(buffer, [slab.numel() for slab in slabs])
