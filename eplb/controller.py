"""`EplbController`: what a model runner holds."""

import atexit
import functools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch.distributed as dist
from torch import nn

from eplb.config import EplbConfig
from eplb.connect import TorchTransport, Transport
from eplb.health import Health, Metrics
from eplb.load_window import LoadWindowRecorder
from eplb.planner import Planner
from eplb.planning.policy import Topology
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.protocol import Work
from eplb.streams import DeviceStreams
from eplb.worker import Clock, Worker
from eplb.worker_thread import WorkerThread

logger = logging.getLogger(__name__)


@runtime_checkable
class RelocatableLayer(Protocol):
    """What `register()` looks for among a model's modules: a layer whose experts it may move."""

    resident: ResidentExperts
    expert_ranks: tuple[int, ...]
    """The global ranks that share its experts, in their order; empty for one rank alone."""
    dispatch_backend: str
    """What its forward dispatches with: "nccl", "gloo" or "local"."""

    def why_not_relocatable(self) -> str | None:
        """Why its experts must not move, None if they may."""
        ...


class EplbController:
    """Balances the experts of the registered models over the ranks of a group while they serve.

    Composed into whatever runs the model: `register()` once, `step()` after each forward. In the background a worker
    thread sums the load over ranks, plans, fills free slots and hands over new tables; `step()` flips them in.

    Args:
        config: the knobs; defaults if None.
        process_group: the ranks that share the experts, the same as the layers'. None if all experts are on this rank.
        transport: another way to reach the ranks; over `process_group` if None.
        clock: seconds, for deadlines; only differences matter.

    Raises:
        ValueError: a combination that cannot work.
    """

    def __init__(
        self,
        config: EplbConfig | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        transport: Transport | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.config = config or EplbConfig()
        self._transport = transport or TorchTransport(process_group)
        self._clock = clock
        self._policy = self.config.make_policy()
        self._topology = Topology(
            max(1, len(self._transport.ranks)), self.config.ranks_per_node, self.config.num_groups
        )
        self._layers: list[RelocatableLayer] = []
        self._steps = 0
        self._worker: Worker | None = None
        self._thread: WorkerThread | None = None
        self._wake = threading.Event()
        self._windows: dict[Work, LoadWindowRecorder] = {}
        self._streams: DeviceStreams | None = None
        self._proposals_due = 0
        self._warm_ups = 0
        self._closed = False

    # ---- registering

    def register(self, model: nn.Module) -> int:
        """Register every MoE layer of `model`; returns how many it has, which may be none.

        Call it on every rank for the same models in the same order, before the first `step()`.

        Raises:
            RuntimeError: the controller has begun to step, or is closed.
            ValueError: a layer is registered already, lives on another group or device, has another number of redundant
                experts than the config asserts, or cannot be relocated. Nothing is registered then.
        """
        if self._worker is not None or self._closed:
            raise RuntimeError("register() must come before the first step() and before close()")
        # By what they hold, as a wrapper (`torch.compile`'s, say) answers for the layer in it.
        layers = [module for module in model.modules() if isinstance(module, RelocatableLayer)]
        found = list({id(layer.resident): layer for layer in layers}.values())
        for layer in found:
            self._check(layer, (self._layers or found)[0].resident)
        together = self._layers + found
        if together:
            backends = {layer.dispatch_backend for layer in together}
            self._transport.check(self.config, together[0].resident.streams.device, backends)
        for layer in found:
            layer.resident.controller = self
            layer.resident.quiesced = self.quiesced
        self._layers += found
        return len(found)

    def _check(self, layer: RelocatableLayer, first: ResidentExperts) -> None:
        resident = layer.resident
        ranks = self._transport.ranks
        if resident.controller is not None:
            raise ValueError("a layer of the model is registered with a controller already")
        if layer.expert_ranks != ranks:
            raise ValueError(
                f"process_group has the ranks {list(ranks)}, but a layer of the model shares its experts among "
                f"{list(layer.expert_ranks)} (empty: one rank alone); they must be the same"
            )
        if resident.streams.device != first.streams.device:
            raise ValueError(
                f"layers are on {first.streams.device} and on {resident.streams.device}; one device is needed"
            )
        asserted = self.config.num_redundant_experts
        if asserted is not None and asserted != resident.num_redundant_experts:
            raise ValueError(
                f"num_redundant_experts={asserted} is asserted, but a layer of the model was built with "
                f"{resident.num_redundant_experts}"
            )
        if resident.num_experts % self.config.num_groups:
            raise ValueError(
                f"num_groups={self.config.num_groups} must divide the num_experts={resident.num_experts} of every layer"
            )
        reason = layer.why_not_relocatable()
        if reason is not None:
            raise ValueError(f"a layer of the model cannot be relocated: {reason}")

    def _start(self) -> Worker:
        """Connect to the other ranks and begin, at the first step. Collective."""
        config = self.config
        residents = [layer.resident for layer in self._layers]
        streams = self._streams = residents[0].streams
        agreement, communicator = self._transport.connect(
            config, streams, {layer.dispatch_backend for layer in self._layers}
        )
        self._windows = {
            Work.REBALANCE: LoadWindowRecorder(
                residents,
                streams,
                interval=config.step_interval,
                window_size=config.window_size,
                num_samples=config.window_samples,
            )
        }
        if config.log_balancedness:
            interval = config.log_balancedness_interval
            self._windows[Work.REPORT] = LoadWindowRecorder(
                residents, streams, interval=interval, window_size=interval, num_samples=1
            )
        worker = self._worker = Worker(
            layers=residents,
            config=config,
            planner=Planner(residents, self._policy, self._topology, config.max_bytes_in_flight),
            agreement=agreement,
            communicator=communicator,
            streams=streams,
            windows=self._windows,
            earlier=streams.gate.events(),
            clock=self._clock,
            notify=self._wake.set,
        )
        if config.use_async:
            self._run_in_background(worker, streams)
        return worker

    def _run_in_background(self, worker: Worker, streams: DeviceStreams) -> None:
        self._thread = WorkerThread(worker, streams, self._wake)
        self._thread.start()
        atexit.register(self.close)

    # ---- serving

    def step(self) -> None:
        """Call it after each forward, on the thread and stream that ran it.

        The first call connects the ranks and is collective. After it, a call costs a counter and a poll: nothing is allocated,
        nobody is waited for. A new table that is ready is flipped in here. While the stream is being captured into a CUDA
        graph it does nothing. With ``use_async=False`` a due rebalance runs in here from end to end, and every call is
        collective.

        Raises:
            RuntimeError: no registered model has an MoE layer.
        """
        if self._closed:
            return
        worker = self._worker
        if worker is None:
            if not self._layers:
                raise RuntimeError("step() without any MoE layer: register() a model that has one first")
            if self._layers[0].resident.streams.is_capturing():
                return
            worker = self._start()
        assert self._streams is not None
        if self._streams.is_capturing():
            return
        self._adopt(worker)
        self._steps += 1
        self._record_load(worker)
        if not self.config.use_async:
            self._rebalance_here(worker)

    def _record_load(self, worker: Worker) -> None:
        for recorder in self._windows.values():
            try:
                recorder.step(self._steps)
            except Exception as error:
                worker.note_failure("the load could not be recorded; its window is lost", error)

    def _rebalance_here(self, worker: Worker) -> None:
        """Run what is due from end to end on the calling thread; all ranks do so in the same step.

        What is due follows from the number of steps, which is the same on all ranks. A window that was lost on this one
        counts as no load; nobody waits for it.
        """
        due = [work for work, recorder in self._windows.items() if recorder.is_end(self._steps)]
        if due:
            self._wait_for_windows(worker)
        for work in due:
            worker.propose(work)
            self._proposals_due += 1

        def is_unfinished() -> bool:
            return worker.num_proposals_heard < self._proposals_due or not worker.is_idle

        while is_unfinished():
            self._wake.clear()
            worker.tick(is_unfinished)
            self._adopt(worker)
            health = worker.health
            if health.state in ("lost", "peer_left", "peer_unreachable", "grace_stalled", "models_differ"):
                return  # a later step goes on where this one stopped, if it can
            if health.state == "held" and health.seconds_waiting > self.config.peer_timeout:
                return
            if is_unfinished():
                self._wake.wait(self.config.round_interval / 10)

    def _wait_for_windows(self, worker: Worker) -> None:
        deadline = time.monotonic() + self.config.transfer_timeout
        while worker.health.state != "lost" and any(recorder.is_on_its_way() for recorder in self._windows.values()):
            worker.tick(lambda: False)
            if time.monotonic() > deadline:
                return

    def _adopt(self, worker: Worker) -> None:
        """Flip a published version in, if there is one."""
        assert self._streams is not None
        try:
            worker.inbox.flip(self._streams)
        except Exception as error:
            # The old tables stay in force, the slots that they name too, and the next step tries again (I6).
            worker.note_failure("a flip could not be enqueued", error)

    @contextmanager
    def quiesced(self) -> Iterator[None]:
        """No relocation is under way inside, and none begins: for writing experts' weights. Collective.

        The calling thread adopts published tables itself while it waits. A rank that is through waits for no other, but none
        relocates until all have been through as often: what one has written already, another might copy over.

        Raises:
            TimeoutError: not within `quiesce_timeout`. Nothing may be written then.
            RuntimeError: the ranks lost each other, so they may have different tables. Nothing may be written then.
        """
        worker = self._worker
        if worker is None or self._closed:
            yield
            return
        worker.hold()
        completed = False
        try:
            deadline = time.monotonic() + self.config.quiesce_timeout
            while not worker.is_held:
                state = worker.health.state
                if state == "lost":
                    raise RuntimeError(f"the ranks cannot agree that relocations have come to rest: {worker.health}")
                if state == "peer_left" and worker.is_published:
                    self._adopt(worker)  # all ranks heard the same, so all have the same tables then
                    break
                self._wake.set()
                if self._thread is None:
                    worker.tick(lambda: not worker.is_held)
                time.sleep(self.config.round_interval / 10)
                self._adopt(worker)
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"relocations did not come to rest within quiesce_timeout={self.config.quiesce_timeout} s: "
                        f"{worker.health}"
                    )
            yield
            completed = True
        finally:
            # Fills read on the side stream what the caller has written on its own.
            assert self._streams is not None
            self._streams.side.wait_event(self._streams.current().record_event())
            worker.end_hold(completed)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Forwards inside run as always, but are not counted as load. Works for graphs captured before or inside."""
        self._warm_ups += 1
        self._count_tokens_as(0)
        try:
            yield
        finally:
            self._warm_ups -= 1
            if not self._warm_ups:
                self._count_tokens_as(1)

    def _count_tokens_as(self, increment: int) -> None:
        for resident in [layer.resident for layer in self._layers]:
            write = functools.partial(resident.load_increment_1.fill_, increment)
            resident.streams.run(resident.streams.current(), write)

    # ---- looking in

    def health(self) -> Health:
        """How the rebalancer is; cheap, never blocks, never raises."""
        if self._worker is None:
            return Health("closed" if self._closed else "idle", 0, "IDLE")
        health = self._worker.health
        return replace(
            health,
            state="closed" if self._closed else health.state,
            last_error=self._worker.last_error,
        )

    def metrics(self) -> Metrics:
        """What it has done so far; cheap, never blocks, never raises."""
        if self._worker is None:
            return Metrics()
        return replace(self._worker.metrics, failures=self._worker.num_failures)

    def save_load_trace(self, path: str | Path) -> int:
        """Write the last load windows, summed over ranks, for ``python -m eplb.simulate --trace``; local.

        Args:
            path: an ``.npz`` file; it gets `load_BLE`, int64 ``[sub-windows, layers, experts]``, oldest first.

        Returns:
            How many sub-windows were written; 0, and no file, before the first window.

        Raises:
            ValueError: the registered layers have different numbers of experts.
        """
        sizes = {layer.resident.num_experts for layer in self._layers}
        if len(sizes) > 1:
            raise ValueError(f"a load trace needs layers with equally many experts, got {sorted(sizes)}")
        windows = self._worker.load_trace() if self._worker is not None else []
        if not windows:
            return 0
        load_BLE = np.concatenate(windows).reshape(-1, len(self._layers), sizes.pop())
        np.savez_compressed(path, load_BLE=load_BLE)
        return len(load_BLE)

    def close(self) -> None:
        """Stop, and tell the other ranks, at most `close_timeout` seconds long. Local; the layers go on serving.

        May be called more than once; with ``use_async=True`` it is called at exit.
        """
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            if self._thread is not None:
                self._thread.close(self.config.close_timeout)
                atexit.unregister(self.close)
            elif not self.config.use_async:
                self._leave_here(self._worker)
            self._adopt(self._worker)
        for layer in self._layers:
            layer.resident.controller = None
            layer.resident.quiesced = nullcontext

    def _leave_here(self, worker: Worker) -> None:
        deadline = time.monotonic() + self.config.close_timeout
        worker.leave()
        while not worker.is_done and time.monotonic() < deadline:
            self._wake.clear()
            worker.tick()
            self._wake.wait(self.config.round_interval / 10)

    def __enter__(self) -> "EplbController":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
