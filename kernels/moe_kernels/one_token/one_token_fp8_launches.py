"""The launches of a forward of a single token with fp8_block experts, on Hopper: how many warps and programs have what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moe_kernels.base.backend import has_tma
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import PreparedLaunch
from moe_kernels.one_token.one_token_fp8_mma import _down_fp8_mma_kernel, _up_fp8_mma_kernel
from moe_kernels.one_token.one_token_fp8_small import _down_small_fp8_mma_kernel
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.operands.schemes import BLOCK

_PIECE = 64
_MOST_UP_PIECES, _MOST_UP_WARPS = 14, 8  # pieces of a warp, which keeps their x in registers
_MOST_DOWN_PIECES, _DOWN_WARPS = 16, 16
_SMALL_WARPS, _MOST_SMALL = 8, 6144  # warps, and most columns of all experts, of `one_token_fp8_small`
_UNDER_WAY = 6144  # columns of eight rows, on a multiprocessor. More take longer (docs/log.md).


class Fp8Launches(NamedTuple):
    up: PreparedLaunch
    down: PreparedLaunch
    up_grid: tuple[int, int, int]
    down_grid: tuple[int, int, int]


def fp8_constants(hidden_size: int, intermediate: int, top_k: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of the kernels of `up` and `down`; those of `one_token_fp8_small` have SHARE."""
    pieces, warps = hidden_size // _PIECE, next_power_of_2(cdiv(hidden_size, _MOST_UP_PIECES * _PIECE))
    up = {"PARTS": 2, "PIECES": cdiv(pieces, 2 * warps) * 2, "P": warps, "num_warps": warps, "maxnreg": 128}
    block_k = next_power_of_2(top_k)
    if block_k <= _SMALL_WARPS and block_k * intermediate <= _MOST_SMALL:
        share = _SMALL_WARPS // block_k
        down = {"SHARE": share, "G": cdiv(intermediate, BLOCK * share), "maxnreg": 152}
        return up, down | {"P": _SMALL_WARPS, "num_warps": _SMALL_WARPS}
    pieces = cdiv(top_k * intermediate, 4 * _DOWN_WARPS * _PIECE) * 4
    return up, {"PARTS": 4, "PIECES": pieces, "P": _DOWN_WARPS, "num_warps": _DOWN_WARPS, "maxnreg": 104}


def prepare_fp8(
    device_index: int, of_both: dict[str, Any], activation: str, top_k: int, num_multiprocessors: int
) -> Fp8Launches:
    """`of_both`: constants that both kernels have."""
    hidden_size, intermediate = of_both["HIDDEN_SIZE"], of_both["INTERMEDIATE"]
    of_up, of_down = fp8_constants(hidden_size, intermediate, top_k)
    kernel, rows = _down_fp8_mma_kernel, 4
    if "SHARE" in of_down:
        kernel, rows = _down_small_fp8_mma_kernel, 16
    up_programs = max(round(_UNDER_WAY / hidden_size), 1) * num_multiprocessors
    down_programs = num_multiprocessors if rows == 4 else hidden_size
    return Fp8Launches(
        up=_up_fp8_mma_kernel.prepare(device_index, **of_both, **of_up, TOP_K=top_k, ACTIVATION=activation),
        down=kernel.prepare(device_index, **of_both, **of_down, TOP_K=top_k),
        up_grid=(min(top_k * intermediate // 4, up_programs), 1, 1),
        down_grid=(min(hidden_size // rows, down_programs), 1, 1),
    )


def can_use_fp8_mma(x_1H: torch.Tensor, matrices: ExpertMatrices, top_k: int) -> bool:
    hidden_size, intermediate = matrices.hidden_size, matrices.intermediate_size
    fits = hidden_size <= _MOST_UP_WARPS * _MOST_UP_PIECES * _PIECE
    fits = fits and top_k * intermediate <= _DOWN_WARPS * _MOST_DOWN_PIECES * _PIECE
    fits = fits and hidden_size % BLOCK == 0 and intermediate % BLOCK == 0
    for weights in (matrices.gate_up_SNH, matrices.down_SHI):
        fits = fits and not (weights.data_ptr() | weights.stride(0)) % 16
    return fits and matrices.is_gated and x_1H.dtype != torch.float32 and has_tma(x_1H.device)
