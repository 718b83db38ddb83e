"""`python -m eplb.simulate`: would moving experts pay for this load? Replays a trace through policies and compares."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from eplb.planning.placement_file import save_placements
from eplb.planning.policy import Policy, Topology, known_policies, make_policy
from eplb.simulate.offline import plan_offline
from eplb.simulate.replay import WindowResult, simulate
from eplb.simulate.traces import DEEPSEEK_EXAMPLE, Trace, generate, load_trace

try:
    from tqdm import tqdm
except ModuleNotFoundError:  # an extra; without it there is no progress bar, which is said below
    tqdm = None


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eplb.simulate", description=__doc__)
    source = parser.add_argument_group("load")
    source.add_argument("--trace", type=Path, help=".npz/.npy with load_BLE, or .pt with logical_count (SGLang)")
    source.add_argument("--load", default="lognormal:0.8", help="zipf:S, lognormal:SIGMA, uniform, deepseek")
    source.add_argument("--change", default="noise:0.05", help="none, noise:SIGMA (drift), hotset, new")
    source.add_argument("--change-every", type=_at_least(1), default=1, metavar="WINDOWS")
    source.add_argument("--layers", type=_at_least(1), default=26)
    source.add_argument("--experts", type=_at_least(1), default=64)
    source.add_argument("--windows", type=_at_least(1), default=20)
    source.add_argument("--assignments-per-batch", type=_at_least(1), default=8192, help="tokens · top-k of a batch")
    source.add_argument("--seed", type=_at_least(0), default=0)
    system = parser.add_argument_group("system")
    system.add_argument("--ranks", type=_at_least(1), default=4)
    system.add_argument("--ranks-per-node", type=_at_least(1))
    system.add_argument("--groups", type=_at_least(1), default=1, help="groups of experts, for node-limited routing")
    system.add_argument("--redundant", type=_at_least(0), default=8, help="redundant experts of a layer")
    system.add_argument("--free-slots", type=_at_least(1), default=1, help="of each rank, shared by all layers")
    system.add_argument("--bytes-per-expert", type=_at_least(0), default=0)
    system.add_argument("--batches-per-window", type=_at_least(1), default=16)
    system.add_argument("--sub-windows", type=_at_least(1), default=4)
    system.add_argument("--forecast-windows", type=_at_least(1), default=8, help="1: plan for the last window")
    parser.add_argument("--policies", default="static,deepseek,adaptive", help="comma-separated names")
    parser.add_argument("--min-gain", type=float, help="of the policy adaptive")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all windows of all policies")
    parser.add_argument(
        "--save-placements",
        type=Path,
        metavar="FILE",
        help="plan the whole trace by the last policy; see load_placements()",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 for an input that cannot be simulated or a file that cannot be written."""
    options = _parser().parse_args(arguments)
    try:
        _check_outputs(options)
        trace = _trace(options)
        topology = Topology(options.ranks, options.ranks_per_node, options.groups)
        names = [name.strip() for name in options.policies.split(",") if name.strip()]
        runs = _run(trace, names, topology, options)
        print(_table(trace, runs, options))
        if options.json:
            records = {name: [asdict(result) for result in results] for name, results in runs.items()}
            options.json.write_text(json.dumps({"trace": trace.name, "policies": records}, indent=1) + "\n")
        if options.plot:
            _plot(trace, runs, options.plot)
        if options.save_placements:
            _save_placements(trace, names[-1], topology, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_outputs(options: argparse.Namespace) -> None:
    """What would fail after the whole run fails before it."""
    outputs = {"--json": options.json, "--plot": options.plot, "--save-placements": options.save_placements}
    for name, path in outputs.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"{name} {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise ValueError(f"{name} {path}: is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{name} {path}: may not be written")
    if options.plot:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(f"--plot {options.plot}: needs matplotlib, which is not installed")
        from matplotlib.figure import Figure

        formats = Figure().canvas.get_supported_filetypes()
        if options.plot.suffix.removeprefix(".") not in formats:
            raise ValueError(f"--plot {options.plot}: the suffix must be one of {', '.join(sorted(formats))}")


def _trace(options: argparse.Namespace) -> Trace:
    if options.trace:
        return load_trace(options.trace)
    if options.load == "deepseek":
        options.layers, options.experts = DEEPSEEK_EXAMPLE.shape
    return generate(
        options.load,
        options.change,
        num_layers=options.layers,
        num_experts=options.experts,
        num_windows=options.windows,
        batches_per_window=options.batches_per_window,
        change_every=options.change_every,
        assignments_per_batch=options.assignments_per_batch,
        seed=options.seed,
    )


def _run(
    trace: Trace, names: Sequence[str], topology: Topology, options: argparse.Namespace
) -> dict[str, list[WindowResult]]:
    if not names:
        raise ValueError(f"policies={options.policies!r}: names none; known policies: {', '.join(known_policies())}")
    policies = {name: _policy(name, options) for name in names}
    batches = min(options.batches_per_window, trace.load_BLE.shape[0])
    total = len(names) * (trace.load_BLE.shape[0] // batches)
    bar = tqdm(total=total, unit="window", file=sys.stderr) if tqdm else None
    if bar is None:
        print("no progress bar: tqdm is not installed", file=sys.stderr)
    runs = {}
    for name, policy in policies.items():
        if bar is not None:
            bar.set_description(name)
        runs[name] = simulate(
            trace,
            policy,
            topology,
            num_redundant_experts=options.redundant,
            batches_per_window=batches,
            sub_windows=min(options.sub_windows, batches),
            forecast_windows=options.forecast_windows,
            bytes_per_expert=options.bytes_per_expert,
            free_slots=options.free_slots,
            progress=bar.update if bar is not None else lambda: None,
        )
    if bar is not None:
        bar.close()
    return runs


def _policy(name: str, options: argparse.Namespace) -> Policy:
    own = {} if options.min_gain is None else {"adaptive": {"min_gain": options.min_gain}}
    return make_policy(name, **own.get(name, {}))


def _save_placements(trace: Trace, name: str, topology: Topology, options: argparse.Namespace) -> None:
    batches = min(options.batches_per_window, trace.load_BLE.shape[0])
    placements, shares = plan_offline(
        trace,
        _policy(name, options),
        topology,
        num_redundant_experts=options.redundant,
        batches_per_window=batches,
        sub_windows=min(options.sub_windows, batches),
        forecast_windows=options.forecast_windows,
    )
    save_placements(options.save_placements, placements, shares)
    print(f"{options.save_placements}: where {name} has the experts of {len(placements)} layers after the last window")


def _table(trace: Trace, runs: dict[str, list[WindowResult]], options: argparse.Namespace) -> str:
    num_batches, num_layers, num_experts = trace.load_BLE.shape
    physical = num_layers * (num_experts + options.redundant)
    lines = [
        f"{trace.name}: {num_layers} layers × {num_experts} → {num_experts + options.redundant} on {options.ranks} ranks, "
        f"{num_batches} batches; averages after the first window",
        f"{'policy':<12}{'max/mean':>10}{'worst':>8}{'per batch':>11}{'bound':>8}{'moved/window':>14}"
        f"{'bytes/window':>14}{'waves':>7}{'planning':>11}{'waves in':>10}",
    ]
    means = {}
    for name, results in runs.items():
        used = results[1:] or results
        mean = {key: float(np.mean([getattr(r, key) for r in used])) for key in asdict(used[0])}
        means[name] = mean
        lines.append(
            f"{name:<12}{mean['max_over_mean']:>10.4f}{max(r.worst_layer for r in used):>8.3f}{mean['per_batch']:>11.4f}"
            f"{mean['bound']:>8.4f}{mean['moves'] / physical:>13.2%} {mean['moved_bytes']:>13.3g}{mean['waves']:>7.1f}"
            f"{mean['planning_ms']:>8.1f} ms{mean['plan_ms']:>7.1f} ms"
        )
    if "static" in means and "adaptive" in means:
        before, after = means["static"]["per_batch"], means["adaptive"]["per_batch"]
        lines.append(
            f"The slowest rank does {1 - after / before:.1%} less work per batch with adaptive than with static, for "
            f"{means['adaptive']['moves']:.1f} experts moved per window."
        )
    return "\n".join(lines)


def _plot(trace: Trace, runs: dict[str, list[WindowResult]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (balance, moves) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    for name, results in runs.items():
        windows = range(len(results))
        (line,) = balance.plot(windows, [r.max_over_mean for r in results], label=f"{name}, window")
        balance.plot(windows, [r.per_batch for r in results], ":", color=line.get_color(), label=f"{name}, per batch")
        moves.plot(windows, np.cumsum([r.moves for r in results]), color=line.get_color(), label=name)
    bound = next(iter(runs.values()))
    balance.plot(range(len(bound)), [r.bound for r in bound], "k--", linewidth=1, label="bound")
    balance.set_ylabel("max / mean load over ranks")
    balance.set_title(trace.name)
    balance.legend(fontsize="small", ncols=2)
    moves.set_ylabel("experts moved so far")
    moves.set_xlabel("window")
    moves.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
