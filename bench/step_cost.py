"""``python -m bench.step_cost``: what `EplbController.step()` costs the main thread.

One rank, many layers, in three kinds of step: quiet (nothing to do), with a snapshot of the load counters, and with a
flip of all layers at once. Host microseconds, median and 20th/80th percentile; on a GPU the device's work is not waited
for inside the measured time, as `step()` does not wait for it.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from bench.environment import environment
from eplb import EplbConfig, EplbController, SlotPool, TensorSpec
from eplb.fill import Handoff
from eplb.resident import ResidentExperts
from eplb.shares import equal_shares
from eplb.streams import streams_of


class Layer(nn.Module):
    """What a controller needs of a layer, without its weights."""

    dispatch_backend = "local"
    expert_ranks = ()

    def __init__(self, resident: ResidentExperts) -> None:
        super().__init__()
        self.resident = resident

    def why_not_relocatable(self) -> str | None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=58, help="default: DeepSeek-R1's MoE layers")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows = []
    for kind, samples in measure(arguments).items():
        p20, median, p80 = statistics.quantiles(samples, n=10)[1::3]
        rows.append({"step": kind, "median_us": round(median, 2), "p20_us": round(p20, 2), "p80_us": round(p80, 2)})
        print(f"{kind:<10} {median:8.2f} µs  (p20 {p20:.2f}, p80 {p80:.2f}, of {len(samples)})")
    if arguments.csv:
        shape = {"layers": arguments.layers, "experts": arguments.experts}
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *shape, *environment()])
            writer.writeheader()
            writer.writerows([{**row, **shape, **environment()} for row in rows])


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    streams = streams_of(device)
    pool = SlotPool([TensorSpec("weight", (16,), torch.uint8)], arguments.layers * arguments.experts + 1, device)
    layers = [
        ResidentExperts(
            num_experts=arguments.experts,
            num_redundant_experts=0,
            num_shadow_slots=1,
            rank=0,
            num_ranks=1,
            pool=pool,
            streams=streams,
        )
        for _ in range(arguments.layers)
    ]
    # A window of two steps in each interval of ten: 7 quiet steps, 3 snapshots. The worker does what it always does.
    config = EplbConfig(step_interval=10, window_size=2, window_samples=2, policy="static")
    samples: dict[str, list[float]] = {"quiet": [], "snapshot": [], "flip": []}
    with EplbController(config) as eplb:
        eplb.register(nn.ModuleList([Layer(layer) for layer in layers]))
        for number in range(-100, arguments.repeats):
            kind = "snapshot" if eplb._steps % 10 in (7, 8, 9) else "quiet"
            elapsed = _timed(eplb.step)
            if number >= 0:
                samples[kind].append(elapsed)
        for number in range(-10, arguments.repeats // 10):
            handoff = _staged(layers, number + 11)
            elapsed = _timed(lambda handoff=handoff: eplb._flip(handoff))
            if number >= 0:
                samples["flip"].append(elapsed)
            if device.type == "cuda":
                torch.cuda.synchronize()
    return samples


def _staged(layers: list[ResidentExperts], version: int) -> Handoff:
    side = layers[0].streams.side
    handoff = Handoff(version, layers)
    for layer in layers:
        layer.table.stage(layer.table.placement, equal_shares(layer.table.placement), side)
    handoff.staged.record(side)
    return handoff


def _timed(call) -> float:  # type: ignore[no-untyped-def]
    started_at = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started_at) / 1e3


if __name__ == "__main__":
    main()
