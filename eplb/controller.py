"""`EplbController`: what a model runner holds. Its `step()` takes snapshots of the load and flips published tables."""

import atexit
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import nn

from eplb.config import EplbConfig
from eplb.connect import TorchTransport, Transport
from eplb.health import Health, HealthState, Metrics
from eplb.load_window import LoadWindowRecorder, recorders
from eplb.plan_process import PlanProcess
from eplb.planner import Planner, plans_in_a_process
from eplb.planning.policy import Topology
from eplb.registration import RelocatableLayer, check_layer, find_layers
from eplb.relocation.resident import ResidentExperts
from eplb.rounds.protocol import Work
from eplb.saving import write_load_trace, write_placements
from eplb.streams import DeviceStreams
from eplb.worker import Clock, InsideStep, Wake, Worker, WorkerThread


class EplbController:
    """Balances the experts of the registered models over the ranks of a group while they serve.

    Composed into whatever runs the model: `register()` once, `step()` after each forward. In the background a worker
    thread sums the load over ranks, plans, fills free slots and hands over new tables; `step()` flips them in.

    Args:
        config: the knobs, also as a dictionary; defaults if None.
        process_group: the ranks that share the experts, the same as the layers'. None if all experts are on this rank.
        transport: another way to reach the ranks; over `process_group` if None.
        clock: seconds, for deadlines; only differences matter.

    Raises:
        ValueError: a combination that cannot work.
    """

    def __init__(
        self,
        config: EplbConfig | dict[str, Any] | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        transport: Transport | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.config = EplbConfig.model_validate({} if config is None else config)
        self._transport = transport or TorchTransport(process_group)
        self._clock = clock
        self._policy = self.config.make_policy()
        self._plans_aside = plans_in_a_process(self.config, self._policy)
        self._topology = Topology(
            max(1, len(self._transport.ranks)), self.config.ranks_per_node, self.config.num_groups
        )
        self._layers: list[RelocatableLayer] = []
        self._steps = self._next_due = 0
        self._worker: Worker | None = None
        self._thread: WorkerThread | None = None
        self._inside_step: InsideStep | None = None
        self._wake = Wake()
        self._windows: dict[Work, LoadWindowRecorder] = {}
        self._streams: DeviceStreams | None = None
        self._warm_ups = 0
        self._closed = False

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
        found = find_layers(model)
        for layer in found:
            check_layer(layer, (self._layers or found)[0].resident, self._transport.ranks, self.config)
        together = self._layers + found
        if together:
            device = together[0].resident.streams.device
            self._transport.check(self.config, device, {layer.dispatch_backend for layer in together})
        for layer in found:
            layer.resident.controller = self
            layer.resident.quiesced = self.quiesced
        self._layers += found
        if self._layers:
            self._streams = self._layers[0].resident.streams
        return len(found)

    @property
    def _residents(self) -> list[ResidentExperts]:
        return [layer.resident for layer in self._layers]

    def _start(self, streams: DeviceStreams) -> Worker:
        """Begin to connect to the other ranks, at the first step."""
        config, residents = self.config, self._residents
        backends = {layer.dispatch_backend for layer in self._layers}
        self._windows = recorders(residents, streams, config)
        earlier = streams.gate.events()
        process = PlanProcess(self._policy, self._topology) if self._plans_aside and not residents[0].rank else None
        planner = Planner(residents, self._policy, self._topology, config.max_bytes_in_flight, process)
        # Last, as the other ranks count on what has begun to connect.
        connection = self._transport.connect(config, streams, backends, planner.pools, self._wake.set)
        worker = self._worker = Worker(
            layers=residents,
            config=config,
            planner=planner,
            connection=connection,
            streams=streams,
            windows=self._windows,
            earlier=earlier,
            clock=self._clock,
            notify=self._wake.set,
        )
        if config.use_async:
            self._run_in_background(worker, streams)
        else:
            self._inside_step = InsideStep(worker, self._windows, config, self._clock, self._wake)
        atexit.register(self.close)
        return worker

    def _run_in_background(self, worker: Worker, streams: DeviceStreams) -> None:
        self._thread = WorkerThread(worker, streams, self._wake, self.config)
        self._thread.start()

    # ---- serving

    def step(self) -> None:
        """Call it after each forward, on the thread and stream that ran it.

        The first call begins to connect the ranks: every rank makes it, and until all have, `health()` is "connecting". A call
        costs a counter, a poll and, while experts move, a look at the clock: nobody is waited for. A new table that is ready
        is flipped in here. While the stream is captured into a CUDA graph it does no more than count. With ``use_async=False``
        a due rebalance runs in here from end to end, and every call is collective: it waits for the other ranks, each time at
        most `connect_timeout`, `peer_timeout` or `grace_timeout`.

        Raises:
            RuntimeError: no registered model has an MoE layer.
        """
        if self._closed:
            return
        streams, worker = self._streams, self._worker
        if streams is None:
            raise RuntimeError("step() without any MoE layer: register() a model that has one first")
        # Few objects and calls: behind a forward nothing is in the interpreter's caches.
        inbox = worker.inbox if worker is not None else None
        posted, rhythm = (inbox.posted, inbox.rhythm) if inbox is not None else (None, None)
        waits = posted is not None and posted.flipped is None
        is_known = streams.current_handle() in streams.gate.ordered
        if is_known and not waits and self._steps + 1 < self._next_due and self._inside_step is None:
            self._steps += 1
            if rhythm is not None:
                rhythm.last = self._steps, perf_counter()
            return
        if streams.is_capturing():
            return
        worker = worker or self._start(streams)
        if posted is not None and waits:
            posted.flip(streams)
        elif not is_known:
            worker.inbox.adopt()
        self._steps += 1
        if self._steps >= self._next_due:
            self._record_load(worker)
        if self._inside_step is not None:
            try:
                self._inside_step.run(self._steps)
            except Exception as error:  # not even what was met on the way could be reported
                worker.note_failure("the step's relocation was given up", error)
        if rhythm is not None:
            rhythm.last = self._steps, perf_counter()

    def _record_load(self, worker: Worker) -> None:
        for recorder in self._windows.values():
            try:
                recorder.step(self._steps)
            except Exception as error:
                worker.note_failure("the load could not be recorded; its window is lost", error)
        self._next_due = min(recorder.next_due(self._steps) for recorder in self._windows.values())

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
            self._wait_for_end()
            yield
            return
        worker.mailbox.hold()
        completed = False
        try:
            deadline = time.monotonic() + self.config.quiesce_timeout
            while not worker.mailbox.is_held:
                if worker.is_lost:
                    raise RuntimeError(f"the ranks cannot agree that relocations have come to rest: {self.health()}")
                if worker.is_over and worker.is_published:
                    worker.inbox.adopt()  # a rank left: all ranks heard the same, so all have the same tables then
                    break
                self._wake.set()
                if self._thread is None:
                    worker.tick(lambda: not worker.mailbox.is_held)
                time.sleep(self.config.round_interval / 10)
                worker.inbox.adopt()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"relocations did not come to rest within quiesce_timeout={self.config.quiesce_timeout} s: "
                        f"{self.health()}"
                    )
            yield
            completed = True
        finally:
            # Fills read on the side stream what the caller has written on its own.
            assert self._streams is not None
            self._streams.side.wait_event(self._streams.current().record_event())
            worker.mailbox.end_hold(completed)

    def _wait_for_end(self) -> None:
        """A worker that its closed controller could not wait for may still move experts."""
        if self._thread is not None:
            self._thread.join(self.config.quiesce_timeout)
            if not self.is_over:
                raise TimeoutError(
                    f"the worker of a closed controller did not end within quiesce_timeout={self.config.quiesce_timeout} s"
                )

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
        for resident in self._residents:
            write = functools.partial(resident.load_increment_1.fill_, increment)
            resident.streams.run(resident.streams.current(), write)

    # ---- looking in

    def health(self) -> Health:
        """How the rebalancer is, and whether the layers can still reach their ranks; cheap, never blocks, never raises."""
        health = self._health_of_worker()
        for failure in [] if self._closed else filter(None, (layer.dispatch_failure() for layer in self._layers)):
            return replace(health, state=HealthState.DISPATCH_FAILED, seconds_waiting=0.0, reason=failure)
        return health

    def _health_of_worker(self) -> Health:
        worker = self._worker
        if worker is None:
            return Health(HealthState.CLOSED if self._closed else HealthState.IDLE, 0, "IDLE")
        seconds = self._clock() - worker.ticked_at
        trouble = self._thread.trouble(seconds) if self._thread is not None else None
        health = replace(worker.health, last_tick_seconds=seconds, last_error=worker.report.last_error)
        if self._closed:
            reason = None if self.is_over else "the worker has not ended: it may still move experts"
            return replace(health, state=HealthState.CLOSED, reason=reason)
        if trouble is not None:
            return replace(health, state=HealthState.LOST, seconds_waiting=seconds, reason=trouble)
        return health

    @property
    def is_closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    @property
    def is_over(self) -> bool:
        """Whether it is closed and nothing of it acts any more: `close()` may have had no time to wait for that."""
        return self._closed and not (self._thread is not None and self._thread.is_alive())

    def metrics(self) -> Metrics:
        """What it has done so far; cheap, never blocks, never raises."""
        if self._worker is None:
            return Metrics()
        return replace(self._worker.metrics, failures=self._worker.report.num_failures)

    def save_load_trace(self, path: str | Path) -> int:
        """Write the last load windows, summed over ranks, for ``python -m eplb.simulate --trace``; local.

        Args:
            path: an ``.npz`` file; it gets `load_BLE`, int64 ``[sub-windows, layers, experts]``, oldest first.

        Returns:
            How many sub-windows were written; 0, and no file, before the first window.

        Raises:
            ValueError: the registered layers have different numbers of experts.
        """
        windows = self._worker.planning.load_trace() if self._worker is not None else []
        return write_load_trace(path, self._residents, windows)

    def save_placements(self, path: str | Path) -> None:
        """Write where experts are now, with shares, by layer as registered, for `eplb.load_placements()`; local, at any time.

        Raises:
            ValueError: no layer is registered.
        """
        write_placements(path, self._residents)

    def close(self) -> None:
        """Stop, tell the other ranks, and give back threads and connections; the layers go on serving. Local.

        It takes `close_timeout` seconds at most. Should the worker not have ended by then, its layers stay registered until
        it has. May be called more than once; it is called at exit.
        """
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            atexit.unregister(self.close)
            if self._thread is not None:
                self._thread.close(self.config.close_timeout)
            elif self._inside_step is not None:
                self._inside_step.close(self.config.close_timeout)
            self._worker.inbox.adopt()
        if self.is_over:
            for layer in self._layers:
                layer.resident.controller = None
                layer.resident.quiesced = nullcontext

    def __enter__(self) -> "EplbController":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
