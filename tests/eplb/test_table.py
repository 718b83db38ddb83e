"""The indirection table: its numbers, staging, flipping."""

import numpy as np
import pytest
import torch

from eplb.planning.placement import Placement
from eplb.planning.shares import equal_shares, table_words
from eplb.relocation.pool import SlotPool, TensorSpec
from eplb.relocation.table import ExpertTable, flip, map_lanes, prepared_flip, stage
from eplb.relocation.table_words import TableWords, Words, runs
from eplb.streams import HostStreams, streams_of
from tests.eplb.by_hand import make_layer

ONE = 1 << 30

# Two ranks of three lanes; expert 0 has two replicas. Global lanes: rank · 3 + lane.
BEFORE = Placement(np.array([[0, 1, -1], [2, 0, -1]]), 3)
BEFORE_SHARES = np.array([[0.75, 1.0, 0.0], [1.0, 0.25, 0.0]])
# Expert 2 has gone to rank 0 in place of expert 0, and expert 1 to rank 1 in place of expert 2.
AFTER = Placement(np.array([[-1, 1, 2], [-1, 0, 1]]), 3)
AFTER_SHARES = np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 0.5]])


def numbers(table: ExpertTable) -> dict[str, list[int]]:
    return {
        "offsets": table.offsets_E1.tolist(),
        "lanes": table.lanes_P.tolist(),
        "cumulative": table.cumulative_P.tolist(),
    }


