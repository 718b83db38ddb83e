"""One rank of the demo: a stack of layers that are rebalanced while they serve, beside a twin that never moves."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eplb import EplbConfig, EplbController, step_eplb_after
from moe_layer.demo.text import batches, token_stream
from moe_layer.dispatch import AllToAllDispatcher, Dispatched
from moe_layer.dispatch.base import Incoming
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
    still_rows: list[list[int]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    twin_step_ms: list[float] = field(default_factory=list)
    relocating: list[bool] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)
    max_abs_difference: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    health: str = ""


class CountingDispatcher(AllToAllDispatcher):
    """Notes how many rows reach this rank's experts."""

    def __init__(self, group: dist.ProcessGroup, num_lanes: int) -> None:
        super().__init__(group, num_lanes)
        self.rows: list[int] = []

    def dispatch(
        self,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        backend: str,
        max_tokens: int | None = None,
        incoming: Incoming | None = None,
    ) -> Dispatched:
        dispatched = super().dispatch(x_TH, weights_TK, lanes_TK, counts_L, backend, max_tokens, incoming)
        self.rows.append(dispatched.rows_RH.shape[0])
        return dispatched


class Stack(nn.Module):
    """Word embeddings and a few blocks of norm, MoE layer and residual: the part of a language model that is at stake."""

    def __init__(self, setup: Setup, vocabulary: int, group: dist.ProcessGroup, device: torch.device) -> None:
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
                device=device,
                dtype=dtype,
            )
            for _ in range(setup.num_layers)
        )
        self.counters: list[CountingDispatcher] = []

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [layer for layer in self.layers if isinstance(layer, MoELayer)]

    def count_rows(self, group: dist.ProcessGroup) -> None:
        self.counters = [CountingDispatcher(group, layer.resident.num_lanes) for layer in self.moe_layers]
        for layer, counter in zip(self.moe_layers, self.counters, strict=True):
            layer.executor.dispatcher = counter

    def take_rows(self) -> list[int]:
        """Rows of the last forward by layer."""
        rows = [counter.rows[-1] for counter in self.counters]
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
    for stack in (model, twin):
        stack.count_rows(group)
    config = EplbConfig(
        step_interval=setup.step_interval,
        window_size=setup.window_size,
        policy=setup.policy,
        heartbeat_interval=0.02,
    )
    recording = Recording()
    with EplbController(config, process_group=group) as eplb:
        runner = Runner(model, eplb)
        with eplb.warm_up():  # kernels compile here; none of it counts as load
            for ids in ids_by_step[:8]:
                model(ids)
                twin(ids)
        for ids in ids_by_step:
            _one_step(runner, twin, ids, device, recording)
            notify(1)
        metrics = eplb.metrics()
        recording.metrics = {name: getattr(metrics, name) for name in metrics.__dataclass_fields__}
        recording.health = str(eplb.health())
        dist.barrier(group)
    return recording


def _one_step(runner: Runner, twin: Stack, ids: torch.Tensor, device: torch.device, recording: Recording) -> None:
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
    difference = float((moving - still).abs().max())
    recording.max_abs_difference = max(
        recording.max_abs_difference, difference if difference == difference else float("inf")
    )
    recording.moving_rows.append(runner.model.take_rows())
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
