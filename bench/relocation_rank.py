"""One rank of `bench.relocation`: a stack of expert-parallel layers that serves while its experts move."""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.relocation_protocols import PROTOCOLS
from bench.report import DTYPES
from eplb.relocation.pool import SlotPool
from moe_layer import MoELayer, make_pool

NUM_BATCHES = 4
TRACED_STEPS = 100
DEADLINE = timedelta(seconds=300)
STEP_RANGE = "eplb.step"
"""What the trace calls the calls of `step()`."""


@dataclass
class Recording:
    """What one rank saw of one protocol, by step.

    Attributes:
        step_ms: the forward, the protocol's `step()`, and the wait for the compute stream.
        call_us: the protocol's `step()` alone, host time.
        relocating: whether a rebalance was under way before or after it, or began in it.
        moving: the same without planning.
        flips: tables that were switched in it.
        wave_bytes, wave_seconds: of each of ours' waves: what a rank received, and how long this one copied.
        wrong: outputs that were not the reference's, bit for bit.
        bytes_per_rebalance: that this rank receives.
        bytes_per_second: the bound of what it copies to its slots; None: there is none.
    """

    step_ms: list[float] = field(default_factory=list)
    call_us: list[float] = field(default_factory=list)
    relocating: list[bool] = field(default_factory=list)
    moving: list[bool] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)
    wave_bytes: list[float] = field(default_factory=list)
    wave_seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    bytes_per_rebalance: int = 0
    bytes_per_second: int | None = None
    health: str = ""


class Stack(nn.Module):
    """Norm, MoE layer, residual; layer after layer."""

    def __init__(self, options: argparse.Namespace, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__()
        shape, num_ranks = options.shape, dist.get_world_size(group)
        per_rank = shape.num_experts // num_ranks
        dtype = DTYPES[options.dtype]
        sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts)
        self.pool: SlotPool = make_pool(
            options.layers,
            *sizes,
            num_shadow_slots=options.free or per_rank,
            num_ranks=num_ranks,
            device=device,
            dtype=dtype,
            shared=True,  # "symm_mem" on a CPU, too
        )
        self.moe_layers = [
            MoELayer(
                *sizes,
                shape.top_k,
                num_shadow_slots=per_rank,
                pool=self.pool,
                process_group=group,
                dispatcher=options.dispatcher,
                max_tokens=options.tokens,
                device=device,
                dtype=dtype,
            )
            for _ in range(options.layers)
        ]
        self.blocks = nn.ModuleList(self.moe_layers)  # what a controller finds
        self.norms = nn.ModuleList(
            nn.RMSNorm(shape.hidden_size, device=device, dtype=dtype) for _ in range(options.layers)
        )

    @property
    def received_bytes(self) -> int:
        """Of a rebalance that moves every expert."""
        return sum(layer.resident.num_physical_per_rank for layer in self.moe_layers) * self.pool.slot_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.moe_layers, strict=True):
            x = x + layer(norm(x))
        return x


class Serving:
    """The forward of a step, eager or as a replay of a CUDA graph, and whether its outputs are right.

    With ``--replay MS`` there is no forward. The host does what it does around a replay of MS milliseconds, and then waits
    for as long without Python's lock: what a step takes beyond that is the host's.
    """

    def __init__(self, model: Stack, options: argparse.Namespace, rank: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1 + rank)
        shape = (NUM_BATCHES, options.tokens, options.shape.hidden_size)
        dtype = DTYPES[options.dtype]
        self._batches = torch.randn(shape, generator=generator).to(device, dtype)
        self._x = self._batches[0].clone()
        self._y = self._x
        self._wrong = torch.zeros((), dtype=torch.int64, device=device)
        self._replay: Callable[[], Any] | None = None
        self._model = model
        self._replay_seconds = options.replay / 1e3
        self._ends_at = 0.0
        if options.replay:
            self._replay = lambda: None
        else:
            for batch in self._batches:
                self._eager(batch)
        if options.graph:
            self._capture(device)
        self._expected = [self._forward(number).clone() for number in range(NUM_BATCHES)]

    def _eager(self, x: torch.Tensor) -> None:
        self._y = self._model(x)

    def _capture(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"--graph needs a CUDA device, got {device}")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._eager(self._x)
        except RuntimeError as error:
            name = type(self._model.moe_layers[0].executor.dispatcher).__name__
            raise ValueError(f"--graph: a forward through {name} cannot be captured: {error}") from error
        self._replay = graph.replay

    def _forward(self, number: int) -> torch.Tensor:
        batch = self._batches[number % NUM_BATCHES]
        if self._replay is None:
            self._eager(batch)
        else:
            self._x.copy_(batch)
            self._replay()
        return self._y

    def step(self, number: int) -> None:
        """A forward; its output is compared on the device, as bytes, so that equal NaNs would be equal."""
        output, expected = self._forward(number), self._expected[number % NUM_BATCHES]
        self._ends_at = time.perf_counter() + self._replay_seconds
        self._wrong += (output.view(torch.uint8) != expected.view(torch.uint8)).any()

    def wait(self, device: torch.device) -> None:
        """For the compute stream alone: a device-wide wait would wait for relocations too."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if self._replay_seconds:
            time.sleep(max(0.0, self._ends_at - time.perf_counter()))

    @property
    def wrong(self) -> int:
        return int(self._wrong)


class Profile:
    """Traces the first steps of the first rebalance, from the step after the one in which it is seen on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._profiler: Any = None
        self._end = 0

    def look(self, recording: Recording) -> None:
        """After each step."""
        number = len(recording.step_ms)
        if self._path is not None and self._profiler is None and recording.relocating[-1]:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
            self._end = number + TRACED_STEPS
        elif number == self._end:
            self.end()

    def end(self) -> None:
        """Write the trace, if there is one."""
        if self._path is not None and self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
            self._path = None


