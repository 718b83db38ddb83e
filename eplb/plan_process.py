"""Rebalance, plan: `PlanProcess` plans in a process of its own, so that planning never holds this one's interpreter.

The child imports NumPy, `eplb.planning` and what the policy needs; no PyTorch. It is not started by `multiprocessing`, which
would run the user's main module again. Messages are pickles behind their length (8 bytes, little-endian): requests on the
child's standard input, answers on its standard output.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from eplb.planning.placement import Placement
from eplb.planning.policy import Policy, Topology
from eplb.planning.rebalance import LayerFacts, plan_rebalance
from eplb.rounds.messages import encode_plan

_PARENT_INTERVAL = 1.0  # seconds; how often the child looks whether its parent is alive
_EXIT_SECONDS = 1.0  # that a child gets to end by itself


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is made from; see `plan_rebalance()`."""

    facts: list[LayerFacts]
    placements: list[Placement]
    shares: list[np.ndarray]
    load_NA: np.ndarray
    past_HA: np.ndarray
    free_slots_GW: np.ndarray
    max_bytes_in_flight: int | None


@dataclass(frozen=True)
class MadePlan:
    """A plan, ready to be sent.

    Attributes:
        words: of `encode_plan()`.
        num_waves: 0 if there is nothing to do.
        num_moves, num_bytes: experts and bytes that move.
        seconds: that planning and encoding took.
    """

    words: np.ndarray = field(repr=False)
    num_waves: int
    num_moves: int
    num_bytes: int
    seconds: float


def make(request: PlanRequest, policy: Policy, topology: Topology) -> MadePlan:
    """Plan, in whichever process."""
    began_at = time.perf_counter()
    plan = plan_rebalance(
        request.facts,
        request.placements,
        request.shares,
        request.load_NA,
        request.past_HA,
        request.free_slots_GW,
        policy,
        topology,
        request.max_bytes_in_flight,
    )
    words = encode_plan(plan)
    moves = [request.facts[u.layer].slot_bytes for wave in plan.waves for u in wave.updates for _ in u.moves]
    return MadePlan(words, len(plan.waves), len(moves), sum(moves), time.perf_counter() - began_at)


class PlanProcess:
    """A child that plans; started by `start()`, and again by the next plan if it has ended.

    `plan()` blocks and is called on one thread at a time; everything else may be called from any thread and does not.

    Args:
        policy: is sent to the child, where it stays: what it keeps between plans is kept there.
        topology: for the policy.

    Attributes:
        pid: of the child, None if there is none.

    Raises:
        ValueError: the policy cannot be sent.
    """

    def __init__(self, policy: Policy, topology: Topology) -> None:
        self._start_message = _policy_message(policy, topology)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def start(self) -> None:
        """Start the child, so that the first plan need not wait for it. Takes a millisecond."""
        with contextlib.suppress(OSError):  # the first plan tries again, and its error is told
            self._running()

    def plan(self, request: PlanRequest) -> MadePlan:
        """The plan.

        Raises:
            RuntimeError: the child ended, or the controller is closed. The next call starts another.
            OSError: no child could be started.
            Exception: what the policy raised; with the child's traceback as a note.
        """
        child = self._running()
        assert child.stdin is not None and child.stdout is not None
        try:
            _write(child.stdin, pickle.dumps(request, protocol=5))
            answer = _read(child.stdout)
        except (OSError, ValueError):  # its pipes are broken, or closed by `close()`
            answer = None
        if answer is None:
            self._end(child)
            status = child.wait(_EXIT_SECONDS)
            _close_pipes(child)
            raise RuntimeError(f"the planning process {child.pid} ended with status {status}")
        made = pickle.loads(answer)
        if isinstance(made, BaseException):
            raise made
        assert isinstance(made, MadePlan)
        return made

    def kill(self) -> None:
        """End the child now: a plan under way fails. Another is started by the next `plan()`."""
        child = self._child
        if child is not None:
            self._end(child)

    def close(self) -> None:
        """End the child; there will be no other."""
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None:
            self._end(child)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_EXIT_SECONDS)
            _close_pipes(child)

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """Kill this child, and not one that has been started since; does not wait for its end."""
        with self._lock:
            if self._child is child:
                self._child = None
        child.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise RuntimeError("the controller is closed: nothing is planned any more")
            if self._child is None or self._child.poll() is not None:
                self._child = _start()
                assert self._child.stdin is not None
                # Far less than a pipe holds, so this does not wait for the child.
                _write(self._child.stdin, self._start_message)
            return self._child


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()