BEFORE_NUMBERS = {"offsets": [0, 2, 3, 4], "lanes": [0, 4, 1, 3], "cumulative": [3 * ONE // 4, ONE, ONE, ONE]}
AFTER_NUMBERS = {"offsets": [0, 1, 3, 4], "lanes": [4, 1, 5, 2], "cumulative": [ONE, ONE // 2, ONE, ONE]}


def make_table(device: str = "cpu") -> ExpertTable:
    return ExpertTable(BEFORE, BEFORE_SHARES, streams_of(torch.empty(0, device=device).device))


def test_exact_numbers(device):
    table = make_table(device)
    assert numbers(table) == BEFORE_NUMBERS
    assert (table.num_experts, table.num_physical) == (3, 4)
    for tensor in (table.offsets_E1, table.lanes_P, table.cumulative_P, table.lane_to_slot_S):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert table.lane_to_slot_S.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_host_buffers_are_on_the_host_whatever_the_default_device(default):
    with torch.device(default):
        table = make_table()
        stream = table._streams.current()
        table.stage(AFTER, AFTER_SHARES, stream)
        map_lanes([(table, 0, 2)], stream)
        flip([table], stream)
    assert numbers(table) == AFTER_NUMBERS and table.lane_to_slot_S.tolist() == [2, -1, -1]


def test_shares_of_thirds_end_at_exactly_one():
    placement = Placement(np.array([[0], [0], [0]]), 1)
    table = ExpertTable(placement, equal_shares(placement), HostStreams())
    assert table.cumulative_P.tolist() == [357913941, 2 * 357913941, ONE]


def test_staging_changes_nothing_until_the_flip(device):
    table = make_table(device)
    addresses = [tensor.data_ptr() for tensor in (table.offsets_E1, table.lanes_P, table.cumulative_P)]
    stream = table._streams.current()
    table.stage(AFTER, AFTER_SHARES, stream)
    assert numbers(table) == BEFORE_NUMBERS
    flip([table], stream)
    assert numbers(table) == AFTER_NUMBERS
    assert addresses == [tensor.data_ptr() for tensor in (table.offsets_E1, table.lanes_P, table.cumulative_P)]


def test_there_and_back(device):
    table = make_table(device)
    stream = table._streams.current()
    for placement, shares, expected in [
        (AFTER, AFTER_SHARES, AFTER_NUMBERS),
        (BEFORE, BEFORE_SHARES, BEFORE_NUMBERS),
    ] * 2:
        table.stage(placement, shares, stream)
        flip([table], stream)
        assert numbers(table) == expected


def test_restaging_before_the_flip_replaces_what_was_staged():
    """A rank may stage again if publishing failed half-way (roll forward)."""
    table = make_table()
    stream = table._streams.current()
    table.stage(BEFORE, BEFORE_SHARES, stream)
    table.stage(AFTER, AFTER_SHARES, stream)
    flip([table], stream)
    assert numbers(table) == AFTER_NUMBERS


def test_no_tables_flip_at_once():
    prepared_flip([])()


def test_several_tables_flip_together_and_others_stay():
    tables = [make_table() for _ in range(3)]
    stream = tables[0]._streams.current()
    for table in tables:
        table.stage(AFTER, AFTER_SHARES, stream)
    flip([tables[0], tables[2]], stream)
    assert [numbers(table) == AFTER_NUMBERS for table in tables] == [True, False, True]
    flip([], stream)
    assert [numbers(table) == AFTER_NUMBERS for table in tables] == [True, False, True]


def test_tables_of_one_memory_lie_side_by_side_and_flip_as_one_piece():
    streams, memory = HostStreams(), TableWords(torch.device("cpu"))
    tables = [ExpertTable(BEFORE, BEFORE_SHARES, streams, memory, num_tables=4) for _ in range(4)]
    assert [table.words.start % 4 for table in tables] == [0] * 4, "each begins at 16 bytes"
    parts = [table.words for table in tables]
    chunk, size = parts[0].chunk, parts[0].end
    assert runs(parts[::-1]) == [Words(chunk, 0, 4 * size)]
    assert runs([parts[3], parts[0], parts[1]]) == [Words(chunk, 0, 2 * size), Words(chunk, 3 * size, 4 * size)]
    assert runs([]) == [] and len(runs([parts[0], make_table().words])) == 2
    stage([tables[number] for number in (3, 0, 1)], [table_words(AFTER, AFTER_SHARES)] * 3, streams.current())
    flip([tables[number] for number in (3, 0, 1)], streams.current())
    assert [numbers(table) == AFTER_NUMBERS for table in tables] == [True, True, False, True]


def test_tables_of_a_pool_lie_side_by_side_and_a_layer_with_a_pool_of_its_own_takes_no_more_than_it_needs():
    pool = SlotPool([TensorSpec("weight", (4,), torch.int32)], 3 * 4 + 1)
    words = [one.table.words for one in [make_layer(HostStreams(), 4, pool=pool) for _ in range(3)]]
    assert len(runs(words)) == 1
    alone = make_layer(HostStreams(), 4).table.words
    assert len(alone.chunk.current) == alone.end - alone.start == 16


def test_a_table_too_large_for_a_chunk_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr("eplb.relocation.table_words._CHUNK", 16)
    streams, memory = HostStreams(), TableWords(torch.device("cpu"))
    tables = [ExpertTable(BEFORE, BEFORE_SHARES, streams, memory, num_tables=9) for _ in range(2)]  # 12 words each
    assert len(tables[0].words.chunk.current) == 16
    assert tables[0].words.chunk is not tables[1].words.chunk
    monkeypatch.setattr("eplb.relocation.table_words._CHUNK", 4)
    large = ExpertTable(BEFORE, BEFORE_SHARES, streams, memory)
    assert numbers(large) == BEFORE_NUMBERS and len(large.words.chunk.current) == 12


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("flipped", [True, False])
def test_a_flip_may_be_in_inference_mode_or_not_wherever_the_table_was_made(built, flipped):
    with torch.inference_mode(built):
        table = make_table()
    scale = torch.ones(4, requires_grad=True)
    loss = (scale * table.cumulative_P).sum()  # keeps the table for the backward, which a pin protects
    with torch.inference_mode(flipped):
        table.stage(AFTER, AFTER_SHARES, table._streams.current())
        prepared_flip([table])()
    assert numbers(table) == AFTER_NUMBERS
    loss.backward()


def test_new_shares_alone():
    table = make_table()
    stream = table._streams.current()
    table.stage(BEFORE, np.array([[0.125, 1.0, 0.0], [1.0, 0.875, 0.0]]), stream)
    flip([table], stream)
    assert numbers(table) == {**BEFORE_NUMBERS, "cumulative": [ONE // 8, ONE, ONE, ONE]}


def test_lanes_are_mapped_one_by_one(device):
    table = make_table(device)
    stream = table._streams.current()
    address = table.lane_to_slot_S.data_ptr()
    map_lanes([(table, 2, 17)], stream)
    assert table.lane_to_slot_S.tolist() == [-1, -1, 17]
    map_lanes([(table, 0, 3)], stream)
    assert table.lane_to_slot_S.tolist() == [3, -1, 17] and table.lane_to_slot_S.data_ptr() == address


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            Placement(np.array([[0, 1, 2], [2, 0, -1]]), 3),
            "has 14 words does not fit: .* for 4 physical experts of 3, 12 words",
        ),
        (
            Placement(np.array([[0, 1, -1], [2, 3, -1]]), 4),
            "has 13 words does not fit: .* for 4 physical experts of 3, 12 words",
        ),
    ],
    ids=["another number of replicas", "another number of experts"],
)
def test_a_placement_that_does_not_fit_is_refused_and_staged_nowhere(placement, message):
    table = make_table()
    stream = table._streams.current()
    table.stage(AFTER, AFTER_SHARES, stream)
    with pytest.raises(ValueError, match=message):
        table.stage(placement, equal_shares(placement), stream)
    flip([table], stream)
    assert numbers(table) == AFTER_NUMBERS


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"the shares of expert 0 sum to 0\.5: must sum to 1"):
        make_table().stage(BEFORE, BEFORE_SHARES * [[0.5, 1, 1], [1, 0.5, 1]], HostStreams().current())


@pytest.mark.gpu
def test_the_flip_is_ordered_on_the_stream_and_the_host_does_not_wait():
    table = make_table("cuda")
    stream = torch.cuda.current_stream()
    table.stage(BEFORE, BEFORE_SHARES, stream)
    flip([table], stream)  # loading a kernel may wait for others: once before
    table.lanes_P.clone()
    torch.cuda.synchronize()  # staging again needs the last flip to be over
    table.stage(AFTER, AFTER_SHARES, stream)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    before = table.lanes_P.clone()
    flip([table], stream)
    after = table.lanes_P.clone()
    assert not stream.query(), "the host waited"
    assert before.tolist() == BEFORE_NUMBERS["lanes"] and after.tolist() == AFTER_NUMBERS["lanes"]


@pytest.mark.gpu
def test_a_captured_graph_sees_flips():
    table = make_table("cuda")
    seen = torch.empty_like(table.lanes_P)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen.copy_(table.lanes_P)
    graph.replay()
    assert seen.tolist() == BEFORE_NUMBERS["lanes"]
    table.stage(AFTER, AFTER_SHARES, torch.cuda.current_stream())
    flip([table], torch.cuda.current_stream())
    graph.replay()
    assert seen.tolist() == AFTER_NUMBERS["lanes"]
