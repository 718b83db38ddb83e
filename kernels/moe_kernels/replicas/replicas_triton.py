"""Step 2 of a forward: the kernels of `select_replicas` and of `select_by_quota`, and their launches.

With BY_QUOTA the circle of an expert is its tokens on all ranks: `cumulative_ptr` is quotas_P, and this rank's elements begin
at before_E, with one position each.

T tokens, E logical experts, K experts per token, L lanes, P replicas of all experts together (entries of the table).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.base.integers import next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.scan import (
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
    start_chunks,
)
from moe_kernels.operands.load import LoadCounter
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.replicas.circle import _SHARE_MASK, ranks_below, ranks_of, start_of


@triton.jit
def _load_expert(offsets_ptr, load_ptr, increment_ptr, num_experts):
    """The program's expert and whether it exists, its entries of the table, its load, and what an element adds to that."""
    expert = tl.program_id(0)
    is_expert = expert < num_experts
    if offsets_ptr is None:
        first_entry, last_entry = expert, tl.minimum(expert + 1, num_experts)
    else:
        first_entry = tl.load(offsets_ptr + expert, mask=is_expert, other=0)
        last_entry = tl.load(offsets_ptr + expert + 1, mask=is_expert, other=0)
    load = tl.load(load_ptr + expert, mask=is_expert, other=0)
    increment = tl.load(increment_ptr) if increment_ptr is not None else 0
    return expert, is_expert, first_entry, last_entry, load, increment


@triton.jit
def _record(load_ptr, expert, is_expert, added):
    """Add to the counter after every thread has read it. An atomic, because another stream may add at the same time."""
    tl.debug_barrier()
    tl.atomic_add(load_ptr + expert, added, mask=is_expert, sem="relaxed")  # nobody reads its result


@triton.jit
def _count_lanes(
    counts_ptr, table_lanes_ptr, cumulative_ptr, first_entry, last_entry, start, count, BY_QUOTA: tl.constexpr
):
    """Write how many of an expert's `count` elements each of its replicas has; returns the lane that has the start."""
    home = -1
    begin = 0
    for entry in range(first_entry, last_entry):
        lane = tl.load(table_lanes_ptr + entry)
        end = _SHARE_MASK + 1
        if cumulative_ptr is not None:
            end = tl.load(cumulative_ptr + entry)
        low, high, around = ranks_of(begin, end, start, count, BY_QUOTA)
        tl.store(counts_ptr + lane, high - low + around)
        home = tl.where((begin <= start) & (start < end), lane, home)
        begin = end
    return home


@triton.jit
def _clear_lanes(counts_ptr, table_lanes, expert, num_experts, num_lanes):
    """Write 0 for the lanes that no entry of the table names. Each program writes some of them."""
    for lane in range(expert, num_lanes, num_experts + 1):
        is_named = tl.sum((table_lanes == lane).to(tl.int32), axis=0) > 0
        tl.store(counts_ptr + lane, 0, mask=is_named == 0)


