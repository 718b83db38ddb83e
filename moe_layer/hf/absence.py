"""Ranks that share a swapped model's experts and do not come to a forward: found within a deadline, told in one error.

Over gloo a collective raises when its group's time is over, and the one-sided dispatcher's waits on the device end. Over NCCL
nothing raises: its watchdog ends the process. `NcclWatch` comes before it.
"""

import logging
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_logger = logging.getLogger(__name__)

_BEFORE_NCCL = 0.9  # of the group's time: then its watchdog would end the process
_LOOKS = 20  # in that time


def absence(num_ranks: int, error: BaseException) -> RuntimeError:
    """What the user is told then; raise it from `error`."""
    return RuntimeError(
        f"another of the {num_ranks} ranks that share the experts did not take part in this forward. All call the model "
        "equally often: where they generate() to different lengths, each needs generate(..., synced_gpus=True). "
        f"({error})"
    )


class NcclWatch:
    """Around each forward over NCCL: one that is not over on the device in time ends in a TimeoutError, not in a hang.

    A thread looks at the oldest forward. When its time is over it logs why, and calls `abort`: the kernels that wait leave, and
    so the host. The group is of no use afterwards. The thread calls nothing of CUDA, which captures would not allow.

    Args:
        timeout: seconds from the begin of a layer's forward to its end on the device; kernels may be compiled in them.
        abort: ends what the ranks wait in.
        mark: called with a number behind the work of a forward; `finished` gives it when that work is over.
        finished: the last number so far; reads host memory only.
        is_capturing: whether the current stream is captured: then nothing is watched.
    """

    def __init__(
        self,
        timeout: float,
        abort: Callable[[], None],
        mark: Callable[[int], None],
        finished: Callable[[], int],
        is_capturing: Callable[[], bool],
    ) -> None:
        self._timeout = timeout
        self._abort, self._mark, self._finished, self._is_capturing = abort, mark, finished, is_capturing
        self._pending: deque[tuple[int, float]] = deque()  # forwards that may not be over, and when they began
        self._number = 0
        self._current: int | None = None
        self._raised = 0  # the last forward that ended in an exception: nobody marks it
        self._failure: str | None = None
        period = timeout / _LOOKS
        self.thread = threading.Thread(target=_look_again, args=(weakref.ref(self), period), daemon=True)
        self.thread.start()

    def __enter__(self) -> None:
        self.raise_if_over()
        self._current = None
        if not self._is_capturing():
            self._number += 1
            self._current = self._number
            self._pending.append((self._number, time.monotonic()))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._failure is not None:
            raise TimeoutError(self._failure) from error
        if self._current is None:
            return
        if error is None:
            self._mark(self._current)
        else:
            self._raised = self._current

    def raise_if_over(self) -> None:
        """Raises TimeoutError if a forward was not over in time. (Outputs since then mean nothing.)"""
        if self._failure is not None:
            raise TimeoutError(self._failure)

    def look(self) -> None:
        """Abort if the oldest forward's time is over."""
        if self._failure is not None:
            return
        over = max(self._finished(), self._raised)
        while self._pending and self._pending[0][0] <= over:
            self._pending.popleft()
        if self._pending and time.monotonic() - self._pending[0][1] > self._timeout:
            self._failure = f"a forward was not over within {self._timeout:g} s; NCCL's communicator was aborted"
            _logger.error(
                "%s. Did another rank not take part? Where ranks generate() to different lengths, each needs "
                "generate(..., synced_gpus=True)",
                self._failure,
            )
            self._abort()


def _look_again(watch: "weakref.ref[NcclWatch]", period: float) -> None:
    while (found := watch()) is not None:
        found.look()
        del found
        time.sleep(period)


_watches: "weakref.WeakKeyDictionary[dist.ProcessGroup, NcclWatch]" = weakref.WeakKeyDictionary()


@torch.inference_mode(False)  # or its tensors could be written in that mode alone
def watch_of(group: dist.ProcessGroup, device: torch.device) -> NcclWatch:
    """The watch of a group whose backend for `device` is NCCL; one for all layers."""
    found = _watches.get(group)
    if found is None:
        timeout = group._get_backend(device).options._timeout.total_seconds()
        on_device = torch.zeros(1, dtype=torch.int64, device=device)
        on_host = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        numbers, known = on_host.numpy(), weakref.ref(group)

        def abort() -> None:
            if (one := known()) is not None:
                one._get_backend(device).abort()

        def mark(number: int) -> None:
            with torch.no_grad():
                on_host.copy_(on_device.fill_(number), non_blocking=True)

        found = _watches[group] = NcclWatch(
            _BEFORE_NCCL * timeout, abort, mark, lambda: int(numbers[0]), torch.cuda.is_current_stream_capturing
        )
    return found


# ---- generate()


def check_generate(model: nn.Module, look: Callable[[nn.Module], None]) -> None:
    """Let `model.generate()` call `look(model)` at its end: after its last forward no other one would raise."""
    if not callable(getattr(model, "generate", None)):
        return
    vars(model)["_unchecked_generate"] = (vars(model).get("generate"), look)
    vars(model)["generate"] = types.MethodType(_generate, model)  # deep copies get one of their own


def uncheck_generate(model: nn.Module) -> None:
    """The reverse of `check_generate`, if that was called."""
    before, _ = vars(model).pop("_unchecked_generate", (None, None))
    if isinstance(found := vars(model).get("generate"), types.MethodType) and found.__func__ is _generate:
        del vars(model)["generate"]
        if before is not None:
            vars(model)["generate"] = before


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    before, look = self._unchecked_generate
    told = type(self).generate(self, *args, **kwargs) if before is None else before(*args, **kwargs)
    look(self)
    return told
