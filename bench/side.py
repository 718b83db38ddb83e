"""One checkout's layer in a process of its own: answers the commands of `bench.against`, a line of JSON each.

Started as ``python -m bench.side ROOT DEVICE DTYPE FLUSH`` by `bench.against.Side`. The benchmark's own code is that of the
checkout which starts it; `moe_layer`, `moe_kernels` and `eplb` come from ROOT. It idles between commands, so two of them
can share a GPU by turns.

    {"do": "prepare", "case": {...}}                   → {"rel_err": 0.003, "crc": 123}, of the output
    {"do": "time", "mode": "graph", "repeats": 40}     → {"samples_us": [28.9, 29.2, ...]}, one burst; or mode "eager"

A command that fails is answered by ``{"error": "ValueError: …"}``. The end of the input ends the process.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PACKAGES = ("moe_layer", "moe_kernels", "eplb")


def main(root: Path, device: str, dtype: str, flush: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not disturb the protocol
    import_from(root)
    serve(sys.stdin, lambda reply: print(json.dumps(reply), file=replies, flush=True), device, dtype, flush)


def import_from(root: Path) -> None:
    """Import the packages from `root`.

    Raises:
        RuntimeError: a package came from elsewhere.
    """
    sys.path[:0] = [str(root), str(root / "kernels")]
    for name in PACKAGES:
        found = Path(__import__(name).__file__ or "")
        if not found.is_relative_to(root):
            raise RuntimeError(f"{name} must come from {root}, came from {found}")


def serve(
    commands: Iterable[str], reply: Callable[[dict[str, Any]], None], device: str, dtype: str, flush: str
) -> None:
    """Answer each line of `commands`; the first reply says that the packages are imported."""
    import torch

    from bench.report import DTYPES

    bench = _Bench(torch.device(device), DTYPES[dtype], flush)
    reply({"ready": True})
    with torch.no_grad():
        for line in commands:
            command = json.loads(line)
            try:
                reply(bench.prepare(command["case"]) if command["do"] == "prepare" else bench.time(**command))
            except Exception as error:  # of whatever kind: the other side and the next cases go on
                reply({"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})


class _Bench:
    """The prepared case: its forward, and on a GPU the graph of it."""

    def __init__(self, device: Any, dtype: Any, flush: str) -> None:
        self.device, self.dtype, self.flush = device, dtype, flush
        self.shape: Any = None
        self.weights: Any = None
        self.forward: Any = None
        self.graph: Any = None

    def prepare(self, fields: dict[str, Any]) -> dict[str, Any]:
        import torch

        from bench.cases import Case, Shape, make_logits
        from bench.providers import PROVIDERS, make_problem, make_weights, reference
        from bench.report import relative_error
        from bench.timing import capture

        case = Case(**fields | {"shape": Shape(**fields["shape"])})
        self.forward = self.graph = None  # gives its memory back
        if case.shape != self.shape:
            self.shape = self.weights = None
            self.weights = make_weights(case.shape, self.dtype, self.device)
            self.shape = case.shape
        problem = make_problem(case.shape, self.weights, make_logits(case))
        forward = PROVIDERS["moe_layer"].prepare(problem)
        output = forward()
        error = relative_error(output, reference(problem))
        if self.device.type == "cuda":
            self.graph = capture(forward, self.device)
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # the other process needs memory too
        self.forward = forward
        return {"rel_err": error, "crc": zlib.crc32(output.cpu().view(torch.uint8).numpy().tobytes())}

    def time(self, mode: str, repeats: int, do: str = "time") -> dict[str, Any]:
        from bench.timing import samples_us, wall_us

        if do != "time" or mode not in ("graph", "eager") or self.forward is None:
            raise ValueError(f"command {do!r} in mode {mode!r}: unknown, or no case is prepared")
        if mode == "eager":
            self.forward()  # warm again, after the other side's turn
            return {"samples_us": [wall_us(self.forward, self.device) for _ in range(repeats)]}
        return {"samples_us": samples_us([self.graph], self.device, repeats, self.flush)[0]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
