"""``python -m bench.formats``: what GPT-OSS's experts cost beside plain ones of the same shape: biases, clamps, another gate.

The layer's forward on one GPU, as `bench.moe_forward` times it, with one set of weights. The checkpoint's interleaved rows are
no part of it: they are turned once, at load, so the kernels of all formats read the same layout. Every output is checked
against float32; the exit status is 1 if one is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from bench.cases import count_hit, make_logits
from bench.command import exit_status, make_parser
from bench.fused import GPT_OSS, fused_forward, reference
from bench.providers import Problem, complaining, make_problem, make_weights
from bench.report import DTYPES, WORST_ERROR, Report, add_arguments, chosen_cases, geometric_mean, relative_error
from bench.timing import Timing, capture, time_captured, time_eager
from moe_kernels import ExpertMatrices

PLAIN = "plain"
FORMATS = {PLAIN: ("silu", False), "bias": ("silu", True), "clamp": (GPT_OSS, False), "gpt_oss": (GPT_OSS, True)}
"""Activation, and whether both matrices have biases."""


def make_matrices(problem: Problem, name: str) -> ExpertMatrices:
    """The problem's weights as experts of a format; random biases."""
    activation, has_bias = FORMATS[name]
    gate_up, down = problem.weights.gate_up_ENH, problem.weights.down_EHI
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if has_bias:
        random = torch.Generator(gate_up.device).manual_seed(2)
        first, second = (
            torch.randn(tensor.shape[:2], device=tensor.device, generator=random).to(tensor.dtype)
            for tensor in (gate_up, down)
        )
        biases = first, second
    return ExpertMatrices(gate_up, down, activation, *biases)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("formats", __doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or ["gptoss"]
    cases = chosen_cases(parser, options)
    complaints: list[str] = []
    ratios: dict[str, list[float]] = {name: [] for name in FORMATS}
    with Report(options.csv, len(cases)) as report, torch.no_grad():
        report.line(f"{'case':<16}{'hit':>5}" + "".join(f"{name + ' µs':>12}{'':>8}" for name in FORMATS))
        for shape, of_shape in groupby(cases, key=lambda case: case.shape):
            weights = make_weights(shape, DTYPES[options.dtype], options.device)
            for case in of_shape:
                report.step(case.name)
                logits_TE = make_logits(case)
                problem = make_problem(shape, weights, logits_TE)
                times, errors = _measure(problem, case.name, options, complaints)
                hit, line = count_hit(logits_TE, shape.top_k), ""
                for name, timing in times.items():
                    ratio = timing.median_us / times[PLAIN].median_us if PLAIN in times else None
                    if ratio is not None:
                        ratios[name].append(ratio)
                    line += f"{timing.median_us:>12.1f}" + (f" ×{ratio:<6.3f}" if ratio is not None else f"{'':>8}")
                    report.row(_row(case.name, name, timing, ratio, errors[name], hit, options))
                report.line(f"{case.name:<16}{hit:>5}{line}")
        for name, found in ratios.items():
            if found and name != PLAIN:
                report.line(
                    f"{name}: {geometric_mean(found):.4f} of plain, worst {max(found):.3f} ({len(found)} cases)"
                )
    return exit_status(complaints)


def _measure(
    problem: Problem, case: str, options: argparse.Namespace, complaints: list[str]
) -> tuple[dict[str, Timing], dict[str, float]]:
    """By format: its timing, and its error."""
    is_gpu = options.device.type == "cuda"
    forwards: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for name in FORMATS:
        with complaining(name, case, complaints):
            given = problem.x_TH, problem.logits_TE, problem.top_k, make_matrices(problem, name)
            forward = fused_forward(*given)
            errors[name] = error = relative_error(forward(), reference(*given))
            if not error <= WORST_ERROR:
                complaints.append(f"FAILED {name}, {case}: error {error:.2e} against float32, or NaN")
            forwards[name] = capture(forward, options.device) if is_gpu else forward
    if is_gpu and forwards:
        timings = time_captured(list(forwards.values()), options.device, options.seconds)
        return dict(zip(forwards, timings, strict=True)), errors
    return {name: time_eager(one, options.device, options.seconds)[0] for name, one in forwards.items()}, errors


def _row(
    case: str, name: str, timing: Timing, ratio: float | None, error: float, hit: int, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "case": case,
        "provider": name,
        "median_us": timing.median_us,
        "p20_us": timing.p20_us,
        "p80_us": timing.p80_us,
        "over_plain": None if ratio is None else f"{ratio:.4f}",
        "rel_err": error,
        "mode": "graph" if options.device.type == "cuda" else "eager",
        "dtype": options.dtype,
        "experts_hit": hit,
    }


if __name__ == "__main__":
    sys.exit(main())
