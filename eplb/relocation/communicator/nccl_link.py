"""Rebalance, fill: `NcclLink`, a NCCL communicator of nccl4py on which no call waits."""

import importlib
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from eplb.streams import StreamLike

_SUCCESS, _IN_PROGRESS = 0, 7  # of ncclResult_t, in nccl.h

_log = logging.getLogger(__name__)


def nccl4py() -> Any:
    """nccl4py's module `nccl.core`.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return importlib.import_module("nccl.core")
    except ImportError as error:
        raise ValueError(
            f"communicator='nccl' needs the package nccl4py, which cannot be imported ({error}): install 'moe-layer[nccl]' "
            "(nccl4py needs cuda-bindings too, which PyTorch's CUDA wheels bring), or use 'auto'"
        ) from error


def new_id() -> bytes:
    """The name of a communicator to come, made by one of its ranks."""
    return bytes(nccl4py().get_unique_id())


def check_library() -> str:
    """The libnccl that nccl4py calls, in words.

    Raises:
        ValueError: there is no nccl4py.
        RuntimeError: it finds no libnccl, or one beside the one that PyTorch has loaded.
    """
    found = nccl4py().get_version().libnccl
    if found is None:
        raise RuntimeError(
            "nccl4py finds no libnccl.so.2: it comes with PyTorch's CUDA wheels, as nvidia-nccl-cu13 or -cu12"
        )
    loaded = _loaded()
    if len(loaded) > 1:
        raise RuntimeError(f"nccl4py must use the libnccl that PyTorch has loaded, but there are {', '.join(loaded)}")
    return str(found)


def _loaded() -> list[str]:
    """The files of libnccl in this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libnccl.so" in line}
    return sorted(paths)


class NcclLink:
    """One rank's end of a non-blocking NCCL communicator. Used by one thread.

    While NCCL is at work on what it was asked for it must be asked for nothing else, and nothing may be enqueued on the
    stream that was given to it (NCCL's guide, "Creating a communicator with options").

    Args:
        unique_id: of `new_id()`, the same on all ranks.
        rank, size: of this rank. Its device is the thread's current one.

    Raises:
        Exception: of nccl4py.
    """

    def __init__(self, unique_id: bytes, rank: int, size: int) -> None:
        self._api = nccl4py()
        self._communicator = self._api.Communicator.init(
            size, rank, self._api.UniqueId.from_bytes(unique_id), self._api.NCCLConfig(blocking=False)
        )
        self._ending: threading.Thread | None = None
        self.is_ended = False

    def is_ready(self) -> bool:
        """Whether NCCL has done what it was asked for: to connect the ranks, or to enqueue transfers.

        Raises:
            RuntimeError: it failed, or a transfer did.
        """
        status = int(self._communicator.get_async_error())
        if status in (_SUCCESS, _IN_PROGRESS):
            return status == _SUCCESS
        said = self._api.get_error_string(status), self._communicator.get_last_error()
        raise RuntimeError(f"NCCL failed: {': '.join(filter(None, said))}")

    def post(
        self,
        sends: Iterable[tuple[torch.Tensor, int]],
        receives: Iterable[tuple[torch.Tensor, int]],
        stream: StreamLike,
    ) -> None:
        """Ask for transfers as one group; they are on `stream` once `is_ready()`.

        Args:
            sends, receives: slabs on the device, each with the other rank. Those between two ranks pair up by their order.
        """
        with self._api.group():
            for slab, peer in sends:
                self._communicator.send(slab, peer, stream=stream)
            for slab, peer in receives:
                self._communicator.recv(slab, peer, stream=stream)

    def end(self, kept: object) -> None:
        """Abort all that is under way, here: `is_ended` when nothing of it is left.

        On a thread of its own, as NCCL frees memory and waits for threads of its own then.

        Args:
            kept: what must live until then.
        """
        if self._ending is not None:
            return
        communicator, self._communicator = self._communicator, None

        def abort(_: object) -> None:
            try:
                communicator.abort()
            except Exception:
                _log.exception("NCCL could not abort its transfers: what they touch stays out of use")
            else:
                self.is_ended = True

        self._ending = threading.Thread(target=abort, args=(kept,), name="eplb-nccl-abort", daemon=True)
        self._ending.start()

    def wait_for_end(self, seconds: float) -> None:
        """After `end()`, for so long at most."""
        assert self._ending is not None
        self._ending.join(seconds)
