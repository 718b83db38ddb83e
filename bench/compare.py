"""``python -m bench.compare OLD.csv NEW.csv``: the changes between two runs of one benchmark, beyond noise.

Beyond noise: the intervals from the 20th to the 80th percentile do not overlap, and the median moved by more than 2 %.
The exit status is 1 if something got slower.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.command import make_parser

KEYS = ("op", "step", "case", "provider", "config", "mode", "dtype", "layers", "experts", "redundant", "ranks")
MACHINE = ("device", "driver", "torch", "triton")
LEAST_CHANGE = 0.02

Key = tuple[str, ...]
Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("compare", __doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old_columns, old_rows = _read(parser, options.old)
    new_columns, new_rows = _read(parser, options.new)
    keys = [key for key in KEYS if key in old_columns and key in new_columns]
    if not keys:
        parser.error(f"the files share none of the columns {', '.join(KEYS)}")
    old, new = (_by_key(parser, path, rows, keys) for path, rows in ((options.old, old_rows), (options.new, new_rows)))
    for name in MACHINE:
        values = ({row.get(name, "") for row in rows} for rows in (old_rows, new_rows))
        before, after = (", ".join(sorted(value)) for value in values)
        if before != after:
            print(f"note: {name} was {before}, is {after}")
    slower: list[tuple[float, Key]] = []
    faster: list[tuple[float, Key]] = []
    for key in old.keys() & new.keys():
        change = _median(new[key]) / _median(old[key]) - 1
        if abs(change) > LEAST_CHANGE and not _overlap(old[key], new[key]):
            (slower if change > 0 else faster).append((change, key))
    for title, changes in (("slower", sorted(slower, reverse=True)), ("faster", sorted(faster))):
        for change, key in changes:
            print(
                f"{title}  {change:+8.1%}  {_median(old[key]):10.2f} → {_median(new[key]):10.2f} µs  {'  '.join(key)}"
            )
    for title, only in (("gone", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        for key in sorted(only):
            print(f"{title:<6}  {'  '.join(key)}")
    same = len(old.keys() & new.keys()) - len(slower) - len(faster)
    print(f"{len(slower)} slower, {len(faster)} faster, {same} within noise")
    return 1 if slower else 0


def _read(parser: argparse.ArgumentParser, path: Path) -> tuple[list[str], list[Row]]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except OSError as error:
        parser.error(str(error))
    columns = list(reader.fieldnames or ())
    if "median_us" not in columns:
        parser.error(f"{path} has no column median_us")
    return columns, rows


def _by_key(parser: argparse.ArgumentParser, path: Path, rows: list[Row], keys: list[str]) -> dict[Key, Row]:
    found = {tuple(row[key] for key in keys): row for row in rows}
    if len(found) != len(rows):
        parser.error(f"{path} has several rows with the same {', '.join(keys)}")
    return found


def _median(row: Row) -> float:
    return float(row["median_us"])


def _overlap(old: Row, new: Row) -> bool:
    """A row without percentiles counts as its median."""
    (old_low, old_high), (new_low, new_high) = (
        (float(row.get("p20_us") or row["median_us"]), float(row.get("p80_us") or row["median_us"]))
        for row in (old, new)
    )
    assert not any(map(math.isnan, (old_low, old_high, new_low, new_high)))
    return old_low <= new_high and new_low <= old_high


if __name__ == "__main__":
    sys.exit(main())
