import pytest
import torch

from moe_kernels import record_load_
from moe_kernels.load import _record_load


def one(device, value=1):
    return torch.tensor([value], dtype=torch.int64, device=device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_example(device, backend):
    load = torch.full((3,), 5, dtype=torch.int64, device=device)
    ids = torch.tensor([[2, 0], [2, -1]], dtype=torch.int32, device=device)
    record_load_(load, ids, one(device), backend=backend)
    assert load.tolist() == [6, 5, 7]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("tokens", "experts", "low"),
    [(0, 4, 0), (1, 1, 0), (300, 5, -1), (300, 1, 0), (7, 257, -1)],  # empty, single, several blocks, one takes all
)
def test_counts(device, backend, tokens, experts, low):
    ids = torch.randint(low, experts, (tokens, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    load = torch.full((experts,), 2**40, dtype=torch.int64, device=device)  # beyond int32
    record_load_(load, ids.to(device), one(device, 3), backend=backend)
    counts = torch.bincount(ids[ids >= 0], minlength=experts)
    assert torch.equal(load.cpu(), 2**40 + 3 * counts)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_increment_zero_and_ids_of_no_expert_count_nothing(device, backend):
    load = torch.zeros(2, dtype=torch.int64, device=device)
    ids = torch.tensor([[0, 1, 2, -7]], dtype=torch.int32, device=device)
    record_load_(load, ids, one(device, 0), backend=backend)
    assert load.tolist() == [0, 0]
    record_load_(load, ids, one(device), backend=backend)
    assert load.tolist() == [1, 1]


def test_opcheck(device):
    ids = torch.tensor([[1, 0], [1, -1]], dtype=torch.int32, device=device)
    torch.library.opcheck(_record_load, (torch.zeros(2, dtype=torch.int64, device=device), ids, one(device), "torch"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("load_E", {"load_E": torch.zeros(4)}),
        ("expert_ids_TK", {"expert_ids_TK": torch.zeros((2, 2), dtype=torch.int64)}),
        ("increment_1", {"increment_1": torch.ones(2, dtype=torch.int64)}),
    ],
)
def test_refused(name, change):
    good = {
        "load_E": torch.zeros(4, dtype=torch.int64),
        "expert_ids_TK": torch.zeros((2, 2), dtype=torch.int32),
        "increment_1": one("cpu"),
    }
    with pytest.raises(ValueError, match=name):
        record_load_(**(good | change))
