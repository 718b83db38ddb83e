import argparse
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench import tune, tune_gradients
from bench.cases import CASES, SHAPES, Case, Shape
from bench.kernel import Inputs
from bench.providers import make_weights
from bench.quantised_providers import FORMATS, make_matrices
from bench.report import Report
from bench.timing import Timing
from bench.tune import candidates, quantised_candidates
from moe_kernels import GemmConfig, expert_up, gemm_configs
from moe_kernels.gradients.gradient_configs import _TABLE_32_BIT, _TABLE_HOPPER, _TABLE_TMA


@pytest.mark.parametrize("case", [case for case in CASES if case.num_tokens > 1], ids=lambda case: case.name)
def test_what_is_served_is_among_the_candidates(case: Case) -> None:
    shape = case.shape
    batch = (torch.bfloat16, case.num_tokens, shape.top_k, shape.num_experts)
    up, down = gemm_configs(shape.hidden_size, shape.intermediate_size, *batch, tma=True)
    rows_per_expert = case.num_tokens * shape.top_k / shape.num_experts
    assert replace(up, keep=False) in set(candidates("up", rows_per_expert))
    assert replace(down, keep=False) in set(candidates("down", rows_per_expert))


def test_a_candidate_that_does_not_fit_is_passed_over(monkeypatch, capsys):
    shape = Shape("tiny", 8, 2, 64, 32)
    up, down = (list(candidates(op, 5.0)) for op in ("up", "down"))
    times = iter([None, *range(len(up) + len(down) - 1)])  # that of the first does not

    def time_graph(*_):
        time = next(times)
        if time is None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return Timing(time, time, time, 10)

    monkeypatch.setattr(tune, "time_graph", time_graph)
    weights = make_weights(shape, torch.bfloat16, torch.device("cpu"))
    inputs = Inputs(Case(shape, 20), torch.bfloat16, torch.device("cpu"), lambda: weights)
    with Report(None) as report:
        assert tune.tune(report, inputs.case, inputs, 0.01, best=1)
    assert [row["op"] for row in report.rows] == (len(up) - 1) * ["up"] + len(down) * ["down"]
    out = capsys.readouterr().out
    assert out.count("out of resource: shared memory") == 1 and f"tiny/T20 up {up[0]}" in out


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_tokens", [2, 16, 64, 256, 1024, 16384])
def test_what_is_served_of_quantised_experts_is_among_the_candidates(name: str, num_tokens: int) -> None:
    for shape in (SHAPES["qwen3"], SHAPES["dsv3"]):
        batch, scheme = (torch.bfloat16, num_tokens, shape.top_k, shape.num_experts), FORMATS[name].scheme
        configs = gemm_configs(shape.hidden_size, shape.intermediate_size, *batch, tma=True, scheme=scheme)
        rows_per_expert = num_tokens * shape.top_k / shape.num_experts
        for op, config in zip(("up", "down"), configs, strict=True):
            assert config in set(quantised_candidates(op, rows_per_expert, scheme)), (shape.name, op)


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_quantised_candidates_are_compared(monkeypatch, capsys, name):
    """Two for each op, on a CPU; one whose result is another is told."""
    shape, form, device = Shape("tiny", 4, 2, 128, 128), FORMATS[name], torch.device("cpu")
    matrices, _ = make_matrices(shape, form, device)
    inputs = Inputs(Case(shape, 6), torch.bfloat16, device, pytest.fail, matrices)
    candidates = [config for config in quantised_candidates("up", 3, form.scheme) if not config.tma][:2]
    monkeypatch.setattr(tune, "time_graph", lambda *_: Timing(3.0, 2.0, 4.0, 10))
    monkeypatch.setattr(
        tune,
        "quantised_candidates",
        lambda op, *_: candidates if op == "up" else [replace(config, block_n=64) for config in candidates],
    )
    with Report(None) as report:
        assert tune.tune(report, inputs.case, inputs, 0.01, best=1, worst_error=form.worst_error)
    assert [(row["op"], row["equal_bits"]) for row in report.rows] == 2 * [("up", True)] + 2 * [("down", True)]
    calls = []

    def other(*arguments, **options):
        rows = expert_up(*arguments, **options)
        calls.append(rows)
        if len(calls) > 1:
            values = rows.values_RH.view(torch.uint8) if name == "fp8" else rows
            values[0, 0] += 1
        return rows

    monkeypatch.setattr(tune, "expert_up", other)
    with Report(None) as report:
        assert not tune.tune(report, inputs.case, inputs, 0.01, best=1, worst_error=form.worst_error)
    assert [row["equal_bits"] for row in report.rows] == [True, False, True, True]
    capsys.readouterr()


def test_gradients_what_is_served_is_among_the_candidates():
    for table, dtype in ((_TABLE_HOPPER, torch.bfloat16), (_TABLE_TMA, torch.bfloat16), (_TABLE_32_BIT, torch.float32)):
        for _, configs in table:
            for op in tune_gradients.OPS:
                assert getattr(configs, op) in set(tune_gradients.candidates(op, dtype)), (op, configs)


def test_gradients_of_candidates_are_compared(monkeypatch, tmp_path, capsys, device):
    """Two that agree; and one that does not fit is passed over."""
    tiles = [GemmConfig(16, 32, 16, 4, 2), GemmConfig(32, 64, 32, 4, 2), GemmConfig(16, 64, 16, 4, 2)]
    times = iter(3 * [30.0, 20.0, None])

    def time_graph(*_):
        time = next(times)
        if time is None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return Timing(time, time, time, 10)

    monkeypatch.setattr(tune_gradients, "time_graph", time_graph)
    monkeypatch.setattr(tune_gradients, "candidates", lambda op, dtype: tiles)
    shape = Shape("tiny", 4, 2, 48, 40)
    weights = make_weights(shape, torch.float32, torch.device(device))
    case = Case(shape, 20)
    inputs = Inputs(case, torch.float32, torch.device(device), lambda: weights)
    options = argparse.Namespace(ops=tune_gradients.OPS, seconds=0.01, best=1)
    with Report(tmp_path / "out.csv") as report:
        backward = tune_gradients.Backward(inputs, case)
        assert tune_gradients.tune(report, case, backward, torch.float32, options) == []
        rows = report.rows
    assert [(row["op"], row["config"]) for row in rows] == [
        (op, config) for op in tune_gradients.OPS for config in ("16 32 16 4 2 8 0 0 0", "32 64 32 4 2 8 0 0 0")
    ]
    assert all(row["rel_err"] < 1e-6 and row["tflops"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert out.count("shared memory") == 3 and out.count("20.0 µs") == 3
