"""The command lines of the scripts; light, as `bench.compare` needs no PyTorch."""

import argparse


def make_parser(script: str, doc: str | None) -> argparse.ArgumentParser:
    """Of ``python -m bench.script``, described by the first line of its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{script}", description=(doc or "").partition("``: ")[2].partition("\n")[0]
    )
