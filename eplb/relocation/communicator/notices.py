"""Rebalance, fill: `Notices`, by which ranks of any hosts tell each other what may be read, and what they have read."""

import logging
import struct
from collections.abc import Sequence

from eplb.relocation.communicator.nixl_agent import Agent

_MESSAGE = struct.Struct("<4sqqq")  # kind, batch, index, slot
_HELLO, _OFFER, _FINISH = b"helo", b"offr", b"done"

_log = logging.getLogger(__name__)


class Notices:
    """What `Board` does, by NIXL's notifications. Each says what it means by itself, so their order does not matter.

    Args:
        agent: of this rank, which knows those of the others.
        rank: this rank.
        names: of the agents, by rank.
        capacity: how many slabs can be offered to one rank in a batch.
    """

    def __init__(self, agent: Agent, rank: int, names: Sequence[str], capacity: int) -> None:
        self.rank, self.size, self.capacity = rank, len(names), capacity
        self._agent = agent
        self._names = list(names)
        self._ranks = {name: other for other, name in enumerate(names)}
        self._offers: dict[tuple[int, int, int], int] = {}
        self._finished = [0] * self.size
        self.greeted_by: set[int] = set()
        self._out_of_reach: set[int] = set()

    def greet(self, other: int) -> None:
        """Tell a rank that this one can read its memory; there this rank is in `greeted_by` then."""
        self._agent.send_notif(self._names[other], _MESSAGE.pack(_HELLO, 0, 0, 0))

    def look(self) -> None:
        """Hear what the others have said, and push on what was said here, reads included."""
        for name, messages in self._agent.get_new_notifs().items():
            for message in messages:
                self._hear(name, message)

    def _hear(self, name: str, message: bytes) -> None:
        sender = self._ranks.get(name)
        if sender is None or len(message) != _MESSAGE.size:
            _log.warning("a notification of %d bytes by the agent %r is none of ours", len(message), name)
            return
        kind, batch, index, slot = _MESSAGE.unpack(message)
        if kind == _HELLO:
            self.greeted_by.add(sender)
        elif kind == _FINISH:
            self._finished[sender] = max(self._finished[sender], batch)
        elif kind == _OFFER and batch > self._finished[self.rank]:  # else it was given up here
            self._offers[sender, batch, index] = slot

    def offer(self, reader: int, index: int, batch: int, slot: int) -> None:
        try:
            self._agent.send_notif(self._names[reader], _MESSAGE.pack(_OFFER, batch, index, slot))
        except Exception as error:
            raise RuntimeError(f"rank {reader} cannot be told what to read: {error}") from error

    def offered(self, owner: int, index: int, batch: int) -> int | None:
        return self._offers.get((owner, batch, index))

    def finish(self, batch: int) -> None:
        self._finished[self.rank] = batch
        self._offers = {key: slot for key, slot in self._offers.items() if key[1] > batch}
        for other, name in enumerate(self._names):
            if other != self.rank:
                self._tell_finished(other, name, batch)
        # What a transport could not take at once goes now: nobody may look here before the next batch.
        self.look()

    def _tell_finished(self, other: int, name: str, batch: int) -> None:
        try:
            self._agent.send_notif(name, _MESSAGE.pack(_FINISH, batch, 0, 0))
        except Exception as error:  # the rest must hear it, and this rank has all that it wanted
            if other not in self._out_of_reach:
                self._out_of_reach.add(other)
                _log.warning("rank %d cannot be told what was read of its memory: %s", other, error)

    def finished(self, reader: int) -> int:
        return self._finished[reader]
