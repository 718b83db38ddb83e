"""What travels in one collective: bytes and back."""

import pytest
import torch

from moe_layer.dispatch.packed import pack_rows, pack_tokens, token_bytes, unpack_rows, unpack_tokens


@pytest.fixture(params=[0, 1, 255], ids="memory of {}".format)
def old_memory(request, monkeypatch):
    """New memory holds these bytes. (255 alone would not do: as an int32 it is -1, a lane's "none".)"""
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda tensor, *size, **options: tensor.new_full(*size, request.param, **options)
    )


@pytest.mark.parametrize("num_rows", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden_size", "top_k"), [(5, 1), (8, 2), (6, 9)])
def test_tokens_of_two_ranks(hidden_size, top_k, dtype, num_rows, old_memory, device):
    x = torch.randn(3, hidden_size, device=device).to(dtype)
    weights = torch.rand(3, top_k, device=device)
    lanes = torch.arange(3 * top_k, dtype=torch.int32, device=device).view(3, top_k) - 1
    packed = [
        pack_tokens(x, weights, lanes, num_rows, needs_grad=True),
        pack_tokens(x[:1], weights[:1], lanes[:1], num_rows, needs_grad=False),
    ]
    assert packed[0].shape == (num_rows, token_bytes(hidden_size, dtype.itemsize, top_k))
    came = unpack_tokens(torch.cat(packed), hidden_size, dtype, top_k)
    for first, count in ((0, 3), (num_rows, 1)):
        assert torch.equal(came.rows_RH[first : first + count], x[:count])
        assert torch.equal(came.weights_RK[first : first + count], weights[:count])
        assert torch.equal(came.lanes_RK[first : first + count], lanes[:count])
        assert (came.lanes_RK[first + count : first + num_rows] == -1).all(), "padding has lanes"
    assert came.needs_grad_R.tolist() == [1] * num_rows + [0] * num_rows
    assert came.rows_RH.stride(0) * dtype.itemsize % 16 == 0, "rows begin at multiples of 16 bytes"


def test_bytes_of_a_token_by_hand():
    """5 bfloat16 are 10 bytes → 16; one weight, one lane and a flag 12 → 16. Four choices are 4 · 9 = 36 bytes → 48."""
    assert token_bytes(5, 2, 1) == 32
    assert token_bytes(64, 4, 4) == 256 + 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows(dtype, old_memory, device):
    rows, weights = torch.randn(4, 7, device=device).to(dtype), torch.rand(4, device=device)
    back, weights_back = unpack_rows(pack_rows(rows, weights), 7, dtype)
    assert torch.equal(back, rows) and torch.equal(weights_back, weights) and weights_back.is_contiguous()
    assert unpack_rows(pack_rows(rows[:0], weights[:0]), 7, dtype)[0].shape == (0, 7)
