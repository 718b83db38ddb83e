"""Backward of the experts on Hopper: the gradients of a slot's matrices, by persistent programs and TMA.

N flat rows, S slots, L lanes; a matrix of a slot is [P, Q].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.base.checks import check_tma_address
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait, num_multiprocessors
from moe_kernels.base.numerics import dot, narrow, widen
from moe_kernels.gradients.gradient_tiles import GradientTiles
from moe_kernels.operands.config import GemmConfig
from moe_kernels.tiles.gather_sorted import gather_sorted
from moe_kernels.tiles.tile_order import tile_and_column_block


@triton.jit
def _store_columns(grad_ptr, grad, product, slot, first_row, first_column, height, width, stride_slot):
    """Of a slot's matrix: write, by TMA, or without a descriptor add, by pointers."""
    if grad is None:
        row = first_row + tl.arange(0, product.shape[0])[:, None]
        column = first_column + tl.arange(0, product.shape[1])[None, :]
        at = grad_ptr + slot.to(tl.int64) * stride_slot + row.to(tl.int64) * width + column
        exists = (row < height) & (column < width)
        product += widen(tl.load(at, mask=exists, other=0.0))
        tl.store(at, narrow(product, grad_ptr.dtype.element_ty), mask=exists)
    else:
        rows = narrow(product, grad_ptr.dtype.element_ty)
        grad.store([slot, first_row, first_column], rows.reshape(1, product.shape[0], product.shape[1]))


