"""``python -m bench.table RESULTS.csv``: the tables of docs/performance.md and README from one run of `bench.moe_forward`.

All times come from one run, in which the providers took turns; times of other runs are not mixed in. Lines that begin
with ``#`` say how a file was measured and are skipped.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.command import make_parser
from bench.report import WORST_ERROR, add_plot, geometric_mean, plot_over_floor

OURS = "moe_layer"
BATCHES = (("up to 256", range(257)), ("1,024 to 4,096", range(1024, 4097)), ("16,384", range(16384, 16385)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("table", __doc__)
    parser.add_argument("results", type=Path)
    add_plot(parser)
    options = parser.parse_args(arguments)
    rows = [row for row in read(options.results) if row["mode"] == "graph"]
    wrong = {f"{row['case']} of {row['provider']}" for row in rows if not _is_right(row)}
    if wrong or len({row["dtype"] for row in rows}) > 1:
        parser.error(f"{options.results}: must have one dtype, and no wrong results ({', '.join(wrong) or 'none'})")
    times: dict[str, dict[str, float]] = defaultdict(dict)
    facts: dict[str, tuple[str, float]] = {}
    for row in rows:
        times[row["case"]][row["provider"]] = float(row["median_us"])
        facts[row["case"]] = row["experts_hit"], float(row["floor_us"])
    peers = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    for case, of_case in times.items():
        if OURS not in of_case or len(of_case) < 2:
            parser.error(f"{options.results}: {case} must have a time of {OURS} and one of a peer")
    print(f"| case | experts hit | floor µs | {OURS} µs | × floor | {' | '.join(peers)} | best peer / ours |")
    print("|---" * (6 + len(peers)) + "|")
    for case, of_case in times.items():
        hit, floor = facts[case]
        of_peers = " | ".join(f"{of_case[peer]:.4g}" if peer in of_case else "–" for peer in peers)
        ours = of_case[OURS]
        print(
            f"| {case} | {hit} | {floor:.4g} | {ours:.4g} | {ours / floor:.2f} | {of_peers} | {_best(of_case) / ours:.3f} |"
        )
    print(
        f"\ngeometric means over {len(times)} cases: {OURS} {_over_floor(times, facts):.3f} × floor; best peer / ours:"
    )
    for title, batch in (("all", range(10**9)), *BATCHES):
        ratios = [_best(one) / one[OURS] for case, one in times.items() if int(case.rpartition("/T")[2]) in batch]
        if ratios:
            print(f"  {title:<16}{geometric_mean(ratios):.3f}  ({len(ratios)} cases, worst {min(ratios):.3f})")
    if options.plot:
        plot_over_floor(_plot_rows(rows), options.plot, "One MoE layer's forward", rows[0]["device"])
    return 0


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def _is_right(row: dict[str, str]) -> bool:
    """An empty error was not written down; NaN is wrong."""
    return not row.get("rel_err") or float(row["rel_err"]) <= WORST_ERROR


def _best(of_case: dict[str, float]) -> float:
    return min(us for provider, us in of_case.items() if provider != OURS)


def _over_floor(times: dict[str, dict[str, float]], facts: dict[str, tuple[str, float]]) -> float:
    return geometric_mean(of_case[OURS] / facts[case][1] for case, of_case in times.items())


def _plot_rows(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Ours first, which is drawn on top; cases in their order."""
    cases = {case: number for number, case in enumerate(dict.fromkeys(row["case"] for row in rows))}
    ordered = sorted(rows, key=lambda row: (row["provider"] != OURS, cases[row["case"]]))
    return [row | {"median_us": float(row["median_us"]), "floor_us": float(row["floor_us"])} for row in ordered]


if __name__ == "__main__":
    sys.exit(main())
