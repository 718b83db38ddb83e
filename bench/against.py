"""The layer of another checkout beside this one's, in one run (``python -m bench.moe_forward --against PATH``).

Custom ops of two checkouts have the same names, so each checkout has a process of its own (`bench.side`). The processes
prepare a case at the same time; then they take turns. In each round both time a burst of about 20 ms from idle, the
other one first in every second round. The ratio of a case is the median over rounds of new / old, so a drift of the clock
from round to round is not in it. `--against .` compares this checkout with itself: that spread is the noise.
"""

import argparse
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, count_hit, forward_work, make_logits
from bench.ceilings import Ceilings, measure_ceilings
from bench.command import exit_status
from bench.environment import ROOT, commit_of
from bench.report import DTYPES, WORST_ERROR, Report, geometric_mean
from bench.timing import BURST_SECONDS, Timing

ROUNDS = 6
IDLE_SECONDS = 0.25
LEAST_REPEATS, MOST_REPEATS = 2, 100  # of a burst
DEADLINE_SECONDS = 600.0
SLOWER = 1.01


class SideFailed(Exception):  # noqa: N818
    """A side answered with an error, died, or did not answer within the deadline."""


class Side:
    """The process of one checkout. Ends with the `with` block."""

    def __init__(self, name: str, root: Path, commit: str, options: argparse.Namespace) -> None:
        self.name, self.commit = name, commit
        arguments = [str(root), str(options.device), options.dtype, options.flush]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.side", *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")  # the process has ended

    def send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended: the next `receive` says so

    def receive(self) -> dict[str, Any]:
        """The next reply.

        Raises:
            SideFailed: there is none, or it is an error.
        """
        try:
            line = self._replies.get(timeout=DEADLINE_SECONDS)
        except queue.Empty:
            raise SideFailed(f"{self.name}: no answer within {DEADLINE_SECONDS:.0f} s") from None
        if not line:
            self._replies.put("")
            raise SideFailed(f"{self.name}: its process ended (see above)")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SideFailed(f"{self.name}: {reply['error']}")
        return reply


