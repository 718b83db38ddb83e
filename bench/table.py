"""``python -m bench.table``: the README's table from a CSV of `bench.moe_forward` and one of peers' times.

Example: ``python -m bench.table bench/results/h200/moe_forward.csv bench/results/h200/peers.csv --plot docs/moe_forward.png``
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.command import make_parser
from bench.report import WORST_ERROR, geometric_mean, plot_over_floor

OURS = "moe_layer"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("table", __doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    with options.results.open(newline="") as file:
        results = [row for row in csv.DictReader(file) if row["mode"] == "graph"]
    wrong = [row["case"] for row in results if row["provider"] == OURS and not float(row["rel_err"]) <= WORST_ERROR]
    if wrong or len({row["dtype"] for row in results}) > 1:
        parser.error(f"{options.results}: must have one dtype, and no wrong results ({', '.join(wrong) or 'none'})")
    with options.peers.open(newline="") as file:
        peers = list(csv.DictReader(file))
    print("| case | experts hit | floor µs | moe_layer µs | × floor | best peer µs | which | speed-up |")
    print("|---|---|---|---|---|---|---|---|")
    ours_over_floor, best_over_floor = [], []
    for row in results:
        if row["provider"] != OURS:
            continue
        floor, median = float(row["floor_us"]), float(row["median_us"])
        of_case = [(float(peer["median_us"]), peer["provider"]) for peer in peers if peer["case"] == row["case"]]
        if not of_case:
            parser.error(f"{options.peers} has no case {row['case']}")
        least, which = min(of_case)
        ours_over_floor.append(median / floor)
        best_over_floor.append(least / floor)
        print(
            f"| {row['case']} | {row['experts_hit']} | {floor:.0f} | {median:.1f} | {median / floor:.2f} "
            f"| {least:.0f} | {which} | {least / median:.2f} |"
        )
    ours, best = geometric_mean(ours_over_floor), geometric_mean(best_over_floor)
    print(
        f"\ngeometric means over {len(ours_over_floor)} cases: moe_layer {ours:.3f} × floor, best peers {best:.3f} × floor"
    )
    if options.plot:
        plot_over_floor(_plot_rows(results, peers), options.plot, "One MoE layer's forward", results[0]["device"])
    return 0


def _plot_rows(results: Sequence[dict[str, str]], peers: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    floors = {row["case"]: float(row["floor_us"]) for row in results}
    ours = [row for row in results if row["provider"] == OURS]
    rows = ours + [row for row in peers if row["case"] in floors]
    return [
        {
            "case": row["case"],
            "provider": row["provider"],
            "mode": "graph",
            "median_us": float(row["median_us"]),
            "floor_us": floors[row["case"]],
        }
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
