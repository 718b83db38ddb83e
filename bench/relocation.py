"""``python -m bench.relocation``: what serving feels of a relocation, by three protocols over the same kernels and traffic.

`pause` stops, moves every expert, and goes on. `lockstep` moves a layer a step, as engines do: a thread receives it into a
second buffer, the serving threads agree by a CPU all-reduce in every step, then copy and upload. `ours` is `EplbController`.
Every rebalance moves every expert of the stack to the next rank. All have one layer's experts of memory for it, `ours` as
`--free` says. Outputs are compared, bit for bit, in every step.

``--replay MS`` shows what the host alone loses, on one GPU or none: there is no forward, but what the host does around the
replay of a graph of MS milliseconds, and a wait for as long that leaves Python's lock alone.

A step is relocating if a rebalance was under way in it; the others are quiet. The targets are those of `ours`.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cases import select
from bench.command import exit_status, make_parser, names
from bench.ranks import run_ranks
from bench.relocation_protocols import PROTOCOLS
from bench.relocation_rank import STEP_RANGE, Recording, serve
from bench.report import DTYPES, Report, add_device, add_plot, require_matplotlib
from eplb.relocation.communicator import COMMUNICATORS

# What must not happen inside `step()`: collectives, and waits of the host for the device.
FORBIDDEN = re.compile(
    r"^(c10d::|gloo:|nccl:|record_param_comms)|(cuda|hip)(Device|Stream|Event)Synchronize|aten::(item|_local_scalar_dense)$"
    r"|(cuda|hip)Memcpy$"
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    results: dict[str, list[Recording]] = {}
    rows: dict[str, dict[str, Any]] = {}
    print(HEAD + "\n" + "|---" * (HEAD.count("|") - 1) + "|")
    with Report(options.csv, len(options.protocols)) as report:
        for protocol in options.protocols:
            results[protocol] = run(protocol, options)
            report.step(protocol)
            values = rows[protocol] = summary(results[protocol], options.layers)
            report.row({"protocol": protocol, **setup(options), **values})
            report.line(line(protocol, values))
    if options.plot:
        plot(results, options)
    failed = [f"{name}: {sum(one.wrong for one in of)} outputs differ" for name, of in results.items() if _wrong(of)]
    if options.trace:
        if not options.trace.exists():
            raise RuntimeError(f"--trace {options.trace}: no rebalance began within --steps {options.steps}")
        found = forbidden_in_step(json.loads(options.trace.read_text()))
        print(f"trace: {found or 'no collective and no wait inside step()'}")
        failed += [f"trace: {name} inside step(), {count} times" for name, count in found.items()]
    for target in targets(rows):
        print(target)
    return exit_status([f"FAILED {text}" for text in failed])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("relocation", __doc__)
    parser.add_argument("--protocols", type=names, default=list(PROTOCOLS), metavar="A,B")
    parser.add_argument("--ranks", type=int, default=None, help="default: the GPUs, or 2 on a CPU")
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="default: nccl if each rank has a GPU")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shape", default=None, help="as of bench.moe_forward; default: qwen3, on a CPU 128:2:64:32")
    parser.add_argument("--tokens", type=int, default=64, help="of a rank in a step")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--steps", type=int, default=2000, help="recorded")
    parser.add_argument(
        "--interval",
        type=int,
        default=500,
        help="steps between two rebalances; one of the default stack takes 360 under the default bound",
    )
    parser.add_argument("--free", type=int, default=0, help="free slots of a rank; default: one layer's experts")
    parser.add_argument("--dispatcher", default="auto", help="of the layers")
    parser.add_argument("--communicator", choices=COMMUNICATORS, default="auto")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="GB/S",
        help="bound of what ours copies (`max_bytes_per_second`), 0 for none; default: the config's",
    )
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph of the forward")
    parser.add_argument(
        "--replay",
        type=float,
        default=0.0,
        metavar="MS",
        help="no forward: what the host does around a replay of MS ms",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="deadline of a protocol")
    add_device(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row per protocol")
    add_plot(parser, "picture of all steps")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="rank 0's profile of a rebalance, alone; needs --protocols ours"
    )
    options = parser.parse_args(arguments)
    on_gpu = options.device.type == "cuda"
    options.rate = "auto" if options.rate is None else max(1, int(1e9 * options.rate)) if options.rate else None
    options.ranks = options.ranks or (torch.cuda.device_count() if on_gpu else 2)
    options.backend = options.backend or ("nccl" if on_gpu and torch.cuda.device_count() >= options.ranks else "gloo")
    try:
        options.shape = select([options.shape or ("qwen3" if on_gpu else "128:2:64:32")], [1])[0].shape
    except ValueError as error:
        parser.error(str(error))
    unknown = [name for name in options.protocols if name not in PROTOCOLS]
    if unknown:
        parser.error(f"--protocols {','.join(unknown)}: must be of {', '.join(PROTOCOLS)}")
    if options.ranks < 2 or options.shape.num_experts % options.ranks:
        parser.error(f"--ranks {options.ranks}: must be at least 2 and divide the {options.shape.num_experts} experts")
    if options.steps < options.interval or options.interval < 2:
        parser.error(f"--interval {options.interval}: must be at least 2, and at most --steps {options.steps}")
    if options.trace and options.protocols != ["ours"]:
        parser.error(f"--trace {options.trace}: needs --protocols ours, got {','.join(options.protocols)}")
    if options.replay < 0 or (options.replay and options.graph):
        parser.error(f"--replay {options.replay}: must not be negative, and takes the place of --graph")
    return options


def run(protocol: str, options: argparse.Namespace) -> list[Recording]:
    """Every rank's recording.

    Raises:
        TimeoutError: the ranks took longer than `--seconds`.
    """
    options = argparse.Namespace(**vars(options) | {"protocol": protocol})
    return run_ranks(serve, options.ranks, (options,), options.seconds, f"protocol {protocol}")


# ---- what came of it


def rebalances(recording: Recording, num_tables: int) -> list[tuple[int, int]]:
    """First and last step of each complete rebalance: runs of moving steps in which each table was switched."""
    runs: list[list[int]] = []
    for number, moving in enumerate(recording.moving):
        if moving and runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        elif moving:
            runs.append([number, number])
    ended = [(first, last) for first, last in runs if last + 1 < len(recording.moving)]
    return [(first, last) for first, last in ended if sum(recording.flips[first : last + 1]) >= num_tables]


def summary(recordings: Sequence[Recording], num_tables: int) -> dict[str, Any]:
    """One row: times of all ranks together, in ms and µs; `rate`: the bound that was kept, bytes per second, or "none"."""
    ms = np.concatenate([one.step_ms for one in recordings])
    us = np.concatenate([one.call_us for one in recordings])
    moving = np.concatenate([one.relocating for one in recordings]).astype(bool)
    flipping = np.concatenate([one.flips for one in recordings]) > 0
    found = [(one, first, last) for one in recordings for first, last in rebalances(one, num_tables)]
    steps = [last - first + 1 for _, first, last in found]
    seconds = [sum(one.step_ms[first : last + 1]) / 1e3 for one, first, last in found]
    quiet, relocating = ms[~moving], ms[moving]
    values: dict[str, Any] = {}
    for name, times in (("quiet", quiet), ("relocating", relocating)):
        values |= {
            f"{name}_steps": len(times),
            f"{name}_median_ms": _quantile(times, 0.5),
            f"{name}_p99_ms": _quantile(times, 0.99),
            f"{name}_mean_ms": float(times.mean()) if len(times) else float("nan"),
        }
    return values | {
        "p99_ratio": values["relocating_p99_ms"] / values["quiet_p99_ms"],
        "mean_ratio": values["relocating_mean_ms"] / values["quiet_mean_ms"],
        "rebalances": len(found),
        "steps_to_relocate_all": float(np.median(steps)) if steps else float("nan"),
        "seconds_to_relocate_all": float(np.median(seconds)) if seconds else float("nan"),
        "gb_per_s_per_receiver": recordings[0].bytes_per_rebalance / 1e9 / float(np.median(seconds))
        if seconds
        else float("nan"),
        "pull_gb_per_s": _quantile(_rates(recordings), 0.5),
        "call_idle_us": _quantile(us[~moving], 0.5),
        "call_relocating_us": _quantile(us[moving & ~flipping], 0.5),
        "call_flip_us": _quantile(us[flipping], 0.5),
        "wrong": _wrong(recordings),
        "rate": recordings[0].bytes_per_second or "none",
    }


def _quantile(values: np.ndarray, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else float("nan")


def _rates(recordings: Sequence[Recording]) -> np.ndarray:
    """GB/s at which ours' waves came, from the beginning of their copies until the host has seen the end."""
    num_bytes = np.array([one for each in recordings for one in each.wave_bytes])
    return num_bytes / 1e9 / np.array([one for each in recordings for one in each.wave_seconds])


