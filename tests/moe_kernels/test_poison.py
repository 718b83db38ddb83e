"""The tests' own safety net."""

import torch

from moe_kernels import ExpertMatrices, build_schedule, expert_down, gemm_config
from tests.moe_kernels.conftest import counts_of


def test_new_memory_is_poisoned(device):
    assert torch.empty(5, device=device).isnan().all()
    assert torch.zeros(1, device=device).new_empty(5).isnan().all()
    assert (torch.empty(5, dtype=torch.int32, device=device) == torch.iinfo(torch.int32).max).all()


def test_rows_that_are_not_computed_stay_poisoned(device):
    """So a later op that read them would be caught."""
    config = gemm_config(16, 16, torch.float32, 1, 1, 1)
    lanes = torch.tensor([0, -1], dtype=torch.int32, device=device)
    schedule = build_schedule(lanes, counts_of(lanes, 1), block_m=config.block_m, backend="triton")
    slot, ones = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(2, device=device)
    hidden = torch.ones((2, 16), device=device)
    weights = ExpertMatrices(torch.ones((1, 32, 16), device=device), torch.ones((1, 16, 16), device=device))
    rows = expert_down(hidden, weights, slot, schedule, ones, config=config, backend="triton")
    assert (rows[0] == 16).all() and rows[1].isnan().all()
