"""Rebalance, publish → flip: `TableWords`, memory in which the tables of a pool's layers lie side by side."""

import threading
from typing import NamedTuple

import torch

_CHUNK = 1 << 16
"""Words that are allocated at once, at most: the tables of some hundred layers of 128 experts, of 80 of 256 with replicas."""
_ALIGNED = 4
"""Words: each table begins at 16 bytes, as memory of its own would, which Triton compiles for."""


class Chunk:
    """Memory for some tables, three times: what kernels read, what is staged, and what is uploaded.

    Attributes:
        current, staged: int32, on the device.
        current_data: the same memory as `current`, with a version counter of its own. Autograd keeps parts of tables for a
            backward that pins their version, and a flip must not look like a change of those.
        host: int32; pinned for a GPU, so that the upload is asynchronous.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        # Ordinary tensors, wherever a model is built: they may be written inside inference mode and outside.
        with torch.inference_mode(False):
            self.current = torch.zeros(size, dtype=torch.int32, device=device)
            self.current_data = self.current.data
            self.staged = torch.zeros_like(self.current)
            self.host = torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        if device.type == "cuda":  # another thread's stream may be the first to write
            torch.cuda.current_stream(device).synchronize()
        self.num_taken = 0


class Words(NamedTuple):
    """A part of a chunk."""

    chunk: Chunk
    start: int
    end: int

    @property
    def current(self) -> torch.Tensor:
        return self._of(self.chunk.current)

    @property
    def current_data(self) -> torch.Tensor:
        return self._of(self.chunk.current_data)

    @property
    def staged(self) -> torch.Tensor:
        return self._of(self.chunk.staged)

    @property
    def host(self) -> torch.Tensor:
        return self._of(self.chunk.host)

    def _of(self, memory: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):
            return memory[self.start : self.end]


class TableWords:
    """Gives tables their words, one behind the other. Memory is freed when nothing of its chunk is in use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._chunk: Chunk | None = None

    def take(self, size: int, num_tables: int = 1) -> Words:
        """`size` words, and as many more as align the next ones.

        Args:
            num_tables: how many of this size may come, this one included; they lie side by side, if they are not too many.
        """
        with self._lock:
            size = -(-size // _ALIGNED) * _ALIGNED
            if self._chunk is None or self._chunk.num_taken + size > len(self._chunk.current):
                self._chunk = Chunk(max(size, min(num_tables * size, _CHUNK)), self._device)
            start = self._chunk.num_taken
            self._chunk.num_taken = start + size
            return Words(self._chunk, start, start + size)


def runs(parts: list[Words]) -> list[Words]:
    """The same words in as few parts as can be: neighbours are one."""
    found: list[Words] = []
    for part in sorted(parts, key=lambda one: (id(one.chunk), one.start)):
        if found and found[-1].chunk is part.chunk and found[-1].end == part.start:
            found[-1] = found[-1]._replace(end=part.end)
        else:
            found.append(part)
    return found