def _wrong(recordings: Sequence[Recording]) -> int:
    return sum(one.wrong for one in recordings)


def setup(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "shape": options.shape.name,
        **{name: getattr(options, name) for name in ("layers", "ranks", "tokens", "dtype", "steps", "interval")},
        **{
            name: getattr(options, name)
            for name in ("free", "backend", "dispatcher", "communicator", "graph", "replay")
        },
    }


def line(protocol: str, row: dict[str, Any]) -> str:
    """A row of a table in Markdown's form, as those of `bench.table`."""
    return (
        f"| {protocol} | {row['quiet_median_ms']:.4g} / {row['quiet_p99_ms']:.4g} / {row['quiet_mean_ms']:.4g} "
        f"| {row['relocating_median_ms']:.4g} / {row['relocating_p99_ms']:.4g} / {row['relocating_mean_ms']:.4g} "
        f"| {row['p99_ratio']:.3f} | {row['mean_ratio']:.3f} | {row['steps_to_relocate_all']:.4g} "
        f"| {row['gb_per_s_per_receiver']:.3g} | {row['pull_gb_per_s']:.3g} "
        f"| {row['call_idle_us']:.3g} | {row['call_flip_us']:.3g} | {row['wrong']} |"
    )


HEAD = (
    "| protocol | quiet step, median / p99 / mean, ms | relocating step | p99 ratio | mean ratio | steps for all slots "
    "| GB/s per receiver | while copying | step() idle, µs | with a flip | wrong |"
)


