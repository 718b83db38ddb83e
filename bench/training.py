"""``python -m bench.training``: forward and backward of one MoE layer's experts, router logits to gradients, against peers.

Gradients of the hidden states, of the router logits and of both weights. On a GPU: device time of a CUDA graph's replay with
a cold L2, forward and backward in one graph, and the forward alone (which keeps what the backward needs) in another; the
providers of a case take turns. With ``--eager`` also without a graph, back to back. Memory is the peak beyond weights, inputs
and the output's gradient; gradients of the weights are included. The floor is three times the forward's products at the
measured ceiling, or the reads of weights and writes of their gradients. Every gradient is checked against float32; the exit
status is 1 if one is wrong or a provider failed.

A peer that is not built in: ``--provider-module``, see `bench.training_providers`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import Case, Shape, count_hit, forward_work, make_logits
from bench.ceilings import measure_ceilings
from bench.command import add_providers, exit_status, make_parser
from bench.providers import Problem, complaining, find, make_problem, make_weights, routing_of
from bench.report import DTYPES, Report, add_arguments, chosen_cases, geometric_mean, relative_error
from bench.timing import Timing, capture, extra_bytes, time_captured, time_eager
from bench.training_providers import PROVIDERS, Step, TrainingProvider

SHAPES = ("qwen3", "gptoss", "dsv3", "mixtral", "olmoe")
TOKENS = (4096, 16384)
WORST_ERROR = 2e-2
"""Largest error of a gradient relative to float32, in norm: it passes through twice as many roundings as an output."""
GRADIENTS = ("x", "logits", "gate_up", "down")

Gradients = tuple[torch.Tensor, ...]


def training_work(shape: Shape, num_tokens: int, experts_hit: int, dtype: torch.dtype) -> tuple[float, float]:
    """The FLOPs and bytes that no forward and backward can do without: three forwards' products; the weights of the experts
    hit read twice, all gradients of weights written, hidden states in and out and their gradients."""
    flops, forward_bytes = forward_work(shape, num_tokens, experts_hit, dtype)
    weights = 3 * shape.hidden_size * shape.intermediate_size * shape.num_experts * dtype.itemsize
    return 3 * flops, 2 * forward_bytes + weights


def reference_gradients(problem: Problem, grad_TH: torch.Tensor) -> Gradients:
    """Gradients in float32, without TF32: expert after expert."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        logits_TE = problem.logits_TE.detach().float().requires_grad_()
        weights_TK, ids_TK = routing_of(logits_TE, problem.top_k)
        x_TH, grad_y_TH = problem.x_TH.float(), grad_TH.float()
        grad_x, grad_weights = torch.zeros_like(x_TH), torch.zeros_like(weights_TK)
        grad_gate_up = torch.zeros_like(problem.weights.gate_up_ENH, dtype=torch.float32)
        grad_down = torch.zeros_like(problem.weights.down_EHI, dtype=torch.float32)
        for expert in ids_TK.unique().tolist():
            token, k = torch.where(ids_TK == expert)
            leaves = [
                tensor.detach().float().requires_grad_()
                for tensor in (
                    x_TH[token],
                    weights_TK[token, k],
                    problem.weights.gate_up_ENH[expert],
                    problem.weights.down_EHI[expert],
                )
            ]
            x, weight, gate_up, down = leaves
            gate, up = (x @ gate_up.T).chunk(2, dim=-1)
            rows = (F.silu(gate) * up) @ down.T * weight[:, None]
            of_x, of_weight, grad_gate_up[expert], grad_down[expert] = torch.autograd.grad(
                rows, leaves, grad_y_TH[token]
            )
            grad_x.index_add_(0, token, of_x)  # an expert has a token once
            grad_weights[token, k] = of_weight
        (grad_logits,) = torch.autograd.grad(weights_TK, logits_TE, grad_weights)
        return grad_x, grad_logits, grad_gate_up, grad_down
    finally:
        torch.set_float32_matmul_precision(before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("training", __doc__)
    add_arguments(parser)
    add_providers(parser)
    parser.add_argument("--eager", action="store_true", help="also without a CUDA graph, back to back")
    options = parser.parse_args(arguments)
    options.shapes, options.tokens = options.shapes or list(SHAPES), options.tokens or list(TOKENS)
    cases = chosen_cases(parser, options)
    try:
        providers: list[TrainingProvider] = find(options.providers, options.provider_module, PROVIDERS)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    complaints: list[str] = []
    ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
    with Report(options.csv, len(cases), ceilings.columns()) as report:
        report.line(f"floors by {ceilings}, measured now")
        report.line(f"{'case':<18}{'floor ms':>9}  forward + backward ms (forward ms, peak GiB)")
        for shape, of_shape in groupby(cases, key=lambda case: case.shape):
            weights = make_weights(shape, DTYPES[options.dtype], options.device)
            for case in of_shape:
                report.step(case.name)
                logits_TE = make_logits(case)
                problem = make_problem(shape, weights, logits_TE)
                work = training_work(shape, case.num_tokens, count_hit(logits_TE, shape.top_k), DTYPES[options.dtype])
                rows, problems = _measure(case, problem, providers, options, ceilings.floor_us(*work))
                for row in rows:
                    report.row(row)
                complaints += problems
                for line in (*_lines(case, rows), *(f"    {complaint}" for complaint in problems)):
                    report.line(line)
            del weights, problem  # before the next shape's are made
        for line in _summary(report.rows):
            report.line(line)
    return exit_status(complaints)


def _measure(
    case: Case,
    problem: Problem,
    providers: Sequence[TrainingProvider],
    options: argparse.Namespace,
    floor_us: float,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a case, and complaints: "skipped …" and "FAILED …"."""
    device, is_gpu = options.device, options.device.type == "cuda"
    generator = torch.Generator(device).manual_seed(1)
    grad_TH = torch.randn(problem.x_TH.shape, device=device, generator=generator).to(problem.x_TH.dtype)
    expected = reference_gradients(problem, grad_TH)
    steps: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]] = {}
    checked: dict[str, tuple[float, int | None]] = {}
    complaints: list[str] = []
    for provider in providers:
        with complaining(provider.name, case.name, complaints):
            both, forward = _functions(provider.prepare(problem), grad_TH)
            errors = [relative_error(*pair) for pair in zip(both(), expected, strict=True)]
            checked[provider.name] = max(errors), extra_bytes(both, device)
            if is_gpu:
                graphs[provider.name] = capture(both, device), capture(forward, device)
            steps[provider.name] = both, forward
            if not max(errors) <= WORST_ERROR:
                each = ", ".join(f"{name} {error:.2e}" for name, error in zip(GRADIENTS, errors, strict=True))
                complaints.append(f"FAILED {provider.name}, {case.name}: errors against float32: {each}")
    del expected
    rows = []
    for (name, mode), (both_timing, forward_timing) in _times(steps, graphs, options).items():
        error, peak_bytes = checked[name]
        rows.append(
            {
                "case": case.name,
                "provider": name,
                "fwd_bwd_ms": both_timing.median_us / 1e3,
                "fwd_ms": forward_timing.median_us / 1e3,
                "peak_extra_gib": None if peak_bytes is None else peak_bytes / 2**30,
                "floor_ms": floor_us / 1e3,
                "p20_ms": both_timing.p20_us / 1e3,
                "p80_ms": both_timing.p80_us / 1e3,
                "rel_err": error,
                "mode": mode,
                "dtype": options.dtype,
            }
        )
    return rows, complaints


def _functions(step: Step, grad_TH: torch.Tensor) -> tuple[Callable[[], Gradients], Callable[[], torch.Tensor]]:
    """Forward and backward; forward alone."""
    return lambda: torch.autograd.grad(step.forward(), step.leaves, grad_TH), step.forward


def _times(
    steps: dict[str, tuple[Callable[[], Any], Callable[[], Any]]],
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]],
    options: argparse.Namespace,
) -> dict[tuple[str, str], tuple[Timing, Timing]]:
    """By provider and mode: forward and backward, forward. Graphs take turns."""
    times: dict[tuple[str, str], tuple[Timing, Timing]] = {}
    if graphs:
        flat = [graph for pair in graphs.values() for graph in pair]
        timings = time_captured(flat, options.device, options.seconds)
        for place, name in enumerate(graphs):
            times[name, "graph"] = timings[2 * place], timings[2 * place + 1]
    if options.eager or options.device.type != "cuda":
        for name, functions in steps.items():
            _, both_us = time_eager(functions[0], options.device, options.seconds)
            _, forward_us = time_eager(functions[1], options.device, options.seconds)
            times[name, "back_to_back"] = Timing.of([both_us]), Timing.of([forward_us])
    return times


def _lines(case: Case, rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        peak = "" if row["peak_extra_gib"] is None else f", {row['peak_extra_gib']:.2f} GiB"
        factor = row["fwd_bwd_ms"] / row["floor_ms"]
        lines.append(
            f"{case.name:<18}{row['floor_ms']:>9.2f}  {row['provider']:<27}{row['mode']:<13}{row['fwd_bwd_ms']:>9.3f} "
            f"({row['fwd_ms']:.3f}{peak}), {factor:.2f} × floor"
        )
    return lines


def _summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["", "geometric mean of time / floor"]
    for mode, provider in dict.fromkeys((row["mode"], row["provider"]) for row in rows):
        factors = [
            row["fwd_bwd_ms"] / row["floor_ms"] for row in rows if (row["mode"], row["provider"]) == (mode, provider)
        ]
        lines.append(f"  {provider:<27}{mode:<13}{geometric_mean(factors):>8.3f}  ({len(factors)} cases)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
