"""``python -m bench.moe_forward``: the forward of one MoE layer, hidden states and router logits to output, against peers.

On a GPU: device time of a CUDA graph's replay with a cold L2 (and with ``--eager`` also without a graph, from the host).
The providers of a case take turns (`bench.timing.time_captured`). The floors are those of ceilings measured at the start of
the run. Every output is checked against float32; the exit status is 1 if one is wrong or a provider failed.

To measure a peer that is not built in, write a module that calls `bench.providers.register` and name it:
``--provider-module my_module --providers moe_layer,mine``. To compare with another checkout of this project, in the same run:
``--against PATH`` (`bench.against`).
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench import against
from bench.cases import Case, count_hit, forward_work, make_logits
from bench.ceilings import measure_ceilings
from bench.command import add_providers, exit_status, make_parser
from bench.providers import Named, complaining, find, make_problem, make_weights, reference
from bench.report import (
    DTYPES,
    WORST_ERROR,
    Report,
    add_arguments,
    add_plot,
    chosen_cases,
    geometric_mean,
    plot_over_floor,
    relative_error,
)
from bench.timing import FLUSHES, capture, extra_bytes, time_captured, time_eager


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("moe_forward", __doc__)
    add_arguments(parser)
    add_plot(parser)
    add_providers(parser)
    parser.add_argument(
        "--flush",
        choices=FLUSHES,
        default="write",
        help="how the L2 is emptied before a replay: by writes, which go on to memory during it, or by reads",
    )
    parser.add_argument("--eager", action="store_true", help="also without a CUDA graph: latency, and back to back")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PATH",
        help="compare with the layer of another checkout, instead of with providers",
    )
    parser.add_argument("--rounds", type=int, default=against.ROUNDS, help="of --against")
    options = parser.parse_args(arguments)
    cases = chosen_cases(parser, options)
    try:
        if options.against is not None:
            against.check_root(options.against)
            if options.rounds < 1:
                raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
        providers = find(options.providers, options.provider_module)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if options.against is not None:
        return against.run(cases, options)
    complaints: list[str] = []
    ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
    with Report(options.csv, len(cases), ceilings.columns()) as report, torch.no_grad():
        report.line(f"floors by {ceilings}, measured now")
        report.line(header(providers))
        for shape, of_shape in groupby(cases, key=lambda case: case.shape):
            weights = make_weights(shape, DTYPES[options.dtype], options.device)
            for case in of_shape:
                report.step(case.name)
                logits_TE = make_logits(case)
                problem = make_problem(shape, weights, logits_TE)
                hit = count_hit(logits_TE, shape.top_k)
                floor_us = ceilings.floor_us(*forward_work(shape, case.num_tokens, hit, DTYPES[options.dtype]))
                columns = {"dtype": options.dtype, "experts_hit": hit}
                rows, problems = measure(
                    case.name, problem, reference(problem), providers, options, floor_us, WORST_ERROR, columns
                )
                for row in rows:
                    report.row(row)
                complaints += problems
                report.line(line_of(case, rows, providers))
                for complaint in problems:
                    report.line(f"    {complaint}")
            del weights, problem  # before the next shape's are made
        for line in summary(report.rows, providers):
            report.line(line)
    if options.plot and report.rows:
        plot_over_floor(report.rows, options.plot, "MoE layer, forward")
    return exit_status(complaints)


def measure(
    case: str,
    problem: Any,
    expected_TH: torch.Tensor,
    providers: Sequence[Any],
    options: argparse.Namespace,
    floor_us: float,
    worst_error: float,
    columns: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a case, and complaints: "skipped …" and "FAILED …".

    Args:
        problem: what the providers' `prepare` takes.
        expected_TH: what they should compute, in float32.
        worst_error: the largest error relative to it, in norm.
        columns: more, of every row.
    """
    forwards: dict[str, Callable[[], torch.Tensor]] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    checked: dict[str, tuple[float, int | None]] = {}
    complaints: list[str] = []
    for provider in providers:
        with complaining(provider.name, case, complaints):
            forward = provider.prepare(problem)
            error = relative_error(forward(), expected_TH)
            checked[provider.name] = error, extra_bytes(forward, options.device)
            if options.device.type == "cuda":
                graphs[provider.name] = capture(forward, options.device)
            forwards[provider.name] = forward
            if not error <= worst_error:
                complaints.append(f"FAILED {provider.name}, {case}: error {error:.2e} against float32, or NaN")
    rows = [
        {
            "case": case,
            "provider": name,
            "median_us": median_us,
            "p20_us": p20_us,
            "p80_us": p80_us,
            "floor_us": floor_us,
            "rel_err": checked[name][0],
            "mode": mode,
            **columns,
            "extra_bytes": checked[name][1],
        }
        for name, times in measured_times(forwards, graphs, options).items()
        for mode, (median_us, p20_us, p80_us) in times.items()
    ]
    return rows, complaints


