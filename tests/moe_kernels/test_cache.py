import pytest
import torch

from moe_kernels.cache import policy_of_output, policy_of_weights


@pytest.mark.parametrize(
    ("rows", "policy"),
    [(0, "evict_last"), (1, "evict_last"), (8192, "evict_last"), (8193, ""), (12288, ""), (100_000, "")],
)
def test_outputs_are_kept_up_to_a_size_that_changes_at_powers_of_two(rows, policy):
    assert policy_of_output(torch.empty(rows, 1536, dtype=torch.bfloat16, device="meta")) == policy


def test_many_weights_do_not_stream():
    assert policy_of_weights(75_000_000) == "evict_first"
    assert policy_of_weights(700_000_000) == ""