def why_not_sent(policy: Policy) -> str | None:
    """Why the policy cannot plan in another process, None if it can."""
    if type(policy).__module__ == "__main__":
        return "its class is in __main__, which another process cannot import"
    try:
        pickle.dumps(policy, protocol=5)
    except Exception as error:  # whatever the policy's own reduction raises
        return f"it cannot be pickled: {type(error).__name__}: {error}"
    return None


def _policy_message(policy: Policy, topology: Topology) -> bytes:
    reason = why_not_sent(policy)
    if reason is not None:
        raise ValueError(f"policy={policy!r} cannot plan in a process of its own: {reason}")
    message = pickle.dumps((policy, topology), protocol=5)
    if len(message) > 2**15:
        raise ValueError(f"policy={policy!r} cannot plan in a process of its own: its pickle has {len(message)} bytes")
    return message


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from eplb.plan_process import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # NumPy's BLAS would start a thread for each core, only to be there.
        env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        bufsize=0,
    )


def _write(pipe: Any, message: bytes) -> None:
    view = memoryview(len(message).to_bytes(8, "little") + message)
    while view:
        view = view[pipe.write(view) :]


def _read(pipe: Any) -> bytes | None:
    """The next message; None if there will be no more."""
    head = _read_exactly(pipe, 8)
    return None if head is None else _read_exactly(pipe, int.from_bytes(head, "little"))


def _read_exactly(pipe: Any, count: int) -> bytes | None:
    parts = []
    while count:
        part = pipe.read(min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


# ---- the child


def serve() -> None:
    """The child's whole life: answers requests until its parent is gone."""
    requests: BinaryIO = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a policy prints must not be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; this ends with it
    parent = os.getppid()
    start = _read(requests)
    if start is None:
        return
    try:
        policy, topology = pickle.loads(start)
        failure = None
    except BaseException as error:
        failure = error
    incoming = _Incoming(requests, parent)
    while True:
        request = incoming.next()
        try:
            if failure is not None:
                raise RuntimeError(f"the policy cannot be made in the planning process: {failure}") from failure
            answer: Any = make(pickle.loads(request), policy, topology)
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a policy too: they are its errors
            answer = _sendable(error)
        _write(answers, pickle.dumps(answer, protocol=5))


class _Incoming:
    """Requests, read on a thread that also sees the parent die while the policy thinks."""

    def __init__(self, pipe: BinaryIO, parent: int) -> None:
        self._pipe, self._parent = pipe, parent
        self._condition = threading.Condition()
        self._waiting: list[bytes] = []
        threading.Thread(target=self._read_all, daemon=True).start()

    def next(self) -> bytes:
        with self._condition:
            self._condition.wait_for(lambda: self._waiting)
            return self._waiting.pop(0)

    def _read_all(self) -> None:
        # A process that the parent forked may hold the pipe open after it: so its number is looked at too.
        while os.getppid() == self._parent:
            if not select.select([self._pipe], [], [], _PARENT_INTERVAL)[0]:
                continue
            request = _read(self._pipe)
            if request is None:
                break
            with self._condition:
                self._waiting.append(request)
                self._condition.notify()
        os._exit(0)


def _sendable(error: BaseException) -> BaseException:
    """The error itself if it survives a pickle, else one of its text; never one that ends a thread silently."""
    told = f"in the planning process:\n{traceback.format_exc()}"
    if isinstance(error, Exception):
        with contextlib.suppress(Exception):
            back = pickle.loads(pickle.dumps(error))
            if str(back) == str(error):
                error.add_note(told)
                return error
    substitute = RuntimeError(f"the policy raised {type(error).__name__}: {error}")
    substitute.add_note(told)
    return substitute
