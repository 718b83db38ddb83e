"""Rebalance, fill: the small interface behind which experts travel between ranks."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Transfer(NamedTuple):
    """One expert's slab on its way, as one rank sees it.

    Attributes:
        source: the slab to read, uint8 ``[slot_bytes]``, or None if it is on another rank.
        target: the slab to write, or None if it is on another rank.
        peer: the other rank within the group; the own rank if both ends are here.
    """

    source: torch.Tensor | None
    target: torch.Tensor | None
    peer: int


class Ends(NamedTuple):
    """A wave by which ends of its transfers are on this rank.

    Attributes:
        here: both.
        sends, receives: only the source, or only the target: slabs, each with the other rank, in the order of the wave.
    """

    here: list[Transfer]
    sends: list[tuple[torch.Tensor, int]]
    receives: list[tuple[torch.Tensor, int]]


def ends_of(transfers: Sequence[Transfer]) -> Ends:
    """Sorts a wave."""
    ends = Ends([], [], [])
    for transfer in transfers:
        source, target, peer = transfer
        if source is not None and target is not None:
            ends.here.append(transfer)
        elif source is not None:
            ends.sends.append((source, peer))
        elif target is not None:
            ends.receives.append((target, peer))
    return ends


class Awaited(enum.Enum):
    """What a wave waits for, of which nobody is told: somebody must look."""

    STEP = enum.auto()  # something that may come at once, and that more is to be done after
    TURN = enum.auto()  # there is more to begin: other threads come first
    PACE = enum.auto()  # a bound of bytes per second holds back what is left
    COPIES = enum.auto()  # all that this rank enqueues is enqueued
    FLIP = enum.auto()  # the device comes to the flip with the end of a step

    @property
    def is_regular(self) -> bool:
        """Whether it takes about as long each time, and nothing is lost before."""
        return self in (Awaited.COPIES, Awaited.FLIP)


class TransferBatch(ABC):
    """The transfers of one wave. Made by `Communicator.prepare()`; never blocks.

    Attributes:
        awaits: what the last `poll()` found missing.
        is_under_way: whether bytes are on their way, if it has been started: whoever polls has time for something else.
    """

    awaits = Awaited.STEP
    is_under_way = True

    @abstractmethod
    def start(self) -> None:
        """Begin. Every rank that prepared the wave starts it once, and all start their waves in the same order."""

    @abstractmethod
    def poll(self) -> bool:
        """Push the transfers on; True when all that concern this rank have completed, as this host has seen.

        Raises:
            Exception: a transfer failed. The others may still write or read their slabs: see `is_dead()`.
        """

    @abstractmethod
    def is_dead(self) -> bool:
        """Asked of a batch that all ranks agreed to start and then gave up: can nothing of it touch a slab any more?

        A batch whose `start()` failed here, or never came, does what the other ranks need to get over it too.
        """


class Communicator(ABC):
    """Moves slabs between the ranks of a group, off the main thread. Used by one thread."""

    name: str

    @abstractmethod
    def prepare(self, transfers: Sequence[Transfer]) -> TransferBatch:
        """Do all of `transfers` that can fail for local reasons, above all get memory; nothing is sent or written yet.

        Args:
            transfers: those with an end on this rank. Those between any two ranks are in the same order on both.
        """

    def watch(self) -> None:  # noqa: B027 (most have nothing to look after)
        """Called now and then as long as the communicator is not closed, also when nobody polls its batches any more.

        Raises:
            Exception: transfers were given up, as they would never have ended.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back what the transfers needed. Local; called once, by the thread that used it; never waits for a rank.

        The slabs of batches that are not dead may be touched until the process ends.
        """
