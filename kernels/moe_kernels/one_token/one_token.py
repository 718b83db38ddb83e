"""Steps 1 to 6 of a forward of a single token: `local_forward` in three launches, with little host time.

Quantised weights are dequantised as they come; x and hidden are not quantised, also with fp8_block: that saves work and is more
exact than what a batch gets.

A plan holds the launches of one kind of layer, so that a forward makes one key, not one for each launch.
K experts per token, E logical experts, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels.base.backend import has_tma
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import PreparedLaunch, num_multiprocessors, on_device, raw_stream
from moe_kernels.one_token.one_token_four_bit import _down_kernel as _down_packed_kernel
from moe_kernels.one_token.one_token_four_bit import _up_kernel as _up_packed_kernel
from moe_kernels.one_token.one_token_four_bit_mma import _down_mma_kernel, _up_mma_kernel
from moe_kernels.one_token.one_token_fp8 import _down_fp8_kernel, _up_fp8_kernel
from moe_kernels.one_token.one_token_fp8_launches import can_use_fp8_mma, prepare_fp8
from moe_kernels.one_token.one_token_triton import _choice_kernel, _down_kernel, _up_kernel
from moe_kernels.operands.load import LoadCounter
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.operands.rule import RoutingRule
from moe_kernels.operands.schemes import BLOCK
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.quantised.fp8 import e4m3_argument
from moe_kernels.routing.routing_triton import rule_constants


@dataclass(frozen=True)
class _Plan:
    """The three launches for layers of one kind.

    Attributes:
        up_grid, down_grid: their programs.
        is_fp8: whether up and down are those of fp8_block alone, which take no zero points.
        scratch: where the choice begins behind hidden, in elements.
    """

    choice: PreparedLaunch
    up: PreparedLaunch
    down: PreparedLaunch
    up_grid: tuple[int, int, int]
    down_grid: tuple[int, int, int]
    is_fp8: bool
    scratch: int


def _make_plan(
    x_1H: torch.Tensor,
    matrices: ExpertMatrices,
    num_experts: int,
    top_k: int,
    rule: RoutingRule,
) -> _Plan:
    hidden_size, intermediate = matrices.hidden_size, matrices.intermediate_size
    device_index, block_k = x_1H.get_device(), next_power_of_2(top_k)
    scratch = cdiv(top_k * intermediate, 16) * 16
    matrix_bytes = hidden_size * matrices.down_SHI.shape[2] * matrices.down_SHI.element_size()
    num_bytes = 3 * top_k * matrix_bytes
    eviction = "evict_first" if num_bytes <= _MOST_TO_STREAM else ""
    of_both = {"SCRATCH": scratch, "HIDDEN_SIZE": hidden_size, "INTERMEDIATE": intermediate, "EVICTION": eviction}
    up_rows = down_rows = 1
    up_grid = down_grid = None  # a program for so many rows, of up of each expert
    # Measured on an H200: small ones gain nothing; and a program has all experts and pieces of hidden unrolled.
    is_fp8 = matrices.scheme == "fp8_block" and num_bytes > _MOST_TO_STREAM and top_k * cdiv(intermediate, 2048) <= 16
    of_up = {"SCHEME": matrices.scheme, "GROUP": _group(matrices.scheme, hidden_size, matrices.gate_up_scale)}
    of_down = {"SCHEME": matrices.scheme, "GROUP": _group(matrices.scheme, intermediate, matrices.down_scale)}
    if matrices.scheme == "fp8_block" and can_use_fp8_mma(x_1H, matrices, top_k):
        is_fp8 = True
        up, down, up_grid, down_grid = prepare_fp8(
            device_index, of_both, matrices.activation, top_k, num_multiprocessors(x_1H.device)
        )
    elif is_fp8:
        down_rows = min(hidden_size & -hidden_size, _MOST_ROWS)  # a power of two that divides it
        chunks, down_chunks = _chunks(hidden_size, 64), _chunks(intermediate, 64)
        up = _up_fp8_kernel.prepare(
            device_index, **of_both, ACTIVATION=matrices.activation, CHUNKS=chunks, num_warps=cdiv(chunks, 32)
        )
        down = _down_fp8_kernel.prepare(
            device_index, **of_both, TOP_K=top_k, ROWS=down_rows, CHUNKS=down_chunks, num_warps=cdiv(down_chunks, 32)
        )
    elif matrices.scheme in ("mxfp4", "int4") and _can_use_mma(x_1H, matrices, block_k):
        pairs = cdiv(block_k, 2)
        up = _up_mma_kernel.prepare(
            device_index,
            **(of_both | of_up),
            TOP_K=top_k,
            ACTIVATION=matrices.activation,
            P=_UP_MMA_WARPS,
            num_warps=_UP_MMA_WARPS,
            maxnreg=_UP_MMA_REGISTERS,
        )
        down = _down_mma_kernel.prepare(
            device_index,
            **(of_both | of_down),
            TOP_K=top_k,
            EXPERT_PAIRS=pairs,
            P=_DOWN_MMA_WARPS,
            num_warps=_DOWN_MMA_WARPS,
        )
        num_programs = num_multiprocessors(x_1H.device)
        up_grid = min(top_k * intermediate // 8, _UP_MMA_PROGRAMS * num_programs), 1, 1
        down_grid = min(hidden_size // 8, num_programs), 1, 1
    elif matrices.scheme in ("mxfp4", "int4"):
        up_rows, down_rows = _UP_ROWS, max(_DOWN_ROWS // block_k, 1)
        up = _up_packed_kernel.prepare(
            device_index,
            **(of_both | of_up),
            ACTIVATION=matrices.activation,
            BLOCK_H=_packed_block(hidden_size),
            BLOCK_R=up_rows,
            num_warps=_UP_WARPS,
        )
        down = _down_packed_kernel.prepare(
            device_index,
            **(of_both | of_down),
            TOP_K=top_k,
            BLOCK_K=block_k,
            BLOCK_I=_packed_block(intermediate),
            BLOCK_R=down_rows,
            num_warps=_DOWN_WARPS,
        )
    else:
        up = _up_kernel.prepare(
            device_index, **(of_both | of_up), ACTIVATION=matrices.activation, BLOCK_H=_block(hidden_size), num_warps=2
        )  # 16 bytes a thread
        down = _down_kernel.prepare(
            device_index,
            **(of_both | of_down),
            TOP_K=top_k,
            BLOCK_K=block_k,
            BLOCK_I=min(next_power_of_2(intermediate), max(_ELEMENTS // block_k, 16)),
            num_warps=1,
        )
    return _Plan(
        choice=_choice_kernel.prepare(
            device_index,
            SCRATCH=scratch,
            TOP_K=top_k,
            **rule_constants(rule),
            BLOCK_E=next_power_of_2(num_experts),
            BLOCK_K=block_k,
            num_warps=1,
        ),
        up=up,
        down=down,
        up_grid=up_grid or (cdiv(intermediate, up_rows), top_k, 1),
        down_grid=down_grid or (cdiv(hidden_size, down_rows), 1, 1),
        is_fp8=is_fp8,
        scratch=scratch,
    )


_plans: dict[Any, _Plan] = {}
_MOST_PLANS = 256  # kinds of layers; a process has few


def one_token_triton(
    x_1H: torch.Tensor,
    logits_1E: torch.Tensor,
    matrices: ExpertMatrices,
    table: ReplicaTable,
    load: LoadCounter,
    top_k: int,
    rule: RoutingRule,
    bias_E: torch.Tensor | None,
    token_mask_T: torch.Tensor | None,
) -> torch.Tensor:
    gate_up_SNH, down_SHI = matrices.gate_up_SNH, matrices.down_SHI
    if matrices.scheme == "fp8_block":
        gate_up_SNH, down_SHI = e4m3_argument(gate_up_SNH), e4m3_argument(down_SHI)
    elif matrices.scheme != "plain":
        gate_up_SNH, down_SHI = gate_up_SNH.view(torch.int32), down_SHI.view(torch.int32)
    up_scale, down_scale, up_zero, down_zero = (
        matrices.gate_up_scale,
        matrices.down_scale,
        matrices.gate_up_zero,
        matrices.down_zero,
    )
    strides = tuple(0 if one is None else one.stride(0) for one in (up_scale, down_scale, up_zero, down_zero))
    up_bias, down_bias = matrices.gate_up_bias_SN, matrices.down_bias_SH
    up_stride = 0 if up_bias is None else up_bias.stride(0)
    down_stride = 0 if down_bias is None else down_bias.stride(0)
    load_E, increment_1, lane_to_slot_L = load.load_E, load.increment_1, table.lane_to_slot_L
    hidden_size, intermediate = matrices.hidden_size, matrices.intermediate_size
    num_experts, num_lanes = load_E.numel(), lane_to_slot_L.numel()
    stride_up, stride_down = gate_up_SNH.stride(0), down_SHI.stride(0)
    device_index = x_1H.get_device()
    key = (
        *(device_index, x_1H.dtype, logits_1E.dtype, gate_up_SNH.dtype, down_SHI.dtype),
        *(hidden_size, intermediate, stride_up, stride_down, num_experts, num_lanes, top_k),
        *(rule.score_function, rule.renormalize, rule.num_groups, rule.top_groups, rule.group_score, rule.round_to),
        *(
            matrices.scheme,
            strides,
            up_zero is None,
            None if up_scale is None else up_scale.shape[1],
            matrices.activation,
        ),
        *(up_bias is None, up_stride, down_bias is None, down_stride),
        *(None if bias_E is None else bias_E.dtype, token_mask_T is None, increment_1 is None),
    )
    addresses = x_1H.data_ptr() | gate_up_SNH.data_ptr() | down_SHI.data_ptr()
    for one in (up_scale, down_scale, up_zero, down_zero) if up_scale is not None else ():
        addresses |= 0 if one is None else one.data_ptr()
    aligned = not addresses % 16
    plan = _plans.get(key) if aligned else None
    if plan is None:
        plan = _make_plan(x_1H, matrices, num_experts, top_k, rule)
        if aligned:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            _plans[key] = plan
    # hidden, and behind it the choice: one allocation, which takes the host as long as a launch.
    scratch = x_1H.new_empty(plan.scratch + 8 * top_k // x_1H.element_size())
    y_1H = torch.empty_like(x_1H)
    with on_device(device_index):
        stream = raw_stream(device_index)
        plan.choice(
            (1, 1, 1),
            stream,
            logits_1E,
            bias_E,
            token_mask_T,
            float(rule.scale),
            float(rule.epsilon),
            table.lanes_P,
            lane_to_slot_L,
            increment_1,
            load_E,
            scratch,
            num_experts,
            num_lanes,
        )
        plan.up(
            plan.up_grid,
            stream,
            *(x_1H, gate_up_SNH, up_bias, up_scale, *(() if plan.is_fp8 else (up_zero,)), scratch),
            *(stride_up, up_stride, strides[0], *(() if plan.is_fp8 else (strides[2],))),
        )
        plan.down(
            plan.down_grid,
            stream,
            *(scratch, down_SHI, down_bias, down_scale, *(() if plan.is_fp8 else (down_zero,)), y_1H),
            *(stride_down, down_stride, strides[1], *(() if plan.is_fp8 else (strides[3],))),
        )
    return y_1H


# Weights up to this size (bytes) take each other's places in L2, and not those of dirty lines, which would have to be written
# first; more of them take longer so (measured on an H200, docs/log.md).
_MOST_TO_STREAM = 256 << 20
_ELEMENTS = 2048  # weights that a program of the down projection reads at once


_MOST_ROWS = 4  # of `_down_fp8_kernel`: more rows take more registers

# Of 4-bit weights: rows of the matrices that a program has, and its warps.
_UP_ROWS, _UP_WARPS = 8, 2
_DOWN_ROWS, _DOWN_WARPS = 16, 4  # rows of all experts together
_MOST_STEPS = 16  # which are unrolled

# By tensor cores: warps of a program, and programs of a multiprocessor. Threads keep x in registers: so a warp has at most so
# many columns; of down, where warps share two experts, 768 would spill (by ptxas).
_UP_MMA_WARPS, _UP_MMA_PROGRAMS, _UP_MMA_REGISTERS = 4, 3, 168
_DOWN_MMA_WARPS = 8
_MOST_UP_MMA_COLUMNS, _MOST_DOWN_MMA_COLUMNS = 768, 720


def _can_use_mma(x_1H: torch.Tensor, matrices: ExpertMatrices, block_k: int) -> bool:
    shares = _DOWN_MMA_WARPS // cdiv(block_k, 2)
    most_hidden, most_intermediate = _MOST_UP_MMA_COLUMNS * _UP_MMA_WARPS, _MOST_DOWN_MMA_COLUMNS * shares
    fits = matrices.hidden_size <= most_hidden and matrices.intermediate_size <= most_intermediate
    return fits and matrices.is_gated and x_1H.dtype == torch.bfloat16 and has_tma(x_1H.device)


def _chunks(size: int, most: int) -> int:
    """Pieces of 16 weights that a program of `one_token_fp8` reads at once: a thread has one."""
    return min(most, next_power_of_2(cdiv(size, 16)))


def _packed_block(size: int) -> int:
    """1024 columns, a warp's words; fewer where 1024 would be half empty, and more of very long rows."""
    least = 1024 if size % 1024 == 0 or size > 2048 else 256
    return max(min(least, next_power_of_2(size)), next_power_of_2(cdiv(size, _MOST_STEPS)))


def _group(scheme: str, columns: int, scale: torch.Tensor | None) -> int:
    """Columns that share a scale; 0: there is none."""
    return BLOCK if scheme == "fp8_block" else 0 if scale is None else columns // scale.shape[1]


def _block(size: int) -> int:
    """The widest block that divides the size; else 1024, or what holds it all."""
    return next((block for block in (1024, 512) if size % block == 0), min(1024, next_power_of_2(size)))
