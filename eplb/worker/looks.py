"""Rebalance, worker: `Looks`, when to ask again how far the device is, which tells nobody."""

from eplb.relocation.communicator.base import Awaited

_SHORTEST = 0.0005
"""Seconds between two looks; a look takes some tens of microseconds of the interpreter."""
_PACED = 0.003
"""While a bound of bytes per second holds copies back; `Pace` grants the bytes of 4 ms at once."""


class Looks:
    """Looks become rarer the longer something takes, so that it costs few of them and is seen at most an eighth late.

    What takes about as long each time (a copy of a wave, a step of the model) is first looked at after seven eighths of that,
    and then seen at most a 32nd late.

    Args:
        now: seconds.
    """

    def __init__(self, now: float) -> None:
        self._changed_at = now
        self._seen: object = None
        self._awaited: Awaited | None = None
        self._took: dict[Awaited, float] = {}

    def note(self, seen: object, awaited: Awaited | None, now: float) -> None:
        """What a look has seen, and what it has found missing; None if nothing is to be looked for."""
        if seen == self._seen and awaited is self._awaited:
            return
        if self._awaited is not None and self._awaited.is_regular:
            self._took[self._awaited] = now - self._changed_at
        self._seen, self._awaited, self._changed_at = seen, awaited, now

    def seconds(self, now: float, longest: float) -> float:
        """Until the next look."""
        if self._awaited is None:
            return longest
        if self._awaited is Awaited.PACE:
            return min(longest, _PACED)
        if self._awaited is Awaited.TURN:
            return min(longest, _SHORTEST)
        elapsed = now - self._changed_at
        took = self._took.get(self._awaited)
        if took is None:
            return min(longest, max(_SHORTEST, elapsed / 8))
        return min(longest, max(_SHORTEST, elapsed / 32, took * 7 / 8 - elapsed))
