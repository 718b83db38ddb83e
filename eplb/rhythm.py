"""All steps of a rebalance: `Rhythm`, when the thread that steps is about to want the interpreter."""

import time
from collections.abc import Callable

_LAUNCHED = 0.1
_BUSY = 0.75
"""Of the time between two steps: the main thread most likely waits for the device from the one to the other, in a loop that
waits behind `step()` and in one that waits before it. What is begun until then is over before the next forward is launched, as
a piece of a worker's work takes at most some 0.5 ms."""
_LATE = 1.5
"""Of that time: a main thread that has not stepped for so long is in no loop, or in another one."""
_LONGEST = 0.05
"""Seconds between two steps beside which a piece of work is nothing."""
_POLL = 1e-4
"""Seconds between two looks for the next step: an event would cost each `step()` a lock."""


class Rhythm:
    """How often steps come, as long as somebody asks: `Inbox.rhythm` is where a thread that steps finds it.

    A thread that comes out of a wait for the device waits for Python's lock as long as another thread has it, and the device
    waits for its next forward. So a worker begins nothing shortly before the next step, nor right behind it.

    Args:
        clock: seconds.
        sleep: for so many seconds.

    Attributes:
        last: how many steps there were, and when the last one ended. The thread that steps sets it.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self.last = 0, 0.0
        self._seen = self.last
        self._period = 0.0

    def wait(self) -> bool:
        """On the worker's thread, without the lock: until the main thread waits for the device again, if it is about to step or
        has just stepped.

        Where steps follow each other at once that is no quiet moment, but there are none.

        Returns:
            Whether it took any time.
        """
        steps, _ = self.last
        has_slept = False
        while self.last[0] <= steps + 1 and (seconds := self._seconds()):
            self._sleep(seconds)
            has_slept = True
        return has_slept

    def _seconds(self) -> float:
        (steps, stepped_at), (seen_steps, seen_at) = self.last, self._seen
        if steps != seen_steps:
            self._period = (stepped_at - seen_at) / (steps - seen_steps)
            self._seen = steps, stepped_at
        period, since = self._period, self._clock() - stepped_at
        if period > _LONGEST or since > _LATE * period:
            return 0.0
        if _LAUNCHED * period <= since <= _BUSY * period:
            return 0.0
        until = _LAUNCHED if since < _LAUNCHED * period else 1.0
        return max(_POLL, until * period - since)
