"""Shared by the benchmarks of single kernels: each op against its floor, its peers and its PyTorch reference."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import groupby
from typing import Any, TypedDict

import torch

from bench.cases import Case, count_hit, make_logits
from bench.ceilings import Ceilings, measure_ceilings
from bench.command import exit_status, make_parser
from bench.providers import Unavailable, Weights, make_weights
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
from bench.timing import Function, time_eager, time_graph
from moe_kernels import (
    ExpertMatrices,
    GemmConfig,
    RoutingRule,
    TileSchedule,
    build_schedule,
    gemm_configs,
    has_tma,
    topk_routing,
)


@dataclass(frozen=True)
class Work:
    """One op on one case.

    Attributes:
        runs: by name, the op first, then its peers; each returns what `expected` does, or is in `unchecked`.
        expected: the op's PyTorch reference: a tensor, or several. Called once, before any run.
        num_bytes, flops: the least work of the op, for its floor.
        unchecked: peers whose output has another form than the op's, so it cannot be compared.
    """

    runs: dict[str, Function]
    expected: Function
    num_bytes: float
    flops: float = 0.0
    unchecked: frozenset[str] = field(default_factory=frozenset)


class Tiling(TypedDict):
    """Arguments of a schedule."""

    block_m: int
    extra_m: int


class Inputs:
    """Inputs of a case's ops; each is made when it is first asked for. One lane per expert, slot = lane = id.

    `quantised`: experts of a scheme, instead of `weights`.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        weights: Callable[[], Weights],
        quantised: ExpertMatrices | None = None,
    ) -> None:
        self._quantised = quantised
        self.case, self.shape = case, case.shape
        self.num_tokens, self.top_k = case.num_tokens, case.shape.top_k
        self.num_rows = case.num_tokens * case.shape.top_k
        self.dtype, self.device = dtype, device
        self._weights = weights

    @cached_property
    def weights(self) -> Weights:
        return self._weights()

    @property
    def matrices(self) -> ExpertMatrices:
        if self._quantised is not None:
            return self._quantised
        return ExpertMatrices(self.weights.gate_up_ENH, self.weights.down_EHI)

    @cached_property
    def logits_TE(self) -> torch.Tensor:
        return make_logits(self.case).to(self.device, self.dtype)

    @cached_property
    def hit(self) -> int:
        return count_hit(self.logits_TE, self.top_k)

    @cached_property
    def routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights, float32, and ids, int32."""
        return topk_routing(self.logits_TE, self.top_k, RoutingRule())

    @property
    def ids_TK(self) -> torch.Tensor:
        return self.routing[1]

    @cached_property
    def counts_E(self) -> torch.Tensor:
        return torch.bincount(self.ids_TK.flatten(), minlength=self.shape.num_experts).int()

    @cached_property
    def ends_E(self) -> torch.Tensor:
        """The sorted position at which each expert's rows end, as grouped products want it."""
        return self.counts_E.cumsum(0).int()

    def config(self, op: str) -> GemmConfig:
        """Of "up" or "down"."""
        shape, scheme = self.shape, "plain" if self._quantised is None else self._quantised.scheme
        up, down = gemm_configs(
            shape.hidden_size, shape.intermediate_size, self.dtype, self.num_tokens, self.top_k, shape.num_experts,
            tma=has_tma(self.device), scheme=scheme,
        )  # fmt: skip
        return up if op == "up" else down

    @cached_property
    def tiling(self) -> Tiling:
        """Arguments of the schedule that both GEMMs share."""
        up = self.config("up")
        return {"block_m": up.block_m, "extra_m": up.schedule_extra_m}

    @cached_property
    def schedule(self) -> TileSchedule:
        return build_schedule(self.ids_TK.flatten(), self.counts_E, **self.tiling)

    @cached_property
    def lane_to_slot_L(self) -> torch.Tensor:
        return torch.arange(self.shape.num_experts, dtype=torch.int32, device=self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(*shape, device=self.device, generator=generator).to(self.dtype)


def main(op: str, doc: str | None, make_work: Callable[[Inputs], Work], arguments: Sequence[str] | None = None) -> int:
    """The command line of one op's benchmark; the exit status is 1 if a result is wrong."""
    parser = make_parser(op, doc)
    add_arguments(parser)
    add_plot(parser)
    options = parser.parse_args(arguments)
    cases = chosen_cases(parser, options)
    complaints: list[str] = []
    ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
    with Report(options.csv, len(cases), ceilings.columns()) as report, torch.no_grad():
        report.line(f"floors by {ceilings}, measured now")
        for shape, of_shape in groupby(cases, key=lambda case: case.shape):
            weights = cache(partial(make_weights, shape, DTYPES[options.dtype], options.device))
            for case in of_shape:
                inputs = Inputs(case, DTYPES[options.dtype], options.device, weights)
                complaints += _measure(op, inputs, make_work(inputs), options, report, ceilings)
        report.line("\ngeometric mean of time / floor")
        for name in dict.fromkeys(row["provider"] for row in report.rows):
            factors = [row["median_us"] / row["floor_us"] for row in report.rows if row["provider"] == name]
            report.line(f"  {name:<36}{geometric_mean(factors):8.2f}  ({len(factors)} cases)")
    if options.plot and report.rows:
        plot_over_floor(report.rows, options.plot, op)
    return exit_status(complaints)


def _measure(
    op: str, inputs: Inputs, work: Work, options: argparse.Namespace, report: Report, ceilings: Ceilings
) -> list[str]:
    """Write one line and one row for each run; returns the complaints: skipped and wrong runs."""
    name = inputs.case.name
    report.step(name)
    floor = ceilings.floor_us(work.flops, work.num_bytes)
    expected = _as_tuple(work.expected())
    texts, complaints = [], []
    for provider, run in work.runs.items():
        error = None
        try:
            output = run()
            if provider not in work.unchecked:
                error = worst_error(_as_tuple(output), expected)
            if options.device.type == "cuda":
                mode, timing = "graph", time_graph(run, options.device, options.seconds)
            else:
                mode, timing = "eager", time_eager(run, options.device, options.seconds)[0]
        except Unavailable as reason:
            complaints.append(f"skipped {provider}, {name}: {reason}")
            continue
        except Exception as failure:  # of whatever kind, it must not end the others' run
            kind = "FAILED" if provider == next(iter(work.runs)) else "skipped"
            message = str(failure).partition("\n")[0]
            complaints.append(f"{kind} {provider}, {name}: {type(failure).__name__}: {message}")
            continue
        if error is not None and not error <= WORST_ERROR:
            complaints.append(f"FAILED {provider}, {name}: error {error:.2e} against the reference, or NaN")
        row = {
            "op": op,
            "case": name,
            "provider": provider,
            "median_us": timing.median_us,
            "p20_us": timing.p20_us,
            "p80_us": timing.p80_us,
            "floor_us": floor,
            "rel_err": error,
            "mode": mode,
            "dtype": options.dtype,
            "experts_hit": inputs.hit,
        }
        report.row(row)
        texts.append(f"{provider} {timing.median_us:.1f} ({timing.median_us / floor:.2f}×)")
    report.line(f"{name:<22} floor {floor:8.1f} µs   " + "   ".join(texts))
    for complaint in complaints:
        report.line(f"    {complaint}")
    return complaints


def _as_tuple(output: Any) -> tuple[torch.Tensor, ...]:
    return (output,) if isinstance(output, torch.Tensor) else tuple(output)


def worst_error(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Relative error of floats; integers must be equal: 0, or infinity."""
    errors = []
    for output, wanted in zip(outputs, expected, strict=True):
        if wanted.is_floating_point():
            errors.append(relative_error(output, wanted))
        else:
            errors.append(0.0 if torch.equal(output, wanted) else float("inf"))
    return max(errors, key=lambda error: float("inf") if error != error else error)
