"""Trainable experts: weights go from their owners to the lanes that compute with them, and gradients come back.

SYMI (arXiv:2504.19925) had the idea: since an optimizer step sends the new weights anyway, changing where they go costs nothing
more, and the optimizer's state never moves.

Legend: S lanes of this rank, O experts that this rank owns.
"""

import numpy as np
import torch
import torch.distributed as dist

from eplb.planning.placement import Placement
from moe_layer.collectives import all_to_all_rows


class Route:
    """Which owned rows go to which lanes of which ranks, under one placement.

    Args:
        num_owned: O, experts that each rank owns, in order.
        rank: this rank.
    """

    def __init__(self, placement: Placement, num_owned: int, rank: int, device: torch.device) -> None:
        lanes_WS = placement.lanes_WS
        owner_WS = lanes_WS // num_owned
        num_ranks = len(lanes_WS)
        # Both ends list the same pairs alike: by the other rank, and then by the lane.
        rows = [lanes_WS[other][owner_WS[other] == rank] - rank * num_owned for other in range(num_ranks)]
        lanes = [np.flatnonzero(owner_WS[rank] == other) for other in range(num_ranks)]
        self._owned_splits, self._lane_splits = [len(one) for one in rows], [len(one) for one in lanes]
        flat = np.concatenate(rows)
        self._rows = torch.from_numpy(flat).to(device)
        self._lanes = torch.from_numpy(np.concatenate(lanes)).to(device)
        # The n-th time that an owned row is listed, for n = 0, 1, …: each adds to a row once.
        nth = np.array([int((flat[:at] == row).sum()) for at, row in enumerate(flat)], dtype=np.int64)
        self._turns = [
            torch.from_numpy(np.flatnonzero(nth == turn)).to(device) for turn in range(int(nth.max(initial=0)) + 1)
        ]

    def publish(self, owned: torch.Tensor, lanes: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Write the owners' rows ``[O, …]`` into the lanes ``[S, …]`` that name them, on all ranks. Collective."""
        lanes[self._lanes] = all_to_all_rows(owned[self._rows], self._lane_splits, self._owned_splits, group)

    def collect(self, lanes: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Each owned row's sum over its lanes, in their order (float32 where there are several). Collective."""
        received = all_to_all_rows(lanes[self._lanes], self._owned_splits, self._lane_splits, group)
        first, *others = self._turns
        owned = received.new_empty((len(first), *received.shape[1:]))
        owned[self._rows[first]] = received[first]
        if not others:
            return owned
        total = owned.float()
        for turn in others:
            total[self._rows[turn]] += received[turn].float()  # no row twice: no order among threads
        return total.to(owned.dtype)