class _Waves:
    """Notes each of ours' waves, after the step in which it was published: the next is not before a further step."""

    def __init__(self, protocol: Any, num_ranks: int) -> None:
        self._controller = getattr(protocol, "controller", None)
        self._num_ranks = num_ranks
        self._seen = (0, 0)

    def look(self, recording: Recording) -> None:
        if self._controller is None:
            return
        metrics = self._controller.metrics()
        num_waves, num_bytes = self._seen
        if metrics.waves > num_waves:
            recording.wave_bytes.append((metrics.moved_bytes - num_bytes) / self._num_ranks)
            recording.wave_seconds.append(metrics.fill_seconds)
            self._seen = (metrics.waves, metrics.moved_bytes)


@torch.no_grad()
def serve(rank: int, store: str, options: argparse.Namespace) -> Recording:
    """Serve all steps on one rank, in this process, which is its own."""
    device = torch.device("cpu")
    if options.device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        options.backend,
        store=dist.FileStore(store, options.ranks),
        rank=rank,
        world_size=options.ranks,
        timeout=DEADLINE,
        device_id=device if options.backend == "nccl" else None,
    )
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(0)
    model = Stack(options, group, device)
    serving = Serving(model, options, rank, device)
    recording = Recording(bytes_per_rebalance=model.received_bytes)
    bound = {"rate": options.rate} if options.protocol == "ours" else {}
    with PROTOCOLS[options.protocol](model, group, options.interval, options.communicator, **bound) as protocol:
        _connect(protocol, serving, device, group)
        # As serving engines do. Else one collection of all that PyTorch has made stops a step for up to 0.2 s.
        gc.collect()
        gc.freeze()
        profile = Profile(options.trace if rank == 0 else None)
        waves = _Waves(protocol, dist.get_world_size(group))
        for number in range(options.steps):
            _step(protocol, serving, number, device, recording)
            waves.look(recording)
            profile.look(recording)
        profile.end()
        dist.barrier(group)
        if options.protocol == "ours":
            recording.health = str(protocol.controller.health())
            recording.bytes_per_second = protocol.bytes_per_second
    recording.wrong = serving.wrong
    dist.barrier(group)
    dist.destroy_process_group()
    return recording


def _connect(protocol: Any, serving: Serving, device: torch.device, group: dist.ProcessGroup) -> None:
    """Steps until the ranks are connected, which only ours does beside the forwards. None of them is recorded."""
    if not hasattr(protocol, "controller"):
        return
    deadline = time.monotonic() + DEADLINE.total_seconds()
    interval = protocol.controller.config.step_interval
    ready = torch.zeros(1, device=device)
    for number in range(interval - 1):  # fewer than would begin a rebalance
        serving.step(number)
        protocol.step()
        serving.wait(device)
        ready.fill_(protocol.controller.health().state == "idle")
        dist.all_reduce(ready, dist.ReduceOp.MIN, group)
        if ready.item():
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    raise TimeoutError(
        f"the ranks did not connect within {interval - 1} steps (--interval): {protocol.controller.health()}"
    )


def _step(protocol: Any, serving: Serving, number: int, device: torch.device, recording: Recording) -> None:
    flips, before, moving = protocol.num_flips, protocol.is_relocating, protocol.is_moving
    began = time.perf_counter_ns()
    serving.step(number)
    with torch.profiler.record_function(STEP_RANGE):
        called = time.perf_counter_ns()
        protocol.step()
        returned = time.perf_counter_ns()
    serving.wait(device)
    ended = time.perf_counter_ns()
    flipped = protocol.num_flips - flips
    recording.step_ms.append((ended - began) / 1e6)
    recording.call_us.append((returned - called) / 1e3)
    recording.flips.append(flipped)
    recording.relocating.append(bool(before or protocol.is_relocating or flipped))
    recording.moving.append(bool(moving or protocol.is_moving or flipped))
