import pytest
import torch

from bench.cases import CASES, Case
from bench.tune import candidates
from moe_kernels import gemm_configs


@pytest.mark.parametrize("case", [case for case in CASES if case.num_tokens > 1], ids=lambda case: case.name)
def test_what_is_served_is_among_the_candidates(case: Case) -> None:
    shape = case.shape
    batch = (torch.bfloat16, case.num_tokens, shape.top_k, shape.num_experts)
    up, down = gemm_configs(shape.hidden_size, shape.intermediate_size, *batch, tma=True)
    rows_per_expert = case.num_tokens * shape.top_k / shape.num_experts
    assert up in set(candidates("up", rows_per_expert))
    assert down in set(candidates("down", rows_per_expert))
