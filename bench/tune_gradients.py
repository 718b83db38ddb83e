"""``python -m bench.tune_gradients``: times candidate tiles of the backward's GEMMs, from which `gradient_configs` is chosen.

Each of the three alone, in a CUDA graph: ``hidden`` (with its epilogue and the row weights), ``weights`` (both matrices) and
``x`` (with the sum over copies). Products and rate are those of the GEMM. `hidden` and `x` share one `block_m`. Each candidate
is compared with the first one, within what roundings explain.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import groupby, product
from typing import Any

import torch
from triton.errors import TritonError

from bench.cases import Case
from bench.command import make_parser, names
from bench.kernel import Inputs
from bench.providers import make_weights
from bench.report import DTYPES, WORST_ERROR, Report, add_arguments, chosen_cases, relative_error
from bench.timing import time_graph
from moe_kernels import GemmConfig, build_schedule
from moe_kernels.gradients.experts_grad_hidden import experts_grad_hidden
from moe_kernels.gradients.experts_grad_weights import experts_grad_weights
from moe_kernels.gradients.experts_grad_x import experts_grad_x
from moe_kernels.gradients.gradient_tiles import GradientTiles, cut_tiles

OPS = ("hidden", "weights", "x")
TOKENS = (4096, 16384)
FIELDS = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m", "tma", "tail_m", "programs_per_sm")


def candidates(op: str, dtype: torch.dtype) -> Iterator[GemmConfig]:
    """The tiles worth a try; those that need too much shared memory fail and are said."""
    if dtype.itemsize == 4:
        for block_m, block_n, block_k, num_stages in product((32, 64), (64, 128), (16, 32), (2, 3)):
            yield GemmConfig(block_m, block_n, block_k, 4, num_stages)
        return
    squares = ((64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (64, 256, 4), (128, 256, 8), (256, 128, 8))
    for (block_m, block_n, num_warps), (block_k, num_stages), group_m in product(
        squares, ((64, 3), (64, 4), (32, 4), (32, 5), (128, 3)), (4, 8, 16)
    ):
        if group_m == 8 or (block_k, num_stages) == (64, 4):
            config = GemmConfig(block_m, block_n, block_k, num_warps, num_stages, group_m)
            yield config
            if op != "weights" and block_k == 64:
                for tail_m in (0, 64) if block_m == 128 else (0,):
                    yield replace(config, tma=True, tail_m=tail_m)
            if op == "x" and block_k == 64:
                yield replace(config, tma=True, programs_per_sm=1 if block_n == 256 else 2)
    if op == "weights":
        by_tma = ((128, 256, 8, 1), (256, 128, 8, 1), (128, 128, 8, 2), (128, 128, 4, 2))
        for (block_m, block_n, num_warps, programs), (block_k, num_stages) in product(
            by_tma, ((64, 3), (64, 4), (32, 6), (32, 8))
        ):
            yield GemmConfig(block_m, block_n, block_k, num_warps, num_stages, tma=True, programs_per_sm=programs)


class Backward:
    """The tensors of a case's backward, and its three GEMMs with any tiles."""

    def __init__(self, inputs: Inputs, case: Case) -> None:
        shape, device = case.shape, inputs.device
        hidden_size, intermediate, self.top_k = shape.hidden_size, shape.intermediate_size, inputs.top_k
        self.matrices, self.slots = inputs.matrices, inputs.lane_to_slot_L
        self.grad_TH, self.x_TH = (inputs.normal(inputs.num_tokens, hidden_size) for _ in range(2))
        self.pre_NJ = inputs.normal(inputs.num_rows, 2 * intermediate)
        self.weighted_NI = inputs.normal(inputs.num_rows, intermediate)
        self.grad_pre_NJ = torch.empty_like(self.pre_NJ)
        self.row_weights_N = inputs.routing[0].flatten()
        self.grad_row_weights_N = torch.empty_like(self.row_weights_N)
        schedule = build_schedule(inputs.ids_TK.flatten(), inputs.counts_E, block_m=128)
        self.order_N, self.offsets_L1 = schedule.order_N, schedule.offsets_L1
        self.grad_up, self.grad_down = (
            torch.empty_like(one) for one in (self.matrices.gate_up_SNH, self.matrices.down_SHI)
        )
        self.device = device

    def tiles(self, config: GemmConfig) -> GradientTiles:
        slots = self.matrices.down_SHI.shape[0]
        sizes = {"tile_m": config.block_m, "block_k": config.block_k}
        return cut_tiles(self.offsets_L1, self.slots, self.order_N.shape[0], slots, **sizes)

    def hidden(self, config: GemmConfig, tiles: GradientTiles) -> tuple[torch.Tensor, ...]:
        experts_grad_hidden(
            self.grad_TH,
            self.matrices.down_SHI,
            None,
            self.pre_NJ,
            self.row_weights_N,
            self.slots,
            self.order_N,
            tiles,
            self.top_k,
            self.matrices.activation,
            config,
            grad_pre_NJ=self.grad_pre_NJ,
            weighted_NI=self.weighted_NI,
            grad_row_weights_N=self.grad_row_weights_N,
        )
        return self.grad_pre_NJ, self.weighted_NI, self.grad_row_weights_N

    def weights(self, config: GemmConfig, tiles: GradientTiles) -> tuple[torch.Tensor, ...]:
        sums = (self.order_N, self.offsets_L1, tiles)
        experts_grad_weights(self.grad_TH, self.weighted_NI, *sums, self.top_k, None, config, out_SPQ=self.grad_down)
        experts_grad_weights(self.pre_NJ, self.x_TH, *sums, None, self.top_k, config, out_SPQ=self.grad_up)
        return self.grad_down, self.grad_up

    def x(self, config: GemmConfig, tiles: GradientTiles) -> tuple[torch.Tensor, ...]:
        gate_up = self.matrices.gate_up_SNH
        return (
            experts_grad_x(self.pre_NJ, gate_up, self.slots, self.order_N, self.offsets_L1, tiles, self.top_k, config),
        )

    def flops(self, op: str) -> float:
        rows, (_, hidden_size, intermediate) = self.order_N.shape[0], self.matrices.down_SHI.shape
        return 2.0 * rows * hidden_size * intermediate * {"hidden": 1, "weights": 3, "x": 2}[op]


