import pytest
import torch
import triton
import triton.language as tl

from moe_kernels.base.scan import (
    MANY_KEYS,
    chunk_options,
    count_chunks,
    count_hits,
    first_index,
    load_bins,
    load_chunk,
    num_steps,
    rank_hits,
    rank_in_bins,
    row_ends,
    scan_options,
    sort_chunk,
    start_chunks,
)


@triton.jit(do_not_specialize=["num_keys"])  # as the ops
def _bins_kernel(keys_ptr, index_ptr, bins_ptr, step, num_keys, num_bins, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    first = first_index(num_keys, BLOCK, ROWS)
    index = first + step * (BLOCK // ROWS)
    part, row = tl.arange(0, first.shape[2])[None, None, :, None], tl.arange(0, ROWS)[None, :, None, None]
    place = (row * first.shape[2] + part) * (4 * first.shape[0]) + first % (4 * first.shape[0])
    tl.store(index_ptr + place, index)
    tl.store(bins_ptr + place, load_bins(keys_ptr, first, step, num_keys, num_bins, BLOCK, ROWS))


@pytest.mark.parametrize(
    ("step", "num_keys", "index", "bins"),
    [
        (0, 24, [*range(8), *range(16, 24)], [1, 0, 2, 3, 3, 2, 3, 0] + [1] * 8),  # what is no bin is in the last
        (1, 24, [*range(8, 16), *range(24, 32)], [1] * 8 + [3] * 8),  # so is what is past the end
        (0, 23, [*range(8), *range(16, 24)], [1, 0, 2, 3, 3, 2, 3, 0] + [1] * 7 + [3]),  # amid 4 keys
        (0, 6, range(16), [1, 0, 2, 3, 3, 2] + [3] * 10),
        (0, 0, range(16), [3] * 16),
    ],
)
def test_bins(device, step, num_keys, index, bins):
    keys = torch.tensor([1, 0, 2, 3, -1, 2, -7, 0] + [1] * 24, dtype=torch.int32, device=device)
    got = torch.empty((2, 16), dtype=torch.int32, device=device)
    _bins_kernel[(1,)](keys, got[0], got[1], step, num_keys, 3, BLOCK=16, ROWS=2)
    assert got.tolist() == [list(index), bins]


@triton.jit(do_not_specialize=["num_keys"])  # as the ops
def _ranks_kernel(keys_ptr, ranks_ptr, start, num_keys, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The ranks of those in bin 0, from `start` on, which the ops take in the same way."""
    index = first_index(num_keys, BLOCK, ROWS)
    steps = num_steps(num_keys, BLOCK)
    hits = count_hits(load_bins(keys_ptr, index, 0, num_keys, 1, BLOCK, ROWS) == 0)
    for step in range(1, steps):
        hits += count_hits(load_bins(keys_ptr, index, step, num_keys, 1, BLOCK, ROWS) == 0)
    ends = row_ends(hits, start)
    for back in range(steps):
        step = steps - 1 - back
        mine = load_bins(keys_ptr, index, step, num_keys, 1, BLOCK, ROWS) == 0
        rank, ends = rank_hits(mine, ends)
        tl.store(ranks_ptr + index + step * (BLOCK // ROWS), rank, mask=mine)


@pytest.mark.parametrize(("block", "rows"), [(16, 2), (512, 4), (2048, 4)])  # the last has 4 parts
@pytest.mark.parametrize("fraction", [0.1, 1])  # all hit: as many as a byte must hold
def test_ranks(device, block, rows, fraction):
    for num_keys in (1, block - 1, block, 3 * block + 6):
        mine = torch.rand(num_keys, generator=torch.Generator().manual_seed(0)) < fraction
        ranks = torch.full((num_keys,), -1, dtype=torch.int32, device=device)
        _ranks_kernel[(1,)](torch.where(mine, 0, 5).int().to(device), ranks, 7, num_keys, BLOCK=block, ROWS=rows)
        assert torch.equal(ranks.cpu(), torch.where(mine, mine.cumsum(0) + 6, -1).int())


@pytest.mark.parametrize(
    ("num_keys", "block", "warps"),
    [(0, 512, 4), (512, 512, 4), (513, 2048, 4), (2049, 8192, 16), (MANY_KEYS - 1, 8192, 16), (MANY_KEYS, 2048, 8)],
)
def test_options(num_keys, block, warps):
    assert scan_options(num_keys) == {"BLOCK": block, "ROWS": warps, "num_warps": warps}


def test_example_of_chunks(small_chunks, device):
    """The kernel's docstring."""
    assert count_chunks(torch.tensor([1, 0, -1, 1], dtype=torch.int32, device=device), 2).tolist() == [[1], [2], [13]]


def test_only_many_keys_are_cut_into_chunks(device):
    keys = torch.zeros(MANY_KEYS, dtype=torch.int32, device=device)
    assert count_chunks(keys[1:], 1) is None
    assert count_chunks(keys, 1).sum(1).tolist() == [MANY_KEYS, 0]


@triton.jit
def _start_chunks_kernel(counts_ptr, totals_ptr, num_chunks, BLOCK: tl.constexpr):
    bin = tl.program_id(0)
    tl.store(totals_ptr + bin, start_chunks(counts_ptr, bin, num_chunks, BLOCK))


@triton.jit
def _chunk_ranks_kernel(keys_ptr, starts_ptr, ranks_ptr, num_keys, num_bins, CHUNK: tl.constexpr):
    index, bins = load_chunk(keys_ptr, tl.program_id(0), num_keys, num_bins, CHUNK)
    tl.store(ranks_ptr + index, rank_in_bins(bins, starts_ptr, CHUNK), mask=index < num_keys)


@pytest.mark.parametrize("num_keys", [1, 15, 16, 17, 700])  # the last has more chunks than one block
@pytest.mark.parametrize("num_bins", [1, 3, 9])
@pytest.mark.parametrize("hot", [0, 0.9, 1])  # how many are in the last bin, the one of those outside
def test_ranks_in_chunks(small_chunks, device, num_keys, num_bins, hot):
    random = torch.Generator().manual_seed(0)
    keys = torch.randint(0, num_bins, (num_keys,), generator=random, dtype=torch.int32)
    keys[torch.rand(num_keys, generator=random) < hot] = -1
    hits = torch.where(keys < 0, num_bins, keys) == torch.arange(num_bins + 1)[:, None]
    counts = count_chunks(keys.to(device), num_bins)
    totals, ranks = counts.new_empty(num_bins + 1), counts.new_empty(num_keys)
    _start_chunks_kernel[(num_bins + 1,)](counts, totals, counts.shape[1], BLOCK=32)
    _chunk_ranks_kernel[(counts.shape[1],)](keys.to(device), counts, ranks, num_keys, num_bins, **chunk_options())
    assert totals[:-1].tolist() == hits.sum(1)[:-1].tolist()
    assert ranks.tolist() == ((hits.cumsum(1) - 1) * hits).sum(0).tolist()


@triton.jit
def _sort_chunk_kernel(keys_ptr, out_ptr, num_keys, num_bins, CHUNK: tl.constexpr):
    _, bins = load_chunk(keys_ptr, tl.program_id(0), num_keys, num_bins, CHUNK)
    bins, place, rank = sort_chunk(bins, CHUNK)
    at = out_ptr + tl.arange(0, CHUNK)
    tl.store(at, bins)
    tl.store(at + CHUNK, place)
    tl.store(at + 2 * CHUNK, rank)


def sorted_chunk(keys, num_bins, chunk, device):
    out = torch.empty(3, chunk, dtype=torch.int32, device=device)
    keys = torch.tensor(keys, dtype=torch.int32, device=device)
    _sort_chunk_kernel[(1,)](keys, out, keys.numel(), num_bins, CHUNK=chunk)
    return out.cpu()


def test_example_of_a_sorted_chunk(device):
    assert sorted_chunk([2, 0, 2, 2], 3, 4, device).tolist() == [[0, 2, 2, 2], [1, 0, 2, 3], [0, 0, 1, 2]]


@pytest.mark.parametrize(("num_keys", "num_bins"), [(256, 1), (256, 7), (200, 65535)])
def test_sorted_chunks(device, num_keys, num_bins):
    keys = torch.randint(-1, num_bins, (num_keys,), generator=torch.Generator().manual_seed(0))
    bins, place, rank = sorted_chunk(keys.tolist(), num_bins, 256, device)
    expected = torch.full((256,), num_bins)
    expected[:num_keys] = torch.where(keys < 0, num_bins, keys)
    assert torch.equal(bins, expected.sort(stable=True).values.int())
    assert torch.equal(place, expected.sort(stable=True).indices.int())
    assert rank.tolist() == [sum(bins[:i] == bin) for i, bin in enumerate(bins)]
