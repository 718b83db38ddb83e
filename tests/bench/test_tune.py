from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench import tune
from bench.cases import CASES, Case, Shape
from bench.kernel import Inputs
from bench.providers import make_weights
from bench.report import Report
from bench.timing import Timing
from bench.tune import candidates
from moe_kernels import gemm_configs


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
