"""The command lines of the scripts; light, as `bench.compare` needs no PyTorch."""

import argparse
import sys
from collections.abc import Sequence


def make_parser(script: str, doc: str | None) -> argparse.ArgumentParser:
    """Of ``python -m bench.script``, described by the first line of its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{script}", description=(doc or "").partition("``: ")[2].partition("\n")[0]
    )


def names(text: str) -> list[str]:
    """Of an argument ``A,B``."""
    return text.split(",")


def integers(text: str) -> list[int]:
    """Of an argument ``N,M``."""
    return [int(number) for number in text.split(",")]


def add_providers(parser: argparse.ArgumentParser) -> None:
    """``--providers`` and ``--provider-module``, for `bench.providers.find`."""
    parser.add_argument("--providers", type=names, metavar="A,B", help="the first is compared with the others")
    parser.add_argument("--provider-module", action="append", default=[], metavar="MODULE", help="registers providers")


def exit_status(complaints: Sequence[str]) -> int:
    """1 if something FAILED, which is printed; what was skipped is no failure."""
    failed = [complaint for complaint in complaints if complaint.startswith("FAILED")]
    if failed:
        print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0
