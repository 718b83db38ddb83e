"""One thread: the matrices are tiny, and threads that wait for busy cores make a run ten times longer."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from tests.distributed import rank_context


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ranks_start_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that a bench starts need not import PyTorch anew, where there is no GPU.

    They have the environment that the test's process had when its first rank was forked. Other benches' ranks start as users'.
    """
    start = functools.partial(torch.multiprocessing.start_processes, start_method=rank_context().get_start_method())
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)
