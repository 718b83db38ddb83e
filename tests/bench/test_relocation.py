"""`bench.relocation`: real ranks by three protocols, and what it makes of their recordings."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import relocation
from bench.relocation_protocols import Ours
from bench.relocation_rank import STEP_RANGE, Recording
from bench.rotation import Rotation
from eplb.config import QUIET_BYTES_PER_SECOND, EplbConfig
from eplb.planning.policy import Topology

TINY = ["--layers", "2", "--shape", "8:2:64:32", "--tokens", "4", "--device", "cpu", "--ranks", "2", "--dtype", "fp32"]


def test_rotation_moves_every_expert():
    physical_LWP = np.array([[[0, 1], [2, 3], [4, 5]]])
    proposal = Rotation().propose(np.ones((1, 1, 6)), physical_LWP, Topology(3))
    assert proposal.physical_LWP.tolist() == [[[4, 5], [0, 1], [2, 3]]]
    assert proposal.shares_LWP.tolist() == [[[1.0, 1.0]] * 3]


@pytest.mark.timeout(400)
def test_three_protocols_serve_the_same_outputs(tmp_path, capsys, ranks_start_fast):
    path, picture = tmp_path / "out.csv", tmp_path / "out.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    arguments = [*TINY, "--steps", "100", "--interval", "32", "--rate", "0", "--csv", str(path), *plot]
    assert relocation.main(arguments) == 0
    with path.open(newline="") as file:
        rows = {row["protocol"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["pause", "lockstep", "ours"]
    for name, row in rows.items():
        assert row["wrong"] == "0" and int(row["rebalances"]) >= 2 and row["rate"] == "none", name
        assert int(row["quiet_steps"]) > 0 and float(row["quiet_p99_ms"]) >= float(row["quiet_median_ms"]) > 0, name
        assert float(row["gb_per_s_per_receiver"]) > 0 and float(row["call_flip_us"]) > 0, name
    assert float(rows["ours"]["pull_gb_per_s"]) > 0 and rows["lockstep"]["pull_gb_per_s"] == "nan"
    assert float(rows["pause"]["steps_to_relocate_all"]) == 1.0
    assert float(rows["lockstep"]["steps_to_relocate_all"]) >= 3.0  # two layers, one a step, and the one that begins
    out = capsys.readouterr().out
    assert "| ours | " in out and "step() idle, µs:" in out and "steps for all slots over lockstep's" in out
    assert picture.exists() == bool(plot)


@pytest.mark.timeout(200)
def test_without_forwards_a_step_is_the_wait_and_what_the_host_does(tmp_path, ranks_start_fast):
    path = tmp_path / "out.csv"
    options = [
        "--protocols",
        "ours",
        "--communicator",
        "symm_mem",
        "--replay",
        "3",
        "--steps",
        "300",
        "--interval",
        "60",
    ]
    assert relocation.main([*TINY, *options, "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 3.0 <= float(row["quiet_median_ms"]) < 30.0 and float(row["relocating_median_ms"]) >= 3.0
    assert int(row["rebalances"]) >= 2 and row["wrong"] == "0" and row["replay"] == "3.0"
    assert row["rate"] == str(QUIET_BYTES_PER_SECOND)


@pytest.mark.parametrize(
    ("rate", "communicator", "kept"),
    [
        ("auto", "symm_mem", QUIET_BYTES_PER_SECOND),
        ("auto", "torch_gloo", None),  # which cannot keep one
        (7_000_000, "nixl", 7_000_000),
        (None, "symm_mem", None),
    ],
)
def test_the_rate_is_the_bound_that_was_kept(rate, communicator, kept):
    worker = SimpleNamespace(rounds=SimpleNamespace(communicator=SimpleNamespace(name=communicator)))
    ours = Ours.__new__(Ours)
    ours.controller = SimpleNamespace(config=EplbConfig(max_bytes_per_second=rate), _worker=worker)
    assert ours.bytes_per_second == kept
    assert relocation.summary([recording(bytes_per_second=kept)], num_tables=3)["rate"] == (kept or "none")


@pytest.mark.timeout(200)
def test_a_trace_of_ours_has_no_collective_in_a_step(tmp_path, capsys, ranks_start_fast):
    path = tmp_path / "trace.json"
    assert (
        relocation.main([*TINY, "--steps", "120", "--interval", "60", "--protocols", "ours", "--trace", str(path)]) == 0
    )
    assert "no collective and no wait inside step()" in capsys.readouterr().out
    events = json.loads(path.read_text())["traceEvents"]
    # What would be found: the forward's own collectives are in the trace, on the same thread, outside.
    thread = next(event["tid"] for event in events if event["name"] == STEP_RANGE)
    assert any(relocation.FORBIDDEN.search(event["name"]) and event["tid"] == thread for event in events)


def event(name: str, ts: float, dur: float = 1.0, tid: int = 7, cat: str = "cpu_op") -> dict:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid, "cat": cat}


@pytest.mark.parametrize(
    ("name", "ts", "tid", "is_found"),
    [
        ("c10d::allreduce_", 15.0, 7, True),
        ("gloo:all_gather", 15.0, 7, True),
        ("cudaStreamSynchronize", 31.0, 7, True),
        ("cudaEventSynchronize", 15.0, 7, True),
        ("aten::item", 15.0, 7, True),
        ("cudaMemcpy", 15.0, 7, True),
        ("cudaMemcpyAsync", 15.0, 7, False),
        ("cudaStreamWaitEvent", 15.0, 7, False),
        ("cudaStreamSynchronize", 25.0, 7, False),  # between steps: the forward's
        ("cudaStreamSynchronize", 5.0, 7, False),
        ("gloo:all_gather", 15.0, 8, False),  # the worker's thread
    ],
)
def test_what_is_forbidden_in_a_step(name, ts, tid, is_found):
    steps = [event(STEP_RANGE, at, 10.0, cat="user_annotation") for at in (30.0, 10.0)]
    trace = {"traceEvents": [*steps, event(name, ts, tid=tid), {"ph": "M", "name": "process_name"}]}
    assert relocation.forbidden_in_step(trace) == ({name: 1} if is_found else {})


def test_a_trace_without_a_step_is_an_error():
    with pytest.raises(ValueError, match=r"has no eplb\.step"):
        relocation.forbidden_in_step({"traceEvents": [event("c10d::allreduce_", 1.0)]})


def recording(**changes) -> Recording:
    """Ten steps; planning in 2, moving in 3 to 5 and again, up to the end, from 8 on."""
    moving = [number in (3, 4, 5, 8, 9) for number in range(10)]
    values = {
        "step_ms": [10.0, 10.0, 11.0, 20.0, 12.0, 13.0, 10.0, 14.0, 50.0, 50.0],
        "call_us": [2.0, 2.0, 3.0, 40.0, 3.0, 30.0, 2.0, 2.0, 3.0, 90.0],
        "relocating": [one or number == 2 for number, one in enumerate(moving)],
        "moving": moving,
        "flips": [0, 0, 0, 1, 0, 2, 0, 0, 0, 1],
        "bytes_per_rebalance": 90_000_000,
        "wave_bytes": [30_000_000.0, 60_000_000.0],
        "wave_seconds": [0.01, 0.01],
    }
    return Recording(**values | changes)


def test_a_summary_by_hand():
    row = relocation.summary([recording(), recording()], num_tables=3)
    assert (row["quiet_steps"], row["relocating_steps"], row["rebalances"]) == (8, 12, 2)
    assert row["quiet_median_ms"] == 10.0 and row["quiet_mean_ms"] == 11.0 and row["relocating_mean_ms"] == 26.0
    assert row["mean_ratio"] == pytest.approx(26 / 11) and row["p99_ratio"] == pytest.approx(50 / row["quiet_p99_ms"])
    assert row["steps_to_relocate_all"] == 3.0 and row["seconds_to_relocate_all"] == pytest.approx(0.045)
    assert row["gb_per_s_per_receiver"] == pytest.approx(2.0) and row["pull_gb_per_s"] == pytest.approx(4.5)
    assert (row["call_idle_us"], row["call_relocating_us"], row["call_flip_us"]) == (2.0, 3.0, 40.0)


def test_a_rebalance_that_did_not_reach_every_table_or_the_end_is_none():
    assert relocation.rebalances(recording(), 3) == [(3, 5)]
    assert relocation.rebalances(recording(), 4) == []
    assert relocation.rebalances(recording(moving=[True] * 10), 3) == []


def test_targets_say_what_was_reached():
    row = relocation.summary([recording()], num_tables=3)
    slow = relocation.summary([recording(moving=[number in range(1, 8) for number in range(10)])], num_tables=3)
    said = relocation.targets({"lockstep": slow, "ours": row})
    assert "reached step() idle, µs: 2.000 (≤ 5)" in said and "MISSED  step() with a flip, µs: 40.000 (≤ 30)" in said
    assert f"MISSED  steps for all slots over lockstep's: {3 / 7:.3f} (≤ 0.333)" in said
    assert "MISSED  GB/s while copying: 4 (≥ 330)" in said
    assert relocation.targets({"pause": row}) == []
    bound = relocation.targets({"lockstep": slow, "ours": row | {"rate": 12_000_000_000}})
    assert len(bound) == 4 and not any("GB/s" in line or "lockstep" in line for line in bound)


def test_wrong_outputs_fail_the_run(monkeypatch, capsys):
    monkeypatch.setattr(relocation, "run", lambda protocol, options: [recording(wrong=int(protocol == "ours"))] * 2)
    assert relocation.main(TINY) == 1
    assert "FAILED ours: 2 outputs differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocols", "pause,hope"], "--protocols hope: must be of pause, lockstep, ours"),
        (["--ranks", "3"], "--ranks 3: must be at least 2 and divide the 8 experts"),
        (["--ranks", "1"], "--ranks 1: must be at least 2"),
        (["--interval", "3000"], "--interval 3000: must be at least 2, and at most --steps 2000"),
        (["--trace", "x.json"], "--trace x.json: needs --protocols ours, got pause,lockstep,ours"),
        (["--shape", "qwen4"], "shape 'qwen4'"),
        (["--replay", "-1"], "--replay -1.0: must not be negative"),
        (["--replay", "4", "--graph"], "--replay 4.0: must not be negative, and takes the place of --graph"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        relocation.main([*TINY, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.multigpu
@pytest.mark.timeout(400)
def test_three_protocols_on_gpus(tmp_path):
    """Targets are for the benchmark; here: every output is right, over NCCL, and a step waits for nothing."""
    shape = ["--layers", "4", "--shape", "16:2:256:128", "--tokens", "32", "--device", "cuda", "--ranks", "2"]
    assert relocation.main([*shape, "--steps", "300", "--interval", "100"]) == 0
    path = Path(tmp_path) / "trace.json"
    assert (
        relocation.main([*shape, "--steps", "200", "--interval", "100", "--protocols", "ours", "--trace", str(path)])
        == 0
    )
