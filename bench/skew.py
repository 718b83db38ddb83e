"""``python -m bench.skew``: uneven, drifting traffic through a stack of layers on several ranks, served in four ways.

Every rank is a process: on GPUs over NCCL (gloo if they share one), on a CPU over gloo. Token by token the same experts are
chosen in all four, by popularities that are Zipf (exponent 1) and walk at random:

* none: every expert once, where it was;
* static: an eighth of redundant experts, where they were;
* window: the same, moved by `EplbController`, split by the shares of the last window;
* batch: the same, split by the counts of each batch.

Beside them, as what could be reached, "even": the layers of "none" and as many tokens, which choose all experts equally often.

It prints max/mean of the ranks' rows (1 is perfectly even, the bound) over the second half of the steps, the time of a step on
the slowest rank, and the throughput over that of "even". A step's times are comparable only where nothing else runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from bench.command import make_parser
from bench.ranks import run_ranks
from bench.report import Report
from eplb import EplbConfig, EplbController
from moe_layer import MoELayer
from moe_layer.demo.serve import CountingDispatcher

WAYS = ("even", "none", "static", "window", "batch")
TARGET = 0.95
"""Of the throughput of "even", which a balanced stack is to reach."""
SIZES = {  # on a CPU, on a GPU
    "layers": (2, 8),
    "experts": (64, 128),
    "top_k": (4, 8),
    "hidden": (32, 2048),
    "intermediate": (32, 1024),
    "tokens": (64, 4096),
    "steps": (160, 400),
    "interval": (20, 20),
}


class Served(NamedTuple):
    """What a rank recorded: by way, rows [steps][layers] and seconds [steps]; and the waves of each controller."""

    rows: dict[str, list[list[int]]]
    seconds: dict[str, list[float]]
    waves: dict[str, int]


class Traffic:
    """Which experts the tokens of a rank choose, step by step: [layers, T, K] int64, the same for equal arguments."""

    def __init__(self, options: Any, rank: int, device: torch.device) -> None:
        self._options, self._device = options, device
        self._shared = np.random.default_rng(options.seed)
        self._own = torch.Generator(device).manual_seed(options.seed * 1000 + rank)
        order = np.argsort(self._shared.random((options.layers, options.experts)), axis=1)
        self._log = -np.log1p(order)  # Zipf

    def step(self) -> torch.Tensor:
        it = self._options
        self._log = self._log + self._shared.normal(0.0, it.drift, self._log.shape)
        noise = torch.empty(it.layers, it.tokens, it.experts, device=self._device).exponential_(generator=self._own)
        # The K largest of log p + Gumbel noise: a draw without replacement.
        log = torch.from_numpy(self._log[:, None].astype(np.float32)).to(self._device)
        return (log - noise.log()).topk(it.top_k, sorted=False).indices

    def even(self) -> torch.Tensor:
        """All experts equally often, but for a remainder; K different ones for each token."""
        it = self._options
        order = torch.rand(it.layers, it.experts, device=self._device, generator=self._own).argsort(dim=1)
        choices = torch.arange(it.tokens * it.top_k, device=self._device) % it.experts
        return order[:, choices].view(it.layers, it.tokens, it.top_k)


def stack(way: str, options: Any, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype) -> list[MoELayer]:
    """The layers of one way, whose dispatchers count rows."""
    ranks = dist.get_world_size(group)
    redundant = 0 if way in ("even", "none") else -(-options.experts // 8 // ranks) * ranks
    layers = [
        MoELayer(
            options.hidden,
            options.intermediate,
            options.experts,
            options.top_k,
            router=None,
            num_redundant_experts=redundant,
            process_group=group,
            max_tokens=options.tokens,
            shares="batch" if way == "batch" else "window",
            device=device,
            dtype=dtype,
        )
        for _ in range(options.layers)
    ]
    for layer in layers:
        assert layer.executor.dispatcher is not None  # these layers are spread over ranks
        layer.executor.dispatcher = CountingDispatcher(layer.executor.dispatcher)
    return layers


@torch.inference_mode()
def serve(rank: int, store: str, options: Any) -> Served:
    """One rank."""
    on_gpu = options.device == "cuda"
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if on_gpu and torch.cuda.device_count() >= options.ranks else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, options.ranks), rank=rank, world_size=options.ranks)
    group = dist.group.WORLD
    assert group is not None
    dtype = torch.bfloat16 if on_gpu else torch.float32
    stacks = {way: stack(way, options, group, device, dtype) for way in WAYS}
    config = EplbConfig(step_interval=options.interval, window_size=options.interval, heartbeat_interval=0.02)
    controllers = {way: EplbController(config, process_group=group) for way in ("window", "batch")}
    for way, controller in controllers.items():
        for layer in stacks[way]:
            controller.register(layer)
    x = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype)
    weights = torch.full((options.tokens, options.top_k), 1 / options.top_k, device=device)
    traffic = Traffic(options, rank, device)

    def forward(way: str, ids: torch.Tensor) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        for layer, ids_TK in zip(stacks[way], ids, strict=True):
            layer(x, expert_ids=ids_TK, expert_weights=weights)
            dispatcher = layer.executor.dispatcher
            assert isinstance(dispatcher, CountingDispatcher)
            rows.append(dispatcher.rows.pop())
        return rows

    def wait() -> None:
        """For the forwards alone: a wait for the device would wait for relocations too."""
        if on_gpu:
            torch.cuda.current_stream(device).synchronize()

    def routing(way: str) -> torch.Tensor:
        return traffic.even() if way == "even" else ids

    ids = traffic.step()
    for way in WAYS:  # kernels compile here; none of it counts as load
        with controllers[way].warm_up() if way in controllers else nullcontext():
            forward(way, routing(way))
    rows: dict[str, list[list[int]]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.steps):
        ids = traffic.step()
        for way in WAYS:
            chosen = routing(way)
            dist.barrier(group)  # all ranks begin together: one that is late would be slow in all of a way's steps
            wait()
            begin = time.perf_counter()
            counts = forward(way, chosen)
            if way in controllers:
                controllers[way].step()
            wait()
            seconds[way].append(time.perf_counter() - begin)
            rows[way].append(torch.stack(counts).tolist())
    waves = {way: controller.metrics().waves for way, controller in controllers.items()}
    dist.barrier(group)
    for controller in controllers.values():
        controller.close()
    dist.destroy_process_group()
    return Served(rows, seconds, waves)


def run(options: Any) -> list[dict[str, Any]]:
    """A record of each way.

    Raises:
        TimeoutError: the ranks took longer than `--seconds`.
    """
    found = run_ranks(serve, options.ranks, (options,), options.seconds, "bench.skew")
    half = options.steps // 2
    records = []
    for way in WAYS:
        rows_SLW = np.stack([np.array(one.rows[way]) for one in found], axis=2)[half:]
        uneven = rows_SLW.max(axis=2) / rows_SLW.mean(axis=2)
        slowest_ms = np.array([one.seconds[way] for one in found]).max(axis=0)[half:] * 1e3
        records.append(
            {
                "way": way,
                "max_over_mean": float(uneven.mean()),
                "p99": float(np.percentile(uneven, 99)),
                "step_ms": float(np.median(slowest_ms)),
                "mean_ms": float(slowest_ms.mean()),
                "waves": found[0].waves.get(way, 0),
                **{name: getattr(options, name) for name in ("ranks", *SIZES, "drift")},
            }
        )
    for one in records:
        one["of_even"] = records[0]["mean_ms"] / one["mean_ms"]
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("skew", __doc__)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--ranks", type=int, default=max(4, torch.cuda.device_count()))
    for name, (cpu, gpu) in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {gpu}, on a CPU {cpu}")
    parser.add_argument("--drift", type=float, default=0.02, help="of the logarithm of a popularity, in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1800.0, help="deadline of the run")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for name, of_device in SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, of_device[options.device == "cuda"])
    if options.ranks < 2 or options.experts % options.ranks:
        parser.error(f"--ranks must be at least 2 and divide --experts={options.experts}, got {options.ranks}")
    with Report(options.csv) as report:
        report.line(f"{'':8}{'max/mean':>10}{'p99':>8}{'step, ms':>10}{'mean':>8}{'of even':>9}{'waves':>7}")
        for one in run(options):
            measured = ("max_over_mean", "p99", "step_ms", "mean_ms", "of_even")
            report.row(one | {name: f"{one[name]:.4f}" for name in measured})
            report.line(
                f"{one['way']:8}{one['max_over_mean']:10.3f}{one['p99']:8.3f}{one['step_ms']:10.2f}{one['mean_ms']:8.2f}"
                f"{one['of_even']:9.3f}{one['waves']:7}"
            )
            if one["waves"]:
                reached = "reached" if one["of_even"] >= TARGET else "MISSED"
                report.line(f"{reached} {one['way']}: throughput over even {one['of_even']:.3f} (≥ {TARGET})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