@triton.jit
def _store_tile(
    grad_ptr, grad, product, slot, first_row, first_column, height, width, stride_slot, PARTS: tl.constexpr
):  # fmt: skip
    """`_store_columns` of a PARTS-th of the columns after another, by the same shared memory."""
    if PARTS == 1:
        _store_columns(grad_ptr, grad, product, slot, first_row, first_column, height, width, stride_slot)
    else:
        HALF: tl.constexpr = product.shape[1] // 2
        left, right = product.reshape(product.shape[0], 2, HALF).permute(0, 2, 1).split()
        _store_tile(grad_ptr, grad, left, slot, first_row, first_column, height, width, stride_slot, PARTS // 2)
        first_column += HALF
        _store_tile(grad_ptr, grad, right, slot, first_row, first_column, height, width, stride_slot, PARTS // 2)


@Launcher
@triton.jit(do_not_specialize=["num_slots", "num_programs"])
def _experts_grad_weights_tma_kernel(
    # inputs
    left,  # ragged descriptor [N, P] of rows in sorted order
    right,  # [N, Q], likewise
    offsets_ptr,
    first_lane_ptr,
    next_lane_ptr,
    blocks_ptr,
    # outputs
    grad_ptr,
    grad,  # descriptor [S, P, Q], or None: added to `grad_ptr`
    # shapes and strides, in elements
    height,
    width,
    stride_slot,
    num_slots,
    num_programs,
    # constants
    PDL: tl.constexpr,
    # tunables
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Every num_programs-th of the tiles of all slots; see `_experts_grad_weights_kernel` for what a tile is.

    The blocks of BLOCK_K rows of all these tiles are one loop, so that the loads of a tile begin while the one before is
    multiplied and stored. A slot without rows has one block, of no rows.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_row_blocks, num_column_blocks = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    per_slot = num_row_blocks * num_column_blocks
    slots = tl.arange(0, BLOCK_S)
    before = slots * per_slot + num_programs - 1 - tl.program_id(0)
    own_tiles = (before + per_slot) // num_programs - before // num_programs
    blocks = tl.load(blocks_ptr + slots, mask=slots < num_slots, other=0)
    num_blocks = tl.sum(own_tiles * blocks, 0)
    tile = tl.program_id(0) - num_programs
    slot = 0
    row_block = 0
    column_block = 0
    start = 0
    end = 0
    position = 0
    next_lane = -1
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in tl.range(0, num_blocks):
        # What the next block needs is computed before its loads, or Triton's pipeline would not let them run ahead.
        position += BLOCK_K
        if position >= end:
            lane = next_lane
            if lane < 0:
                tile += num_programs
                slot = tile // per_slot
                row_block, column_block = tile_and_column_block(
                    tile % per_slot, num_row_blocks, num_column_blocks, GROUP_M
                )
                lane = tl.load(first_lane_ptr + slot)
            has_rows = lane >= 0
            start = tl.load(offsets_ptr + lane, mask=has_rows, other=0)
            end = tl.load(offsets_ptr + lane + 1, mask=has_rows, other=0)
            next_lane = tl.load(next_lane_ptr + lane, mask=has_rows, other=-1)
            position = start
        left_block = load_ragged(left, start, end - start, [position - start, row_block * BLOCK_M])
        right_block = load_ragged(right, start, end - start, [position - start, column_block * BLOCK_N])
        product = dot(left_block.T, right_block, product)
        if (position + BLOCK_K >= end) & (next_lane < 0):
            first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
            _store_tile(grad_ptr, grad, product, slot, first_row, first_column, height, width, stride_slot, PARTS)
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)


def _sorted_rows(name: str, rows_NP: torch.Tensor, config: GemmConfig, block: int) -> TensorDescriptor:
    """Of boxes ``[block_k, block]`` that end with a lane: what they lack are zeros."""
    check_tma_address(name, rows_NP)
    return create_ragged_descriptor(rows_NP, [config.block_k, block])


_REGISTERS = 1 << 16  # of a multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities")
_SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper (CUDA C++ Programming Guide, "Compute Capabilities")


def most_registers(config: GemmConfig) -> int:
    """Of a thread, so that `programs_per_sm` fit."""
    return min(255, _REGISTERS // (config.programs_per_sm * 32 * config.num_warps))


def num_parts(config: GemmConfig, adds: bool) -> int:
    """1, 2 or 4, so that what is stored at once fits into shared memory beside the loads."""
    loads = config.num_stages * (config.block_m + config.block_n) * config.block_k * 2
    stored = config.block_m * config.block_n * (4 if adds else 2)
    available = _SHARED_MEMORY // config.programs_per_sm - loads - 1024  # of which barriers take some
    return next((parts for parts in (1, 2) if stored <= available * parts), 4)


def experts_grad_weights_tma(
    left_NP: torch.Tensor,
    right_NQ: torch.Tensor,
    order_N: torch.Tensor,
    offsets_L1: torch.Tensor,
    tiles: GradientTiles,
    left_fanout: int | None,
    right_fanout: int | None,
    config: GemmConfig,
    *,
    out_SPQ: torch.Tensor,
    adds: bool = False,
) -> None:
    """As `experts_grad_weights`. An operand that is not in sorted order is copied into it first: the left one, whose gradient
    is computed last, when memory is scarcest, in two parts."""
    slots, height, width = out_SPQ.shape
    if not slots * height * width:
        return
    if not len(order_N):
        if not adds:
            out_SPQ.zero_()
        return
    if right_fanout is not None:
        right_NQ = gather_sorted(right_NQ, order_N, right_fanout)
    if left_fanout is None:
        _sum_rows(left_NP, right_NQ, offsets_L1, tiles, config, out_SPQ, adds)
        return
    part = cdiv(height, 2 * config.block_m) * config.block_m
    for left, out in zip(left_NP.split(part, dim=1), out_SPQ.split(part, dim=1), strict=True):
        _sum_rows(gather_sorted(left, order_N, left_fanout), right_NQ, offsets_L1, tiles, config, out, adds)


def _sum_rows(
    left_NP: torch.Tensor,
    right_NQ: torch.Tensor,
    offsets_L1: torch.Tensor,
    tiles: GradientTiles,
    config: GemmConfig,
    out_SPQ: torch.Tensor,
    adds: bool,
) -> None:
    """Of rows in sorted order. Slots of `out_SPQ` may be apart."""
    slots, height, width = out_SPQ.shape
    num_tiles = slots * cdiv(height, config.block_m) * cdiv(width, config.block_n)
    num_programs = min(num_tiles, config.programs_per_sm * num_multiprocessors(left_NP.device))
    parts = num_parts(config, adds)
    grad = None
    if not adds:
        grad = TensorDescriptor(
            out_SPQ,
            [slots, height, width],
            [out_SPQ.stride(0) if slots > 1 else height * width, width, 1],
            [1, config.block_m, config.block_n // parts],
        )
    _experts_grad_weights_tma_kernel[(num_programs,)](
        _sorted_rows("left_NP", left_NP, config, config.block_m),
        _sorted_rows("right_NQ", right_NQ, config, config.block_n),
        offsets_L1,
        tiles.first_lane_S,
        tiles.next_lane_L,
        tiles.blocks_S,
        out_SPQ,
        grad,
        height,
        width,
        out_SPQ.stride(0),
        slots,
        num_programs,
        PARTS=parts,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        BLOCK_S=next_power_of_2(slots),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=most_registers(config),
    )
