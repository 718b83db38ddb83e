"""Steps 4 and 5 of a forward, both grouped GEMMs: `expert_up`, and then `expert_down` of what it returns.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_kind, check_pair
from moe_kernels.base.registered import registered_op
from moe_kernels.gemms.expert_down import check_down, expert_down_torch
from moe_kernels.gemms.expert_mlp_triton import expert_mlp_triton
from moe_kernels.gemms.expert_up import check_up, expert_up_torch
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.tiles.homes import RowHomes
from moe_kernels.tiles.tiles import TileSchedule


def expert_mlp_torch(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    fanout: int,
    pre_NJ: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `expert_mlp`: those of both. Writes the pre-activation into `pre_NJ`, if given."""
    hidden_NI = expert_up_torch(x_RH, matrices, lane_to_slot_L, schedule, fanout=fanout, pre_NJ=pre_NJ)
    return expert_down_torch(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N)


@registered_op("moe_kernels::expert_mlp")
def _expert_mlp(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    fanout: int,
    up: GemmConfig,
    down: GemmConfig,
    backend: str,
) -> torch.Tensor:
    arguments = (x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, fanout)
    return expert_mlp_triton(*arguments, up, down) if backend == "triton" else expert_mlp_torch(*arguments)


@_expert_mlp.register_fake
def _expert_mlp_fake(x_RH, matrices, lane_to_slot_L, schedule, *_):
    return x_RH.new_empty((schedule.order_N.shape[0], matrices.hidden_size))


def _check(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    fanout: int,
    configs: tuple[GemmConfig, GemmConfig],
) -> int:
    """`fanout`; raises ValueError unless the arguments are `expert_mlp`'s."""
    check_kind("x_RH", x_RH, torch.Tensor)
    check_pair("configs", configs, GemmConfig)
    up, down = configs
    fanout = check_up(x_RH, matrices, lane_to_slot_L, schedule, fanout, up)
    of_down = (matrices, lane_to_slot_L, schedule, row_weights_N, down)
    check_down(matrices.intermediate_size, x_RH.dtype, x_RH.device, *of_down)
    return fanout


def expert_mlp(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    *,
    fanout: int,
    configs: tuple[GemmConfig, GemmConfig],
    backend: str = "auto",
) -> torch.Tensor:
    """`expert_up` and `expert_down`, with the same bits; by one kernel where there is one (fp8_block on Hopper).

    Args:
        x_RH: [R, H] float32, float16 or bfloat16; as `expert_up`'s.
        matrices, lane_to_slot_L, schedule, fanout, backend: as `expert_up`'s.
        row_weights_N: as `expert_down`'s.
        configs: of both; `gemm_configs` has them.

    Returns:
        rows_NH, as `expert_down`'s.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    inputs = (x_RH, matrices, lane_to_slot_L, schedule, row_weights_N)
    fanout = _check(*inputs, fanout, configs)
    return _expert_mlp(*inputs, fanout, *configs, resolve_backend(backend, x_RH.device))


def expert_mlp_home(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    homes: RowHomes,
    *,
    fanout: int,
    configs: tuple[GemmConfig, GemmConfig],
) -> None:
    """`expert_mlp` by Triton that writes each row where it is wanted, on this device or a peer's.

    Args:
        homes: flat row n goes to row ``n % homes.rows_per_home`` of rank ``n // homes.rows_per_home``.

    Raises:
        ValueError: as `expert_mlp`.
    """
    inputs = (x_RH, matrices, lane_to_slot_L, schedule, row_weights_N)
    fanout = _check(*inputs, fanout, configs)
    resolve_backend("triton", x_RH.device)
    expert_mlp_triton(*inputs, fanout, *configs, homes=homes)
