"""Forward, dispatch: which rows are whose, from their global lanes, on the device.

Legend: N flat rows, W ranks, S lanes of a rank, L = W · S lanes.
"""

from dataclasses import dataclass

import torch


def count_bins(bins_N: torch.Tensor, num_bins: int) -> torch.Tensor:
    """How many of `bins_N` (int64, in ``[0, num_bins]``) are each of ``[0, num_bins)``: int32 ``[num_bins]``.

    No host sync; a sum of integers, so the order in which a GPU adds them changes nothing.
    """
    counts = torch.zeros(num_bins + 1, dtype=torch.int32, device=bins_N.device)
    return counts.scatter_add_(0, bins_N, torch.ones_like(bins_N, dtype=torch.int32))[:num_bins]


@dataclass(frozen=True)
class LaneTables:
    """What a rank makes of each global lane, ``[L + 1]``: one look-up is one kernel. The last entry is that of lane -1.

    Attributes:
        own: int32, this rank's number of its own lanes, -1 for others.
        bins: int64, the same, S for others.
        owners: int64, the lane's rank; 0 for lane -1.
        owners_or_none: int64, the lane's rank; W for lane -1.
    """

    own: torch.Tensor
    bins: torch.Tensor
    owners: torch.Tensor
    owners_or_none: torch.Tensor

    @staticmethod
    def build(rank: int, num_ranks: int, num_lanes: int, device: torch.device) -> "LaneTables":
        """For `num_lanes` lanes on each rank. On the device alone, so a CUDA graph may capture it."""
        lanes = torch.arange(num_ranks * num_lanes + 1, device=device)
        owners = torch.div(lanes, num_lanes, rounding_mode="floor")  # W for the last
        is_own = owners == rank
        bins = torch.where(is_own, lanes - rank * num_lanes, num_lanes)
        own = torch.where(is_own, bins, -1).to(torch.int32)
        return LaneTables(own, bins, torch.where(owners == num_ranks, 0, owners), owners)
