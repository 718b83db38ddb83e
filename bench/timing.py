"""How a function is timed: device time in a CUDA graph, latency and throughput from the host.

All times are in µs.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

Function = Callable[[], Any]

WARM_UPS = 3
# As Triton's `do_bench_cudagraph`.
DEFAULT_SECONDS = 0.02
LEAST_REPEATS, MOST_REPEATS = 10, 200
# Work comes in bursts from idle: under load for longer the power limit lowers the clock (docs/performance.md), and a GPU that
# is still hot from other work (a reference in float32, say) would be slower.
BURST_SECONDS = 0.02
IDLE_SECONDS = 0.5
LEAST_FLUSH = 256 * 2**20  # bytes
FLUSHES = ("write", "read")


@dataclass(frozen=True)
class Timing:
    median_us: float
    p20_us: float
    p80_us: float
    num_samples: int

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "Timing":
        p20, median, p80 = np.quantile(samples_us, (0.2, 0.5, 0.8)).tolist()
        return cls(median, p20, p80, len(samples_us))


def time_graphs(
    functions: Sequence[Function], device: torch.device, seconds: float = DEFAULT_SECONDS, flush: str = "write"
) -> list[Timing]:
    """`time_captured` of functions without host syncs; each is captured once, after a warm-up."""
    return time_captured([capture(function, device) for function in functions], device, seconds, flush)


def time_captured(
    graphs: Sequence[torch.cuda.CUDAGraph], device: torch.device, seconds: float = DEFAULT_SECONDS, flush: str = "write"
) -> list[Timing]:
    """Device time of each graph's replay with a cold L2, all once in each round, in random order.

    Before each replay a buffer of four times the L2 is written, as Triton's `do_bench` does, or read. The host enqueues a
    burst of rounds without waiting, and is ahead of the device, as a flush takes longer than the launches; so the time from
    event to event is the device's alone. The device idles before each burst of about 20 ms (at least one round).
    Interleaved, drifts of the clock hit all functions alike. In a fixed order they would not: a function behind a light
    one would find a higher clock.

    Args:
        device: a CUDA device, that of the graphs.
        seconds: about how long each graph is timed; 10 to 200 repeats.
        flush: "write" leaves the L2 full of lines that must be written to memory as they make room, and a forward that
            reads weights pays for that; "read" leaves lines that need not be.
    """
    order = random.Random(0)
    estimate_us = round_us(graphs, device, flush)
    repeats = repeats_for(estimate_us, seconds * len(graphs))
    per_burst = max(1, int(1e6 * BURST_SECONDS / estimate_us))
    samples: list[list[float]] = [[] for _ in graphs]
    for first in range(0, repeats, per_burst):
        time.sleep(IDLE_SECONDS)
        burst = samples_us(graphs, device, min(per_burst, repeats - first), flush, order)
        for of_graph, new in zip(samples, burst, strict=True):
            of_graph += new
    return [Timing.of(of_graph) for of_graph in samples]


def round_us(graphs: Sequence[torch.cuda.CUDAGraph], device: torch.device, flush: str = "write") -> float:
    """Estimate of the time of one round: a flush and a replay of each graph."""
    with torch.cuda.device(device):
        return sum(_samples(graphs, _flush(device, flush), 3, random.Random(0))[1])


def samples_us(
    graphs: Sequence[torch.cuda.CUDAGraph],
    device: torch.device,
    repeats: int,
    flush: str = "write",
    order: random.Random | None = None,
) -> list[list[float]]:
    """One burst: the times of each graph's replays, one in each of `repeats` rounds (`time_captured`)."""
    with torch.cuda.device(device):
        return _samples(graphs, _flush(device, flush), repeats, order or random.Random(0))[0]


def time_graph(
    function: Function, device: torch.device, seconds: float = DEFAULT_SECONDS, flush: str = "write"
) -> Timing:
    """`time_graphs` of one function."""
    return time_graphs([function], device, seconds, flush)[0]


def time_eager(function: Function, device: torch.device, seconds: float = DEFAULT_SECONDS) -> tuple[Timing, float]:
    """Times of a caller without graphs: (latency, time per call back to back).

    The latency is from the call on an idle device to the end of its work, with the host's part; the L2 is as the last call
    left it. Back to back, many calls are enqueued and waited for once: the longer one of host and device decides.
    """
    for _ in range(WARM_UPS):
        function()
    synchronize(device)
    estimate_us = min(wall_us(function, device) for _ in range(3))
    repeats = repeats_for(estimate_us, seconds / 2)
    latency = Timing.of([wall_us(function, device) for _ in range(repeats)])
    throughput_us = wall_us(lambda: [function() for _ in range(repeats)], device) / repeats
    return latency, throughput_us


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_bytes(function: Function, device: torch.device) -> int | None:
    """The most memory that one call allocates beyond what was allocated before, its output included; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    output = function()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del output
    return peak - before


def capture(function: Function, device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, after a warm-up; it has been replayed once. It keeps `function`, and so what it reads."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.function = function  # type: ignore[attr-defined]
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        return graph


def _samples(
    graphs: Sequence[torch.cuda.CUDAGraph], flush: Function, repeats: int, order: random.Random
) -> tuple[list[list[float]], list[float]]:
    """Times of each graph's replays, and for each graph the time of a flush and a replay."""
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(repeats)] for _ in graphs]
    for _ in range(10):  # the host's lead
        flush()
    for repeat in range(repeats):
        for number in order.sample(range(len(graphs)), len(graphs)):
            before_flush, begin, end = events[number][repeat]
            before_flush.record()
            flush()
            begin.record()
            graphs[number].replay()
            end.record()
    torch.cuda.synchronize()
    samples = [[1e3 * begin.elapsed_time(end) for _, begin, end in of_graph] for of_graph in events]
    rounds = [float(np.median([1e3 * first.elapsed_time(end) for first, _, end in of_graph])) for of_graph in events]
    return samples, rounds


def _flush(device: torch.device, how: str) -> Function:
    if how not in FLUSHES:
        raise ValueError(f"flush={how!r}: must be one of {FLUSHES}")
    buffer = _flush_buffer(device)
    if how == "write":
        return buffer.zero_
    largest = torch.empty((), dtype=buffer.dtype, device=device)
    return lambda: torch.amax(buffer, dim=0, out=largest)


@lru_cache(maxsize=1)
def _flush_buffer(device: torch.device) -> torch.Tensor:
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, LEAST_FLUSH)
    return torch.empty(size // 4, dtype=torch.int32, device=device)


def repeats_for(estimate_us: float, seconds: float) -> int:
    """How often to repeat something that takes `estimate_us`, to spend about `seconds`: 10 to 200 times."""
    return int(min(max(1e6 * seconds / max(estimate_us, 1e-3), LEAST_REPEATS), MOST_REPEATS))


def wall_us(function: Function, device: torch.device) -> float:
    """Host time from the call on an idle device to the end of its work."""
    synchronize(device)
    begin = time.perf_counter_ns()
    function()
    synchronize(device)
    return (time.perf_counter_ns() - begin) / 1e3
