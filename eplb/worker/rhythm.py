"""Rebalance, worker: `Rhythm`, when the thread that steps is about to want the interpreter."""

import time
from collections.abc import Callable

_BUSY = 0.75
"""Of the time between two steps: until then the main thread most likely waits for the device. What is begun before is over
before the next forward is launched, as a piece of a worker's work takes at most some 0.5 ms."""
_LATE = 1.5
"""Of that time: a main thread that has not stepped for so long is in no loop, or in another one."""
_LONGEST = 0.05
"""Seconds between two steps beside which a piece of work is nothing."""
_POLL = 1e-4


class Rhythm:
    """How many steps there were, and how often they come.

    A thread that comes out of a wait for the device waits for Python's lock as long as another thread has it, and the device
    waits for its next forward. So a worker begins nothing shortly before the next step.

    Args:
        clock: seconds.
        sleep: for so many seconds.

    Attributes:
        steps, stepped_at: the main thread sets them itself, as a function takes microseconds behind a forward; `steps` last.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self.steps = 0
        self.stepped_at = 0.0
        self._seen = 0, 0.0
        self._period = 0.0

    def wait(self) -> None:
        """On the worker's thread, without the lock: until the next step is over, if it is about to come."""
        while seconds := self._seconds():
            self._sleep(seconds)

    def _seconds(self) -> float:
        steps, stepped_at = self.steps, self.stepped_at
        seen_steps, seen_at = self._seen
        if steps != seen_steps:
            self._period = (stepped_at - seen_at) / (steps - seen_steps)
            self._seen = steps, stepped_at
        period, since = self._period, self._clock() - stepped_at
        if period > _LONGEST or not _BUSY * period < since < _LATE * period:
            return 0.0
        return max(_POLL, period - since)
