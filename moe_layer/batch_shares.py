"""Forward, choose replicas: by shares of the last load window, or solved for the batch at hand.

Legend: T tokens, K top-k, E logical experts, W ranks, L lanes of all ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels import count_experts, select_by_quota, solve_shares
from moe_kernels.solve_shares import MOST_COST, MOST_EXPERTS, MOST_RANKS
from moe_layer.arguments import check_choice, check_integer
from moe_layer.dispatch import Dispatcher
from moe_layer.experts import Experts


@dataclass(frozen=True)
class BatchShares:
    """Divide each expert's tokens among its replicas anew in each batch, so that the most loaded rank has least.

    Before they choose, the ranks tell each other how many tokens they have for each expert; then all solve the same
    division, on their devices (`moe_kernels.solve_shares`). While ranks flip to a new table some may solve it for the old
    one: a batch is then less even, and as right as ever. The outputs' bits do not depend on it (I5).

    Attributes:
        expert_cost: how many tokens take a rank as long as to read an expert's weights. 0 where computing takes the time
            (prefill). With few tokens reading does, and to split an expert makes two ranks read it: about 40 for bf16
            experts on Hopper.
    """

    expert_cost: int = 0

    def __post_init__(self) -> None:
        check_integer("expert_cost", self.expert_cost, 0)
        if self.expert_cost > MOST_COST:
            raise ValueError(f"expert_cost must be at most {MOST_COST}, got {self.expert_cost}")

    def counts(self, experts: Experts, ids_TK: torch.Tensor, dispatcher: Dispatcher, needs_grad: bool) -> torch.Tensor:
        """counts_WE, int32: tokens of each expert on each rank. Collective."""
        counts_E = count_experts(ids_TK, experts.num_experts, backend=experts.backend)
        return dispatcher.gather_counts(counts_E, needs_grad)

    def choose(
        self, experts: Experts, ids_TK: torch.Tensor, counts_WE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """lanes_TK and counts_L; records the load. As `choose_replicas`."""
        resident, table, backend = experts.resident, experts.table, experts.backend
        cost = self.expert_cost
        solved = solve_shares(counts_WE, table, resident.num_lanes, resident.rank, expert_cost=cost, backend=backend)
        num_lanes = resident.num_ranks * resident.num_lanes
        return select_by_quota(ids_TK, table, *solved, experts.load, num_lanes=num_lanes, backend=backend)


def resolve_shares(shares: Any, num_ranks: int, num_experts: int) -> BatchShares | None:
    """What `MoELayer`'s argument `shares` means; None: those of the window.

    Raises:
        ValueError: it is something else, or there are more ranks or experts than can be solved for.
    """
    if not isinstance(shares, BatchShares):
        check_choice("shares", shares, ("window", "batch"), " or BatchShares")
        if shares == "window":
            return None
        shares = BatchShares()
    if num_ranks > MOST_RANKS or num_experts > MOST_EXPERTS:
        raise ValueError(
            f"shares={shares!r} is solved for at most {MOST_RANKS} ranks and {MOST_EXPERTS} experts, got {num_ranks} and "
            f"{num_experts}"
        )
    return shares
