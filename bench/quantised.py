"""``python -m bench.quantised``: the forward of one MoE layer with quantised experts, against our bfloat16 and against peers.

A case is a shape in a format: ``dsv3-fp8/T64``. Times and checks are those of `bench.moe_forward`. The floors are by the bytes
of the format, and by products measured at the start of the run: e4m3 ones for fp8, bfloat16 ones for 4-bit weights. On a GPU
without e4m3 products those for fp8 are bfloat16's too, and the column `ceiling_fp8_tflops` is empty. Every output is checked
against a float32 computation on the dequantised weights. The exit status is 1 if one is wrong or a provider failed.

To measure a peer, write a module that calls `bench.quantised_providers.register`:
``--provider-module my_module --providers moe_layer,moe_layer_bf16,mine``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from bench.cases import CASES, SHAPES, TOKENS, Case, count_hit, make_logits, select
from bench.ceilings import Ceilings, measure_ceilings
from bench.command import add_providers, exit_status, integers, make_parser, names
from bench.fused import reference
from bench.moe_forward import header, line_of, measure, summary
from bench.providers import find
from bench.quantised_providers import (
    FORMATS,
    PROVIDERS,
    Format,
    QuantisedProblem,
    QuantisedProvider,
    make_matrices,
    make_problem,
)
from bench.report import (
    Report,
    add_plot,
    add_timing,
    geometric_mean,
    plot_over_floor,
)
from bench.timing import DEFAULT_SECONDS, FLUSHES, time_eager, time_graph
from moe_kernels import ExpertMatrices

DEFAULT = ("qwen3-fp8", "dsv3-fp8", "gptoss-mxfp4", "qwen3-int4", "qwen3-int4-g32", "qwen3-mxfp4-silu")
OURS, OURS_BF16 = "moe_layer", "moe_layer_bf16"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("quantised", __doc__)
    parser.add_argument(
        "--cases",
        type=names,
        default=list(DEFAULT),
        metavar="A,B",
        help=f"shape-format: of {', '.join(SHAPES)} (or experts:top_k:hidden:intermediate) and {', '.join(FORMATS)}; "
        f"default: {','.join(DEFAULT)}",
    )
    parser.add_argument("--tokens", type=integers, default=list(TOKENS), metavar="N,M")
    add_providers(parser)
    add_timing(parser)
    parser.add_argument("--flush", choices=FLUSHES, default="write", help="how the L2 is emptied before a replay")
    parser.add_argument("--eager", action="store_true", help="also without a CUDA graph")
    add_plot(parser)
    options = parser.parse_args(arguments)
    try:
        cases = chosen(options.cases, options.tokens)
        providers = find(options.providers, options.provider_module, PROVIDERS)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    complaints: list[str] = []
    ceilings = measure_ceilings(options.device, torch.bfloat16)
    fp8, of_fp8, said = ceilings, "", "by bfloat16's products: this device has none in e4m3"
    if has_e4m3_products(options.device):
        fp8 = replace(ceilings, flops_per_s=measure_fp8(options.device))
        of_fp8 = fp8.columns()["ceiling_tflops"]
        said = f"by {of_fp8} TFLOP/s"
    columns = {**ceilings.columns(), "ceiling_fp8_tflops": of_fp8}
    with Report(options.csv, len(cases), columns) as report, torch.no_grad():
        report.line(f"floors by {ceilings}, and of fp8 {said}; measured now")
        report.line(header(providers) + f"{'bf16 /':>10}")
        for (shape, form), of_kind in groupby(cases, key=lambda pair: (pair[0].shape, pair[1])):
            matrices = make_matrices(shape, form, options.device)
            for case, _ in of_kind:
                report.step(case.name)
                problem = make_problem(shape, form, matrices, make_logits(case))
                floors = fp8 if form.scheme == "fp8_block" else ceilings
                rows, problems = _measure(case, problem, providers, options, floors)
                for row in rows:
                    report.row(row)
                complaints += problems
                report.line(line_of(case, rows, providers) + _ratio(rows))
                for complaint in problems:
                    report.line(f"    {complaint}")
            del matrices, problem  # before the next ones are made
        for line in _summaries(report.rows, providers):
            report.line(line)
    if options.plot and report.rows:
        plot_over_floor(report.rows, options.plot, "Quantised experts, forward")
    return exit_status(complaints)


def chosen(kinds: Sequence[str], tokens: Sequence[int]) -> list[tuple[Case, Format]]:
    """The cases of these kinds, with their logits; a case's name has the format: ``qwen3-fp8/T16``.

    Raises:
        ValueError: an unknown shape or format, or a batch without tokens.
    """
    found = []
    for kind in kinds:
        shape_name, _, form_name = kind.partition("-")
        if form_name not in FORMATS:
            raise ValueError(f"case {kind!r}: must be a shape, '-', and one of {', '.join(FORMATS)}")
        for case in select([shape_name], tokens):
            if case.is_skewed:
                continue
            known = next((one for one in CASES if one.name == case.name), case)
            shape = replace(case.shape, name=kind)
            found.append((replace(known, shape=shape), FORMATS[form_name]))
    return found


def quantised_work(
    problem_shape: tuple[int, int, int], matrices: ExpertMatrices, num_tokens: int, hit: int
) -> tuple[float, float]:
    """The FLOPs and bytes that no forward can do without: all bytes of the experts hit, once, and x and y in bfloat16.

    Args:
        problem_shape: top k, H, I.
    """
    top_k, hidden_size, intermediate = problem_shape
    flops = 6 * num_tokens * top_k * hidden_size * intermediate
    slots = matrices.down_SHI.shape[0]
    parts = (
        matrices.gate_up_SNH, matrices.down_SHI, matrices.gate_up_bias_SN, matrices.down_bias_SH,
        matrices.gate_up_scale, matrices.down_scale, matrices.gate_up_zero, matrices.down_zero,
    )  # fmt: skip
    of_expert = sum(part.numel() * part.element_size() // slots for part in parts if part is not None)
    return flops, of_expert * hit + 4 * num_tokens * hidden_size


def has_e4m3_products(device: torch.device) -> bool:
    """GPUs from compute capability 8.9 on; PyTorch has one for CPUs."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def measure_fp8(device: torch.device, seconds: float = DEFAULT_SECONDS) -> float:
    """FLOP/s of an 8192³ product of e4m3 numbers with one scale each."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=device.type == "cuda")

    timing = time_graph(product, device, seconds) if device.type == "cuda" else time_eager(product, device, seconds)[0]
    return 2e6 * size**3 / timing.median_us


def _measure(
    case: Case,
    problem: QuantisedProblem,
    providers: Sequence[QuantisedProvider],
    options: argparse.Namespace,
    ceilings: Ceilings,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a case, and complaints: "skipped …" and "FAILED …"."""
    shape, form = problem.shape, problem.form
    hit = count_hit(problem.logits_TE, shape.top_k)
    sizes = (shape.top_k, shape.hidden_size, shape.intermediate_size)
    floor_us = ceilings.floor_us(*quantised_work(sizes, problem.quantised, case.num_tokens, hit))
    expected_TH = reference(problem.x_TH, problem.logits_TE, shape.top_k, problem.quantised)
    columns = {"scheme": form.scheme, "experts_hit": hit}
    return measure(case.name, problem, expected_TH, providers, options, floor_us, form.worst_error, columns)


def _ratio(rows: Sequence[dict[str, Any]]) -> str:
    """How much longer our bfloat16 takes, in the first mode."""
    first: dict[str, float] = {}
    for row in rows:
        first.setdefault(row["provider"], row["median_us"])
    if OURS not in first or OURS_BF16 not in first:
        return ""
    return f"{first[OURS_BF16] / first[OURS]:>10.2f}"


def _summaries(rows: Sequence[dict[str, Any]], providers: Sequence[QuantisedProvider]) -> list[str]:
    """Of each kind of case; what is our bfloat16's own floor is not this one, so it may be far away."""
    lines = []
    kinds = dict.fromkeys(row["case"].partition("/")[0] for row in rows)
    for kind in kinds:
        of_kind = [row for row in rows if row["case"].partition("/")[0] == kind]
        lines += [f"\n{kind}", *summary(of_kind, providers)[1:]]
        ours, plain = (
            {(row["case"], row["mode"]): row["median_us"] for row in of_kind if row["provider"] == name}
            for name in (OURS, OURS_BF16)
        )
        both = [plain[key] / ours[key] for key in ours if key in plain]
        if both:
            lines.append(f"  {OURS_BF16} / {OURS}: {geometric_mean(both):.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
