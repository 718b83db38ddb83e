"""The thread that a worker lives in."""

import threading
import time

from eplb.streams import DeviceStreams
from eplb.worker import Worker


class WorkerThread(threading.Thread):
    """Calls `tick()` for ever."""

    def __init__(self, worker: Worker, streams: DeviceStreams, wake: threading.Event) -> None:
        super().__init__(name="eplb-worker", daemon=True)
        self._worker = worker
        self._streams = streams
        self._wake = wake
        self._stopping = False

    def run(self) -> None:
        adopted = False
        while not self._stopping:
            self._wake.clear()
            if not adopted:
                try:
                    self._streams.adopt_thread()
                    adopted = True
                except Exception as error:
                    self._worker.fail(error)
            if adopted:
                self._worker.tick()
            self._wake.wait(self._worker.seconds_to_next_tick())

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._worker.leave()
        while self.is_alive() and not self._worker.is_done and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.001)
        self._stopping = True
        self._wake.set()
        self.join(max(0.0, deadline - time.monotonic()))
