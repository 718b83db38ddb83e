"""Steps 4 and 5 of a forward, both grouped GEMMs, by Triton: one kernel where there is one for both, or two.

R source rows, N = R * fanout flat rows, H hidden, J what the activation gets of a row, L lanes.
"""

from __future__ import annotations

import torch

from moe_kernels.gemms.expert_down_triton import expert_down_triton
from moe_kernels.gemms.expert_up_triton import expert_up_triton
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.quantised.experts_fp8 import experts_fp8
from moe_kernels.tiles.homes import RowHomes
from moe_kernels.tiles.tiles import TileSchedule


def expert_mlp_triton(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    fanout: int,
    up: GemmConfig,
    down: GemmConfig,
    *,
    pre_NJ: torch.Tensor | None = None,
    homes: RowHomes | None = None,
) -> torch.Tensor:
    """rows_NH of `expert_up` and then `expert_down`; into `pre_NJ`, if given, what `expert_up_triton` says."""
    if matrices.scheme == "fp8_block" and up.tma and up == down:
        assert pre_NJ is None, "quantised experts have no gradient"
        return experts_fp8(x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, fanout, up, homes)
    hidden_NI = expert_up_triton(x_RH, matrices, lane_to_slot_L, schedule, fanout, up, pre_NJ)
    return expert_down_triton(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, down, homes)
