"""``python -m bench.table_flip``: `flip()` of all layers' tables at once: the device's time, and the host's.

This work stands between two forwards when a relocation takes effect. Nothing is staged between the flips, so all copy the
same bytes.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import measure_ceilings
from bench.command import integers, make_parser
from bench.report import Report, add_device
from bench.timing import Timing, synchronize, time_graph
from eplb.planning.placement import Placement
from eplb.planning.shares import equal_shares
from eplb.relocation.table import ExpertTable, flip
from eplb.streams import streams_of


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("table_flip", __doc__)
    parser.add_argument("--layers", type=integers, default=[1, 4, 16, 58])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--redundant", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1000, help="of the host's time")
    add_device(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    device = options.device
    streams = streams_of(device)
    num_physical = (options.experts + options.redundant) // options.ranks
    placement = Placement.initial(options.experts, options.redundant, options.ranks, num_lanes=num_physical + 1)
    shares_WS = equal_shares(placement)
    ceilings = measure_ceilings(device)
    with Report(options.csv, columns=ceilings.columns()) as report:
        for num_layers in options.layers:
            tables = [ExpertTable(placement, shares_WS, streams) for _ in range(num_layers)]

            def call(tables: list[ExpertTable] = tables) -> None:
                flip(tables, streams.current())

            synchronize(device)
            num_bytes = num_layers * 4 * (options.experts + 1 + 2 * tables[0].num_physical)
            timings = {"host": _host_time(call, options.repeats, device)}
            if device.type == "cuda":
                timings["device"] = time_graph(call, device)
            for mode, timing in timings.items():
                report.row(
                    {
                        "op": "table_flip",
                        "layers": num_layers,
                        "experts": options.experts,
                        "redundant": options.redundant,
                        "ranks": options.ranks,
                        "mode": mode,
                        "median_us": timing.median_us,
                        "p20_us": timing.p20_us,
                        "p80_us": timing.p80_us,
                        "floor_us": ceilings.floor_us(0, 2 * num_bytes),
                        "bytes": num_bytes,
                    }
                )
                spread = f"p20 {timing.p20_us:.2f}, p80 {timing.p80_us:.2f}"
                report.line(
                    f"{num_layers:>4} layers, {num_bytes:>8} bytes  {mode:<7}{timing.median_us:9.2f} µs  ({spread})"
                )
    return 0


def _host_time(call: Callable[[], Any], repeats: int, device: torch.device) -> Timing:
    """Time of the call alone, without the device's work."""
    samples = []
    for number in range(-10, repeats):
        begin = time.perf_counter_ns()
        call()
        elapsed = time.perf_counter_ns() - begin
        if number >= 0:
            samples.append(elapsed / 1e3)
        if number % 100 == 0:
            synchronize(device)
    return Timing.of(samples)


if __name__ == "__main__":
    sys.exit(main())
