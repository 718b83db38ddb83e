"""Steps 4 and 5 of a forward, both grouped GEMMs: `expert_up`, and then `expert_down` of what it returns.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import check_integer, check_kind, check_pair
from moe_kernels.base.registered import registered_op
from moe_kernels.gemms.expert_down import check_down, expert_down, expert_down_home
from moe_kernels.gemms.expert_mlp_triton import expert_mlp_triton, is_one_kernel
from moe_kernels.gemms.expert_up import check_up, expert_up
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.tiles.homes import RowHomes
from moe_kernels.tiles.tiles import TileSchedule


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
) -> torch.Tensor:
    return expert_mlp_triton(x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, fanout, up, down)


@_expert_mlp.register_fake
def _expert_mlp_fake(x_RH, matrices, lane_to_slot_L, schedule, *_):
    return x_RH.new_empty((schedule.order_N.shape[0], matrices.hidden_size))


def _is_one_kernel(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    fanout: int,
    configs: tuple[GemmConfig, GemmConfig],
    backend: str,
) -> bool:
    """Whether one launch does all, which then takes the arguments unchecked: raises ValueError if it can't."""
    check_kind("x_RH", x_RH, torch.Tensor)
    check_kind("matrices", matrices, ExpertMatrices)
    check_pair("configs", configs, GemmConfig)
    up, down = configs
    if resolve_backend(backend, x_RH.device) != "triton" or not is_one_kernel(matrices, up, down):
        return False
    check_up(x_RH, matrices, lane_to_slot_L, schedule, fanout, up)
    of_down = (matrices, lane_to_slot_L, schedule, row_weights_N, down)
    check_down(matrices.intermediate_size, x_RH.dtype, x_RH.device, *of_down)
    return True


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
    arguments = (x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, check_integer("fanout", fanout))
    if _is_one_kernel(*arguments, configs, backend):
        return _expert_mlp(*arguments, *configs)
    up, down = configs
    hidden_NI = expert_up(x_RH, matrices, lane_to_slot_L, schedule, fanout=fanout, config=up, backend=backend)
    return expert_down(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, config=down, backend=backend)


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
    """`expert_mlp` by Triton that writes each row where it is wanted: see `expert_down_home`."""
    arguments = (x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, check_integer("fanout", fanout))
    if _is_one_kernel(*arguments, configs, "triton"):
        expert_mlp_triton(*arguments, *configs, homes=homes)
        return
    up, down = configs
    hidden_NI = expert_up(x_RH, matrices, lane_to_slot_L, schedule, fanout=fanout, config=up, backend="triton")
    expert_down_home(hidden_NI, matrices, lane_to_slot_L, schedule, row_weights_N, homes, config=down)
