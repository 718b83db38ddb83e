"""What `bench.ranks` gives back of ranks, and what it does with those that fail or hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench import ep_ranks, skew
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
    assert run_ranks(told, 3, ("word",), 60, "told") == [(rank, "word", True) for rank in range(3)]


def test_a_rank_that_fails_ends_the_run_with_its_traceback():
    with pytest.raises(Exception, match="no luck"):
        run_ranks(failing, 2, (), 60, "failing")


def test_a_rank_that_hangs_ends_the_run():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^hanging: 2 ranks took more than 0\.5 s, the limit that --seconds sets$"):
        run_ranks(hanging, 2, (), 0.5, "hanging")
    assert time.monotonic() - began < 60


def test_seconds_is_the_limit_of_skew():
    with pytest.raises(TimeoutError, match=r"^bench\.skew: 2 ranks took more than 0\.1 s"):
        skew.main(["--device", "cpu", "--ranks", "2", "--steps", "100000", "--seconds", "0.1"])


@pytest.mark.parametrize(("given", "seconds"), [([], 1800.0), (["--seconds", "7"], 7.0)])
def test_seconds_is_the_limit_of_ep_ranks(monkeypatch, given, seconds):
    runs = []
    monkeypatch.setattr(ep_ranks.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ep_ranks, "run_ranks", lambda *arguments: runs.append(arguments))
    assert ep_ranks.main(given) == 0
    assert [(ranks, limit, what) for _, ranks, _, limit, what in runs] == [(2, seconds, "bench.ep_ranks")]
