"""Rebalance, worker: `WorkerThread` lets it tick in the background (``use_async=True``)."""

import threading
import time

from eplb.config import EplbConfig
from eplb.rhythm import Rhythm
from eplb.streams import DeviceStreams
from eplb.worker.wake import Wake
from eplb.worker.worker import Worker

_LONGEST = 5e-5  # seconds that a piece of work may hold the interpreter
_BREATH = 1e-4  # seconds that others have it for then: longer than a main thread takes to launch a graph


class WorkerThread(threading.Thread):
    """Calls `tick()` until it is closed, whatever a tick raises.

    Unless `max_bytes_per_second` is None, nobody is to notice a relocation: then it keeps to the rhythm of the steps, too.
    """

    def __init__(self, worker: Worker, streams: DeviceStreams, wake: Wake, config: EplbConfig) -> None:
        super().__init__(name="eplb-worker", daemon=True)
        self._worker = worker
        self._streams = streams
        self._wake = wake
        self._config = config
        self._leaving = False
        self._stopping = False
        self._adopted = False
        self._adopt_at = 0.0
        self._num_adoptions = 0
        self._num_failures = 0
        self._ended_by: str | None = None
        self._breathed_at = 0.0
        self._rhythm = Rhythm() if config.bytes_per_second is not None else None
        worker.relocation.breathe = self._breathe

    def run(self) -> None:
        try:
            while not self._stopping and not (self._leaving and self._worker.is_done):
                self._wake.clear()
                self._rest(self._tick())
        except BaseException as error:
            self._ended_by = type(error).__name__
            raise
        finally:
            self._worker.close()

    def _tick(self) -> float:
        """Tick once; returns how long to sleep."""
        try:
            if not self._adopted and time.monotonic() >= self._adopt_at:
                self._adopt()
            self._keep_out()
            self._worker.tick()
            # Nobody is asked at rest: to say when it steps takes a main thread a microsecond or two.
            self._worker.inbox.rhythm = None if self._worker.is_at_rest else self._rhythm
            self._num_failures = 0
            return self._worker.seconds_to_next_tick()
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: on this thread they are nobody's wish
            self._num_failures += 1
            self._note(error)
            return self._delay(self._num_failures)

    def _rest(self, seconds: float) -> None:
        """Until somebody wakes this thread, which may be at once: then what was held before goes on to count."""
        began = time.perf_counter()
        self._wake.wait(seconds)
        now = time.perf_counter()
        if now - began >= _BREATH:
            self._breathed_at = now

    def _breathe(self) -> None:
        """Let other threads have the interpreter, if this one has had it for long.

        A thread that comes out of a call without the interpreter's lock waits for as long as another has it, up to Python's
        switch interval of 5 ms. A sleep of 0 would do nearly as well (docs/log.md).
        """
        now = time.perf_counter()
        if now - self._breathed_at > _LONGEST:
            time.sleep(_BREATH)
            self._breathed_at = time.perf_counter()
            self._keep_out()

    def _keep_out(self) -> None:
        rhythm = self._worker.inbox.rhythm
        if rhythm is not None and rhythm.wait():
            self._breathed_at = time.perf_counter()

    def _adopt(self) -> None:
        """Prepare this thread for the device; without that it ticks all the same, as the other ranks wait for it."""
        try:
            self._streams.adopt_thread()
            self._adopted = True
        except Exception as error:
            self._num_adoptions += 1
            self._adopt_at = time.monotonic() + self._delay(self._num_adoptions)
            self._worker.note_failure("the worker's thread could not be prepared for the device", error)

    def _note(self, error: BaseException) -> None:
        try:
            self._worker.fail(error)
        except BaseException:  # no memory to say more, or what reports it fails as well
            self._worker.report.last_error = type(error).__name__

    def _delay(self, num_failures: int) -> float:
        return min(self._config.backoff * 2.0 ** min(num_failures - 1, 30), self._config.max_backoff)

    def trouble(self, seconds_since_tick: float) -> str | None:
        """Why this thread does no work although it should, None if it does."""
        if not self.is_alive() and not self._leaving:
            return f"the worker's thread has ended: {self._ended_by}"
        if seconds_since_tick > self._config.peer_timeout + self._config.heartbeat_interval:
            what = "fails in every tick" if self._num_failures else "hangs"
            return f"the worker's thread {what}: it has completed none for {seconds_since_tick:.1f} s"
        return None

    def close(self, timeout: float) -> None:
        """Tell the other ranks, and end; returns after `timeout` seconds at most, with the thread perhaps still alive."""
        self._worker.mailbox.leave()
        self._leaving = True
        self._wake.set()
        self.join(0.9 * timeout)
        self._stopping = True
        self._wake.set()
        self.join(0.1 * timeout)
