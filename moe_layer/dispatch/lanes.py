"""Forward, dispatch: which rows are whose, from their global lanes, on the device.

Legend: N flat rows, W ranks, S lanes of a rank, L = W · S lanes.
"""

import torch


def count_lanes(lanes: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """How many of `lanes` (integer, any shape, -1 for none) are each of ``[0, num_lanes)``: int32 ``[num_lanes]``.

    No host sync; a sum of integers, so the order in which a GPU adds them changes nothing.
    """
    lanes = lanes.reshape(-1).long()
    bins = torch.where(lanes >= 0, lanes, num_lanes)
    counts = torch.zeros(num_lanes + 1, dtype=torch.int32, device=lanes.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.int32))[:num_lanes]
