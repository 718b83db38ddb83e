"""Rebalance, worker: `Wake`, by which other threads tell it that there is something to tick for."""

import functools
import queue
import threading


class Wake:
    """A flag that one thread waits for and others set.

    As `threading.Event`, but `set()` is a single call of C: the main thread makes it behind a forward, when nothing of Python's
    own functions is in its caches.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.set = functools.partial(self._queue.put, None)

    def clear(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass

    def wait(self, seconds: float) -> bool:
        """Whether it is set, at the latest after `seconds`. It stays set."""
        try:
            self._queue.get(timeout=min(max(0.0, seconds), threading.TIMEOUT_MAX))
        except queue.Empty:
            return False
        self.set()
        return True