def tune(report: Report, case: Case, backward: Backward, dtype: torch.dtype, options: Any) -> list[str]:
    """Prints the best candidates of a case, writes all; complaints."""
    complaints = []
    for op in options.ops:
        run: Callable[[GemmConfig, GradientTiles], tuple[torch.Tensor, ...]] = getattr(backward, op)
        expected: list[torch.Tensor] | None = None
        times: list[tuple[float, GemmConfig]] = []
        for config in candidates(op, dtype):
            try:
                tiles = backward.tiles(config)
                results = run(config, tiles)
                timing = time_graph(partial(run, config, tiles), backward.device, options.seconds)
            except (RuntimeError, TritonError) as failure:  # too much shared memory
                report.line(f"  {case.name} {op} {_fields(config)}: {str(failure).partition(chr(10))[0][:100]}")
                continue
            if expected is None:
                expected = [result.clone() for result in results]
            error = max(relative_error(*pair) for pair in zip(results, expected, strict=True))
            if not error <= WORST_ERROR:
                complaints.append(f"{case.name} {op} {_fields(config)}: differs from the first by {error:.2e}")
                continue
            times.append((timing.median_us, config))
            report.row(
                {"case": case.name, "op": op, "config": _fields(config), "median_us": round(timing.median_us, 2)}
                | {"tflops": backward.flops(op) / timing.median_us / 1e6, "rel_err": error}
            )
        for median_us, config in sorted(times, key=lambda pair: pair[0])[: options.best]:
            rate = backward.flops(op) / median_us / 1e6
            report.line(f"{case.name:<16} {op:<8} {median_us:9.1f} µs {rate:7.1f} TFLOP/s  {_fields(config)}")
    return complaints


def _fields(config: GemmConfig) -> str:
    return " ".join(str(int(getattr(config, name))) for name in FIELDS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("tune_gradients", __doc__)
    add_arguments(parser)
    parser.add_argument("--best", type=int, default=4, help="how many to print for each case; all are in the CSV")
    parser.add_argument("--ops", type=names, default=list(OPS), metavar="A,B", help=f"of {OPS}")
    options = parser.parse_args(arguments)
    if options.device.type != "cuda":
        parser.error(f"--device {options.device}: must be a GPU")
    if not set(options.ops) <= set(OPS):
        parser.error(f"--ops {','.join(options.ops)}: must be among {', '.join(OPS)}")
    options.tokens = options.tokens or list(TOKENS)
    cases, dtype = chosen_cases(parser, options), DTYPES[options.dtype]
    complaints: list[str] = []
    with Report(options.csv, len(cases)) as report, torch.no_grad():
        report.line(f"fields: {' '.join(FIELDS)}")
        for shape, of_shape in groupby(cases, key=lambda case: case.shape):
            weights = cache(partial(make_weights, shape, dtype, options.device))
            for case in of_shape:
                inputs = Inputs(case, dtype, options.device, weights)
                complaints += tune(report, case, Backward(inputs, case), dtype, options)
                report.step(case.name)
            del weights, inputs
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
