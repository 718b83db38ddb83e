"""``python -m bench.policy_windows``: how well plans serve the next window, over successive windows.

Every policy starts from the initial placement and plans for one window after another, each time from its own last plan. A plan
is judged by the window that it was made from (`own`) and by the next one (`next`), as max/mean of the rank loads over
B* (`eplb.planning.balance.free_placement_bound`); the worst layer counts. Loads and processes: `bench.policy_loads`.

Policies: `adaptive` as the product runs it, with 4 sub-windows and a forecast from the last 8 windows
(`eplb.planning.forecast`); `adaptive, last window`, without the forecast; `adaptive, 1 sub-window`, which also trusts the
window's mean; `adaptive, prepared`, like the first, which has planned for 8 more windows with 20 % of noise before the first
one; `hottest everywhere`, with the hottest experts on every rank and the others packed; `deepseek`; `static+shares`, which
moves nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.command import make_parser
from bench.policy import SETUPS, Setup, machine
from bench.policy_loads import LOADS, PROCESSES, windows
from eplb.planning.balance import free_placement_bound, rank_loads
from eplb.planning.forecast import forecast
from eplb.planning.make_plan import make_plan
from eplb.planning.placement import Placement, count_experts
from eplb.planning.policy import Policy, Proposal, Topology, make_policy
from eplb.planning.policy.adaptive import num_moves
from eplb.planning.policy.deepseek import pack_evenly
from eplb.planning.shares import balanced_shares

POLICIES = (
    "adaptive",
    "adaptive, last window",
    "adaptive, 1 sub-window",
    "adaptive, prepared",
    "hottest everywhere",
    "deepseek",
    "static+shares",
)
FORECAST_WINDOWS = 8
"""The default of `EplbConfig`."""

FIRST = 10
"""Windows that are not counted as settled."""


class HottestEverywhere:
    """As many of the hottest experts as a rank has spare slots go to every rank; the others are packed anew each time."""

    def propose(self, load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> Proposal:
        load_LE = load_LNE.mean(axis=1)
        num_layers, num_ranks, per_rank = physical_LWP.shape
        num_experts = load_LE.shape[1]
        num_hot = (num_ranks * per_rank - num_experts) // num_ranks
        order_LE = np.argsort(-load_LE, axis=1, kind="stable")
        hot_LH = order_LE[:, :num_hot]
        rest_LR = order_LE[:, num_hot:]
        free = num_ranks * (per_rank - num_hot) - rest_LR.shape[1]
        # Slots that are left over go to second replicas of the next hottest.
        packed_LR = np.concatenate([rest_LR, rest_LR[:, :free]], axis=1)
        load_LR = np.take_along_axis(load_LE, packed_LR, axis=1)
        load_LR[:, :free] /= 2
        load_LR[:, load_LR.shape[1] - free :] /= 2
        rank_LR, place_LR = pack_evenly(load_LR.astype(np.float32), num_ranks)
        new_LWP = np.empty_like(physical_LWP)
        new_LWP[:, :, :num_hot] = hot_LH[:, None]
        new_LWP[np.arange(num_layers)[:, None], rank_LR, num_hot + place_LR] = packed_LR
        return Proposal(new_LWP, balanced_shares(load_LE, new_LWP))


def make(name: str) -> Policy:
    if name == "hottest everywhere":
        return HottestEverywhere()
    if name == "static+shares":
        return make_policy("static", balance_shares=True)
    return make_policy(name.partition(",")[0])


def over_bound(load_LNE: np.ndarray, proposal: Proposal) -> np.ndarray:
    """float64 [L]: the largest rank load of each layer over B*."""
    load_LE = load_LNE.mean(axis=1)
    num_ranks, per_rank = proposal.physical_LWP.shape[1:]
    bound_L = free_placement_bound(load_LE, num_ranks, num_ranks * per_rank)
    highest_L = rank_loads(load_LE, proposal.physical_LWP, proposal.shares_LWP).max(axis=1)
    return highest_L / np.maximum(bound_L, np.finfo(np.float64).tiny)


def run(setup: Setup, process: str, load: str, name: str, num_windows: int, seed: int) -> Iterator[dict]:
    """One record per window."""
    source = windows(process, load, setup.layers, setup.experts, 4, np.random.default_rng([seed, setup.ranks]))
    per_rank = setup.physical // setup.ranks
    start = Placement.initial(setup.experts, setup.physical - setup.experts, setup.ranks, per_rank)
    live_LWP = np.tile(start.lanes_WS, (setup.layers, 1, 1))
    policy, topology = make(name), Topology(setup.ranks)
    if name == "adaptive, prepared":
        rng = np.random.default_rng(seed)
        first = next(source)
        source = itertools.chain([first], source)
        for _ in range(8):
            noisy = first.mean(axis=1, keepdims=True) * rng.lognormal(0.0, 0.2, (setup.layers, 1, setup.experts))
            live_LWP = policy.propose(noisy, live_LWP, topology).physical_LWP
    proposal = None
    seen: deque[np.ndarray] = deque(maxlen=FORECAST_WINDOWS if name in ("adaptive", "adaptive, prepared") else 1)
    for window in range(num_windows):
        load_LNE = next(source)
        served_L = None if proposal is None else over_bound(load_LNE, proposal)
        sampled_LNE = load_LNE.mean(axis=1, keepdims=True) if name == "adaptive, 1 sub-window" else load_LNE
        seen.append(load_LNE.sum(axis=1))
        begin = time.process_time()
        proposal = policy.propose(forecast(sampled_LNE, np.array(seen)[:-1]), live_LWP, topology)
        planning_ms = (time.process_time() - begin) * 1e3
        own_L = over_bound(load_LNE, proposal)
        yield {
            "window": window,
            "next_worst": None if served_L is None else float(served_L.max()),
            "next_mean": None if served_L is None else float(served_L.mean()),
            "own_worst": float(own_L.max()),
            "own_above": float((own_L > 1.003 * (1 + 1e-6)).mean()),
            "moved": float(num_moves(live_LWP, proposal.physical_LWP, setup.experts).mean() / setup.physical),
            "planning_cpu_ms": planning_ms,
        }
        live_LWP = proposal.physical_LWP


def merge(records: Sequence[dict]) -> dict:
    """Medians over settled windows, means of the moves; the first windows and the first plan apart."""
    first, settled = [r for r in records if 0 < r["window"] < FIRST], [r for r in records if r["window"] >= FIRST]

    def median(key: str, some: Sequence[dict]) -> float:
        return float(np.median([r[key] for r in some]))

    return {
        **{key: median(key, settled) for key in ("next_worst", "next_mean", "own_worst", "planning_cpu_ms")},
        "own_above": float(np.mean([r["own_above"] for r in settled])),
        "moved": median("moved", settled),
        "moved_mean": float(np.mean([r["moved"] for r in settled])),
        "moved_most": max(r["moved"] for r in settled),
        "planning_cpu_ms_most": max(r["planning_cpu_ms"] for r in settled),
        "first_next_worst": median("next_worst", first),
        "first_moved_mean": float(np.mean([r["moved"] for r in first])),
        "cold_moved": float(np.mean([r["moved"] for r in records if r["window"] == 0])),
        "cold_cpu_ms": median("planning_cpu_ms", [r for r in records if r["window"] == 0]),
    }


def cold_start(setup: Setup, load: str) -> dict:
    """CPU milliseconds of the first plan and of its waves, one free slot per rank for all layers together."""
    load_LNE = next(windows("new", load, setup.layers, setup.experts, 4, np.random.default_rng([0, setup.ranks])))
    per_rank = setup.physical // setup.ranks
    start = Placement.initial(setup.experts, setup.physical - setup.experts, setup.ranks, per_rank + 1)
    live_LWP = np.tile(start.compact(), (setup.layers, 1, 1))
    begin = time.process_time()
    proposal = make_policy("adaptive").propose(load_LNE, live_LWP, Topology(setup.ranks))
    planned = time.process_time()
    plan = make_plan(
        [start] * setup.layers,
        proposal,
        load_LNE.mean(axis=1),
        free_slots_GW=np.ones((1, setup.ranks), dtype=np.int64),
        pool_of_layer=[0] * setup.layers,
        bytes_per_expert=[1] * setup.layers,
        max_bytes_in_flight=None,
        topology=Topology(setup.ranks),
    )
    ready = time.process_time()
    moved = np.maximum(
        count_experts(proposal.physical_LWP, setup.experts) - count_experts(live_LWP, setup.experts), 0
    ).sum()
    return {
        "setup": str(setup),
        "load": load,
        "planning_cpu_ms": (planned - begin) * 1e3,
        "waves_cpu_ms": (ready - planned) * 1e3,
        "waves": len(plan.waves),
        "moved": float(moved / setup.physical / setup.layers),
    }


def parse_setup(text: str) -> Setup:
    """As `str(setup)` writes it."""
    numbers = re.fullmatch(r"(\d+)x(\d+)-(\d+)@(\d+)", text)
    if not numbers:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be like 58x256-288@32: layers x experts - physical experts @ ranks"
        )
    setup = Setup(*map(int, numbers.groups()))
    if not 0 < setup.ranks <= setup.experts <= setup.physical or setup.physical % setup.ranks or setup.layers < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must have at least one layer, ranks <= experts <= physical experts, which the ranks share equally"
        )
    return setup


def table(records: Sequence[dict]) -> str:
    lines = [
        f"{'setup':<15}{'process':<12}{'load':<14}{'policy':<24}{'next':>8}{'mean':>8}{'own':>8}{'above':>7}{'moved':>8}"
        f"{'mean':>8}{'most':>8}{'CPU':>8}{'most':>8}{'first':>9}{'moved':>8}"
    ]
    for r in records:
        lines.append(
            f"{r['setup']:<15}{r['process']:<12}{r['load']:<14}{r['policy']:<24}{r['next_worst']:>8.4f}{r['next_mean']:>8.4f}"
            f"{r['own_worst']:>8.4f}{r['own_above']:>7.1%}{r['moved']:>8.2%}{r['moved_mean']:>8.2%}{r['moved_most']:>8.2%}"
            f"{r['planning_cpu_ms']:>5.0f} ms{r['planning_cpu_ms_most']:>5.0f} ms{r['first_next_worst']:>9.4f}"
            f"{r['first_moved_mean']:>8.2%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("policy_windows", __doc__)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="machine, and one record per setup, process, load and policy"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument(
        "--setups",
        nargs="*",
        type=parse_setup,
        default=SETUPS,
        metavar="LxE-P@W",
        help="layers, experts, physical experts, ranks",
    )
    parser.add_argument("--loads", nargs="*", default=list(LOADS), help="see eplb.simulate.traces.base_load")
    parser.add_argument("--processes", nargs="*", default=list(PROCESSES), help="see bench.policy_loads")
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), choices=POLICIES)
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.windows <= FIRST:
        parser.error(f"--seeds must be at least 1, --windows more than {FIRST}")
    records, cold = [], []

    def report(text: str) -> None:
        print(text, flush=True)

    for setup in options.setups:
        for process, load in itertools.product(options.processes, options.loads):
            for name in options.policies:
                raw = [
                    r for seed in range(options.seeds) for r in run(setup, process, load, name, options.windows, seed)
                ]
                head = {"setup": str(setup), "process": process, "load": load, "policy": name}
                records.append({**head, **merge(raw)})
                report(table(records[-1:]).partition("\n")[2] if len(records) > 1 else table(records))
        cold += [cold_start(setup, load) for load in options.loads]
    report("\nfrom the initial placement: planning and waves, CPU ms")
    for c in cold:
        report(
            f"{c['setup']:<15}{c['load']:<14}planning {c['planning_cpu_ms']:6.1f}   waves {c['waves_cpu_ms']:6.1f}   "
            f"({c['waves']} waves, {c['moved']:.1%} moved)"
        )
    if options.json:
        text = json.dumps({"machine": machine(), "records": records, "cold_start": cold}, indent=1)
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
