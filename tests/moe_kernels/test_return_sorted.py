"""Rows in sorted order and a number each go home to two ranks, of which the other has said all beforehand."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.peers.peers import ARRIVED, HOMEWARD, NO_RANK, PeerArea, PeerLayout, exchange_word
from moe_kernels.peers.return_sorted import return_sorted

TOP_K, BOUND, LANES = 2, 5, 3
TOLD = exchange_word(HOMEWARD, 7)


def areas(hidden_size: int, dtype: torch.dtype, device: str, told: int = TOLD) -> list[PeerArea]:
    """Of rank 1, whose flags and words are in rank 0's buffer, and nobody else's."""
    layout = PeerLayout(2, LANES, 4, BOUND + 1, TOP_K, hidden_size, dtype)
    buffers = [torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
    found = [PeerArea(addresses, buffer, rank, layout, timeout=0.2) for rank, buffer in enumerate(buffers)]
    found[0].part("flags", torch.int64, 3, 2)[ARRIVED.value, 1] = 9
    found[0].part("counts", torch.int32, 2, LANES + 2)[1, LANES + 1] = told
    return found


@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "dtype", "has_scalars"),
    [
        (0, 24, torch.float32, True),
        (7, 24, torch.float32, False),
        (13, 1100, torch.bfloat16, True),  # several blocks of columns, of which the last is not full
    ],
)
def test_rows_and_numbers(num_rows, hidden_size, dtype, has_scalars, device):
    own, other = areas(hidden_size, dtype, device)
    random = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, hidden_size, generator=random).to(device, dtype)
    scalars = torch.rand(num_rows, generator=random).to(device) + 1 if has_scalars else None
    order = torch.randperm(2 * BOUND * TOP_K, generator=random)[:num_rows].int()
    return_sorted(rows, scalars, order.to(device), own, BOUND, LANES, TOLD)
    wanted = torch.zeros(2 * BOUND * TOP_K, hidden_size, dtype=dtype, device=device)
    wanted[order.long()] = rows
    came = [area.part("results", dtype, BOUND * TOP_K, hidden_size) for area in (own, other)]
    assert torch.equal(torch.cat(came), wanted)
    numbers = torch.zeros(2 * BOUND * TOP_K, device=device)
    if scalars is not None:
        numbers[order.long()] = scalars
    assert torch.equal(
        torch.cat([area.part("scalars", torch.float32, BOUND * TOP_K) for area in (own, other)]), numbers
    )
    # The ranks have been told that this one is here, and which exchange it is; of the rows `combine_home` tells them.
    flags = other.part("flags", torch.int64, 3, 2)
    assert flags.tolist() == [[1, 0], [0, 0], [0, 0]]
    assert other.part("counts", torch.int32, 2, LANES + 2)[0, LANES + 1] == TOLD
    assert own.state.tolist() == [1, 0, 0] and own.failure() is None


def test_ranks_in_different_exchanges(device):
    own, _ = areas(24, torch.float32, device, told=TOLD + 1)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    return_sorted(torch.empty(0, 24, device=device), None, empty, own, BOUND, LANES, TOLD)
    if device == "cuda":
        torch.cuda.synchronize()
    assert own.failure() == NO_RANK


def test_a_rank_that_does_not_come(device):
    """Named, though its last word was another one."""
    own, _ = areas(24, torch.float32, device, told=TOLD + 1)
    own.part("flags", torch.int64, 3, 2).zero_()
    empty = torch.empty(0, dtype=torch.int32, device=device)
    return_sorted(torch.empty(0, 24, device=device), None, empty, own, BOUND, LANES, TOLD)
    if device == "cuda":
        torch.cuda.synchronize()
    assert own.failure() == 1
