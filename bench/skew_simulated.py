"""``python -m bench.skew_simulated``: the largest rank's load by batch, with shares of the window and of the batch itself.

On the CPU, without ranks: the references of the kernels choose replicas for the picks of all ranks. The popularity of
experts is lognormal (0.8); `adaptive` plans for a window of 1,000 batches of it, with an eighth of redundant experts. Each
batch is drawn from the same popularity, times a lognormal factor for each expert if it jitters.

objective "tokens": max/mean of the ranks' tokens. "decode": the placement is planned for activated experts + tokens / 40,
and this is what the largest rank has of it, over the mean of what is least if no expert were read twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.command import make_parser
from bench.report import Report
from eplb.planning.balance import max_over_mean, rank_loads
from eplb.planning.placement import Placement
from eplb.planning.policy import AdaptivePolicy, Topology
from eplb.planning.shares import balanced_shares, cumulative_shares
from moe_kernels import GOLDEN, SHARE_BITS, LoadCounter, ReplicaTable, select_replicas_torch, solve_shares_torch

SIGMA, EXPERT_COST, WINDOW = 0.8, 40, 1000


def layer(
    num_ranks: int, num_experts: int, picks: int, objective: str, rng: np.random.Generator
) -> tuple[np.ndarray, Placement, np.ndarray]:
    """The popularity of the experts, and the placement and shares that `adaptive` has for it.

    Args:
        picks: of a batch over all ranks.
    """
    popularity = rng.lognormal(0.0, SIGMA, num_experts)
    popularity /= popularity.sum()
    physical = Placement.initial(
        num_experts, num_experts // 8, num_ranks, (num_experts + num_experts // 8) // num_ranks
    ).compact()
    policy = AdaptivePolicy()
    if objective == "decode":
        policy = AdaptivePolicy(objective="decode", batch_assignments=picks, token_cost=1 / EXPERT_COST)
    for _ in range(2):
        load_LNE = rng.multinomial(WINDOW * picks // 4, popularity, (1, 4)).astype(float)
        proposal = policy.propose(load_LNE, physical[None], Topology(num_ranks))
        physical = proposal.physical_LWP[0]
    return popularity, Placement(physical, num_experts), proposal.shares_LWP[0]


def batches(
    setup: tuple[int, int, int, str, float], num_layers: int, num_batches: int, seed: int
) -> Iterator[tuple[float, float, float]]:
    """Of each batch: the largest rank's load over the mean by window shares, by batch shares, and the least there can be.

    The last is exact for tokens; for decode it is the mean, and so a bound that no placement need reach.
    """
    num_ranks, num_experts, tokens, objective, jitter = setup
    top_k = 8
    cost = EXPERT_COST if objective == "decode" else 0
    rng = np.random.default_rng(seed)
    for _ in range(num_layers):
        popularity, placement, shares_WS = layer(num_ranks, num_experts, num_ranks * tokens * top_k, objective, rng)
        offsets, lanes = placement.logical_to_lanes()
        lanes_P, offsets_E1, cumulative_P = (
            torch.as_tensor(value, dtype=torch.int32)
            for value in (lanes, offsets, cumulative_shares(placement, shares_WS))
        )
        table = ReplicaTable(lanes_P, lanes_P, offsets_E1, cumulative_P)
        per_rank = placement.lanes_WS.shape[1]
        loads = [
            LoadCounter(torch.zeros(num_experts, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
            for _ in range(num_ranks)
        ]
        for _ in range(num_batches):
            chance = popularity * rng.lognormal(0.0, jitter, num_experts)
            counts_WE = rng.multinomial(tokens * top_k, chance / chance.sum(), num_ranks)
            by_window_L = np.zeros(num_ranks * per_rank, dtype=np.int64)
            for rank, counts_E in enumerate(counts_WE):
                ids = torch.from_numpy(np.repeat(np.arange(num_experts, dtype=np.int32), counts_E))[:, None]
                start = rank * GOLDEN % (1 << SHARE_BITS)
                by_window_L += select_replicas_torch(ids, table, loads[rank], start, num_lanes=by_window_L.size)[
                    1
                ].numpy()
            ends_P = solve_shares_torch(torch.as_tensor(counts_WE, dtype=torch.int32), table, per_rank, 0, cost)[
                0
            ].numpy()
            before_P = np.concatenate([[0], ends_P[:-1]])
            before_P[offsets[:-1]] = 0
            by_batch_L = np.zeros_like(by_window_L)
            by_batch_L[lanes] = ends_P - before_P
            totals_E = counts_WE.sum(axis=0)
            mean = (totals_E + cost * (totals_E > 0)).sum() / num_ranks
            both = [
                (one + cost * (one > 0)).reshape(num_ranks, -1).sum(axis=1).max() / mean
                for one in (by_window_L, by_batch_L)
            ]
            least = 1.0
            if not cost:
                physical = placement.lanes_WS[None]
                best = balanced_shares(totals_E[None], physical)
                least = float(max_over_mean(rank_loads(totals_E[None], physical, best))[0])
            yield both[0], both[1], least


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("skew_simulated", __doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8, help="each with a popularity and a placement of its own")
    parser.add_argument("--batches", type=int, default=8, help="of each layer")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    cases = [("tokens", tokens, jitter) for jitter in (0.0, 0.2) for tokens in (64, 512)]
    cases += [("decode", tokens, 0.0) for tokens in (1, 16)]
    with Report(options.csv) as report:
        report.line(
            f"{'ranks':>5} {'objective':>9} {'tokens':>6} {'jitter':>6} {'window':>8} {'batch':>8} {'least':>8}"
        )
        for num_ranks in options.ranks:
            for objective, tokens, jitter in cases:
                setup = (num_ranks, options.experts, tokens, objective, jitter)
                found = np.array(list(batches(setup, options.layers, options.batches, 0)))
                window, batch, least = found.mean(axis=0)
                report.row(
                    {
                        "ranks": num_ranks,
                        "experts": options.experts,
                        "redundant": options.experts // 8,
                        "top_k": 8,
                        "objective": objective,
                        "tokens_per_rank": tokens,
                        "jitter": jitter,
                        "batches": len(found),
                        "window": f"{window:.4f}",
                        "batch": f"{batch:.4f}",
                        "least": f"{least:.4f}",
                    }
                )
                report.line(
                    f"{num_ranks:5} {objective:>9} {tokens:6} {jitter:6} {window:8.3f} {batch:8.3f} {least:8.3f}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
