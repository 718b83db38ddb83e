"""``python -m bench.step_cost``: the cost of `EplbController.step()` on the main thread.

One rank, many layers, in three kinds of step: quiet (nothing to do), with a snapshot of the load counters, and with a
flip of all layers at once. Host microseconds, median and 20th/80th percentile. The times do not contain the device's work,
because `step()` does not wait for it.

``--against PATH`` compares with another checkout: each checkout's own script runs in a process of its own, by turns.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bench.command import make_parser
from bench.environment import ROOT
from bench.report import Report, add_device
from bench.timing import Timing, synchronize
from eplb import EplbConfig, EplbController, SlotPool, TensorSpec
from eplb.planning.shares import equal_shares
from eplb.relocation.handoff import Handoff
from eplb.relocation.resident import ResidentExperts
from eplb.relocation.versions import Version
from eplb.streams import streams_of

DEADLINE_SECONDS = 600.0


class Layer(nn.Module):
    """A layer as a controller sees it, without weights."""

    dispatch_backend = "local"
    expert_ranks = ()

    def __init__(self, resident: ResidentExperts) -> None:
        super().__init__()
        self.resident = resident

    def why_not_relocatable(self) -> str | None:
        return None

    def dispatch_failure(self) -> str | None:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("step_cost", __doc__)
    parser.add_argument("--layers", type=int, default=58, help="default: DeepSeek-R1's MoE layers")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2000)
    add_device(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=6, help="of --against")
    options = parser.parse_args(arguments)
    if options.against is not None:
        return compare(options)
    with Report(options.csv) as report:
        for kind, timing in measure(options).items():
            report.row(
                {
                    "step": kind,
                    "median_us": timing.median_us,
                    "p20_us": timing.p20_us,
                    "p80_us": timing.p80_us,
                    "layers": options.layers,
                    "experts": options.experts,
                }
            )
            spread = f"p20 {timing.p20_us:.2f}, p80 {timing.p80_us:.2f}, of {timing.num_samples}"
            report.line(f"{kind:<10} {timing.median_us:8.2f} µs  ({spread})")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Print new / old of each kind of step: the median over rounds, and the rounds' least and largest."""
    roots = {"old": options.against.resolve(), "new": ROOT}
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        order = ("old", "new") if number % 2 else ("new", "old")
        rounds.append({side: _medians(roots[side], options) for side in order})
    for kind in rounds[0]["new"]:
        of_side = {side: [one[side][kind] for one in rounds] for side in roots}
        ratios = [new / old for old, new in zip(of_side["old"], of_side["new"], strict=True)]
        old_us, new_us = (statistics.median(of_side[side]) for side in roots)
        print(
            f"{kind:<10} old {old_us:8.2f} µs, new {new_us:8.2f} µs, new / old {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f} in {len(rounds)} rounds)"
        )
    return 0


def _medians(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """By kind of step, in µs: one run of the script of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.csv"
        numbers = ["--layers", options.layers, "--experts", options.experts, "--repeats", options.repeats]
        arguments = [*map(str, numbers), "--device", str(options.device), "--csv", str(path)]
        subprocess.run(
            [sys.executable, "-m", "bench.step_cost", *arguments],
            cwd=root,
            env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"},
            stdout=subprocess.DEVNULL,
            timeout=DEADLINE_SECONDS,
            check=True,
        )
        with path.open(newline="") as file:
            return {row["step"]: float(row["median_us"]) for row in csv.DictReader(file)}


def measure(options: argparse.Namespace) -> dict[str, Timing]:
    """By kind of step."""
    device = options.device
    streams = streams_of(device)
    pool = SlotPool([TensorSpec("weight", (16,), torch.uint8)], options.layers * options.experts + 1, device)
    layers = [
        ResidentExperts(
            num_experts=options.experts,
            num_redundant_experts=0,
            num_shadow_slots=1,
            rank=0,
            num_ranks=1,
            pool=pool,
            streams=streams,
        )
        for _ in range(options.layers)
    ]
    # A window of two steps in each interval of ten: 7 quiet steps, 3 snapshots. The worker does what it always does.
    config = EplbConfig(step_interval=10, window_size=2, window_samples=2, policy="static")
    samples: dict[str, list[float]] = {"quiet": [], "snapshot": [], "flip": []}
    with EplbController(config) as eplb:
        eplb.register(nn.ModuleList([Layer(layer) for layer in layers]))
        for number in range(-100, options.repeats):
            kind = "snapshot" if eplb._steps % 10 in (7, 8, 9) else "quiet"
            elapsed = _timed(eplb.step)
            if number >= 0:
                samples[kind].append(elapsed)
        for number in range(-10, options.repeats // 10):
            handoff = _staged(layers, number + 11)
            elapsed = _timed(partial(handoff.flip, streams))
            if number >= 0:
                samples["flip"].append(elapsed)
            synchronize(device)
    return {kind: Timing.of(of_kind) for kind, of_kind in samples.items()}


def _staged(layers: list[ResidentExperts], number: int) -> Handoff:
    side = layers[0].streams.side
    published = []
    for layer in layers:
        old = layer.newest
        layer.versions.grace_before(old.number)
        version = Version(number, old.placement, equal_shares(old.placement), old.slots_S)
        layer.table.stage(version.placement, version.shares_WS, side)
        layer.versions.publish(version)
        published.append((layer, version))
    staged = side.record_event()
    while not staged.query():  # as the worker, before it publishes
        pass
    return Handoff(number, published)


def _timed(call: Callable[[], object]) -> float:
    started_at = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started_at) / 1e3


if __name__ == "__main__":
    sys.exit(main())
