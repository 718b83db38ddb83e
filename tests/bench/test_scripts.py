"""The scripts from end to end, on tiny shapes."""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench import (
    moe_forward,
    providers,
    skew,
    skew_simulated,
    step_cost,
    table_cost,
    table_flip,
    training,
    training_providers,
)
from bench.environment import environment
from bench.timing import Timing

TINY = ["--shapes", "8:2:64:32", "--tokens", "1,20", "--seconds", "0.01", "--device", "cpu"]
OPS = ("routing", "select_replicas", "schedule", "expert_up", "expert_down", "combine")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Wrong:
    name = "wrong"

    def __init__(self, output):
        self.output = output

    def prepare(self, problem):
        if self.output is None:
            raise providers.Unavailable("not on a Tuesday")
        return lambda: torch.full_like(problem.x_TH, self.output)


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", dict(providers.PROVIDERS))
    return providers.register


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_moe_forward(tmp_path, capsys, dtype):
    path, picture = tmp_path / "out.csv", tmp_path / "out.png"
    arguments = [*TINY, "--dtype", dtype, "--providers", "moe_layer,torch_grouped_mm", "--csv", str(path)]
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    assert moe_forward.main([*arguments, *plot]) == 0
    rows = rows_of(path)
    assert [(row["case"], row["provider"], row["mode"]) for row in rows] == [
        (f"8:2:64:32/T{tokens}", provider, mode)
        for tokens in (1, 20)
        for provider in ("moe_layer", "torch_grouped_mm")
        for mode in ("eager", "back_to_back")
    ]
    for row in rows:
        assert float(row["rel_err"]) < (1e-2 if dtype == "bf16" else 1e-5)
        assert float(row["median_us"]) > 0 and float(row["floor_us"]) > 0
        assert row["dtype"] == dtype and {*environment(), "ceiling_tflops", "ceiling_tb_per_s"} <= set(row)
    assert picture.exists() == bool(plot)
    out = capsys.readouterr().out
    assert "8:2:64:32/T20" in out and "geometric mean" in out


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_training(tmp_path, capsys, monkeypatch, dtype):
    def time_eager(function, device, seconds):  # of so short a while, times on a busy machine say nothing
        made = function()
        forward_us, both_us = 1000.0, 3000.0
        return None, forward_us if isinstance(made, torch.Tensor) else both_us

    monkeypatch.setattr(training, "time_eager", time_eager)
    path = tmp_path / "out.csv"
    arguments = ["--shapes", "8:2:64:32", "--tokens", "20", "--seconds", "0.01", "--device", "cpu", "--dtype", dtype]
    providers = ["moe_layer", "torch_grouped_mm"]
    if importlib.util.find_spec("transformers"):
        providers.append("transformers_grouped_mm")
    assert training.main([*arguments, "--providers", ",".join(providers), "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert [(row["case"], row["provider"], row["mode"]) for row in rows] == [
        ("8:2:64:32/T20", provider, "back_to_back") for provider in providers
    ]
    columns = ["case", "provider", "fwd_bwd_ms", "fwd_ms", "peak_extra_gib", "floor_ms"]
    assert list(rows[0])[: len(columns)] == columns
    for row in rows:
        assert float(row["rel_err"]) < (training.WORST_ERROR if dtype == "bf16" else 1e-5)
        assert float(row["fwd_bwd_ms"]) > float(row["fwd_ms"]) > 0 and float(row["floor_ms"]) > 0
        assert row["peak_extra_gib"] == "" and row["dtype"] == dtype
    assert "× floor" in capsys.readouterr().out


def test_training_has_two_cases_of_each_shape():
    cases = [f"{shape}/T{tokens}" for shape in training.SHAPES for tokens in training.TOKENS]
    assert len(cases) == 10 and {"qwen3/T4096", "olmoe/T16384", "gptoss/T4096", "dsv3/T16384", "mixtral/T4096"} < set(
        cases
    )


def test_a_wrong_gradient_fails_the_run(monkeypatch, capsys):
    class Wrong(training_providers._TorchGroupedMM):
        name = "wrong"

        def _made_fast(self, forward):
            return lambda x, *leaves: forward(x, *leaves) + 0.1 * x

    monkeypatch.setattr(training_providers, "PROVIDERS", dict(training_providers.PROVIDERS))
    monkeypatch.setattr(training, "PROVIDERS", training_providers.PROVIDERS)
    training_providers.register(Wrong())
    arguments = ["--shapes", "8:2:64:32", "--tokens", "20", "--seconds", "0.01", "--device", "cpu", "--dtype", "fp32"]
    assert training.main([*arguments, "--providers", "wrong"]) == 1
    assert "FAILED wrong, 8:2:64:32/T20: errors against float32: x" in capsys.readouterr().err
    with pytest.raises(ValueError, match="registered already"):
        training_providers.register(Wrong())


@pytest.mark.parametrize("output", [0.0, float("nan")])
def test_a_wrong_output_fails_the_run_after_the_table(register, tmp_path, capsys, output):
    register(Wrong(output))
    path = tmp_path / "out.csv"
    assert moe_forward.main([*TINY, "--providers", "wrong,torch_grouped_mm", "--csv", str(path)]) == 1
    said = capsys.readouterr()
    assert "FAILED wrong, 8:2:64:32/T20" in said.err and "geometric mean" in said.out
    assert {row["provider"] for row in rows_of(path)} == {"wrong", "torch_grouped_mm"}


def test_who_is_skipped_is_said(register, capsys):
    register(Wrong(None))
    assert moe_forward.main([*TINY, "--providers", "torch_grouped_mm,wrong"]) == 0
    assert "skipped wrong, 8:2:64:32/T1: not on a Tuesday" in capsys.readouterr().out


@pytest.mark.parametrize(("flush", "mode"), [("write", "graph"), ("read", "graph_read_flush")])
def test_graphs_of_a_case_take_turns(monkeypatch, flush, mode):
    """One call times all of them. With a reading flush they have a mode of their own, which `bench.table` leaves out."""
    monkeypatch.setattr(moe_forward, "time_captured", lambda graphs, *_: [Timing(1.0, 1.0, 1.0, 9) for _ in graphs])
    options = argparse.Namespace(device=torch.device("cuda"), seconds=0.1, flush=flush, eager=False)
    forwards = {"a": lambda: torch.zeros(1), "b": lambda: torch.zeros(1)}
    times = moe_forward.measured_times(forwards, dict.fromkeys(forwards), options)
    assert times == {"a": {mode: (1.0, 1.0, 1.0)}, "b": {mode: (1.0, 1.0, 1.0)}}


def test_bad_arguments(capsys):
    for arguments, message in (
        (["--shapes", "qwen4"], "qwen4"),
        (["--providers", "nobody"], "nobody"),
        (["--tokens", "16,0"], "tokens 0: must be at least 1"),
        (["--device", "cuda:99"], "argument --device: cuda:99: "),
        (["--against", "docs"], "--against docs: must be a checkout of this project, has no moe_layer"),
    ):
        with pytest.raises(SystemExit) as refusal:
            moe_forward.main(arguments)
        assert refusal.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("op", OPS)
def test_kernels(op, tmp_path):
    script = importlib.import_module(f"bench.{op}")
    path = tmp_path / "out.csv"
    assert script.main(op, script.__doc__, script.make_work, [*TINY, "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert {row["case"] for row in rows} == {"8:2:64:32/T1", "8:2:64:32/T20"}
    assert len({row["provider"] for row in rows}) >= 2
    # On a CPU the op is its own reference (tests/moe_kernels compares them); what is seen here is that peers do the same.
    assert all(float(row["rel_err"]) < 1e-2 for row in rows if row["rel_err"])


def test_a_wrong_kernel_fails_the_run(capsys):
    from bench.kernel import Work, main

    work = Work(runs={"op": lambda: torch.tensor([1, 2])}, expected=lambda: torch.tensor([1, 3]), num_bytes=16)
    assert main("op", "", lambda inputs: work, TINY) == 1
    assert "FAILED op, 8:2:64:32/T1" in capsys.readouterr().err


@pytest.mark.parametrize(("failing", "status"), [("op", 1), ("peer", 0)])
def test_a_kernel_that_fails_does_not_end_the_run(tmp_path, capsys, failing, status):
    """A peer is skipped, the op has failed; what is not an error of PyTorch's counts alike."""
    from bench.kernel import Work, main

    def fail():
        raise OutOfResources(2, 1, "shared memory")

    runs = {"op": lambda: torch.tensor([1]), "peer": lambda: torch.tensor([1])} | {failing: fail}
    work = Work(runs=runs, expected=lambda: torch.tensor([1]), num_bytes=16)
    path = tmp_path / "out.csv"
    assert main("op", "", lambda inputs: work, [*TINY, "--csv", str(path)]) == status
    said = (
        f"{'FAILED' if status else 'skipped'} {failing}, 8:2:64:32/T20: OutOfResources: out of resource: shared memory"
    )
    assert said in capsys.readouterr().out
    assert [row["provider"] for row in rows_of(path)] == 2 * [name for name in runs if name != failing]


def test_table_cost(tmp_path, capsys):
    path = tmp_path / "out.csv"
    assert table_cost.main([*TINY, "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert [row["provider"] for row in rows[:5]] == [
        "hard-wired, counts given",
        "hard-wired, counted",
        "table",
        "hard-wired, lanes given",
        "table with replicas",
    ]
    assert {row["bits_equal"] for row in rows} == {"True"}
    assert "geometric mean" in capsys.readouterr().out


def test_table_cost_fails_if_bits_differ(monkeypatch, capsys):
    monkeypatch.setattr(table_cost.MoELayer, "forward", lambda self, x, **_: torch.zeros_like(x))
    assert table_cost.main(TINY) == 1
    assert "other bits" in capsys.readouterr().err


def test_step_cost(tmp_path, capsys):
    path = tmp_path / "out.csv"
    arguments = ["--layers", "2", "--experts", "4", "--repeats", "40", "--device", "cpu", "--csv", str(path)]
    assert step_cost.main(arguments) == 0
    rows = rows_of(path)
    assert [(row["step"], row["layers"], row["experts"]) for row in rows] == [
        (kind, "2", "4") for kind in ("quiet", "snapshot", "flip")
    ]
    assert all(float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"]) for row in rows)
    assert "of 28)" in capsys.readouterr().out  # quiet steps: 7 of 10


def test_step_cost_against_another_checkout(monkeypatch, capsys):
    """The median of the rounds' ratios; the sides take turns at being first."""
    times, visited = {"new": iter([2.0, 3.0, 8.0]), "old": iter([4.0, 2.0, 4.0])}, []

    def medians(root, options):
        side = "new" if root == step_cost.ROOT else "old"
        visited.append(side)
        return {"quiet": next(times[side])}

    monkeypatch.setattr(step_cost, "_medians", medians)
    assert step_cost.main(["--against", "elsewhere", "--rounds", "3", "--device", "cpu"]) == 0
    assert visited == ["new", "old", "old", "new", "new", "old"]
    assert "new / old 1.500 (0.500 to 2.000 in 3 rounds)" in capsys.readouterr().out


def test_table_flip(tmp_path):
    path = tmp_path / "out.csv"
    arguments = ["--layers", "1,3", "--experts", "8", "--redundant", "2", "--ranks", "2", "--repeats", "20"]
    assert table_flip.main([*arguments, "--device", "cpu", "--csv", str(path)]) == 0
    assert [(row["layers"], row["mode"], row["bytes"]) for row in rows_of(path)] == [
        ("1", "host", "116"),
        ("3", "host", "348"),
    ]


def test_skew_simulated(tmp_path):
    """Shares by batch are no worse than the window's, and no better than the optimum."""
    path = tmp_path / "out.csv"
    arguments = ["--experts", "32", "--layers", "1", "--batches", "2", "--ranks", "4", "--csv", str(path)]
    assert skew_simulated.main(arguments) == 0
    rows = rows_of(path)
    assert len(rows) == 6
    for row in rows:
        least, batch, window = (float(row[name]) for name in ("least", "batch", "window"))
        assert 1 <= least <= batch + 1e-4
        assert batch <= window + 1e-4


@pytest.mark.timeout(240)
def test_skew(tmp_path):
    """Two ranks; the ways choose the same experts, so the batch's shares are the most even."""
    path = tmp_path / "out.csv"
    sizes = ["--ranks", "2", "--layers", "1", "--experts", "16", "--steps", "60", "--interval", "10"]
    assert skew.main(["--device", "cpu", *sizes, "--csv", str(path)]) == 0
    rows = {row["way"]: row for row in rows_of(path)}
    assert list(rows) == ["even", "none", "static", "window", "batch"]
    assert float(rows["batch"]["max_over_mean"]) < float(rows["window"]["max_over_mean"])
    assert all(float(row["step_ms"]) > 0 for row in rows.values())
