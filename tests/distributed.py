"""Tests on several ranks: a decorator that runs a function in one new process per rank.

On a machine with GPUs each takes seconds to start, as it imports PyTorch anew: let one function check several things. Without
GPUs processes are forked from one that has imported what they need and done nothing else.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import inspect
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

INTERPRETED = not torch.cuda.is_available()
"""Whether Triton's kernels run on CPUs (see conftest.py): `on_cpu` of a test that needs them."""

_IMPORTED = [
    "torch",
    "torch.distributed",
    "triton.language",
    "pytest",
    "hypothesis",
    "moe_layer",
    "eplb.simulate",
    "tests.distributed",
]
"""What the process that is forked imports."""

_AFTERMATH = 3.0
"""Seconds that the other ranks get to say what they make of one rank's failure."""


def distributed(
    num_ranks: int, backend: str = "gloo", timeout: float = 120.0, on_cpu: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a top-level function ``fn(rank, num_ranks, group, device, ...)``, run by `num_ranks` processes.

    With gloo there are two tests: on CPUs, and (marked `gpu`) with all ranks on one GPU. With NCCL every rank has a GPU
    of its own (marked `multigpu`, skipped where there are fewer). Without `on_cpu` only on GPUs. Further parameters of `fn`
    are the test's own; what `pytest.mark.parametrize` gives them must be picklable.

    The test fails with the traceback of the child that raised first and the errors of the others; after `timeout` seconds
    with the stacks of all threads of the children. A child that leaves through `os._exit(0)` did not fail.
    """
    assert backend in ("gloo", "nccl")

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[4:]

        @functools.wraps(function)
        def test(tmp_path: Path, device_type: str, **arguments: Any) -> None:
            if device_type == "cuda" and backend == "nccl" and torch.cuda.device_count() < num_ranks:
                pytest.skip(f"needs {num_ranks} CUDA devices, there are {torch.cuda.device_count()}")
            _run(function, num_ranks, backend, device_type, arguments, tmp_path, timeout)

        def positional(name: str) -> inspect.Parameter:
            return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)

        signature = inspect.Signature([positional("tmp_path"), positional("device_type"), *own])
        test.__signature__ = signature  # type: ignore[attr-defined]
        on_gpu = pytest.param("cuda", marks=pytest.mark.gpu if backend == "gloo" else pytest.mark.multigpu)
        devices = ["cpu", on_gpu] if backend == "gloo" and on_cpu else [on_gpu]
        return pytest.mark.parametrize("device_type", devices)(pytest.mark.timeout(timeout + 60)(test))

    return decorate


def _run(
    function: Callable[..., None],
    num_ranks: int,
    backend: str,
    device_type: str,
    arguments: Mapping[str, Any],
    folder: Path,
    timeout: float,
) -> None:
    context = rank_context()
    processes = [
        context.Process(
            target=_run_rank,
            args=(rank, num_ranks, backend, device_type, function.__module__, function.__name__),
            kwargs={
                "arguments": dict(arguments),
                "folder": str(folder),
                "timeout": timeout,
                "environment": dict(os.environ),
            },
            daemon=True,
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout + 5  # the children write their stacks at `timeout`
    running = set(processes)
    failed = False
    while running and time.monotonic() < deadline:
        connection.wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
        running = {process for process in running if process.is_alive()}
        if not failed and any(_failed(process.exitcode, folder, rank) for rank, process in enumerate(processes)):
            failed = True
            deadline = min(deadline, time.monotonic() + _AFTERMATH)
    for process in running:
        process.kill()
    for process in processes:
        process.join()
    if failed or running:
        said = sorted(folder.glob("rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
        texts = [f"---- {path.stem}\n{path.read_text()}" for path in said if path.stat().st_size]
        if not running:  # the first to fail knows why; the others mostly miss it
            texts = [*texts[:1], *(f"{text.splitlines()[0]} (later): {text.splitlines()[-1]}" for text in texts[1:])]
        codes = ["still running" if process in running else process.exitcode for process in processes]
        pytest.fail("\n".join([f"{function.__name__}: exit codes by rank {codes}", *texts]), pytrace=False)


def rank_context() -> Any:
    """The multiprocessing context in which ranks start: forked from a process that has imported all, if there is no GPU."""
    if torch.cuda.is_available():  # a process that has asked for the GPUs cannot be forked
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    # The server does not know this process's sys.path. It would import from the folder it starts in, or from another
    # checkout that is installed, and pass over in silence what it finds nowhere.
    path = os.pathsep.join(filter(None, sys.path))
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}):
        forkserver.ensure_running()
    return context


def _failed(exit_code: int | None, folder: Path, rank: int) -> bool:
    """Whether a child failed, as far as is known.

    One that was through and then aborted did not, but is told of: PyTorch's own threads of gloo do that now and then while a
    process ends ("terminate called without an active exception"), on machines that are overloaded.
    """
    if exit_code == -signal.SIGABRT and (folder / f"through{rank}").exists():
        warnings.warn(f"rank {rank} aborted after its test had passed", stacklevel=2)
        return False
    return bool(exit_code)


def _run_rank(
    rank: int,
    num_ranks: int,
    backend: str,
    device_type: str,
    module: str,
    name: str,
    *,
    arguments: dict[str, Any],
    folder: str,
    timeout: float,
    environment: dict[str, str],
) -> None:
    for variable in os.environ.keys() - environment.keys():  # the process that was forked had it, the test has not
        del os.environ[variable]
    os.environ.update(environment)
    with open(Path(folder) / f"rank{rank}.txt", "w") as file:
        faulthandler.dump_traceback_later(timeout, file=file)
        try:
            torch.set_num_threads(1)
            if INTERPRETED:
                from tests.interpreter import quicken_interpreter

                quicken_interpreter()
            device = torch.device("cpu")
            if device_type == "cuda":
                device = torch.device("cuda", rank if backend == "nccl" else 0)
                torch.cuda.set_device(device)
            dist.init_process_group(
                backend,
                store=dist.FileStore(str(Path(folder) / "store"), num_ranks),
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=timeout),
                device_id=device if backend == "nccl" else None,
            )
            function = getattr(importlib.import_module(module), name).__wrapped__
            function(rank, num_ranks, dist.group.WORLD, device, **arguments)
            dist.destroy_process_group()
            (Path(folder) / f"through{rank}").touch()
        except BaseException:
            file.write(traceback.format_exc())
            file.flush()
            raise SystemExit(1) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
