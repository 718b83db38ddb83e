"""Rebalance, publish → flip: the indirection table of one layer, the device copy of a placement and its shares.

Legend: E logical experts, P physical experts over all ranks, S lanes of a rank.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from eplb.planning.placement import Placement
from eplb.planning.shares import table_words
from eplb.relocation.table_words import TableWords, runs
from eplb.streams import DeviceStreams, StreamLike


class ExpertTable:
    """Which lanes hold each logical expert, where kernels read it; staged aside and switched in one small write.

    All of it is int32 at a static address, so a captured CUDA graph sees every flip. The replicas of
    expert e are entries ``offsets_E1[e] … offsets_E1[e + 1]`` of `lanes_P` (global lane ids: rank · S + lane) and of
    `cumulative_P` (running share in units of 2⁻³⁰, the last one of each expert exactly 2³⁰).

    Args:
        memory: of tables that flip together; its own if None.
        num_tables: how many as this one may come to lie there, at most.

    Attributes:
        lane_to_slot_S: int32 ``[S]``, for rows that this rank *receives*: the pool's slot of each of its own lanes. An
            entry is written at the fill, before any table names the lane, and so never while a kernel can read it.
        words: where its numbers lie.
    """

    def __init__(
        self,
        placement: Placement,
        shares_WS: np.ndarray,
        streams: DeviceStreams,
        memory: TableWords | None = None,
        num_tables: int = 1,
    ) -> None:
        self.num_experts = placement.num_experts
        self.num_physical = int((placement.lanes_WS >= 0).sum())
        size = self.num_experts + 1 + 2 * self.num_physical
        device = streams.device
        self._streams = streams
        self.words = (memory or TableWords(device)).take(size, num_tables)
        self._host_words = self.words.host.numpy()[:size]
        ends = (self.num_experts + 1, self.num_experts + 1 + self.num_physical, size)
        with torch.inference_mode(False):  # else no backward could keep them
            current = self.words.current
            self.offsets_E1 = current[: ends[0]]
            self.lanes_P = current[ends[0] : ends[1]]
            self.cumulative_P = current[ends[1] : ends[2]]
        self._lane_to_slot = torch.full((placement.num_lanes,), -1, dtype=torch.int32, device=device)
        self._lanes_host = torch.full(
            (placement.num_lanes,), -1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
        )
        self._lane_words = self._lanes_host.numpy()
        # `.data`: the same memory with a version counter of its own. Autograd keeps it for a backward, and an entry that
        # is written meanwhile is one that no pending backward reads (I1, I3).
        self.lane_to_slot_S = self._lane_to_slot.data
        self._write_host(table_words(placement, shares_WS))
        self.words.staged.copy_(self.words.host)
        # Both ways of a flip: the first use of a CUDA kernel loads it, which waits for the device.
        self.words.current_data.copy_(self.words.staged)
        torch._foreach_copy_([self.words.current_data], [self.words.staged])

    def stage(self, placement: Placement, shares_WS: np.ndarray, stream: StreamLike) -> None:
        """`stage()` of this table alone."""
        stage([self], [table_words(placement, shares_WS)], stream)

    def map_all(self, slots_S: Sequence[int]) -> None:
        """What `map_lanes` says of single lanes, of all; it is there, for every stream, when this returns."""
        self._lane_words[:] = slots_S
        self.lane_to_slot_S.copy_(self._lanes_host)

    def _write_host(self, words: np.ndarray) -> None:
        if len(words) != len(self._host_words) or words[self.num_experts] != self.num_physical:
            raise ValueError(
                f"a placement whose table has {len(words)} words does not fit: "
                f"it is made for {self.num_physical} physical experts of {self.num_experts}, {len(self._host_words)} words"
            )
        self._host_words[:] = words


def map_lanes(entries: Sequence[tuple[ExpertTable, np.ndarray | int, np.ndarray | int]], stream: StreamLike) -> None:
    """Enqueue on `stream`: rows sent to lanes of this rank will find their weights in slots.

    Args:
        entries: of each, a table, and as many of its lanes as slots.
    """

    # All lanes of a table in one copy: the others are written with what they hold. A copy that an earlier call has left in the
    # queue may write these entries early, which nobody reads yet.
    for table, lanes, slots in entries:
        table._lane_words[lanes] = slots
    tables = {id(table): table for table, lanes, _ in entries if np.size(lanes)}.values()

    def write() -> None:
        for table in tables:
            table._lane_to_slot.copy_(table._lanes_host, non_blocking=True)

    if tables:
        entries[0][0]._streams.run(stream, write)


def stage(tables: Sequence[ExpertTable], words: Sequence[np.ndarray], stream: StreamLike) -> None:
    """Enqueue on `stream` the upload of the tables' next versions beside the current ones.

    The caller must know that the last flip has completed (grace says so): the staging buffers are its source.

    Args:
        words: `eplb.planning.shares.table_words()` of each.

    Raises:
        ValueError: words of a table of other sizes. Nothing was enqueued.
    """
    for table, new in zip(tables, words, strict=True):
        table._write_host(new)

    parts = runs([table.words for table in tables])

    def upload() -> None:
        for part in parts:
            part.staged.copy_(part.host, non_blocking=True)

    if tables:
        tables[0]._streams.run(stream, upload)


def flip(tables: list[ExpertTable], stream: StreamLike) -> None:
    """Enqueue on `stream` the one small write that makes what was staged in each of `tables` current.

    Kernels enqueued before it see the old tables from end to end, kernels after it the new ones (I3).
    """
    if tables:
        tables[0]._streams.run(stream, prepared_flip(tables))


def prepared_flip(tables: list[ExpertTable]) -> Callable[[], object]:
    """What enqueues the `flip()` of these tables on the current stream, with all that can be done before done now.

    One copy where they lie side by side, as those of a pool do if all of them are flipped.
    """
    parts = runs([table.words for table in tables])
    if not parts:
        return lambda: None
    current, staged = [part.current_data for part in parts], [part.staged for part in parts]
    if len(parts) == 1:
        return functools.partial(current[0].copy_, staged[0])
    return functools.partial(torch._foreach_copy_, current, staged)
