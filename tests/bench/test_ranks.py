"""What `bench.ranks` gives back of ranks, and what it does with those that fail or hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("ranks_start_fast")


def told(rank: int, store: str, word: str) -> tuple[int, str, bool]:
    return rank, word, Path(store).parent.is_dir()


def failing(rank: int, store: str) -> None:
    if rank == 1:
        raise ValueError("no luck")


def hanging(rank: int, store: str) -> None:
    if rank == 1:
        time.sleep(100)


def test_results_come_by_rank():
    assert run_ranks(told, 3, ("word",)) == [(rank, "word", True) for rank in range(3)]


def test_a_rank_that_fails_ends_the_run_with_its_traceback():
    with pytest.raises(Exception, match="no luck"):
        run_ranks(failing, 2)


def test_a_rank_that_hangs_ends_the_run():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"2 ranks took more than 0\.5 s"):
        run_ranks(hanging, 2, seconds=0.5)
    assert time.monotonic() - began < 60