def targets(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What the GPU run is to reach, and whether this one did. Under a bound nobody counts the steps of a rebalance."""
    if "ours" not in rows:
        return []
    ours = rows["ours"]
    wanted = [
        ("p99 of relocating steps over quiet", ours["p99_ratio"], 1.02),
        ("mean of relocating steps over quiet", ours["mean_ratio"], 1.01),
        ("step() idle, µs", ours["call_idle_us"], 5.0),
        ("step() with a flip, µs", ours["call_flip_us"], 30.0),
    ]
    is_bound = ours["rate"] != "none"
    if "lockstep" in rows and not is_bound:
        ratio = ours["steps_to_relocate_all"] / rows["lockstep"]["steps_to_relocate_all"]
        wanted.append(("steps for all slots over lockstep's", ratio, 1 / 3))
    lines = [
        f"{'reached' if got <= limit else 'MISSED '} {what}: {got:.3f} (≤ {limit:.3g})" for what, got, limit in wanted
    ]
    if not is_bound:
        rate, least = ours["pull_gb_per_s"], 330.0
        lines.append(f"{'reached' if rate >= least else 'MISSED '} GB/s while copying: {rate:.0f} (≥ {least:.0f})")
    return lines


def forbidden_in_step(trace: dict[str, Any]) -> dict[str, int]:
    """Collectives and waits on the serving thread inside `step()`, by name, in a trace of torch.profiler's.

    Raises:
        ValueError: the trace has no `step()`.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event["name"] == STEP_RANGE and event.get("cat") == "user_annotation"]
    if not steps:
        raise ValueError(f"the trace has no {STEP_RANGE}")
    thread = steps[0]["tid"]
    spans = np.array(sorted((float(step["ts"]), float(step["ts"]) + float(step["dur"])) for step in steps))
    found: dict[str, int] = {}
    for event in events:
        if event["tid"] != thread or not FORBIDDEN.search(event["name"]):
            continue
        at = int(np.searchsorted(spans[:, 0], float(event["ts"]), side="right")) - 1
        if at >= 0 and float(event["ts"]) < spans[at, 1]:
            found[event["name"]] = found.get(event["name"], 0) + 1
    return found


def plot(results: dict[str, list[Recording]], options: argparse.Namespace) -> None:
    """Rank 0's step times in order, a panel for each protocol; relocating steps in another colour."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(
        len(results), 1, figsize=(9, 1 + 2 * len(results)), sharex=True, sharey=True, squeeze=False
    )
    for axis, (name, recordings) in zip(axes[:, 0], results.items(), strict=True):
        times, moving = np.array(recordings[0].step_ms), np.array(recordings[0].relocating)
        numbers = np.arange(len(times))
        axis.plot(numbers[~moving], times[~moving], ".", markersize=2, label="quiet")
        axis.plot(numbers[moving], times[moving], ".", markersize=3, label="relocating")
        axis.set_title(name, loc="left", fontsize="medium")
        axis.set_ylabel("step, ms")
        axis.set_yscale("log")
        axis.grid(axis="y", which="both", linewidth=0.3)
    axes[0, 0].legend(fontsize="small")
    axes[-1, 0].set_xlabel("step")
    figure.suptitle(f"{options.layers} layers of {options.shape.name} on {options.ranks} ranks ({options.device.type})")
    figure.tight_layout()
    figure.savefig(options.plot, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
