"""Two checkouts in one run: the protocol of the processes, and the comparison."""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import against, moe_forward, side
from bench.cases import Case, Shape
from bench.environment import ROOT, commit_of

CASE = Case(Shape("8:2:64:32", 8, 2, 64, 32), 5)
PREPARE = {"do": "prepare", "case": asdict(CASE)}


def replies(*commands):
    said = []
    side.serve([json.dumps(command) for command in commands], said.append, "cpu", "bf16", "write")
    return said


def test_a_side_prepares_and_times():
    ready, prepared, again, timed = replies(PREPARE, PREPARE, {"do": "time", "mode": "eager", "repeats": 4})
    assert ready == {"ready": True}
    assert 0 < prepared["rel_err"] < 1e-2 and prepared == again
    assert len(timed["samples_us"]) == 4 and min(timed["samples_us"]) > 0


def test_a_side_answers_what_it_cannot_do_and_goes_on():
    broken = {"do": "prepare", "case": {**asdict(CASE), "seed": None}}
    said = replies({"do": "time", "mode": "eager", "repeats": 4}, broken, {"do": "dance", "mode": "eager"}, PREPARE)
    assert ["error" in reply for reply in said] == [False, True, True, True, False]
    assert said[1]["error"] == "ValueError: command 'time' in mode 'eager': unknown, or no case is prepared"


def test_packages_must_come_from_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(RuntimeError, match=f"moe_layer must come from {tmp_path}"):
        side.import_from(tmp_path)


class FakeSide:
    """Answers bursts of fixed times; notes its turns."""

    def __init__(self, name, times_us, turns):
        self.name, self.commit, self._times_us, self._turns = name, name, iter(times_us), turns

    def send(self, **command):
        self._command = command

    def receive(self):
        self._turns.append((self.name, self._command["repeats"]))
        return {"samples_us": [next(self._times_us)] * self._command["repeats"]}


def test_sides_take_turns_and_the_ratio_is_of_rounds():
    turns = []
    old = FakeSide("old", [1000.0, 100.0, 200.0, 400.0], turns)
    new = FakeSide("new", [500.0, 110.0, 210.0, 100.0], turns)
    compared = against._compare("eager", old, new, rounds=3)
    assert [name for name, _ in turns] == ["old", "new", "new", "old", "old", "new", "new", "old"]
    assert {repeats for _, repeats in turns[2:]} == {20}  # a burst of 20 ms of the slower one
    assert compared.ratio == pytest.approx(1.05) and (compared.old.median_us, compared.new.median_us) == (200, 110)
    assert "slower by more than 1 %: a 1.050" in against._summary("eager", {"a": compared.ratio, "b": 1.0})[1]


@pytest.fixture
def other(tmp_path) -> Path:
    """Another checkout: a folder of its own with this one's packages."""
    for name in ("moe_layer", "eplb", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_two_processes(other, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BENCH_AGAINST_COMMIT", "abc1234")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "out.csv"
    arguments = ["--shapes", CASE.shape.name, "--tokens", "5", "--device", "cpu", "--rounds", "2"]
    assert moe_forward.main([*arguments, "--against", str(other), "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        old, new = csv.DictReader(file)
    assert (old["provider"], old["commit"], new["provider"]) == ("old", "abc1234", "new")
    assert new["commit"] != "abc1234" and float(old["new_over_old"]) > 0 and old["rel_err"] == new["rel_err"]
    out = capsys.readouterr().out
    assert f"old: {other} at abc1234" in out and "bits of the two outputs differ" not in out
    assert "eager: new / old, geometric mean" in out


def test_a_side_that_dies_is_said(tmp_path):
    options = argparse.Namespace(device=torch.device("cpu"), dtype="bf16", flush="write")
    for name in ("moe_layer", "moe_kernels", "eplb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(3)")
    with against.Side("old", tmp_path, "?", options) as dead:
        for _ in range(2):
            with pytest.raises(against.SideFailed, match="old: its process ended"):
                dead.receive()
        dead.send(do="time", mode="eager", repeats=1)


def test_a_folder_inside_another_repository_has_no_commit(monkeypatch):
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert commit_of(ROOT / "bench", "BENCH_COMMIT") == "unknown"
    monkeypatch.setenv("BENCH_COMMIT", "told")
    assert commit_of(ROOT / "bench", "BENCH_COMMIT") == "told"
