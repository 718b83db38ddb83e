"""``python -m bench.solve_shares``: device time of the three ops that choose replicas by the counts of a batch, by ranks.

256 experts, 32 redundant, as `bench.skew_simulated` places them; 512 tokens a rank, top-8, loads that jitter by 20 %. The
counts of all ranks are made here: what gathers them is not timed. Each op is replayed from a CUDA graph with a cold L2; so
are "count, select" and "count, solve, select", one op after the other as in a forward. The last two lines are differences:
what `solve_shares` adds between its neighbours, where a graph's start and the cold caches are paid for already, and what shares
by batch add to a choice by those of the window. The results are compared with the references first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.command import make_parser
from bench.report import Report
from bench.skew_simulated import layer
from bench.timing import time_graphs
from eplb.planning.shares import cumulative_shares
from moe_kernels import (
    LoadCounter,
    ReplicaTable,
    count_experts,
    count_experts_torch,
    select_by_quota,
    select_by_quota_torch,
    select_replicas,
    solve_shares,
    solve_shares_torch,
)

NUM_EXPERTS, TOP_K = 256, 8


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("solve_shares", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", torch.cuda.current_device())
    with Report(options.csv) as report:
        for num_ranks in options.ranks:
            _measure(report, device, num_ranks, options.tokens)
    return 0


def _measure(report: Report, device: torch.device, num_ranks: int, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    popularity, placement, shares_WS = layer(num_ranks, NUM_EXPERTS, num_ranks * num_tokens * TOP_K, "tokens", rng)
    offsets, lanes = placement.logical_to_lanes()
    lanes_P, offsets_E1, cumulative_P = (
        torch.as_tensor(value, dtype=torch.int32).to(device)
        for value in (lanes, offsets, cumulative_shares(placement, shares_WS))
    )
    table = ReplicaTable(lanes_P, lanes_P, offsets_E1, cumulative_P)
    chance = popularity * rng.lognormal(0.0, 0.2, NUM_EXPERTS)
    counts = rng.multinomial(num_tokens * TOP_K, chance / chance.sum(), num_ranks)
    counts_WE = torch.as_tensor(counts, dtype=torch.int32).to(device)
    mine = rng.permutation(np.repeat(np.arange(NUM_EXPERTS), counts[0]))
    ids_TK = torch.as_tensor(mine, dtype=torch.int32).view(-1, TOP_K).to(device)
    counter = LoadCounter(
        torch.zeros(NUM_EXPERTS, dtype=torch.int64, device=device),
        torch.ones(1, dtype=torch.int64, device=device),
    )
    per_rank = placement.lanes_WS.shape[1]
    num_lanes = num_ranks * per_rank
    quotas_P, before_E = solve_shares(counts_WE, table, per_rank, 0)
    functions: dict[str, Callable[[], object]] = {
        "count_experts": lambda: count_experts(ids_TK, NUM_EXPERTS),
        "solve_shares": lambda: solve_shares(counts_WE, table, per_rank, 0),
        "solve_shares, expert_cost=40": lambda: solve_shares(counts_WE, table, per_rank, 0, expert_cost=40),
        "select_by_quota": lambda: select_by_quota(ids_TK, table, quotas_P, before_E, counter, num_lanes=num_lanes),
        "count, solve, select": lambda: _choose_by_batch(ids_TK, table, counts_WE, per_rank, counter, num_lanes),
        "count, select": lambda: (
            count_experts(ids_TK, NUM_EXPERTS),
            select_by_quota(ids_TK, table, quotas_P, before_E, counter, num_lanes=num_lanes),
        ),
        "select_replicas": lambda: select_replicas(ids_TK, table, counter, 0, num_lanes=num_lanes),
    }
    expected = solve_shares_torch(counts_WE, table, per_rank, 0)
    chosen = select_by_quota(ids_TK, table, quotas_P, before_E, counter, num_lanes=num_lanes)
    by_hand = select_by_quota_torch(ids_TK, table, quotas_P, before_E, counter, num_lanes=num_lanes)
    costly = solve_shares(counts_WE, table, per_rank, 0, expert_cost=40)
    for got, wanted in (
        ((count_experts(ids_TK, NUM_EXPERTS),), (count_experts_torch(ids_TK, NUM_EXPERTS),)),
        ((quotas_P, before_E), expected),
        (costly, solve_shares_torch(counts_WE, table, per_rank, 0, 40)),
        (chosen, by_hand),
    ):
        if not all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True)):
            raise AssertionError(f"{num_ranks} ranks: a kernel differs from its reference")
    times = dict(zip(functions, time_graphs(list(functions.values()), device), strict=True))
    medians = {name: timing.median_us for name, timing in times.items()}
    medians["solve_shares, beside the others"] = medians["count, solve, select"] - medians["count, select"]
    medians["shares by batch, not window"] = medians["count, solve, select"] - medians["select_replicas"]
    for name, median_us in medians.items():
        timing = times.get(name)
        report.row(
            {
                "op": name,
                "ranks": num_ranks,
                "experts": NUM_EXPERTS,
                "tokens": num_tokens,
                "median_us": median_us,
                "p20_us": timing and timing.p20_us,
                "p80_us": timing and timing.p80_us,
            }
        )
        report.line(f"{num_ranks:>3} ranks  {name:<33}{median_us:8.2f} µs")


def _choose_by_batch(
    ids_TK: torch.Tensor,
    table: ReplicaTable,
    counts_WE: torch.Tensor,
    per_rank: int,
    counter: LoadCounter,
    num_lanes: int,
) -> object:
    """What a forward runs, without the exchange of counts."""
    count_experts(ids_TK, NUM_EXPERTS)
    quotas_P, before_E = solve_shares(counts_WE, table, per_rank, 0)
    return select_by_quota(ids_TK, table, quotas_P, before_E, counter, num_lanes=num_lanes)


if __name__ == "__main__":
    sys.exit(main())
