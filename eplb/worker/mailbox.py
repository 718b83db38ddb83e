"""`Mailbox`: what the main thread and the worker leave for each other."""

import threading
from dataclasses import dataclass, replace

from eplb.relocation.fill import Handoff


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
    """One published version at a time in one direction, requests in the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inbox: Handoff | None = None
        self._requests = Requests()
        self._held = True  # nothing is under way before this rank has ever said that it does not hold

    # ---- the main thread's side

    def take_handoff(self) -> Handoff | None:
        """The published version that waits to be flipped, if any. The caller then sets its `flipped`."""
        if self.inbox is None:  # unlocked on purpose: a stale answer costs one step, and every step asks
            return None
        with self.lock:
            handoff, self.inbox = self.inbox, None
            return handoff

    def give_back_handoff(self, handoff: Handoff) -> None:
        """The flip could not be enqueued: try again at the next step."""
        with self.lock:
            self.inbox = handoff

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

    def post(self, handoff: Handoff) -> None:
        with self.lock:
            self.inbox = handoff

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