def measured_times(
    forwards: dict[str, Callable[[], torch.Tensor]],
    graphs: dict[str, torch.cuda.CUDAGraph],
    options: argparse.Namespace,
) -> dict[str, dict[str, tuple[float, float | None, float | None]]]:
    """By provider and mode: median, p20, p80 in µs. Graphs take turns; forwards without a graph are timed one by one."""
    times: dict[str, dict[str, tuple[float, float | None, float | None]]] = {name: {} for name in forwards}
    if options.device.type == "cuda" and forwards:
        mode = "graph" if options.flush == "write" else "graph_read_flush"
        captured = [graphs[name] for name in forwards]
        timings = time_captured(captured, options.device, options.seconds, options.flush)
        for name, timing in zip(forwards, timings, strict=True):
            times[name][mode] = timing.median_us, timing.p20_us, timing.p80_us
    if options.eager or options.device.type != "cuda":
        for name, forward in forwards.items():
            timing, back_to_back_us = time_eager(forward, options.device, options.seconds)
            times[name]["eager"] = timing.median_us, timing.p20_us, timing.p80_us
            times[name]["back_to_back"] = back_to_back_us, None, None
    return times


def header(providers: Sequence[Named]) -> str:
    names = "".join(f"{provider.name + ' µs':>{_width(provider)}}" for provider in providers)
    return f"{'case':<22}{'hit':>5}{'floor µs':>10}{names}{'× floor':>10}{'speed-up':>10}"


def _width(provider: Named) -> int:
    return max(10, len(provider.name) + 5)


def line_of(case: Case, rows: Sequence[dict[str, Any]], providers: Sequence[Named]) -> str:
    """Times in the first mode measured; the factors are of the first provider, against the best of the others."""
    first: dict[str, float] = {}
    for row in rows:
        first.setdefault(row["provider"], row["median_us"])
    times = "".join(
        f"{first[provider.name]:>{_width(provider)}.1f}" if provider.name in first else f"{'-':>{_width(provider)}}"
        for provider in providers
    )
    if not rows:
        return f"{case.name:<22}{'-':>5}{'-':>10}{times}"
    text = f"{case.name:<22}{rows[0]['experts_hit']:>5}{rows[0]['floor_us']:>10.1f}{times}"
    ours, others = first.get(providers[0].name), [us for name, us in first.items() if name != providers[0].name]
    if ours is None:
        return text
    return text + f"{ours / rows[0]['floor_us']:>10.2f}" + (f"{min(others) / ours:>10.2f}" if others else f"{'-':>10}")


def summary(rows: Sequence[dict[str, Any]], providers: Sequence[Named]) -> list[str]:
    lines = ["", "geometric mean of time / floor"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for provider in providers:
            factors = [
                row["median_us"] / row["floor_us"]
                for row in rows
                if (row["provider"], row["mode"]) == (provider.name, mode)
            ]
            if factors:
                lines.append(f"  {provider.name:<26}{mode:<14}{geometric_mean(factors):>8.3f}  ({len(factors)} cases)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
