"""Forward, choose replicas: by the counts of this batch on all ranks, in place of the shares of the last window.

Legend: T tokens, K top-k, E logical experts, P entries of the table, W ranks, S lanes of a rank, L = W · S lanes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from eplb.planning.shares import cumulative_shares
from eplb.relocation.resident import ResidentExperts
from eplb.relocation.versions import Version
from moe_kernels import ReplicaTable, count_experts, select_by_quota, solve_shares
from moe_kernels.replicas.solve_shares import MOST_COST, MOST_EXPERTS, MOST_RANKS
from moe_layer.arguments import check_choice, check_integer
from moe_layer.dispatch.base import Dispatcher, Incoming
from moe_layer.weights.experts import Experts
from moe_layer.weights.versions import Pin


@dataclass(frozen=True)
class BatchShares:
    """Split each expert's tokens over its replicas by what all ranks have in *this* batch.

    Before it chooses replicas, a forward gathers how many tokens every rank has for each expert; each rank then solves the
    same small problem and gets the same bits. The output does not depend on it (I5). Ranks whose tables differ, because one
    has flipped already, solve different problems; that batch is less even, and as right.

    Attributes:
        expert_cost: what it costs a rank to have any token of an expert, in tokens. 0: only tokens count, which fits long
            batches (prefill). Where reading weights takes the time (decode), how many tokens take as long as reading
            an expert, about 40 on an H200; an expert is then split only where that saves time.

    Raises:
        ValueError: `expert_cost` is no integer in [0, 2**20].
    """

    expert_cost: int = 0

    def __post_init__(self) -> None:
        check_integer("expert_cost", self.expert_cost, 0)
        if self.expert_cost > MOST_COST:
            raise ValueError(f"expert_cost must be at most {MOST_COST}, got {self.expert_cost}")

    def choose(
        self, experts: Experts, dispatcher: Dispatcher, ids_TK: torch.Tensor, needs_grad: bool
    ) -> tuple[Pin, torch.Tensor, torch.Tensor, Incoming | None]:
        """A pin of the version, lanes_TK, counts_L, and what comes here if the dispatcher takes that; records the load.

        Collective. `needs_grad`: whether the dispatcher will see a tensor that requires a gradient.
        """
        resident, num_experts, backend = experts.resident, experts.num_experts, experts.backend
        assert isinstance(resident, ResidentExperts)  # see `resolve_shares`
        counts_E = count_experts(ids_TK, num_experts, backend=backend)
        # Not inside the choice: it holds up flips, and so other threads, until other ranks come.
        with resident.choice() as pin:
            pass
        takes_incoming = getattr(dispatcher, "takes_incoming", False)
        if takes_incoming:
            said = F.pad(counts_E, (0, 1), value=2 * ids_TK.shape[0] + needs_grad)
            gathered = dispatcher.gather_counts(F.pad(said, (0, 1), value=pin.version.number), needs_grad)
            counts_WE, facts_W2 = gathered[:, :num_experts].contiguous(), gathered[:, num_experts:]
        else:
            counts_WE = dispatcher.gather_counts(counts_E, needs_grad)
        with resident.choice() as now:
            # Another thread may have flipped meanwhile. The others have been told of the pinned version.
            is_same = now.version.number == pin.version.number
            table = experts.table if is_same else table_of(pin.version, experts.table)
            lanes_TK, counts_L, quotas_P = self.lanes(experts, table, ids_TK, counts_WE)
            num_lanes = resident.num_ranks * resident.num_lanes
            incoming = None
            if takes_incoming:
                rows_WL = rows_by_lane(counts_WE, table, quotas_P, num_lanes)
                own = slice(resident.rank * resident.num_lanes, (resident.rank + 1) * resident.num_lanes)
                incoming = Incoming(rows_WL[:, own], facts_W2)
        now.release()
        return pin, lanes_TK, counts_L, incoming

    def lanes(
        self, experts: Experts, table: ReplicaTable, ids_TK: torch.Tensor, counts_WE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """lanes_TK, counts_L and quotas_P of a table; records the load."""
        resident, backend = experts.resident, experts.backend
        quotas_P, before_E = solve_shares(
            counts_WE, table, resident.num_lanes, resident.rank, expert_cost=self.expert_cost, backend=backend
        )
        num_lanes = resident.num_ranks * resident.num_lanes
        chosen = select_by_quota(ids_TK, table, quotas_P, before_E, experts.load, num_lanes=num_lanes, backend=backend)
        return *chosen, quotas_P


def resolve_shares(
    shares: str | BatchShares, num_ranks: int, num_experts: int, trainable: bool, dispatcher: Dispatcher | None
) -> BatchShares | None:
    """What `MoELayer`'s argument `shares` means; None for those of the window.

    Raises:
        ValueError: it is no such thing, or does not go with the other arguments.
    """
    if not isinstance(shares, BatchShares):
        check_choice("shares", shares, ("window", "batch"), " or a BatchShares")
        if shares == "window":
            return None
        shares = BatchShares()
    if num_ranks < 2:
        raise ValueError(f"shares={shares!r} needs a process_group of several ranks: on one, an expert has one replica")
    if trainable:
        raise ValueError(f"shares={shares!r} does not go with trainable=True: such experts have one replica")
    if num_ranks > MOST_RANKS or num_experts > MOST_EXPERTS:
        raise ValueError(
            f"shares={shares!r} goes with at most {MOST_RANKS} ranks and num_experts={MOST_EXPERTS}, got {num_ranks} and "
            f"{num_experts}"
        )
    if not callable(getattr(dispatcher, "gather_counts", None)):
        raise ValueError(
            f"shares={shares!r} needs a dispatcher with the method gather_counts, but {dispatcher!r} lacks it"
        )
    return shares


def table_of(version: Version, like: ReplicaTable) -> ReplicaTable:
    """The table of a version that is no longer current."""
    offsets_E1, lanes_P = version.placement.logical_to_lanes()
    parts = (lanes_P, offsets_E1, cumulative_shares(version.placement, version.shares_WS))
    lanes, offsets, cumulative = (torch.as_tensor(part, dtype=torch.int32).to(like.lanes_P.device) for part in parts)
    return ReplicaTable(lanes, like.lane_to_slot_L, offsets, cumulative)


def rows_by_lane(counts_WE: torch.Tensor, table: ReplicaTable, quotas_P: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """How many rows each rank sends to each lane, int32 [W, L], if all ranks choose by these quotas.

    Of an expert, a rank has the positions from what the ranks before it have; a replica those between its quota's ends.
    """
    offsets_E1 = table.offsets_E1
    assert offsets_E1 is not None
    num_experts, entry = counts_WE.shape[1], torch.arange(quotas_P.numel(), device=quotas_P.device)
    owner = torch.searchsorted(offsets_E1[1:].long(), entry, right=True)
    is_owned = owner < num_experts
    owner = owner.clamp(max=num_experts - 1)
    begin_P = torch.where(entry == offsets_E1[owner], 0, quotas_P.roll(1))
    after_WP = counts_WE.cumsum(0)[:, owner]
    before_WP = after_WP - counts_WE[:, owner]
    rows_WP = (torch.minimum(quotas_P, after_WP) - torch.maximum(begin_P, before_WP)).clamp(min=0) * is_owned
    rows_WL = rows_WP.new_zeros(counts_WE.shape[0], num_lanes)
    return rows_WL.index_add_(1, table.lanes_P.long(), rows_WP).to(torch.int32)
