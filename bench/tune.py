"""``python -m bench.tune``: times candidate tiles of both grouped GEMMs, from which `moe_kernels.operands.config` was chosen.

Both GEMMs of a layer share one schedule: choose a pair of one `block_m` and one `schedule_extra_m`. Every candidate's
result is compared with the first one's, bit for bit: tiles may be chosen freely only as long as they change none.
``--format fp8`` (or mxfp4, int4, int4-g32) times tiles of quantised experts.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import cache, partial
from itertools import groupby, product

import torch
from triton.errors import TritonError

from bench.cases import Case
from bench.command import make_parser
from bench.kernel import Inputs
from bench.providers import make_weights
from bench.quantised_providers import FORMATS, Format, make_matrices
from bench.report import DTYPES, WORST_ERROR, Report, add_arguments, chosen_cases, relative_error
from bench.timing import time_graph
from moe_kernels import (
    GemmConfig,
    TileSchedule,
    build_schedule,
    expert_down,
    expert_down_torch,
    expert_up,
    expert_up_torch,
    has_tma,
    quantise_rows,
)
from moe_kernels.quantised.quantise_rows import QuantisedRows, Rows

NUM_WARPS = {(64, 128): 4, (64, 256): 4, (128, 128): 4, (128, 256): 8}
PAIRS = (0, 1, 2048, 4096)  # those that are served, and always in step


def candidates(op: str, rows_per_expert: float) -> Iterator[GemmConfig]:
    """The tiles worth a try for an op ("up" or "down") at so many rows per expert."""
    if rows_per_expert <= 32:
        for block_m, (block_n, block_k, num_stages) in product(
            (16, 32), ((128, 128, 3), (128, 64, 4), (128, 64, 5), (128, 64, 6))
        ):
            yield GemmConfig(block_m, block_n, block_k, 4, num_stages, tma=True, swap=True)
    if 8 < rows_per_expert <= 128:
        yield GemmConfig(64, 128, 64, 4, 4, tma=True, swap=True)
    for (block_m, block_n), num_warps in NUM_WARPS.items():
        if (block_m == 64 and not 8 < rows_per_expert <= 128) or (block_m == 128 and rows_per_expert < 32):
            continue
        # (tail_m, extra_m, group_m)
        tails = ((0, 0, 8), *product((64,), (0, 64), (4, 8))) if block_m == 128 else ((0, 0, 8),)
        for num_stages, (tail_m, extra_m, group_m) in product((3, 4), tails):
            sizes = (block_m, block_n, 64, num_warps, num_stages, group_m)
            for pairs in PAIRS if tail_m else (0,):
                yield GemmConfig(*sizes, tma=True, tail_m=tail_m, extra_m=extra_m, pairs=pairs)
        if block_m == 128:
            for extra_m, group_m, pairs in product((0, 64), (8, 12, 20), PAIRS):
                sizes = (block_m, block_n, 64, num_warps, 4, group_m)
                yield GemmConfig(*sizes, tma=True, tail_m=64, extra_m=extra_m, by_lane=True, pairs=pairs)
        if op == "down":
            for num_stages, programs, group_m in product((3, 4), (1, 2), (8, 12, 16)):
                sizes = (block_m, block_n, 64, num_warps, num_stages, group_m)
                for by_lane, pairs in product((False, True), (0, 1) if programs == 1 else (0,)):
                    yield GemmConfig(*sizes, tma=True, programs_per_sm=programs, by_lane=by_lane, pairs=pairs)


def quantised_candidates(op: str, rows_per_expert: float, scheme: str) -> Iterator[GemmConfig]:
    """The same for quantised experts."""
    if scheme == "fp8_block":
        for num_stages, group_m in product((3, 4), (4, 8, 16)):
            yield GemmConfig(128, 256, 128, 4, num_stages, group_m, tma=True, quantised=True)
        for block_m, num_stages in product((16, 32), (5, 6)) if rows_per_expert <= 64 else ():
            yield GemmConfig(block_m, 256, 128, 4, num_stages, tma=True, swap=True, quantised=True)
        # `expert_up` has a whole group of 128 hidden channels.
        blocks: tuple[tuple[int, int, int], ...] = (
            ((256, 128, 2), (256, 128, 3)) if op == "up" else ((128, 128, 3), (128, 128, 4), (64, 128, 5))
        )
    else:
        yield from four_bit_rings(rows_per_expert)
        blocks = tuple((n, k, stages) for n, k in product((64, 128, 256), (64, 128)) for stages in (3, 4, 5))
    for block_m, (block_n, block_k, num_stages), num_warps in product((16, 32, 64, 128), blocks, (4, 8)):
        is_narrow = block_m <= 32
        if rows_per_expert > 64 if is_narrow else rows_per_expert < block_m / 4:
            continue
        for swap in (True, False) if is_narrow else (False,):
            yield GemmConfig(block_m, block_n, block_k, num_warps, num_stages, swap=swap, quantised=True)


def four_bit_rings(rows_per_expert: float) -> Iterator[GemmConfig]:
    """Of 4-bit weights by the ring."""
    for block_m, (block_n, programs), (block_k, num_stages) in product(
        (8, 16, 32, 64, 128), ((128, 2), (192, 1)), ((256, 4), (128, 4))
    ):
        is_wide = block_m > 32
        if (
            (block_m > 16 and rows_per_expert < block_m / 4)
            or (block_m == 8 and rows_per_expert > 4)
            or (is_wide and (programs > 1 or block_k > 128))
        ):
            continue
        for tail_m, extra_m in ((0, 0), (0, 16), (32, 32), (64, 32)):
            if tail_m < block_m and extra_m <= block_m and (extra_m < 32 or is_wide):
                yield GemmConfig(
                    block_m, block_n, block_k, block_n // 16, num_stages, tma=True, swap=True, tail_m=tail_m, extra_m=extra_m,
                    programs_per_sm=programs, quantised=True,
                )  # fmt: skip


def tune(
    report: Report, case: Case, inputs: Inputs, seconds: float, best: int, worst_error: float = WORST_ERROR
) -> bool:
    """Prints and writes all candidates of a case; whether all results had equal bits."""
    shape, device = case.shape, inputs.device
    weights_N = inputs.routing[0].flatten()
    rows_per_expert = inputs.num_rows / shape.num_experts
    schedules: dict[tuple[int, int], TileSchedule] = {}
    expected: dict[str, Rows] = {}
    all_equal = True
    matrices, slots, wrong = inputs.matrices, inputs.lane_to_slot_L, []
    is_plain = matrices.scheme == "plain"
    floats_TH = inputs.normal(inputs.num_tokens, shape.hidden_size)
    x_TH: Rows = quantise_rows(floats_TH) if matrices.scheme == "fp8_block" else floats_TH

    def run(op: str, config: GemmConfig) -> Rows:
        schedule = schedules[config.block_m, config.schedule_extra_m]
        if op == "up":
            return expert_up(x_TH, matrices, slots, schedule, fanout=inputs.top_k, config=config)
        return expert_down(expected["up"], matrices, slots, schedule, weights_N, config=config)

    for op in ("up", "down"):
        if op == "down" and "up" not in expected:
            raise SystemExit(f"{case.name}: no candidate of the up projection fits this GPU")
        times: list[tuple[float, GemmConfig]] = []
        keep = inputs.config(op).keep  # as served: it is a matter of sizes, not of tiles
        of_op = (
            candidates(op, rows_per_expert) if is_plain else quantised_candidates(op, rows_per_expert, matrices.scheme)
        )
        for config in (replace(config, keep=keep) for config in of_op):
            tiling = config.block_m, config.schedule_extra_m
            if tiling not in schedules:
                flat_ids = inputs.ids_TK.flatten()
                schedules[tiling] = build_schedule(flat_ids, inputs.counts_E, block_m=tiling[0], extra_m=tiling[1])
            try:
                result = run(op, config)
                timing = time_graph(partial(run, op, config), device, seconds)
            except (RuntimeError, TritonError) as error:  # too much shared memory
                report.line(f"  {case.name} {op} {config}: {str(error).partition(chr(10))[0][:100]}")
                continue
            if op not in expected:
                expected[op] = result
                schedule = schedules[tiling]
                reference = (
                    expert_up_torch(x_TH, matrices, slots, schedule, fanout=inputs.top_k)
                    if op == "up"
                    else expert_down_torch(expected["up"], matrices, slots, schedule, weights_N)
                )
                if not relative_error(_floats(result), _floats(reference)) <= worst_error:
                    wrong.append(op)
            equal = _have_equal_bits(result, expected[op])
            all_equal &= equal
            times.append((timing.median_us, config))
            report.row(
                {"case": case.name, "op": op, "config": _fields(config)}
                | {"median_us": round(timing.median_us, 2), "p20_us": round(timing.p20_us, 2)}
                | {"p80_us": round(timing.p80_us, 2), "equal_bits": equal}
            )
        for median_us, config in sorted(times, key=lambda pair: pair[0])[:best]:
            report.line(f"{case.name:<20} {op:<5} {median_us:9.1f} µs  {_fields(config)}")
    if wrong:
        raise SystemExit(
            f"{case.name}: the first candidate of {' and '.join(wrong)} is not what the reference computes"
        )
    return all_equal


def _floats(rows: Rows) -> torch.Tensor:
    return rows.dequantised() if isinstance(rows, QuantisedRows) else rows


def _have_equal_bits(rows: Rows, others: Rows) -> bool:
    if isinstance(rows, QuantisedRows) and isinstance(others, QuantisedRows):
        values, other_values = rows.values_RH.view(torch.uint8), others.values_RH.view(torch.uint8)
        return torch.equal(values, other_values) and torch.equal(rows.scale_RG, others.scale_RG)
    assert isinstance(rows, torch.Tensor) and isinstance(others, torch.Tensor)
    return torch.equal(rows, others)


def _fields(config: GemmConfig) -> str:
    return " ".join(str(int(value)) for value in astuple(config))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("tune", __doc__)
    add_arguments(parser)
    parser.add_argument(
        "--best", type=int, default=3, help="how many to print for each case and op; all are in the CSV"
    )
    parser.add_argument("--format", choices=FORMATS, help="of quantised experts; default: of none")
    options = parser.parse_args(arguments)
    form: Format | None = FORMATS[options.format] if options.format else None
    if not has_tma(options.device):
        parser.error(f"--device {options.device}: the candidates need a GPU with a tensor memory accelerator")
    if options.dtype == "fp32":
        parser.error("--dtype fp32: the candidates are for 16-bit dtypes")
    all_equal = True
    cases = chosen_cases(parser, options, least_tokens=2)  # one token has kernels of its own
    for shape in {case.shape for case in cases}:
        if shape.hidden_size % 8 or shape.intermediate_size % 8:
            parser.error(f"--shapes {shape.name}: the candidates need sizes divisible by 8")
    with Report(options.csv, len(cases)) as report, torch.no_grad():
        report.line(
            "fields: block_m block_n block_k num_warps num_stages group_m tma swap tail_m programs_per_sm extra_m keep "
            "quantised by_lane pairs"
        )
        for shape, of_shape in groupby(cases, key=lambda case: case.shape):
            weights = cache(partial(make_weights, shape, DTYPES[options.dtype], options.device))
            quantised = None if form is None else make_matrices(shape, form, options.device)[0]
            for case in of_shape:
                inputs = Inputs(case, DTYPES[options.dtype], options.device, weights, quantised)
                worst_error = WORST_ERROR if form is None else form.worst_error
                all_equal &= tune(report, case, inputs, options.seconds, options.best, worst_error)
                report.step(case.name)
            del weights, quantised, inputs
    if not all_equal:
        print("some candidates gave other bits than the first: see the column equal_bits", file=sys.stderr)
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
