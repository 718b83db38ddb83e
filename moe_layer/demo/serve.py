"""One rank of the demo: two stacks of layers that are rebalanced while they serve, beside a twin that never moves.

One of the two takes its shares from the window, the other solves them in each batch.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eplb import EplbConfig, EplbController, step_eplb_after
from moe_kernels import TileSchedule
from moe_layer.demo.text import batches, token_stream
from moe_layer.dispatch import Dispatched, Dispatcher
from moe_layer.layer import MoELayer


@dataclass(frozen=True)
class Setup:
    """What the demo serves."""

    ranks: int
    device: str
    backend: str
    dtype: torch.dtype
    steps: int
    tokens_per_rank: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_redundant_experts: int
    step_interval: int
    window_size: int
    policy: str
    seed: int = 0

    def device_of(self, rank: int) -> torch.device:
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())


@dataclass
class Recording:
    """What one rank saw. Rows: how many its experts computed, by step and layer."""

    moving_rows: list[list[int]] = field(default_factory=list)
    batch_rows: list[list[int]] = field(default_factory=list)
    still_rows: list[list[int]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    twin_step_ms: list[float] = field(default_factory=list)
    relocating: list[bool] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)
    max_abs_difference: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    health: str = ""


class CountingDispatcher:
    """Another dispatcher, and how many rows this rank's experts computed by it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.max_tokens = dispatcher.max_tokens
        self.rows: list[torch.Tensor] = []

    def backend(self, device: torch.device) -> str:
        return self._dispatcher.backend(device)

    def gather_counts(self, *arguments: Any) -> torch.Tensor:
        return self._dispatcher.gather_counts(*arguments)

    def dispatch(self, *arguments: Any) -> Dispatched:
        dispatched = self._dispatcher.dispatch(*arguments)

        def schedule(block_m: int, extra_m: int) -> TileSchedule:
            tiles = dispatched.schedule(block_m, extra_m)
            self.rows.append(tiles.offsets_L1[-1])  # on the device: read when the step is over
            return tiles

        return replace(dispatched, schedule=schedule)

    def combine(self, *arguments: Any) -> torch.Tensor:
        return self._dispatcher.combine(*arguments)


class Stack(nn.Module):
    """Word embeddings and a few blocks of norm, MoE layer and residual: the part of a language model that is at stake."""

    def __init__(
        self, setup: Setup, vocabulary: int, group: dist.ProcessGroup, device: torch.device, shares: str = "window"
    ) -> None:
        super().__init__()
        hidden, dtype = setup.hidden_size, setup.dtype
        self.embedding = nn.Embedding(vocabulary, hidden, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(setup.seed)
        self.embedding.weight.data.copy_(torch.randn(vocabulary, hidden, generator=generator))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, device=device, dtype=dtype) for _ in range(setup.num_layers))
        self.layers = nn.ModuleList(
            MoELayer(
                hidden,
                setup.intermediate_size,
                setup.num_experts,
                setup.top_k,
                num_redundant_experts=setup.num_redundant_experts,
                process_group=group,
                max_tokens=setup.tokens_per_rank,
                shares=shares,
                device=device,
                dtype=dtype,
            )
            for _ in range(setup.num_layers)
        )
        self.counters: list[CountingDispatcher] = []

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [layer for layer in self.layers if isinstance(layer, MoELayer)]

    def count_rows(self) -> None:
        for layer in self.moe_layers:
            assert layer.executor.dispatcher is not None
            layer.executor.dispatcher = CountingDispatcher(layer.executor.dispatcher)
            self.counters.append(layer.executor.dispatcher)

    def take_rows(self) -> list[int]:
        """Rows of the last forward by layer."""
        rows = [int(counter.rows[-1]) for counter in self.counters]
        for counter in self.counters:
            counter.rows.clear()
        return rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


class Runner:
    """What a user's model runner does: hold a controller, and step it after each forward."""

    def __init__(self, model: Stack, eplb: EplbController) -> None:
        self.model = model
        self.eplb = eplb
        eplb.register(model)

    @step_eplb_after
    def run(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)


@torch.inference_mode()
def serve(rank: int, setup: Setup, init_method: str, notify: Callable[[int], None]) -> Recording:
    """Serve the whole run on one rank.

    Args:
        notify: called with 1 after each step.
    """
    device = setup.device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(setup.backend, init_method=init_method, rank=rank, world_size=setup.ranks)
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(setup.seed)
    stream, vocabulary = token_stream()
    ids_by_step = batches(stream, setup.steps, setup.ranks, rank, setup.tokens_per_rank).to(device)
    model = Stack(setup, vocabulary, group, device)
    twin = copy.deepcopy(model)
    by_batch = Stack(setup, vocabulary, group, device, shares="batch")
    by_batch.load_state_dict(model.state_dict())
    for stack in (model, by_batch, twin):
        stack.count_rows()
    config = EplbConfig(
        step_interval=setup.step_interval,
        window_size=setup.window_size,
        policy=setup.policy,
        heartbeat_interval=0.02,
    )
    recording = Recording()
    with EplbController(config, process_group=group) as eplb, EplbController(config, process_group=group) as other:
        runner, batch_runner = Runner(model, eplb), Runner(by_batch, other)
        with eplb.warm_up(), other.warm_up():  # kernels compile here; none of it counts as load
            for ids in ids_by_step[:8]:
                for stack in (model, by_batch, twin):
                    stack(ids)
        for ids in ids_by_step:
            _one_step(runner, batch_runner, twin, ids, device, recording)
            notify(1)
        metrics = eplb.metrics()
        recording.metrics = {name: getattr(metrics, name) for name in metrics.__dataclass_fields__}
        recording.health = str(eplb.health())
        dist.barrier(group)
    return recording


def _one_step(
    runner: Runner, batch_runner: Runner, twin: Stack, ids: torch.Tensor, device: torch.device, recording: Recording
) -> None:
    eplb = runner.eplb
    before, phase_before = eplb.metrics(), eplb.health().phase
    versions = [layer.resident.current.number for layer in runner.model.moe_layers]
    moving, moving_ms = _timed(lambda: runner.run(ids), device)
    flips = sum(
        layer.resident.current.number != version
        for layer, version in zip(runner.model.moe_layers, versions, strict=True)
    )
    filling = "FILL" in (phase_before, eplb.health().phase) or eplb.metrics().waves != before.waves
    still, still_ms = _timed(lambda: twin(ids), device)
    for output in (moving, batch_runner.run(ids)):
        difference = float((output - still).abs().max())
        recording.max_abs_difference = max(
            recording.max_abs_difference, difference if difference == difference else float("inf")
        )
    recording.moving_rows.append(runner.model.take_rows())
    recording.batch_rows.append(batch_runner.model.take_rows())
    recording.still_rows.append(twin.take_rows())
    recording.step_ms.append(moving_ms)
    recording.twin_step_ms.append(still_ms)
    recording.relocating.append(filling or flips > 0)
    recording.flips.append(flips)


def _timed(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_at = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, (time.perf_counter() - started_at) * 1e3
