"""Rebalance, load counters → window: differences of stream-ordered snapshots of the layers' counters.

Legend: N sub-windows of a window, A all layers' logical experts side by side.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch

from eplb.config import EplbConfig
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.protocol import Work
from eplb.streams import DeviceStreams, EventLike


class LoadWindowRecorder:
    """Takes snapshots on the main thread and brings finished windows to the host on the worker's.

    A snapshot is a copy that the compute stream makes, behind all streams that ran forwards. So it counts all that the
    forwards before it routed: neither a late kernel nor a relocation can be attributed to a later window. (A forward
    that another stream runs beside the snapshot counts in this window or in the next.) Two sets of buffers take turns;
    if both are taken (the worker is late), a window is skipped: to replace the unread one could go on for ever.

    Args:
        layers: whose counters to record.
        interval: steps from the end of a window to the end of the next.
        window_size: steps that a window covers, at most `interval`.
        num_samples: N, sub-windows of a window, at most `window_size`.
    """

    def __init__(
        self,
        layers: Sequence[ResidentExperts],
        streams: DeviceStreams,
        *,
        interval: int,
        window_size: int,
        num_samples: int,
    ) -> None:
        self._streams = streams
        self._interval = interval
        start = interval - window_size
        self._sample_at = {start + window_size * sample // num_samples: sample for sample in range(num_samples + 1)}
        self._counters = [layer.load_E for layer in layers]
        sizes = [layer.num_experts for layer in layers]
        shape = (num_samples + 1, sum(sizes))
        self._snapshots = [torch.zeros(shape, dtype=torch.int64, device=streams.device) for _ in range(2)]
        self._views = [[list(row.split(sizes)) for row in buffer] for buffer in self._snapshots]
        self._host = torch.zeros(shape, dtype=torch.int64, device="cpu", pin_memory=streams.device.type == "cuda")
        self._lock = threading.Lock()
        self._writing = 0
        self._begun = False  # whether the buffer being written has its first snapshot
        self._ready: tuple[int, EventLike] | None = None
        self._reading: int | None = None
        self._downloaded: EventLike | None = None
        self._snapshot(0)  # the first use of a CUDA kernel loads it, which waits for the device
        if start == 0:
            self._begin()

    def is_end(self, step: int) -> bool:
        """Whether a window ends with this step, taken or not."""
        return step % self._interval == 0

    def next_due(self, step: int) -> int:
        """The first step after `step` in which `step()` has something to do."""
        begin, position = step // self._interval * self._interval, step % self._interval
        later = [sample for sample in (*self._sample_at, self._interval) if sample > position]
        return begin + min(later)

    def is_on_its_way(self) -> bool:
        """Whether `poll()` has still to be called for a window that has ended."""
        with self._lock:
            return self._ready is not None or self._reading is not None

    @property
    def message_words(self) -> int:
        """Length of a flattened window."""
        rows, width = self._host.shape
        return (rows - 1) * width

    def step(self, step: int) -> bool:
        """Main thread, after each forward: take the snapshot that is due, if any.

        Args:
            step: number of the step that has just run, from 1.

        Returns:
            Whether a window has ended with this step and can be polled for.
        """
        try:
            return self._step((step - 1) % self._interval + 1)
        except BaseException:
            self._begun = False
            raise

    def _step(self, position: int) -> bool:
        sample = self._sample_at.get(position)
        if sample == 0:
            self._begin()
        elif sample is not None and self._begun:
            self._snapshot(sample)
        if position < self._interval:
            return False
        complete, self._begun = self._begun, False
        with self._lock:
            complete = complete and self._ready is None
            if complete:
                self._ready = (self._writing, self._streams.current().record_event())
        if 0 in self._sample_at:
            self._begin()  # this step ends one window and begins the next
        return complete

    def _begin(self) -> None:
        with self._lock:
            taken = {self._reading, self._ready[0] if self._ready is not None else None}
        free = [buffer for buffer in (0, 1) if buffer not in taken]
        self._begun = bool(free)
        if free:
            self._writing = free[0]
            self._snapshot(0)

    def _snapshot(self, sample: int) -> None:
        views = self._views[self._writing][sample]
        stream = self._streams.current()
        self._streams.gate.join(stream)
        self._streams.run(stream, lambda: torch._foreach_copy_(views, self._counters))

    def poll(self) -> np.ndarray | None:
        """Worker thread: the next finished window, int64 ``[N, A]``, once it is on the host; None otherwise."""
        if self._downloaded is None:
            with self._lock:
                # Seen complete by the host first: a side stream that waited for it would hold up the fills behind it.
                if self._ready is None or not self._ready[1].query():
                    return None
                (self._reading, _), self._ready = self._ready, None
            try:
                self._downloaded = self._download(self._reading)
            except BaseException:
                self._reading = None  # the window is lost, the buffer is not
                raise
        if not self._downloaded.query():
            return None
        window_NA = np.diff(self._host.numpy(), axis=0)
        with self._lock:
            self._downloaded, self._reading = None, None
        return window_NA

    def _download(self, buffer: int) -> EventLike:
        side, snapshot = self._streams.side, self._snapshots[buffer]
        self._streams.run(side, lambda: self._host.copy_(snapshot, non_blocking=True))
        return side.record_event()


def recorders(
    residents: Sequence[ResidentExperts], streams: DeviceStreams, config: EplbConfig
) -> dict[Work, LoadWindowRecorder]:
    """What a controller of `config` records: the windows that it plans from, and those that it only reports."""
    sizes = {Work.REBALANCE: (config.step_interval, config.window_size, config.window_samples)}
    if config.log_balancedness:
        sizes[Work.REPORT] = (config.log_balancedness_interval, config.log_balancedness_interval, 1)
    return {
        work: LoadWindowRecorder(
            residents, streams, interval=interval, window_size=window_size, num_samples=num_samples
        )
        for work, (interval, window_size, num_samples) in sizes.items()
    }
