"""Rebalance, worker: `Rounds` connects to the other ranks, speaks and hears; it holds what the ranks have agreed on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eplb.config import EplbConfig
from eplb.connect import Connection
from eplb.relocation.communicator.base import Communicator
from eplb.rounds.exchange import Agreement, Exchange
from eplb.rounds.protocol import Agreed, Phase, Record, advance, heard_plan, is_held, models_differ

_THROTTLED = (Phase.IDLE, Phase.PLANNING, Phase.PREPARE, Phase.FILL, Phase.GRACE)
"""The phases in which a rank may have nothing new to say; each of the others lasts one round."""


class Clock(Protocol):
    def __call__(self) -> float:
        """Seconds; only differences matter."""
        ...


@dataclass(frozen=True)
class Heard:
    """A round that is over: what was agreed on before and after it, what this rank and what all ranks said."""

    old: Agreed
    new: Agreed
    spoken: Record
    messages: list[np.ndarray]


class Rounds:
    """One round at a time; nothing here blocks.

    Which round comes next is a function of what is agreed alone. A failure here changes what this rank *says* in it, never
    whether it takes part.

    Args:
        connection: on its way to the other ranks.
        version: of the tables that the controller found.
        notify: called, on any thread, when a round is over.

    Attributes:
        agreed: what all ranks share after as many rounds.
        communicator: None until the ranks are connected.
        is_lost: whether the rounds failed for good.
        has_left: whether all ranks have heard that this one leaves.
        began_at: when this rank began to connect.
        spoke_at, heard_at: when this rank spoke and heard last.
        held_since: when the hold under way was first heard of, None if there is none.
        models_differ: whether the ranks registered different things.
    """

    def __init__(
        self, connection: Connection, config: EplbConfig, version: int, clock: Clock, notify: Callable[[], None]
    ) -> None:
        self._connection: Connection | None = connection
        self._agreement: Agreement | None = None
        self._exchange: Exchange | None = None
        self._config = config
        self._clock = clock
        self._notify = notify
        self._spoken = Record()
        # A controller before may have been closed in grace: the versions that are found need theirs before anything moves.
        self.agreed = Agreed(version=version, phase=Phase.GRACE, num_waves=1)
        self.communicator: Communicator | None = None
        self.is_lost = False
        self.has_left = False
        self.spoke_at = self.heard_at = self.began_at = clock()
        self.held_since: float | None = None
        self.models_differ = False

    @property
    def is_connected(self) -> bool:
        return self._agreement is not None

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks that have not come to their first `step()`, as far as this one knows."""
        return self._connection.missing if self._connection is not None else ()

    @property
    def is_under_way(self) -> bool:
        """Whether this rank has spoken in a round that is not over."""
        return self._exchange is not None

    @property
    def is_over(self) -> bool:
        """Whether there will be no more rounds."""
        return self.is_lost or self.agreed.phase is Phase.LEFT

    def connect(self) -> None:
        """Look whether the ranks are connected by now, and once they are, after transfers that nobody may poll any more."""
        if self.communicator is not None:
            self.communicator.watch()
        if self._connection is None or self.is_lost:
            return
        try:
            both = self._connection.poll()
        except Exception:
            self.is_lost = True
            raise
        if both is not None:
            self._agreement, self.communicator = both
            self._connection = None
            self.spoke_at = self.heard_at = self._clock()

    def hear(self) -> Heard | None:
        """The round that has ended since, if any."""
        exchange, old = self._exchange, self.agreed
        if self.is_lost or exchange is None or not exchange.done():
            return None
        try:
            messages = exchange.result()
        except Exception:
            # Nothing can be agreed on any more. What is published stays; a slot voted for is never written again, as
            # other ranks may have published it: all this rank can do in doubt is to keep what it said it has.
            self.is_lost = True
            raise
        if old.phase is Phase.PLAN:
            self.agreed = heard_plan(old, num_waves=int(messages[0][0]))
        else:
            self._hear_records([Record.decode(message) for message in messages])
        self._exchange = None
        self.heard_at = self._clock()
        self.has_left = self.has_left or bool(self._spoken.left)
        return Heard(old, self.agreed, self._spoken, messages)

    def _hear_records(self, records: Sequence[Record]) -> None:
        self.agreed = advance(self.agreed, records)
        self.models_differ = models_differ(records)
        if not is_held(records):
            self.held_since = None
        elif self.held_since is None:
            self.held_since = self._clock()

    @property
    def is_my_turn(self) -> bool:
        """Whether this rank may begin a round."""
        return self.is_connected and not self.is_over and self._exchange is None

    def is_worth_saying(self, record: Record, is_through: bool = False) -> bool:
        """Whether it is news, or this rank has been silent for long enough.

        Args:
            is_through: nothing that this rank still has to do can end the phase. Then it speaks at once: the round is over when
                the ranks that the others wait for have spoken, and costs nobody a round of their own before.
        """
        if self.agreed.phase not in _THROTTLED or record != self._spoken or is_through:
            return True
        idle = self.agreed.phase is Phase.IDLE
        interval = self._config.heartbeat_interval if idle else self._config.round_interval
        return self._clock() - self.spoke_at >= interval

    def say(self, record: Record, loads: np.ndarray) -> None:
        """Begin a round of records, with the ranks' loads behind them in the phase LOAD."""
        assert self._agreement is not None and self._exchange is None
        self._exchange = self._agreement.all_gather(np.concatenate([record.encode(), loads]), self._notify)
        self._spoken = record
        self.spoke_at = self._clock()

    def say_plan(self, message: np.ndarray | None) -> None:
        """Begin the round of rank 0's plan, which the others do not know."""
        assert self._agreement is not None and self._exchange is None
        self._exchange = self._agreement.broadcast(message, self.agreed.plan_words, self._notify)
        self.spoke_at = self._clock()

    def close(self) -> None:
        """Give everything back; called once, when nothing ticks any more. Never waits for another rank."""
        if self._connection is not None:
            self._connection.cancel()
        for made in (self._agreement, self.communicator):
            if made is not None:
                made.close()
        self._connection = self._agreement = self._exchange = self.communicator = None
