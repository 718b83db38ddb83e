"""Rebalance, fill: `Copies`, what brings slabs to this rank piece by piece; and `StreamCopies`, which a stream does."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from eplb.relocation.communicator.base import Awaited
from eplb.streams import DeviceStreams, EventLike, StreamLike

_ON_HOST = tuple(torch.zeros(1, dtype=torch.uint8, device="cpu") for _ in range(2))
"""With a pair of another device among its tensors `_foreach_copy_` copies one after the other, by the GPU's copy engines. It
would start a kernel otherwise, and take multiprocessors from the forward."""


class Source(Protocol):
    """Bytes to read: a tensor, uint8 ``[num_bytes]``, or memory of another rank that is cut as one."""

    def numel(self) -> int: ...

    def __getitem__(self, piece: slice, /) -> "Source": ...


Piece = tuple[torch.Tensor, Source]
"""A part of a slot of this rank, and the bytes for it, as many."""


class Copies(ABC):
    """The copies of one batch. Never blocks for longer than a look may take.

    Attributes:
        awaits: what there is to wait for when all have begun.
    """

    awaits = Awaited.STEP

    @abstractmethod
    def room(self) -> int:
        """How many bytes may begin now."""

    @abstractmethod
    def post(self, pieces: Sequence[Piece]) -> None:
        """Begin.

        Raises:
            Exception: some did not begin. Others may be under way.
        """

    @abstractmethod
    def are_under_way(self) -> bool:
        """Whether any that began may still read or write. A copy that failed is under way for good if nobody can tell."""

    @abstractmethod
    def raise_failed(self) -> None:
        """Raises what made a copy fail that had begun; `are_under_way()` finds out."""


class StreamCopies(Copies):
    """Between tensors that this process can read and write, on a stream."""

    awaits = Awaited.COPIES

    def __init__(self, streams: DeviceStreams, stream: StreamLike) -> None:
        self._streams = streams
        self._stream = stream
        self._copied: EventLike | None = None
        self._has_copied = False

    def room(self) -> int:
        return sys.maxsize

    def post(self, pieces: Sequence[Piece]) -> None:
        self._has_copied, self._copied = True, None
        self._streams.run(self._stream, lambda: _copy(pieces))
        self._copied = self._stream.record_event()

    def are_under_way(self) -> bool:
        if not self._has_copied:
            return False
        if self._copied is None:  # enqueueing failed half-way
            self._copied = self._stream.record_event()
        return not self._copied.query()

    def raise_failed(self) -> None:
        """What fails on a stream fails for the whole process."""


def copy_stream(streams: DeviceStreams) -> StreamLike:
    """One for slabs alone, of the lowest priority."""
    return torch.cuda.Stream(streams.device, priority=0) if streams.device.type == "cuda" else streams.side


def _copy(pieces: Sequence[Piece]) -> None:
    """In one call, which does not hold the interpreter."""
    targets, sources = zip(*pieces, strict=True)
    torch._foreach_copy_([*targets, _ON_HOST[0]], [*sources, _ON_HOST[1]], non_blocking=True)
