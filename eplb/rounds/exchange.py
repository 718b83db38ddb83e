"""Rebalance, between ranks: rounds in which the workers tell each other a few integers (int64 arrays)."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from eplb.gloo import GlooGroup


class Exchange(Protocol):
    """A round under way."""

    def done(self) -> bool:
        """Whether `result()` would return or raise at once."""
        ...

    def result(self) -> list[np.ndarray]:
        """What every rank said, by rank. Call it when `done()`.

        Raises:
            Exception: the round failed; the ranks can agree on nothing any more.
        """
        ...


class Agreement(Protocol):
    """All ranks call the same methods with equally long messages in the same order; nothing ever blocks."""

    def all_gather(self, message: np.ndarray, notify: Callable[[], None]) -> Exchange:
        """Tell all ranks `message`, hear theirs; `notify` is called, on any thread, when the round is over."""
        ...

    def broadcast(self, message: np.ndarray | None, length: int, notify: Callable[[], None]) -> Exchange:
        """Hear rank 0's message of `length` integers (the result's only entry); rank 0 gives it, others None."""
        ...

    def close(self) -> None:
        """Give back what the rounds needed, whether or not one is under way. Local; called once, after the last round."""
        ...


class LocalAgreement:
    """The rounds of a single rank."""

    def all_gather(self, message: np.ndarray, notify: Callable[[], None]) -> "_Said":
        return _Said([message])

    def broadcast(self, message: np.ndarray | None, length: int, notify: Callable[[], None]) -> "_Said":
        assert message is not None
        return _Said([message])

    def close(self) -> None:
        """There is nothing to give back."""


class _Said:
    def __init__(self, messages: list[np.ndarray]) -> None:
        self._messages = messages

    def done(self) -> bool:
        return True

    def result(self) -> list[np.ndarray]:
        return self._messages


class GlooAgreement:
    """Rounds over a gloo group of the controller's own, which nothing else uses."""

    def __init__(self, group: GlooGroup) -> None:
        self._group = group

    def all_gather(self, message: np.ndarray, notify: Callable[[], None]) -> "_GlooExchange":
        mine = torch.from_numpy(message)
        said = [torch.empty_like(mine) for _ in range(self._group.size)]
        return _GlooExchange(self._group.all_gather(said, mine), said, notify)

    def broadcast(self, message: np.ndarray | None, length: int, notify: Callable[[], None]) -> "_GlooExchange":
        if self._group.rank == 0:
            assert message is not None and len(message) == length
        said = torch.empty(length, dtype=torch.int64, device="cpu") if message is None else torch.from_numpy(message)
        return _GlooExchange(self._group.broadcast(said, root=0), [said], notify)

    def close(self) -> None:
        self._group.close()


class _GlooExchange:
    def __init__(self, work: dist.Work, said: list[torch.Tensor], notify: Callable[[], None]) -> None:
        self._work = work
        self._said = said
        self._future = work.get_future()
        self._future.add_done_callback(lambda _: notify())

    def done(self) -> bool:
        # Not the work's `is_completed()`: gloo completes the future first, and notifies a moment before the work says so.
        return self._future.done()

    def result(self) -> list[np.ndarray]:
        self._work.wait()
        return [message.numpy() for message in self._said]
