"""Rebalance, worker: `Wake`, by which other threads tell it that there is something to tick for."""

import threading


class Wake:
    """A flag that one thread waits for and others set.

    As `threading.Event`, but `set()` is a single call of C: the main thread makes it behind a forward, when nothing of Python's
    own classes is in its caches.
    """

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        try:  # noqa: SIM105 - a context manager is what is to be avoided
            self._unset.release()
        except RuntimeError:  # it is set
            pass

    def clear(self) -> None:
        self._unset.acquire(blocking=False)

    def wait(self, seconds: float) -> bool:
        """Whether it is set, at the latest after `seconds`. It stays set."""
        is_set = self._unset.acquire(timeout=min(max(0.0, seconds), threading.TIMEOUT_MAX))
        if is_set:
            self.set()
        return is_set
