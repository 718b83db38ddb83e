"""Rebalance, plan: `Job` runs a policy, which may never return, on a thread of its own."""

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Pending(Protocol[T_co]):
    def done(self) -> bool:
        """Whether `result()` would return or raise at once."""
        ...

    def result(self) -> T_co:
        """What the work returned, or an Exception for what it raised. Call it when `done()`."""
        ...


class Start(Protocol):
    def __call__(self, work: Callable[[], T], notify: Callable[[], None]) -> Pending[T]:
        """Begin `work`; `notify` is called, on any thread, when it has ended."""
        ...


class Job(Generic[T]):
    """Calls `work()` on a daemon thread: one that hangs keeps neither the caller nor the process."""

    def __init__(self, work: Callable[[], T], notify: Callable[[], None]) -> None:
        self._work, self._notify = work, notify
        self._value: T | None = None
        self._error: BaseException | None = None
        self._ended = False
        threading.Thread(target=self._run, name="eplb-planning", daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # SystemExit too: it would end this thread alone, and silently
            self._error = error
        self._ended = True
        self._notify()

    def done(self) -> bool:
        return self._ended

    def result(self) -> T:
        assert self._ended
        if isinstance(self._error, Exception):
            raise self._error
        if self._error is not None:
            raise RuntimeError(f"it raised {type(self._error).__name__}: {self._error}") from self._error
        return self._value  # type: ignore[return-value]
