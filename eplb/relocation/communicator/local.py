"""Rebalance, fill: copies between slots of one rank."""

from collections.abc import Sequence

from eplb.relocation.communicator.base import Communicator, Transfer, TransferBatch
from eplb.streams import DeviceStreams, EventLike


class LocalCommunicator(Communicator):
    """For a group of one rank, and for the part of a wave that stays on its rank."""

    name = "local"

    def __init__(self, streams: DeviceStreams) -> None:
        self._streams = streams

    def prepare(self, transfers: Sequence[Transfer]) -> "LocalBatch":
        return LocalBatch(transfers, self._streams)


class LocalBatch(TransferBatch):
    """Copies on the side stream, over when the event behind them is."""

    def __init__(self, transfers: Sequence[Transfer], streams: DeviceStreams) -> None:
        self._transfers = transfers
        self._streams = streams
        self._event: EventLike | None = None

    def start(self) -> None:
        self._streams.run(self._streams.side, self._copy)
        self._event = self._streams.side.record_event()

    def poll(self) -> bool:
        return self._event is not None and self._event.query()

    def is_dead(self) -> bool:
        return self._event is None or self._event.query()

    def _copy(self) -> None:
        for transfer in self._transfers:
            assert transfer.source is not None and transfer.target is not None, "both ends must be on this rank"
            transfer.target.copy_(transfer.source, non_blocking=True)
