import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_kernels.counting import BLOCK, count_block_ranks, count_ranks_torch


def test_reference_example():
    rank, counts, order = count_ranks_torch(torch.tensor([2, 0, 2, 2, 0, -1]), 3)
    assert rank.tolist() == [0, 0, 1, 2, 1, 0]
    assert counts.tolist() == [2, 0, 3, 1]
    assert order.tolist() == [1, 4, 0, 2, 3, 5]


@given(st.lists(st.integers(-2, 4), max_size=30))
def test_reference_is_a_stable_counting_sort(keys):
    rank, counts, order = count_ranks_torch(torch.tensor(keys, dtype=torch.int32), 4)
    bins = [key if 0 <= key < 4 else 4 for key in keys]
    assert order.tolist() == sorted(range(len(keys)), key=lambda element: bins[element])
    assert rank.tolist() == [bins[:element].count(bins[element]) for element in range(len(keys))]
    assert counts.tolist() == [bins.count(key) for key in range(5)]


@pytest.mark.parametrize(
    ("size", "num_keys"),
    [(0, 3), (1, 1), (BLOCK, 5), (BLOCK + 1, 5), (5 * BLOCK - 3, 40), (70 * BLOCK, 2)],  # the last: several scan steps
)
@pytest.mark.parametrize("skewed", [False, True])
def test_kernels_match_reference(device, size, num_keys, skewed):
    keys = torch.randint(-1, num_keys, (size,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    if skewed:
        keys.fill_(num_keys - 1)
    expected_rank, expected_counts, _ = count_ranks_torch(keys, num_keys)
    ranks = count_block_ranks(keys.to(device), num_keys)
    assert torch.equal(ranks.counts_P.cpu().long(), expected_counts)
    bins = torch.where((keys >= 0) & (keys < num_keys), keys, num_keys).long()
    starts = ranks.block_starts_BP.cpu()[torch.arange(size) // BLOCK, bins]
    assert torch.equal((starts + ranks.rank_N.cpu()).long(), expected_rank)
