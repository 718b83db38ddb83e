import pytest
import torch

from moe_kernels import combine, combine_torch
from moe_kernels.gemms.combine import _combine


def case(tokens, top_k, hidden_size, device, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    lanes = torch.randint(-1, 3, (tokens, top_k), generator=random, dtype=torch.int32)
    rows = torch.randn((tokens * top_k, hidden_size), generator=random).to(dtype)
    rows[lanes.flatten() < 0] = float("nan")  # a skipped row is never read
    return rows.to(device), lanes.to(device)


@pytest.mark.parametrize(
    ("tokens", "top_k", "hidden_size"),
    [(0, 2, 8), (3, 1, 1), (4, 3, 65), (2, 8, 1030)],  # none; K = 1; odd; more than one block of columns
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_reference_bit_for_bit(device, tokens, top_k, hidden_size, dtype):
    rows, lanes = case(tokens, top_k, hidden_size, device, dtype)
    y = combine(rows, lanes, backend="triton")
    assert y.dtype == dtype
    assert torch.equal(y, combine_torch(rows, lanes))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sum_is_in_float32_rounded_once(device, backend):
    """In float16, 2048 + 1 + 1 would stay 2048 if each step were rounded."""
    rows = torch.tensor([[2048.0], [1.0], [1.0]], dtype=torch.float16, device=device)
    assert combine(rows, torch.zeros((1, 3), dtype=torch.int32, device=device), backend=backend).item() == 2050


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sum_has_the_order_of_k(device, backend):
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1.0]], device=device)
    lanes = torch.zeros((1, 4), dtype=torch.int32, device=device)
    assert combine(rows, lanes, backend=backend).item() == 1.0  # (1e8 + 1) loses the 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient(device, backend):
    rows, lanes = case(4, 3, 17, device)
    rows.requires_grad_()
    upstream = torch.randn((4, 17), generator=torch.Generator().manual_seed(1)).to(device)
    combine(rows, lanes, backend=backend).backward(upstream)
    expected = upstream.repeat_interleave(3, 0) * (lanes.flatten() >= 0)[:, None]
    assert torch.equal(rows.grad, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(device, backend):
    rows, lanes = case(4, 3, 9, device)
    torch.library.opcheck(_combine.registered, (rows.nan_to_num().requires_grad_(), lanes, backend))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows_NH", {"rows_NH": torch.zeros((5, 3))}),
        ("rows_NH", {"rows_NH": torch.zeros((3, 4)).T}),
        ("rows_NH", {"rows_NH": torch.zeros((4, 3), dtype=torch.float64)}),
        ("lanes_TK", {"lanes_TK": torch.zeros((2, 2))}),
    ],
)
def test_refused(name, change):
    good = {"rows_NH": torch.zeros((4, 3)), "lanes_TK": torch.zeros((2, 2), dtype=torch.int32)}
    with pytest.raises(ValueError, match=name):
        combine(**(good | change))