@dataclass(frozen=True)
class Compared:
    """One case in one mode: a `Timing` of each side, and new / old of each round."""

    old: Timing
    new: Timing
    ratios: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def run(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Compare all cases; the exit status is 1 if a side failed or an output is wrong."""
    modes = [*(["graph"] if options.device.type == "cuda" else []), "eager"]
    if not options.eager:
        modes = modes[:1]
    ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    other = options.against.resolve()
    complaints: list[str] = []
    ratios: dict[str, dict[str, float]] = {mode: {} for mode in modes}
    with (
        Report(options.csv, len(cases), ceilings.columns()) as report,
        Side("old", other, commit_of(other, "BENCH_AGAINST_COMMIT"), options) as old,
        Side("new", ROOT, commit_of(ROOT, "BENCH_COMMIT"), options) as new,
    ):
        for side in (old, new):
            side.receive()
        report.line(f"old: {other} at {old.commit}; new: {ROOT} at {new.commit}; floors by {ceilings}, measured now")
        report.line(
            f"{'case':<20}{'mode':<7}{'floor µs':>10}{'old µs':>10}{'new µs':>10}{'× floor':>9}{'new / old':>11}  of rounds"
        )
        for case in cases:
            report.step(case.name)
            try:
                prepared = _prepare(case, old, new)
                compared = {mode: _compare(mode, old, new, options.rounds) for mode in modes}
            except SideFailed as failure:
                complaints.append(f"FAILED {case.name}: {failure}")
                report.line(complaints[-1])
                continue
            complaints += _judge(case, prepared, report)
            for mode, pair in compared.items():
                ratios[mode][case.name] = pair.ratio
                _write(report, case, mode, pair, prepared, (old, new), ceilings, options.dtype)
        for mode, of_case in ratios.items():
            for line in _summary(mode, of_case):
                report.line(line)
    return exit_status(complaints)


def _prepare(case: Case, old: Side, new: Side) -> list[dict[str, Any]]:
    """Both at the same time: kernels are compiled then."""
    for side in (old, new):
        side.send(do="prepare", case=asdict(case))
    replies: list[dict[str, Any]] = []
    failures: list[SideFailed] = []
    for side in (old, new):  # both are heard, or the next case would get this one's answer
        try:
            replies.append(side.receive())
        except SideFailed as failure:
            failures.append(failure)
    if failures:
        raise failures[0]
    return replies


def _compare(mode: str, old: Side, new: Side, rounds: int) -> Compared:
    estimates_us = []
    for side in (old, new):
        side.send(do="time", mode=mode, repeats=3)
        estimates_us.append(statistics.median(side.receive()["samples_us"]))
    repeats = int(min(max(1e6 * BURST_SECONDS / max(estimates_us), LEAST_REPEATS), MOST_REPEATS))
    samples: dict[Side, list[float]] = {old: [], new: []}
    ratios = []
    for number in range(rounds):
        median = {}
        for side in (old, new) if number % 2 else (new, old):
            if mode == "graph":
                time.sleep(IDLE_SECONDS)
            side.send(do="time", mode=mode, repeats=repeats)
            burst = side.receive()["samples_us"]
            samples[side] += burst
            median[side] = statistics.median(burst)
        ratios.append(median[new] / median[old])
    return Compared(Timing.of(samples[old]), Timing.of(samples[new]), ratios)


def _judge(case: Case, prepared: Sequence[dict[str, Any]], report: Report) -> list[str]:
    wrong = [
        f"FAILED {case.name}: error of {name} {reply['rel_err']:.2e} against float32, or NaN"
        for name, reply in zip(("old", "new"), prepared, strict=True)
        if not reply["rel_err"] <= WORST_ERROR
    ]
    if prepared[0]["crc"] != prepared[1]["crc"]:
        report.line(f"    {case.name}: the bits of the two outputs differ")
    for complaint in wrong:
        report.line(f"    {complaint}")
    return wrong


def _write(
    report: Report,
    case: Case,
    mode: str,
    pair: Compared,
    prepared: Sequence[dict[str, Any]],
    sides: tuple[Side, Side],
    ceilings: Ceilings,
    dtype: str,
) -> None:
    hit = count_hit(make_logits(case), case.shape.top_k)
    floor = ceilings.floor_us(*forward_work(case.shape, case.num_tokens, hit, DTYPES[dtype]))
    for side, timing, reply in zip(sides, (pair.old, pair.new), prepared, strict=True):
        report.row(
            {
                "case": case.name,
                "provider": side.name,
                "median_us": timing.median_us,
                "p20_us": timing.p20_us,
                "p80_us": timing.p80_us,
                "floor_us": floor,
                "rel_err": reply["rel_err"],
                "mode": mode,
                "dtype": dtype,
                "experts_hit": hit,
                "new_over_old": f"{pair.ratio:.4f}",
                "commit": side.commit,
            }
        )
    report.line(
        f"{case.name:<20}{mode:<7}{floor:>10.1f}{pair.old.median_us:>10.1f}{pair.new.median_us:>10.1f}"
        f"{pair.new.median_us / floor:>9.2f}{pair.ratio:>11.3f}  {min(pair.ratios):.3f} to {max(pair.ratios):.3f}"
    )


def _summary(mode: str, ratios: dict[str, float]) -> list[str]:
    if not ratios:
        return []
    worst = max(ratios, key=lambda name: ratios[name])
    slower = [f"{name} {ratio:.3f}" for name, ratio in ratios.items() if ratio > SLOWER]
    return [
        f"\n{mode}: new / old, geometric mean {geometric_mean(ratios.values()):.4f}, worst {ratios[worst]:.3f} ({worst}), "
        f"{len(ratios)} cases",
        f"{mode}: slower by more than {100 * (SLOWER - 1):.0f} %: {', '.join(slower) or 'none'}",
    ]


def check_root(path: Path) -> None:
    """Raises ValueError if there is no checkout at `path`."""
    missing = [name for name in ("moe_layer", "eplb", "kernels/moe_kernels") if not (path / name).is_dir()]
    if missing:
        raise ValueError(f"--against {path}: must be a checkout of this project, has no {', '.join(missing)}")
