"""What stands for nccl4py where there is no GPU: ranks that meet, and send bytes to each other, in a folder.

It is as strict as a non-blocking NCCL communicator: what is asked of it while it is at work is an error, as is a send or
receive outside of a group. Transfers between two ranks pair up by their order alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.eplb.simulated import SimStream

SUCCESS, REMOTE_ERROR, IN_PROGRESS = 0, 6, 7
ID_BYTES = 128

made: list[FakeCommunicator] = []
"""All communicators of this process, in order."""


class FakeCommunicator:
    """One rank's end.

    Attributes:
        status: what it has failed with.
        holds: whether it stays at work although it could go on.
        num_aborts: how often it was aborted.
    """

    def __init__(self, size: int, rank: int, folder: Path) -> None:
        self.size, self.rank, self.folder = size, rank, folder
        self.status = SUCCESS
        self.holds = False
        self.num_aborts = 0
        self._asked: list[Callable[[], bool]] = []
        self._num: dict[tuple[int, int], int] = {}
        self._work: list[Callable[[], bool]] = [self._have_all_come]
        (folder / f"rank{rank}").touch()
        made.append(self)

    @classmethod
    def init(cls, size: int, rank: int, unique_id: UniqueId, config: NCCLConfig) -> FakeCommunicator:
        assert config.blocking is False
        return cls(size, rank, Path(bytes(unique_id).rstrip(b"\0").decode()))

    def get_async_error(self) -> int:
        assert not self.num_aborts, "NCCL has freed the communicator"
        if self.status != SUCCESS:
            return self.status
        while self._work and not self.holds and self._work[0]():
            self._work.pop(0)
        return IN_PROGRESS if self._work else SUCCESS

    def get_last_error(self) -> str:
        return "a cable was cut" if self.status != SUCCESS else ""

    def send(self, slab: torch.Tensor, peer: int, *, stream: Any) -> None:
        path = self._path(self.rank, peer)

        def send() -> bool:
            part = path.with_suffix(".part")
            part.write_bytes(slab.numpy().tobytes())
            part.rename(path)
            return True

        self._ask(send, stream)

    def recv(self, slab: torch.Tensor, peer: int, *, stream: Any) -> None:
        path = self._path(peer, self.rank)

        def receive() -> bool:
            if not path.exists():
                return False
            slab.copy_(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))
            path.unlink()
            return True

        self._ask(receive, stream)

    def abort(self) -> None:
        self.num_aborts += 1
        self._work.clear()

    def _have_all_come(self) -> bool:
        return all((self.folder / f"rank{rank}").exists() for rank in range(self.size))

    def _path(self, source: int, target: int) -> Path:
        number = self._num[source, target] = self._num.get((source, target), 0) + 1
        return self.folder / f"{source}-{target}-{number}"

    def _ask(self, transfer: Callable[[], bool], stream: Any) -> None:
        assert _groups.open and self.get_async_error() == SUCCESS, "NCCL is at work, or this is no group"
        _groups.open[-1].append((self, transfer, stream))

    def launch(self, transfers: list[Callable[[], bool]], stream: Any) -> None:
        """Begin to enqueue: sends and receives of a group go on side by side."""

        def go_on() -> bool:
            if self.num_aborts:
                return True
            transfers[:] = [transfer for transfer in transfers if not transfer()]
            return not transfers

        def enqueue() -> bool:
            stream.items.append(go_on)
            return True

        # On a simulated stream they are enqueued, and go on when the stream does. A CPU's stream is what is done by now.
        self._work.append(enqueue if isinstance(stream, SimStream) else go_on)


class NCCLConfig:
    def __init__(self, *, blocking: bool | None = None) -> None:
        self.blocking = blocking


class UniqueId:
    def __init__(self, value: bytes) -> None:
        assert len(value) == ID_BYTES
        self._value = value

    def __bytes__(self) -> bytes:
        return self._value

    @staticmethod
    def from_bytes(value: bytes) -> UniqueId:
        return UniqueId(value)


def get_unique_id() -> UniqueId:
    return UniqueId(os.fsencode(tempfile.mkdtemp(prefix="nccl")).ljust(ID_BYTES, b"\0"))


class _Groups(threading.local):
    def __init__(self) -> None:
        self.open: list[list[tuple[FakeCommunicator, Callable[[], bool], Any]]] = []


_groups = _Groups()


@contextlib.contextmanager
def group() -> Iterator[None]:
    _groups.open.append([])
    try:
        yield
    finally:
        asked = _groups.open.pop()
    if asked:
        communicator, _, stream = asked[0]
        communicator.launch([transfer for _, transfer, _ in asked], stream)


def get_version() -> SimpleNamespace:
    return SimpleNamespace(libnccl="2.0.0 @ nowhere")


def get_error_string(status: int) -> str:
    return {REMOTE_ERROR: "remote process exited or there was a network error"}[status]


def install() -> None:
    """`import nccl.core` finds this from now on, in this process."""
    module: Any = ModuleType("nccl.core")
    module.Communicator, module.NCCLConfig, module.UniqueId = FakeCommunicator, NCCLConfig, UniqueId
    module.get_unique_id, module.group = get_unique_id, group
    module.get_version, module.get_error_string = get_version, get_error_string
    sys.modules["nccl"], sys.modules["nccl.core"] = ModuleType("nccl"), module
