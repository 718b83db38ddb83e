"""``python -m tests.mutants``: plants single-line bugs, one by one, and says which of them the tests catch.

Not collected by pytest, and not part of CI: the whole list takes long. Each bug is planted in a copy of the tree, then the
named tests run there until one fails. The list is in `tests/mutant_list.py`.

A bug is *caught* if a test fails, and *survived* if all pass. An entry whose line is not there any more, or there twice, is
*stale*. One whose code cannot be imported, or whose tests do not exist, is *broken*. The exit status is 0 only if all are
caught.
"""

import argparse
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", "results", "docs", "*.egg-info")
HANG_SECONDS = "100"  # for one test
DEADLINE_SECONDS = 1200.0  # for the tests of one bug; one that hangs longer is caught, as CI would be red


@dataclass(frozen=True)
class Mutant:
    """A single-line bug.

    Attributes:
        file: path from the root.
        before: the line, without indentation.
        after: the line with the bug.
        tests: files, or single tests, at least one of which must fail.
        inside: a line before it, of which the first occurrence after it is meant; for lines that occur several times.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    inside: str = ""


class Stale(Exception):  # noqa: N818
    """The line is not there, or it is not clear which one is meant."""


def planted(mutant: Mutant, text: str) -> str:
    """The file's text with the bug.

    Raises:
        Stale: see there.
    """
    lines = text.split("\n")
    first = 0
    if mutant.inside:
        starts = [number for number, line in enumerate(lines) if line.strip().startswith(mutant.inside)]
        if len(starts) != 1:
            raise Stale(f"{len(starts)} lines begin with {mutant.inside!r}")
        first = starts[0]
    found = [number for number in range(first, len(lines)) if lines[number].strip() == mutant.before]
    if not found or (len(found) > 1 and not mutant.inside):
        raise Stale(f"{len(found)} lines are {mutant.before!r}")
    line = lines[found[0]]
    lines[found[0]] = line[: len(line) - len(line.lstrip())] + mutant.after
    changed = "\n".join(lines)
    compile(changed, mutant.file, "exec")
    return changed


def try_one(mutant: Mutant | None, tests: Sequence[str], copy: Path) -> tuple[str, str]:
    """Run the tests in `copy` with the bug, or without one: (verdict, the test that failed or why)."""
    path = copy / mutant.file if mutant else None
    original = path.read_text() if path else ""
    try:
        if mutant and path:
            path.write_text(planted(mutant, original))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", HANG_SECONDS, *tests],
            cwd=copy, capture_output=True, text=True, timeout=DEADLINE_SECONDS,
        )  # fmt: skip
    except Stale as reason:
        return "stale", str(reason)
    except SyntaxError as error:
        return "broken", f"the bug is no Python: {error}"
    except subprocess.TimeoutExpired:
        return "caught", f"the tests took more than {DEADLINE_SECONDS:.0f} s"
    finally:
        if path:
            path.write_text(original)
    if done.returncode not in (0, 1):
        return "broken", f"pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return ("caught" if done.returncode else "survived"), failed.group(1) if failed else ""


def main(arguments: Sequence[str] | None = None) -> int:
    from tests.mutant_list import MUTANTS

    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Which single-line bugs tests catch.")
    parser.add_argument("--only", type=lambda text: [int(n) for n in text.split(",")], metavar="N,M", help="numbers")
    parser.add_argument("--file", default="", help="only bugs in files whose path contains this")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies of the tree to work in at once")
    parser.add_argument("--check", action="store_true", help="only look for stale entries")
    parser.add_argument("--baseline", action="store_true", help="only run the named tests without bugs: all must pass")
    options = parser.parse_args(arguments)
    chosen = [
        (number, mutant)
        for number, mutant in enumerate(MUTANTS)
        if (options.only is None or number in options.only) and options.file in mutant.file
    ]
    if options.check:
        return check(chosen)
    work: list[tuple[int, Mutant | None, tuple[str, ...]]] = [(number, one, one.tests) for number, one in chosen]
    if options.baseline:
        work = [(number, None, (test,)) for number, test in enumerate(sorted({t for _, m in chosen for t in m.tests}))]
    copies: queue.Queue[Path] = queue.Queue()
    verdicts = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for number in range(options.jobs):
            copies.put(
                Path(shutil.copytree(ROOT, Path(folder) / str(number), ignore=shutil.ignore_patterns(*LEFT_OUT)))
            )

        def run(one: tuple[int, Mutant | None, tuple[str, ...]]) -> str:
            number, mutant, tests = one
            copy, began = copies.get(), time.monotonic()
            try:
                verdict, reason = try_one(mutant, tests, copy)
            finally:
                copies.put(copy)
            told = f"{mutant.file}: {mutant.after}" if mutant else " ".join(tests)
            print(f"{number:>3} {verdict:<9}{time.monotonic() - began:6.0f} s  {told}  [{reason}]", flush=True)
            return verdict

        verdicts = list(pool.map(run, work))
    wanted = "survived" if options.baseline else "caught"  # without a bug all tests pass
    print(", ".join(f"{verdicts.count(kind)} {kind}" for kind in dict.fromkeys(verdicts)) + f" of {len(verdicts)}")
    return 0 if all(verdict == wanted for verdict in verdicts) else 1


def check(chosen: Sequence[tuple[int, Mutant]]) -> int:
    """Print the stale and broken entries."""
    wrong = 0
    for number, mutant in chosen:
        missing = [test for test in mutant.tests if not (ROOT / test.partition("::")[0]).is_file()]
        try:
            planted(mutant, (ROOT / mutant.file).read_text())
            reason = f"no {', '.join(missing)}" if missing else ""
        except (Stale, SyntaxError, OSError) as error:
            reason = str(error)
        if reason:
            wrong += 1
            print(f"{number:>3} stale  {mutant.file}: {reason}")
    print(f"{wrong} of {len(chosen)} entries are stale")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