# Unspecialized, or serving would compile when one is a multiple of 16.
@Launcher
@triton.jit(do_not_specialize=["starts", "num_elements"])
def _select_replicas_kernel(
    # inputs
    ids_ptr,
    offsets_ptr,  # None: each expert has one replica
    table_lanes_ptr,
    cumulative_ptr,  # None: likewise
    increment_ptr,  # None: nothing is recorded
    starts,  # see `start_of`
    # outputs
    load_ptr,  # read, then added to
    lanes_ptr,
    counts_ptr,
    # shapes
    num_elements,
    num_experts,
    num_entries,
    num_lanes,
    # constants
    BY_QUOTA: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program chooses the replicas of all elements of one expert. The last program serves the elements of no expert.

    Example: expert 0 has the lanes 3 and 5 with shares 3/4 and 1/4, load 0, rank_start 0; ids [0, 0, 0, 0] → steps
    [0, 1/4, 1/2, 3/4] of the circle; lane 3 has the ranks below 3, lane 5 the others → lanes [3, 3, 3, 5],
    counts [0, 0, 0, 3, 0, 1], load 4.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    expert, is_expert, first_entry, last_entry, load, increment = _load_expert(
        offsets_ptr, load_ptr, increment_ptr, num_experts
    )
    entries = tl.arange(0, BLOCK_P)
    # Early, so that the lanes are in the cache when the offsets say which one is meant.
    table_lanes = tl.load(table_lanes_ptr + entries, mask=entries < num_entries, other=-1)
    steps = num_steps(num_elements, BLOCK)
    index = first_index(num_elements, BLOCK, ROWS)
    bins = load_bins(ids_ptr, index, 0, num_elements, num_experts, BLOCK, ROWS)

    several = last_entry - first_entry > 1  # if not, no rank matters: one walk does
    lane = tl.load(table_lanes_ptr + first_entry, mask=first_entry < last_entry, other=-1)
    mine = bins == expert
    hits = count_hits(mine)
    for step in range(1, steps):
        bins = load_bins(ids_ptr, index, step, num_elements, num_experts, BLOCK, ROWS)  # ahead of the stores
        if offsets_ptr is None or not several:
            before = (step - 1) * (BLOCK // ROWS)
            tl.store(lanes_ptr + before + index, lane, mask=mine & (index < num_elements - before))
        mine = bins == expert
        hits += count_hits(mine)
    count = tl.sum(hits)
    if increment_ptr is not None:
        _record(load_ptr, expert, is_expert, count * increment)

    if offsets_ptr is not None and several:
        start = start_of(starts, expert, is_expert, load, BY_QUOTA)
        home = _count_lanes(
            counts_ptr, table_lanes_ptr, cumulative_ptr, first_entry, last_entry, start, count, BY_QUOTA
        )
        ends = row_ends(hits, 0)
        for back in range(steps):
            step = steps - 1 - back
            mine = bins == expert
            # Ahead of time; after the last step, in vain.
            bins = load_bins(ids_ptr, index, tl.maximum(step - 1, 0), num_elements, num_experts, BLOCK, ROWS)
            rank, ends = rank_hits(mine, ends)
            lanes = tl.zeros_like(rank) + home
            begin = 0
            for entry in range(first_entry, last_entry):
                lane = tl.load(table_lanes_ptr + entry)
                end = tl.load(cumulative_ptr + entry)
                low, high, _ = ranks_of(begin, end, start, count, BY_QUOTA)
                lanes = tl.where((rank >= low) & (rank < high), lane, lanes)
                begin = end
            tl.store(lanes_ptr + step * (BLOCK // ROWS) + index, lanes, mask=mine)
    else:
        last = (steps - 1) * (BLOCK // ROWS)
        tl.store(lanes_ptr + last + index, lane, mask=mine & (index < num_elements - last))
        tl.store(counts_ptr + lane, count, mask=lane >= 0)
    if num_entries < num_lanes:  # then some lanes hold no expert
        _clear_lanes(counts_ptr, table_lanes, expert, num_experts, num_lanes)


@Launcher
@triton.jit(do_not_specialize=["starts", "num_chunks"])  # as above
def _count_replicas_kernel(
    # input and output
    chunks_ptr,  # of `count_chunks`, and what `start_chunks` makes of it
    # inputs
    offsets_ptr,
    table_lanes_ptr,
    cumulative_ptr,
    increment_ptr,  # None: nothing is recorded
    starts,  # see `start_of`
    # outputs
    load_ptr,  # read, then added to
    counts_ptr,
    circles_ptr,
    # shapes
    num_chunks,
    num_experts,
    num_entries,
    num_lanes,
    # constants
    BY_QUOTA: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """`_select_replicas_kernel` for many elements, without their lanes. `_find_lanes_kernel` finds the lanes.

    Example: expert 0 as above, four elements in one chunk, chunks [[4], [0]] → chunks [[0], [0]], counts and load as above, and
    the circle [0, 4]: start and count.
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    expert, is_expert, first_entry, last_entry, load, increment = _load_expert(
        offsets_ptr, load_ptr, increment_ptr, num_experts
    )
    count = start_chunks(chunks_ptr, expert, num_chunks, BLOCK)
    if increment_ptr is not None:
        _record(load_ptr, expert, is_expert, count * increment)
    start = start_of(starts, expert, is_expert, load, BY_QUOTA)
    _count_lanes(counts_ptr, table_lanes_ptr, cumulative_ptr, first_entry, last_entry, start, count, BY_QUOTA)
    tl.store(circles_ptr + 2 * expert, start, mask=is_expert)
    tl.store(circles_ptr + 2 * expert + 1, count, mask=is_expert)
    if num_entries < num_lanes:  # as above
        entries = tl.arange(0, BLOCK_P)
        table_lanes = tl.load(table_lanes_ptr + entries, mask=entries < num_entries, other=-1)
        _clear_lanes(counts_ptr, table_lanes, expert, num_experts, num_lanes)


@Launcher
@triton.jit(do_not_specialize=["num_elements"])  # as above
def _find_lanes_kernel(
    # inputs
    ids_ptr,
    offsets_ptr,
    table_lanes_ptr,
    cumulative_ptr,
    starts_ptr,
    circles_ptr,
    # outputs
    lanes_ptr,
    # shapes
    num_elements,
    num_experts,
    # constants
    BY_QUOTA: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    CHUNK: tl.constexpr,
):
    """The elements of one chunk.

    Example: expert 0 as above, with the circle [0, 4] (start, count); ids [0, 0, 0, 0] in one chunk, starts [[0], [0]] →
    lanes [3, 3, 3, 5].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    index, expert = load_chunk(ids_ptr, tl.program_id(0), num_elements, num_experts, CHUNK)
    is_expert = expert < num_experts
    lane = tl.full((CHUNK,), -1, dtype=tl.int32)
    if offsets_ptr is None:
        lane = tl.load(table_lanes_ptr + expert, mask=is_expert, other=-1)
    else:
        first_entry = tl.load(offsets_ptr + expert, mask=is_expert, other=0)
        last_entry = tl.load(offsets_ptr + expert + 1, mask=is_expert, other=0)
        start = tl.load(circles_ptr + 2 * expert, mask=is_expert, other=0)
        count = tl.load(circles_ptr + 2 * expert + 1, mask=is_expert, other=1)
        rank = rank_in_bins(expert, starts_ptr, CHUNK)
        if not BY_QUOTA:
            turned = start - _SHARE_MASK - 1  # the start as those see it that have passed the end of the circle
            start = tl.where(rank < ranks_below(-turned, count), start, turned)
        searching = is_expert
        for replica in range(0, tl.max(last_entry - first_entry, axis=0)):
            entry = first_entry + replica
            searching &= entry < last_entry
            candidate = tl.load(table_lanes_ptr + entry, mask=searching, other=-1)
            end = tl.load(cumulative_ptr + entry, mask=searching, other=0)
            below = end - start if BY_QUOTA else ranks_below(end - start, count)
            found = searching & (rank < below)
            lane = tl.where(found, candidate, lane)
            searching &= ~found
    tl.store(lanes_ptr + index, lane, mask=index < num_elements)


def select_replicas_triton(
    expert_ids_TK: torch.Tensor,
    table: ReplicaTable,
    load: LoadCounter,
    rank_start: int,
    *,
    num_lanes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    entries = (table.offsets_E1, table.lanes_P, table.cumulative_P)
    return launch_selection(expert_ids_TK, entries, load, rank_start, num_lanes, False)


def launch_selection(
    expert_ids_TK: torch.Tensor,
    entries: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None],
    load: LoadCounter,
    starts: int | torch.Tensor,
    num_lanes: int,
    by_quota: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    lanes_TK, counts_L = torch.empty_like(expert_ids_TK), expert_ids_TK.new_empty(num_lanes)
    load_E, increment_1 = load.load_E, load.increment_1
    num_elements, num_experts, num_entries = expert_ids_TK.numel(), load_E.numel(), entries[1].numel()
    sizes = (num_experts, num_entries, num_lanes)
    options = scan_options(num_elements)
    block_p = next_power_of_2(max(num_entries, 1))
    chunks_BC = count_chunks(expert_ids_TK, num_experts)
    if chunks_BC is None:
        _select_replicas_kernel[(num_experts + 1,)](
            *(expert_ids_TK, *entries, increment_1, starts),
            *(load_E, lanes_TK, counts_L),
            *(num_elements, *sizes),
            BY_QUOTA=by_quota,
            BLOCK_P=block_p,
            **options,
        )
        return lanes_TK, counts_L
    circles_E2, num_chunks = expert_ids_TK.new_empty((num_experts, 2)), chunks_BC.shape[1]
    _count_replicas_kernel[(num_experts + 1,)](
        *(chunks_BC, *entries, increment_1, starts),
        *(load_E, counts_L, circles_E2),
        *(num_chunks, *sizes),
        BY_QUOTA=by_quota,
        BLOCK=options["BLOCK"],
        BLOCK_P=block_p,
        num_warps=options["num_warps"],
    )
    _find_lanes_kernel[(num_chunks,)](
        *(expert_ids_TK, *entries, chunks_BC, circles_E2),
        lanes_TK,
        *(num_elements, num_experts),
        BY_QUOTA=by_quota,
        **chunk_options(),
    )
    return lanes_TK, counts_L
