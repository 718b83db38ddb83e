"""``python -m bench.ep_ranks``: dispatch and combine, and whole layers, on several GPUs, one process for each.

Times are medians of the longest time over the ranks, µs. `lined_up_us`: an all-reduce of one number lines the ranks up before
each call, and what it leaves of their lead counts too. `median_us`: calls back to back, as layers follow each other.

Parts as in `bench.ep_layer`; "local" is as many tokens on each rank's own experts. Peers: NCCL all-to-all of one row per
(token, expert) with splits that the host knows; NCCL all-gather of all tokens and reduce-scatter of sums. A peer's whole layer
has our experts in the middle.

Legend: T tokens of a rank, K top-k, H hidden, W ranks, E logical experts.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.command import make_parser
from bench.ep_layer import SHAPES, TOKENS
from bench.ranks import run_ranks
from bench.report import Report
from bench.timing import Function
from moe_layer import MoELayer
from moe_layer.dispatch.one_sided import OneSidedDispatcher

ROUNDS, WARM_UPS = 60, 5
BLOCKS, BLOCK = 15, 10  # back to back


@dataclass(frozen=True)
class Timed:
    part: str
    provider: str
    mode: str
    run: Function


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("ep_ranks", __doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="of a rank")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--zipf", action="store_true", help="skewed routing, exponent 1")
    parser.add_argument("--seconds", type=float, default=1800.0, help="deadline of the run")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if not 2 <= options.ranks <= torch.cuda.device_count():
        parser.error(f"--ranks {options.ranks}: must be from 2 to the GPUs there are, {torch.cuda.device_count()}")
    run_ranks(_rank, options.ranks, (options,), options.seconds, "bench.ep_ranks")
    return 0


def _rank(rank: int, store: str, options: Any) -> None:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", store=dist.FileStore(store, options.ranks), rank=rank, world_size=options.ranks, device_id=device
    )
    group = dist.group.WORLD
    assert group is not None
    with Report(options.csv) if rank == 0 else nullcontext() as report:
        for shape in options.shapes:
            for num_tokens in options.tokens:
                for timed, median_us, lined_up_us in _case(shape, num_tokens, options.zipf, group, device):
                    if report is None:
                        continue
                    row = {
                        "case": f"{shape}{'~zipf' if options.zipf else ''}/T{num_tokens}",
                        "ranks": options.ranks,
                        "virtual": 0,
                        "provider": timed.provider,
                        "part": timed.part,
                        "mode": timed.mode,
                        "median_us": f"{median_us:.2f}",
                        "lined_up_us": f"{lined_up_us:.2f}",
                    }
                    report.row(row)
                    report.line(" ".join(f"{value:>18}" for value in row.values()))
    dist.destroy_process_group()


def _case(
    shape: str, num_tokens: int, is_skewed: bool, group: dist.ProcessGroup, device: torch.device
) -> list[tuple[Timed, float, float]]:
    num_experts, top_k, hidden_size, intermediate_size = SHAPES[shape]
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator(device).manual_seed(rank)
    x_TH = torch.randn(num_tokens, hidden_size, generator=generator, device=device).bfloat16()
    scores = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    if is_skewed:  # Gumbel's trick draws without replacement
        popularity = 1 / (1 + torch.randperm(num_experts, generator=torch.Generator().manual_seed(0)).float())
        scores = popularity.log().to(device) - torch.log(-torch.log(scores))
    ids_TK = scores.topk(top_k, dim=1).indices.int()
    weights_TK = torch.rand(num_tokens, top_k, generator=generator, device=device)

    def layer(dispatcher: Any, experts: int = num_experts, ranks: Any = group) -> MoELayer:
        torch.manual_seed(0)  # equal weights
        return MoELayer(
            hidden_size, intermediate_size, experts, top_k, router=None, dispatcher=dispatcher, process_group=ranks,
            device=device, dtype=torch.bfloat16, max_tokens=num_tokens,
        )  # fmt: skip

    timed: list[Timed] = []
    failed: list[Callable[[], None]] = []
    outputs = {}
    ours = None
    for name, sums in (("moe_layer", "fixed_order"), ("moe_layer sums by rank", "by_rank")):
        dispatcher = OneSidedDispatcher.connect(
            group, num_experts // num_ranks + 1, num_experts, num_tokens, hidden_size, top_k, torch.bfloat16, device,
            sums=sums,
        )  # fmt: skip
        failed.append(dispatcher.raise_if_failed)
        timed.append(
            Timed("dispatch+combine", name, "graph", _travel(dispatcher, x_TH, ids_TK, weights_TK, num_experts))
        )
        ours = layer(dispatcher)
        run = _forward(ours, x_TH, ids_TK, weights_TK)
        outputs[name] = run()
        timed.append(Timed("layer", name, "graph", run))
    for name in ("all_to_all", "all_gather"):
        try:
            other = layer(name)
        except ValueError as error:
            if rank == 0:
                print(f"# {name}: {error}")
            continue
        run = _forward(other, x_TH, ids_TK, weights_TK)
        outputs[name] = run()
        mode = "graph" if name == "all_gather" else "eager"
        timed.append(Timed("layer", f"moe_layer {name}", mode, run))
    torch.cuda.synchronize()
    for name, y in outputs.items():
        if "by rank" not in name and name != "all_gather":
            assert torch.equal(y, outputs["moe_layer"]), f"{name}: other bits than one-sided dispatch"
        torch.testing.assert_close(y, outputs["moe_layer"], rtol=3e-2, atol=3e-2)
    timed += _nccl(x_TH, ids_TK, num_experts, group)
    alone = layer("local", num_experts // num_ranks, None)
    own_TK = scores[:, : num_experts // num_ranks].topk(top_k, dim=1).indices.int()
    timed.append(Timed("local", "moe_layer", "graph", _forward(alone, x_TH, own_TK, weights_TK)))
    times = [(one, *_time(one, group)) for one in timed]
    for check in failed:
        check()
    return times


def _forward(layer: MoELayer, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Function:
    @torch.no_grad()
    def run() -> torch.Tensor:
        return layer(x_TH, expert_ids=ids_TK, expert_weights=weights_TK)

    return run


def _travel(
    dispatcher: OneSidedDispatcher, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int
) -> Function:
    """All of a layer but replica choice and experts; a kernel of its own sends the rows back."""
    num_ranks = dispatcher.area.layout.num_ranks
    per_rank = num_experts // num_ranks
    lanes_TK = (ids_TK // per_rank * (per_rank + 1) + ids_TK % per_rank).int()
    counts_L = torch.bincount(lanes_TK.flatten(), minlength=num_ranks * (per_rank + 1)).int()
    rows = x_TH.new_zeros(num_ranks * lanes_TK.numel(), x_TH.shape[1])

    def run() -> torch.Tensor:
        sent = dispatcher.dispatch(x_TH, weights_TK, lanes_TK, counts_L, "triton")
        sent.schedule(16, 0)
        return dispatcher.combine(rows, sent, lanes_TK, "triton")

    return run


def _nccl(x_TH: torch.Tensor, ids_TK: torch.Tensor, num_experts: int, group: dist.ProcessGroup) -> list[Timed]:
    """Dispatch and combine by NCCL alone."""
    num_ranks = dist.get_world_size(group)
    num_tokens, top_k = ids_TK.shape
    order = ids_TK.flatten().argsort(stable=True)
    sends = torch.bincount(ids_TK.flatten() // (num_experts // num_ranks), minlength=num_ranks)
    receives = torch.empty_like(sends)
    dist.all_to_all_single(receives, sends, group=group)
    send_splits, receive_splits = sends.tolist(), receives.tolist()
    arrived = x_TH.new_empty(sum(receive_splits), x_TH.shape[1])
    back, flat = x_TH.new_empty(order.numel(), x_TH.shape[1]), x_TH.new_empty(order.numel(), x_TH.shape[1])
    everything, result = x_TH.new_empty(num_ranks * num_tokens, x_TH.shape[1]), torch.empty_like(x_TH)

    def all_to_all() -> torch.Tensor:
        dist.all_to_all_single(arrived, x_TH[order // top_k], receive_splits, send_splits, group)
        dist.all_to_all_single(back, arrived, send_splits, receive_splits, group)
        flat[order] = back
        return flat.view(num_tokens, top_k, -1).sum(1)

    def all_gather() -> torch.Tensor:
        dist.all_gather_into_tensor(everything, x_TH, group)
        dist.reduce_scatter_tensor(result, everything, group=group)
        return result

    return [
        Timed("dispatch+combine", "NCCL all-to-all, splits known", "graph", all_to_all),
        Timed("dispatch+combine", "NCCL all-gather + reduce-scatter", "graph", all_gather),
    ]


def _time(timed: Timed, group: dist.ProcessGroup) -> tuple[float, float]:
    """Back to back, and lined up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            timed.run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier(group)
    replay = timed.run
    if timed.mode == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            timed.run()
        replay = graph.replay
    one = torch.zeros(1, device=torch.cuda.current_device())

    def median(count: int, skip: int, calls: int, line_up: bool) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count + skip)]
        dist.barrier(group)
        for begin, end in events:
            if line_up:
                dist.all_reduce(one, group=group)
            begin.record()
            for _ in range(calls):
                replay()
            end.record()
        torch.cuda.synchronize()
        times = torch.tensor([1e3 * begin.elapsed_time(end) / calls for begin, end in events[skip:]], device=one.device)
        dist.all_reduce(times, dist.ReduceOp.MAX, group)
        return float(times.median())

    return median(BLOCKS, 1, BLOCK, False), median(ROUNDS, WARM_UPS, 1, True)


if __name__ == "__main__":
    sys.exit(main())
