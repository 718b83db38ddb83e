"""``python -m bench.table_cost``: the cost of the indirection table in a forward that could do without.

The same forward twice in one run: through the table, and with the experts hard-wired to rows of the weights
(`hard_wired`). All must give the same bits. Two comparisons, which contain different things:

- *table*: `MoELayer`'s own forward. Each expert has one replica, so it looks up slots and records the load; it reads no
  shares. Hard-wired, the number of rows of each expert is given (strict, as every layer must find it out) or counted.
- *table with replicas*: some experts have two, so the choice by shares is in it. Hard-wired, each row's lane is given.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby

import torch

from bench.cases import Case, count_hit, forward_work, make_logits
from bench.ceilings import Ceilings, measure_ceilings
from bench.command import make_parser
from bench.providers import Problem, make_layer, make_problem, make_weights
from bench.report import DTYPES, Report, add_arguments, add_plot, chosen_cases, geometric_mean, plot_over_floor
from bench.timing import Function, Timing, time_eager, time_graphs
from eplb.planning.placement import Placement
from eplb.planning.shares import equal_shares
from eplb.relocation.table import ExpertTable
from eplb.streams import streams_of
from moe_kernels import (
    LoadCounter,
    ReplicaTable,
    RoutingRule,
    build_schedule,
    combine,
    expert_down,
    expert_up,
    gemm_configs,
    has_tma,
    select_replicas,
    topk_routing,
)
from moe_layer import MoELayer


def hard_wired(
    problem: Problem,
    layer: MoELayer,
    lane_to_slot_L: torch.Tensor,
    counts_L: torch.Tensor | None = None,
    lanes_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """The forward on the layer's weights without a table, shares or recording.

    Args:
        counts_L: rows of each lane; counted here if None.
        lanes_TK: the lane of each row; the expert's id if None.
    """
    weights_TK, ids_TK = topk_routing(problem.logits_TE, problem.top_k, RoutingRule())
    if lanes_TK is None:
        lanes_TK = ids_TK
    if counts_L is None:
        lanes_N = lanes_TK.view(-1)
        counts_L = torch.zeros_like(lane_to_slot_L).index_add_(0, lanes_N, torch.ones_like(lanes_N))
    return _computed(problem, layer, weights_TK, lanes_TK, counts_L, lane_to_slot_L)


class WithReplicas:
    """The forward through a table in which some experts have two replicas, both in the layer's one slot of the expert."""

    def __init__(self, problem: Problem, layer: MoELayer, num_redundant: int) -> None:
        device, num_experts = problem.x_TH.device, problem.shape.num_experts
        self.problem, self.layer = problem, layer
        self.num_lanes = num_experts + num_redundant
        placement = Placement.initial(num_experts, num_redundant, 1, num_lanes=self.num_lanes)
        self.table = ExpertTable(placement, equal_shares(placement), streams_of(device))
        self.load_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.increment_1 = torch.ones(1, dtype=torch.int64, device=device)
        slots = slot_of_expert(layer)
        self.lane_to_slot_L = (
            torch.tensor([slots[expert] for expert in placement.lanes_WS[0].tolist()]).int().to(device)
        )

    def lanes(self, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.table
        return select_replicas(
            ids_TK,
            ReplicaTable(table.lanes_P, self.lane_to_slot_L, table.offsets_E1, table.cumulative_P),
            LoadCounter(self.load_E, self.increment_1),
            0,
            num_lanes=self.num_lanes,
        )

    def __call__(self) -> torch.Tensor:
        weights_TK, ids_TK = topk_routing(self.problem.logits_TE, self.problem.top_k, RoutingRule())
        lanes_TK, counts_L = self.lanes(ids_TK)
        return _computed(self.problem, self.layer, weights_TK, lanes_TK, counts_L, self.lane_to_slot_L)


def _computed(
    problem: Problem,
    layer: MoELayer,
    weights_TK: torch.Tensor,
    lanes_TK: torch.Tensor,
    counts_L: torch.Tensor,
    lane_to_slot_L: torch.Tensor,
) -> torch.Tensor:
    shape, dtype, num_tokens = problem.shape, problem.x_TH.dtype, problem.x_TH.shape[0]

    batch = (dtype, num_tokens, shape.top_k, shape.num_experts)
    up, down = gemm_configs(shape.hidden_size, shape.intermediate_size, *batch, tma=has_tma(problem.x_TH.device))
    matrices = layer.experts.matrices()
    schedule = build_schedule(lanes_TK.view(-1), counts_L, block_m=up.block_m, extra_m=up.schedule_extra_m)
    hidden_NI = expert_up(problem.x_TH, matrices, lane_to_slot_L, schedule, fanout=shape.top_k, config=up)
    rows_NH = expert_down(hidden_NI, matrices, lane_to_slot_L, schedule, weights_TK.view(-1), config=down)
    return combine(rows_NH, lanes_TK)


def slot_of_expert(layer: MoELayer) -> list[int]:
    live = layer.resident.live_slots()
    return [live[expert][0] for expert in range(layer.resident.num_experts)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("table_cost", __doc__)
    add_arguments(parser)
    add_plot(parser)
    parser.add_argument("--redundant", type=int, default=8, help="experts with a second replica, where there are any")
    options = parser.parse_args(arguments)
    # One token has kernels of its own, in which the table is a few loads that can't be left out.
    cases = chosen_cases(parser, options, least_tokens=2)
    differing: list[str] = []
    costs: dict[str, list[float]] = {"counts given": [], "counted": [], "replicas": []}
    ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
    with Report(options.csv, len(cases), ceilings.columns()) as report, torch.no_grad():
        report.line(
            f"{'case':<22}{'counts given':>14}{'counted':>10}{'table µs':>10}{'cost %':>9}{'%':>8}"
            f"{'lanes given':>16}{'replicas µs':>13}{'cost %':>9}"
        )
        for shape, of_shape in groupby(cases, key=lambda case: case.shape):
            weights = make_weights(shape, DTYPES[options.dtype], options.device)
            layer: MoELayer | None = None
            for case in of_shape:
                report.step(case.name)
                logits_TE = make_logits(case)
                problem = make_problem(shape, weights, logits_TE)
                layer = layer or make_layer(problem)
                timings, equal = _measure(problem, layer, options)
                if not equal:
                    differing.append(case.name)
                _write(report, case, timings, equal, count_hit(logits_TE, shape.top_k), options, ceilings)
                us = [timing.median_us for timing in timings.values()]
                percent = [100 * (us[2] / us[0] - 1), 100 * (us[2] / us[1] - 1), 100 * (us[4] / us[3] - 1)]
                for kind, cost in zip(costs, percent, strict=True):
                    costs[kind].append(cost)
                report.line(
                    f"{case.name:<22}{us[0]:>14.1f}{us[1]:>10.1f}{us[2]:>10.1f}{percent[0]:>9.2f}{percent[1]:>8.2f}"
                    f"{us[3]:>16.1f}{us[4]:>13.1f}{percent[2]:>9.2f}"
                )
            del weights, problem, layer
        for kind, percent in costs.items():
            mean = 100 * (geometric_mean(1 + cost / 100 for cost in percent) - 1)
            report.line(f"{kind}: geometric mean {mean:+.2f} %, worst {max(percent):+.2f} % ({len(percent)} cases)")
    if options.plot:
        plot_over_floor(report.rows, options.plot, "cost of the table")
    if differing:
        print("FAILED: other bits than the hard-wired forward: " + ", ".join(differing), file=sys.stderr)
    return 1 if differing else 0


def _measure(problem: Problem, layer: MoELayer, options: argparse.Namespace) -> tuple[dict[str, Timing], bool]:
    """Times by forward, and whether their bits are equal."""
    num_experts, device = problem.shape.num_experts, options.device
    _, ids_TK = topk_routing(problem.logits_TE, problem.top_k, RoutingRule())
    counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts).int()
    slot_E = torch.tensor(slot_of_expert(layer), dtype=torch.int32, device=device)
    with_replicas = WithReplicas(problem, layer, min(options.redundant, num_experts))
    lanes_TK, counts_L = with_replicas.lanes(ids_TK)
    forwards: dict[str, Function] = {
        "hard-wired, counts given": lambda: hard_wired(problem, layer, slot_E, counts_E),
        "hard-wired, counted": lambda: hard_wired(problem, layer, slot_E),
        "table": lambda: layer(problem.x_TH, router_logits=problem.logits_TE),
        "hard-wired, lanes given": lambda: hard_wired(problem, layer, with_replicas.lane_to_slot_L, counts_L, lanes_TK),
        "table with replicas": with_replicas,
    }
    outputs = [forward() for forward in forwards.values()]
    equal = all(torch.equal(outputs[0], output) for output in outputs[1:])
    if device.type == "cuda":
        timings = time_graphs(list(forwards.values()), device, options.seconds)
    else:
        timings = [time_eager(forward, device, options.seconds)[0] for forward in forwards.values()]
    return dict(zip(forwards, timings, strict=True)), equal


def _write(
    report: Report,
    case: Case,
    timings: dict[str, Timing],
    equal: bool,
    hit: int,
    options: argparse.Namespace,
    ceilings: Ceilings,
) -> None:
    floor = ceilings.floor_us(*forward_work(case.shape, case.num_tokens, hit, DTYPES[options.dtype]))
    for name, timing in timings.items():
        report.row(
            {
                "case": case.name,
                "provider": name,
                "median_us": timing.median_us,
                "p20_us": timing.p20_us,
                "p80_us": timing.p80_us,
                "floor_us": floor,
                "bits_equal": equal,
                "mode": "graph" if options.device.type == "cuda" else "eager",
                "dtype": options.dtype,
                "experts_hit": hit,
            }
        )


if __name__ == "__main__":
    sys.exit(main())
