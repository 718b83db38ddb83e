"""Saving and loading: the only place where logical experts and slots meet. No step of a forward.

Legend: E logical experts.
"""

from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist

from eplb.relocation.pool import SlotPool
from eplb.relocation.resident import ResidentExperts
from moe_layer.collectives import all_gather_flags, broadcast_
from moe_layer.weights.meeting import meet


class LogicalWeights:
    """Reads and writes the weights of one layer in logical order.

    Args:
        ranges: the logical experts of each rank's state dict.
        timeout: seconds to wait for the other ranks where they are needed.
    """

    def __init__(
        self,
        resident: ResidentExperts,
        ranges: list[range],
        process_group: dist.ProcessGroup | None,
        timeout: float,
    ) -> None:
        self._resident = resident
        self._ranges = ranges
        self._group = process_group
        self._timeout = timeout

    @torch.no_grad()
    def read(self, everything: bool, device: torch.device, only_rank: int | None = None) -> dict[str, torch.Tensor]:
        """Copies of the tensors of this rank's range, or of all experts, by name, on `device`; on `only_rank` alone, if given.

        Collective over the ranks, unless experts have never moved and each rank wants only what it has.

        Raises:
            TimeoutError: ranks that are needed did not come; names them.
        """
        pool = self._resident.pool
        wanted = range(self._resident.num_experts) if everything else self._ranges[self._resident.rank]
        if only_rank not in (None, self._resident.rank):
            wanted = range(0)
        result = {
            spec.name: torch.empty(len(wanted), *spec.shape, dtype=spec.dtype, device=device) for spec in pool.specs
        }
        views = SlotPool(pool.specs, 1, pool.device)
        slabs = self._local_slabs(wanted) if self._is_at_home(everything) else self._slabs()
        for expert, slab in slabs:
            if expert in wanted:
                views.slab(0).copy_(slab)
                for name, tensor in result.items():
                    tensor[expert - wanted.start].copy_(views.tensors[name][0])
        return result

    def _is_at_home(self, everything: bool) -> bool:
        """Whether each rank has all that it wants. Decided alike on all ranks, as long as none has relocated."""
        resident = self._resident
        if resident.num_ranks == 1:
            return True
        if everything or resident.controller is not None or resident.current.number != 0:
            return False
        held = resident.current.placement.holds_WE() > 0
        return all(held[rank, list(experts)].all() for rank, experts in enumerate(self._ranges))

    def _local_slabs(self, wanted: Collection[int]) -> Iterator[tuple[int, torch.Tensor]]:
        with self._resident.reading() as (live, _):
            for expert in wanted:
                yield expert, self._resident.pool.slab(live[expert][0])

    def _slabs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Every logical expert's record, in order, on every rank. Collective."""
        resident, group = self._resident, self._group
        assert group is not None
        meet(group, "state_dict()", self._timeout)
        with resident.reading() as (live, retiring):
            slots = retiring | {expert: slots[0] for expert, slots in live.items()}
            for expert, owner in enumerate(self._owners(live, retiring)):
                is_here = owner == resident.rank
                slab = resident.pool.slab(slots[expert]) if is_here else torch.empty_like(resident.pool.slab(0))
                broadcast_(slab, owner, group)
                yield expert, slab

    def _owners(self, live: Collection[int], retiring: Collection[int]) -> list[int]:
        """The rank that each logical expert is saved from, the lowest of those that have it; given what this one has."""
        resident = self._resident
        assert self._group is not None
        mine = torch.zeros(2, resident.num_experts, dtype=torch.bool, device="cpu")
        mine[0, list(live)] = True
        # Ranks may be one version apart, and an expert that has moved be in none's own current table: then it is still where
        # it was, on a rank that has flipped, as another has not.
        mine[1, list(retiring)] = True
        flags = all_gather_flags(mine.flatten(), resident.pool.device, self._group).int()
        now, before = flags.view(len(flags), 2, -1).unbind(1)
        return torch.where(now.any(dim=0), now.argmax(dim=0), before.argmax(dim=0)).tolist()

    @torch.no_grad()
    def write(self, given: dict[str, torch.Tensor]) -> None:
        """Write all replicas on this rank, of tensors of all experts, or of this rank's range (then collective).

        The caller has checked shapes, and that no relocation is under way.

        Raises:
            TimeoutError: ranks that are needed did not come; names them.
        """
        resident, pool, live = self._resident, self._resident.pool, self._resident.live_slots()
        if all(len(value) == resident.num_experts for value in given.values()):
            for expert, slots in live.items():
                for name, value in given.items():
                    for slot in slots:
                        pool.tensors[name][slot].copy_(value[expert])
            return
        assert self._group is not None
        meet(self._group, "load_state_dict()", self._timeout)
        for rank, experts in enumerate(self._ranges):
            for expert in experts:
                for name, value in given.items():
                    buffer = torch.empty(value.shape[1:], dtype=pool.tensors[name].dtype, device=pool.device)
                    if rank == resident.rank:
                        buffer.copy_(value[expert - experts.start])
                    broadcast_(buffer, rank, self._group)
                    for slot in live.get(expert, []):
                        pool.tensors[name][slot].copy_(buffer)
