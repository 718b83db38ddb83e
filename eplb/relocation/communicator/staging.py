"""Rebalance, fill: `Staging`, host memory that slabs pass through, kept from wave to wave."""

import torch


class Staging:
    """Buffers that are made at the start, reused, and only made anew for a wave that is larger than all before.

    To pin memory takes a driver's lock and about a second a gigabyte: not beside forwards, wave by wave.

    Args:
        num_bytes: of each of the buffers that are there from the start: one to send and one to receive.
        pinned: whether a GPU copies from and to them.
    """

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        self._pinned = pinned
        self._free = [self._new(num_bytes) for _ in range(2)] if num_bytes else []
        self.num_allocated = len(self._free)

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, uint8 ``[at least num_bytes]``, its contents undefined; `give()` it back when nothing touches it."""
        fitting = [buffer for buffer in self._free if buffer.numel() >= num_bytes]
        if not fitting and self._free:  # the new one is for what the largest was for
            self._remove(max(self._free, key=torch.Tensor.numel))
        if fitting:
            buffer = min(fitting, key=torch.Tensor.numel)
            self._remove(buffer)
        else:
            buffer = self._new(num_bytes)
            self.num_allocated += 1
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """A buffer from `take()` may be used again. One that is never given back is freed with its last tensor."""
        self._free.append(buffer)

    def _new(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._pinned and num_bytes > 0)

    def _remove(self, buffer: torch.Tensor) -> None:
        self._free = [one for one in self._free if one is not buffer]
