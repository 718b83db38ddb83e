"""Shared by the benchmarks: devices and dtypes, CSV files written row by row, progress, a table's lines, pictures."""

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bench.cases import SHAPES, Case, select
from bench.command import integers, names
from bench.environment import environment
from bench.timing import DEFAULT_SECONDS

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORST_ERROR = 1e-2
"""Largest error relative to float32, in norm; the best kernels are at 2.5e-3 to 5e-3 in bf16."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that benchmarks of cases have."""
    parser.add_argument(
        "--shapes",
        type=names,
        metavar="A,B",
        help=f"of {', '.join(SHAPES)}, or experts:top_k:hidden:intermediate; default: all of these",
    )
    parser.add_argument("--tokens", type=integers, metavar="N,M", help="batch sizes; default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    add_timing(parser)


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Where, how long, and where to the rows go."""
    add_device(parser)
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="of timing, for each case and provider")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row per case and provider, written as they come")


def add_plot(parser: argparse.ArgumentParser, what: str = "picture of time over floor") -> None:
    """``--plot``, where something is drawn."""
    parser.add_argument("--plot", type=_picture, metavar="FILE", help=f"{what} (needs matplotlib)")


def _picture(path: str) -> Path:
    require_matplotlib()
    return Path(path)


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """``--device``: by default a GPU if there is one; a CUDA device has its index, so that devices compare equal."""
    default = default or ("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=_available, default=default)


def _available(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{device}: {str(error).partition(chr(10))[0]}") from None


def chosen_cases(parser: argparse.ArgumentParser, options: argparse.Namespace, least_tokens: int = 1) -> list[Case]:
    """The cases of the arguments that have so many tokens; ends the program if the arguments make no sense."""
    try:
        cases = [case for case in select(options.shapes, options.tokens) if case.num_tokens >= least_tokens]
    except ValueError as error:
        parser.error(str(error))
    if not cases:
        parser.error(f"--tokens {','.join(map(str, options.tokens))}: one must be at least {least_tokens}")
    return cases


class Report:
    """Rows of results: to a CSV as they come, and kept in `rows`. Lines and a progress bar do not disturb each other.

    Args:
        path: the CSV; none if None.
        total: steps of the progress bar.
        columns: for all rows, beside hardware, versions and commit: the run's ceilings.
    """

    def __init__(self, path: Path | None, total: int = 0, columns: Mapping[str, str] | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._environment = {**(columns or {}), **environment()}
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="") if path else None
        self._writer: csv.DictWriter[str] | None = None
        self._bar = tqdm(total=total, file=sys.stderr, disable=None, leave=False) if tqdm else None

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file:
            self._file.close()

    def row(self, values: Mapping[str, Any]) -> None:
        """All rows of a report have the same columns; a value that is given goes before one of the environment."""
        self.rows.append(dict(values))
        if self._file is None:
            return
        if self._writer is None:
            names = list(dict.fromkeys([*values, *self._environment]))
            self._writer = csv.DictWriter(self._file, names, lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(self._environment | {name: _cell(value) for name, value in values.items()})
        self._file.flush()

    def line(self, text: str) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def step(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description(what)
            self._bar.update()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1
        else round(value, 2)
        if isinstance(value, float)
        else value
    )


def plot_over_floor(rows: Sequence[Mapping[str, Any]], path: Path, title: str, hardware: str | None = None) -> None:
    """Time over floor by case, a marker for each provider, the first on top; `hardware`: this machine's if None."""
    plt = require_matplotlib()
    cases = list(dict.fromkeys(row["case"] for row in rows))
    providers = list(dict.fromkeys((row["provider"], row["mode"]) for row in rows))
    figure, axis = plt.subplots(figsize=(max(5, 1.5 + 0.32 * len(cases)), 4.5), layout="constrained")
    for (provider, mode), marker in zip(providers, "os^Dv<>Pp*Xh" * len(providers), strict=False):
        points = [
            (cases.index(row["case"]), row["median_us"] / row["floor_us"])
            for row in rows
            if (row["provider"], row["mode"]) == (provider, mode)
        ]
        label = provider if mode == "graph" else f"{provider}, {mode}"
        is_first = (provider, mode) == providers[0]
        axis.plot(
            *zip(*points, strict=True),
            marker,
            label=label,
            markersize=6 if is_first else 5,
            alpha=1 if is_first else 0.6,
            zorder=3 if is_first else 2,
        )
    axis.axhline(1, color="k", linewidth=1)
    if max(row["median_us"] / row["floor_us"] for row in rows) > 4:
        axis.set_yscale("log")
        ticks = [tick for tick in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 10, 20, 50, 100) if tick <= axis.get_ylim()[1]]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set_xticks(range(len(cases)), cases, rotation=90)
    axis.set_ylabel("time / floor")
    axis.set_title(f"{title} ({hardware or environment()['device']})")
    axis.grid(axis="y", which="both", linewidth=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def require_matplotlib() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises:
        SystemExit: it is not installed; the message says what to install.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'matplotlib>=3.8'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float32; NaN if anything is NaN."""
    difference = torch.linalg.vector_norm(output.float() - reference.float())
    return float(difference / torch.linalg.vector_norm(reference.float()).clamp_min(torch.finfo(torch.float32).tiny))


def geometric_mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).log().mean().exp())
