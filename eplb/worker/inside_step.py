"""Rebalance, worker: `InsideStep` lets it tick on the main thread, inside `step()` (``use_async=False``)."""

import time

from eplb.config import EplbConfig
from eplb.load_window import LoadWindowRecorder
from eplb.rounds.protocol import Work
from eplb.worker.rounds import Clock
from eplb.worker.wake import Wake
from eplb.worker.worker import Worker

_INTERVAL = 0.0005  # seconds between two looks at the device, while the main thread waits anyway


class InsideStep:
    """Runs what is due from end to end on the calling thread; all ranks do so in the same step.

    What is due follows from the number of steps, which is the same on all ranks. A window that was lost on one of them
    counts as no load; nobody waits for it.

    Args:
        wake: set when there is something to tick for.
    """

    def __init__(
        self,
        worker: Worker,
        windows: dict[Work, LoadWindowRecorder],
        config: EplbConfig,
        clock: Clock,
        wake: Wake,
    ) -> None:
        self._worker = worker
        self._windows = windows
        self._config = config
        self._clock = clock
        self._wake = wake
        self._num_due = 0
        self._num_given_up = 0

    def run(self, step: int) -> None:
        """Do what is due with this step, and what earlier ones left; a later step goes on where this one stops."""
        due = [work for work, recorder in self._windows.items() if recorder.is_end(step)]
        if due:
            self._wait_for_windows()
        for work in due:
            self._worker.planning.propose(work)
            self._num_due += 1
        if self._is_unfinished():
            self._num_given_up = 0 if self._finish() else self._num_given_up + 1

    def _is_unfinished(self) -> bool:
        return self._worker.num_proposals_heard < self._num_due or not self._worker.is_idle

    def _finish(self) -> bool:
        """Tick until nothing is left; False if something took too long."""
        worker, began_at = self._worker, self._clock()
        while self._is_unfinished():
            self._wake.clear()
            worker.tick(self._is_unfinished)
            worker.inbox.adopt()
            if worker.is_stuck or not self._is_unfinished():
                return True
            # Time counts from where this step began: ranks come here together, and none is to go on at once because it
            # had waited in an earlier step. Those that wait for nothing time and again wait half as long each time.
            patience = 0.5 ** min(self._num_given_up, 30)
            now = self._clock()
            if any(now - max(began_at, wait.since) > wait.limit * patience for wait in worker.waits()):
                return False
            self._wake.wait(_INTERVAL)
        return True

    def _wait_for_windows(self) -> None:
        deadline = time.monotonic() + self._config.transfer_timeout
        while not self._worker.is_lost and any(recorder.is_on_its_way() for recorder in self._windows.values()):
            self._worker.tick(lambda: False)
            if time.monotonic() > deadline:
                return

    def close(self, timeout: float) -> None:
        """Tell the other ranks, and give back what reaches them; returns after `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        self._worker.mailbox.leave()
        try:
            while not self._worker.is_done and time.monotonic() < deadline:
                self._wake.clear()
                self._worker.tick()
                self._wake.wait(_INTERVAL)
        finally:
            self._worker.close()
