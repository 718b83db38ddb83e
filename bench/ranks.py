"""Ranks of a benchmark, each in a process of its own."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.multiprocessing as mp

Result = TypeVar("Result")


def run_ranks(
    serve: Callable[..., Result], num_ranks: int, arguments: tuple[Any, ...], seconds: float, what: str
) -> list[Result]:
    """What `serve` returns, by rank. A rank that fails ends the run with its traceback.

    Args:
        serve: a module's function, called in a new process with the rank, the path of a file for the ranks'
            `torch.distributed.FileStore`, and `arguments`.
        seconds: deadline of all ranks together, from the option ``--seconds`` of the script.
        what: runs, for the error.

    Raises:
        TimeoutError: the ranks took longer, and were killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(_run, (serve, folder, arguments), nprocs=num_ranks, join=False)
        deadline = time.monotonic() + seconds
        while not processes.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                for process in processes.processes:
                    process.join()  # or one could still write while the folder is removed
                raise TimeoutError(
                    f"{what}: {num_ranks} ranks took more than {seconds:g} s, the limit that --seconds sets"
                )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _run(rank: int, serve: Callable[..., object], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.save(serve(rank, f"{folder}/store", *arguments), Path(folder) / f"{rank}.pt")
