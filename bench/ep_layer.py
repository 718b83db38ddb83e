"""``python -m bench.ep_layer``: dispatch and combine, and whole layers whose experts are spread over ranks.

By default with virtual ranks on one GPU (`bench.virtual_ranks`): the kernels' own cost, without links. Parts:
"dispatch+combine" (all but the experts; a kernel of its own returns the results), "layer" (replica choice, dispatch, experts,
combine) and "local": the rows that each rank gets, by the same experts and tiles, which is what the layer would take if
nothing travelled.

Device time of CUDA graphs that run all ranks; the providers of a case take turns.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.command import make_parser
from bench.report import Report
from bench.timing import Function, Timing, capture, time_captured
from bench.virtual_ranks import Sizes, VirtualRanks
from moe_kernels import TileSchedule, build_schedule, combine
from moe_layer.dispatch import Dispatched
from moe_layer.forward.executors import choose_replicas, compute_rows

SHAPES = {"dsv3": (256, 8, 7168, 2048), "qwen3": (128, 8, 2048, 768)}
"""Of all ranks together: experts, top-k, hidden, intermediate."""
TOKENS = (1, 16, 64, 512, 4096)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("ep_layer", __doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="of a rank")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU: what is timed are CUDA graphs")
    with Report(options.csv) as report:
        for shape in options.shapes:
            for num_tokens in options.tokens:
                for part, provider, timing in time_virtual(shape, num_tokens, options):
                    row = {
                        "case": f"{shape}/T{num_tokens}",
                        "ranks": options.ranks,
                        "virtual": 1,
                        "provider": provider,
                        "part": part,
                        "median_us": f"{timing.median_us:.2f}",
                        "p20_us": f"{timing.p20_us:.2f}",
                        "p80_us": f"{timing.p80_us:.2f}",
                    }
                    report.row(row)
                    report.line(" ".join(f"{value:>18}" for value in row.values()))
    return 0


def time_virtual(shape: str, num_tokens: int, options: argparse.Namespace) -> list[tuple[str, str, Timing]]:
    """(part, provider, time) of one case."""
    num_experts, top_k, hidden_size, intermediate_size = SHAPES[shape]
    device = torch.device("cuda")
    sizes = Sizes(options.ranks, num_experts, top_k, hidden_size, intermediate_size, num_tokens)
    generator = torch.Generator(device).manual_seed(0)
    x = [
        torch.randn(num_tokens, hidden_size, generator=generator, device=device).bfloat16()
        for _ in range(options.ranks)
    ]
    logits = [torch.randn(num_tokens, num_experts, generator=generator, device=device) for _ in x]
    timed: list[tuple[str, str, torch.cuda.CUDAGraph]] = []
    kept = []
    first = VirtualRanks(sizes, device)
    for provider, sums in (("moe_layer", "fixed_order"), ("moe_layer sums by rank", "by_rank")):
        ranks = VirtualRanks(sizes, device, sums=sums, experts_of=first)
        chosen = first.choose(logits)
        torch.cuda.synchronize()
        for part, function in (("dispatch+combine", _travel(ranks, x, chosen)), ("layer", _layer(ranks, x, chosen))):
            timed.append((part, provider, capture(function, device)))
            kept.append(ranks)
    local = _local(first, x, chosen)
    timed.append(("local", "moe_layer", capture(local, device)))
    times = time_captured([graph for _, _, graph in timed], device)
    for ranks in kept:
        for dispatcher in ranks.dispatchers:
            dispatcher.raise_if_failed()
    return [(part, provider, timing) for (part, provider, _), timing in zip(timed, times, strict=True)]


def _layer(ranks: VirtualRanks, x: list[torch.Tensor], chosen: Any) -> Function:
    def run() -> None:
        ranks.fork()
        ranks.forward(x, chosen)
        ranks.join()

    return run


def _travel(ranks: VirtualRanks, x: list[torch.Tensor], chosen: Any) -> Function:
    """All of a layer but replica choice and experts."""
    lanes = [choose_replicas(experts, ids_TK) for experts, (_, ids_TK) in zip(ranks.experts, chosen, strict=True)]
    sizes = ranks.sizes
    rows = torch.zeros(
        sizes.num_ranks * sizes.max_tokens * sizes.top_k, sizes.hidden_size, dtype=sizes.dtype, device="cuda"
    )
    torch.cuda.synchronize()

    def run() -> None:
        def send(rank: int) -> Dispatched:
            return ranks.dispatchers[rank].dispatch(x[rank], chosen[rank][0], *lanes[rank], "triton")

        ranks.fork()
        sent = ranks.all(send)
        ranks.all(lambda rank: sent[rank].schedule(16, 0))
        ranks.finish([rows] * sizes.num_ranks, sent, [lanes_TK for lanes_TK, _ in lanes])
        ranks.join()

    return run


def _local(ranks: VirtualRanks, x: list[torch.Tensor], chosen: Any) -> Function:
    """The rows that each rank gets in a layer, by the same experts and tiles, but they need not travel."""
    sizes = ranks.sizes
    x_NH = torch.cat(x)
    weights_NK = torch.cat([weights_TK for weights_TK, _ in chosen])
    lanes = [choose_replicas(experts, ids_TK)[0] for experts, (_, ids_TK) in zip(ranks.experts, chosen, strict=True)]
    lanes_NK = torch.cat(lanes)
    work = []
    for rank in range(sizes.num_ranks):
        num_lanes = ranks.layout.num_lanes
        own_NK = lanes_NK - rank * num_lanes
        own_NK = own_NK.masked_fill((own_NK < 0) | (own_NK >= num_lanes), -1)
        counts_S = torch.bincount(own_NK[own_NK >= 0], minlength=num_lanes).int()
        work.append((own_NK, counts_S))
    torch.cuda.synchronize()

    def one(rank: int) -> torch.Tensor:
        own_NK, counts_S = work[rank]
        choose_replicas(ranks.experts[rank], chosen[rank][1])

        def schedule(block_m: int, extra_m: int) -> TileSchedule:
            return build_schedule(own_NK.view(-1), counts_S, block_m=block_m, extra_m=extra_m, backend="triton")

        came = Dispatched(x_NH, sizes.top_k, weights_NK.view(-1), schedule, len(x_NH))
        rows = compute_rows(ranks.experts[rank], came, sizes.top_k)
        assert rows is not None
        first = rank * sizes.max_tokens * sizes.top_k
        own_rows = rows[first : first + lanes[rank].numel()]  # as many as a rank's own tokens have
        return combine(own_rows, lanes[rank], backend="triton")

    def run() -> None:
        ranks.fork()
        ranks.all(one)
        ranks.join()

    return run


if __name__ == "__main__":
    sys.exit(main())
