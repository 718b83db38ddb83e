"""Rebalance, between ranks: `GlooGroup`, collectives that nothing else uses, made and closed without the others' help.

It is no group of `torch.distributed`'s registry: nobody else finds it, `destroy_process_group()` leaves it alone, and its
name, unlike those of `new_group()`, does not depend on how many groups a rank has made before.
"""

import ctypes
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions, BroadcastOptions

# Our deadlines are states that `health()` shows and that a late peer can still mend; a timeout of gloo's own would break
# the group for good. So its timeout is out of reach.
_NEVER = timedelta(days=7)

_MOMENT = 0.2  # seconds

_lock = threading.Lock()
_closing: list["GlooGroup"] = []
"""Closed groups with collectives that other ranks have not taken part in yet; guarded by the lock."""


class GlooGroup:
    """The ranks' collectives; each returns at once. Used by one thread.

    A group's destructor waits for its collectives, and a collective waits for the other ranks: a peer that is stopped would
    keep this process from exiting. gloo cannot abort them (tried with torch 2.13: `abort()` does nothing). So a group is kept
    from being destroyed until `close()` finds nothing under way. If something is, its threads and descriptors stay until
    a later group is made or closed, or until the process ends, which kills them.

    Args:
        store: of this group alone.
        timeout: seconds to connect. All ranks must have come to it.

    Raises:
        RuntimeError: the ranks did not connect in time.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        _destroy_closed([])
        self.rank, self.size = rank, size
        # (Any: PyTorch's stubs do not know its collectives.)
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        self._under_way: list[dist.Work] = []

    def all_gather(self, said: Sequence[torch.Tensor], mine: torch.Tensor) -> dist.Work:
        options = AllgatherOptions()
        options.timeout = _NEVER
        return self._note(self._group.allgather([list(said)], [mine], options))

    def broadcast(self, said: torch.Tensor, root: int) -> dist.Work:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = root, 0, _NEVER
        return self._note(self._group.broadcast([said], options))

    def all_to_all(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, receive_splits: list[int], send_splits: list[int]
    ) -> dist.Work:
        options = AllToAllOptions()
        options.timeout = _NEVER
        return self._note(self._group.alltoall_base(incoming, outgoing, receive_splits, send_splits, options))

    def close(self) -> None:
        """Waits a moment for collectives that are about to end, and no longer for any rank."""
        deadline = time.monotonic() + _MOMENT
        while not self._is_quiet() and time.monotonic() < deadline:
            time.sleep(0.001)
        _destroy_closed([self])

    def _note(self, work: dist.Work) -> dist.Work:
        self._under_way = [earlier for earlier in self._under_way if not earlier.is_completed()]
        self._under_way.append(work)
        return work

    def _is_quiet(self) -> bool:
        return all(work.is_completed() for work in self._under_way)

    def _try_to_destroy(self) -> bool:
        if not self._is_quiet():
            return False
        group = self._group
        del self._group, self._under_way
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(group))
        return True


def _destroy_closed(more: list[GlooGroup]) -> None:
    with _lock:
        _closing[:] = [group for group in [*_closing, *more] if not group._try_to_destroy()]
