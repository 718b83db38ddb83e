"""Rebalance, fill: `Pace`, a bound of bytes per second."""

import time
from collections.abc import Callable

_UNIT = 256  # pieces begin and end at multiples of this many bytes, as tensors in slots do
_SMALLEST_PIECE = 256 << 10
_LONGEST_GAP = 0.004
"""Seconds whose bytes may come at once: a worker looks every 3 ms, so it keeps the pace if it is a little late."""


class Pace:
    """Grants pieces of slabs so that in any `t` seconds no more than ``rate * t`` bytes are granted, and one burst.

    A burst is what 4 ms carry, but at least 256 KiB.

    Args:
        rate: bytes per second; None: no bound.
        clock: seconds.
    """

    def __init__(self, rate: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._seen_at = clock()
        self._budget = self._burst = max(_SMALLEST_PIECE, int((rate or 0) * _LONGEST_GAP))

    def look(self) -> None:
        """Earn what has come due. Not in `grant`: a loop over grants would earn while it runs, and end with the last byte."""
        if self._rate is None:
            return
        earned = int((self._clock() - self._seen_at) * self._rate)
        self._seen_at += earned / self._rate  # what is less than a byte counts later
        self._budget = min(self._burst, self._budget + earned)

    def grant(self, wanted: int) -> int:
        """How many of `wanted` bytes may be copied now: all, or a multiple of 256, or 0."""
        if self._rate is None:
            return wanted
        if self._budget < min(wanted, _SMALLEST_PIECE):
            return 0
        piece = wanted if wanted <= self._budget else self._budget // _UNIT * _UNIT
        self._budget -= piece
        return piece
