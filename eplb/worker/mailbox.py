"""Rebalance, worker: `Mailbox`, what the main thread asks of it."""

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Requests:
    """What the main thread wants.

    Attributes:
        hold: how many holds are under way: no new wave may begin.
        holds_completed: how many have ended well.
        leaving: whether the controller closes.
    """

    hold: int = 0
    holds_completed: int = 0
    leaving: bool = False


class Mailbox:
    """Requests of the main thread, and whether the ranks have heard them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._requests = Requests()
        self._held = True  # nothing is under way before this rank has ever said that it does not hold

    # ---- the main thread's side

    def hold(self) -> None:
        """Want no new waves, until `end_hold()`."""
        with self.lock:
            self._requests = replace(self._requests, hold=self._requests.hold + 1)

    def end_hold(self, completed: bool) -> None:
        """Want new waves again, as soon as every rank has completed as many holds."""
        with self.lock:
            now = self._requests
            self._requests = replace(now, hold=now.hold - 1, holds_completed=now.holds_completed + completed)

    @property
    def is_held(self) -> bool:
        """Whether nothing is under way, and every rank knows or will hear first of all that this one holds."""
        with self.lock:
            return self._held and self._requests.hold > 0

    def leave(self) -> None:
        with self.lock:
            self._requests = replace(self._requests, leaving=True)

    # ---- the worker's side

    def read_requests(self) -> Requests:
        """What to say in the next round: a hold that is asked for after this is not known to the others."""
        with self.lock:
            if not self._requests.hold:
                self._held = False
            return self._requests

    def note_heard(self, *, held: bool) -> None:
        """A round was heard: whether this rank held in it, and nothing is under way."""
        with self.lock:
            self._held = held
