"""Step 5 of a forward, on Hopper: `expert_down` loads weights and rows by TMA (tensor memory accelerator).

N flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged, to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.base.checks import check_tma_address, slot_stride
from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait, num_multiprocessors
from moe_kernels.base.numerics import dot, narrow, widen
from moe_kernels.base.pairs import keep_in_step
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.tiles.homes import RowHomes, row_at
from moe_kernels.tiles.tile_order import choose_tile
from moe_kernels.tiles.tiles import TileSchedule


@triton.jit
def _store_columns(
    at, row_boxes, product, start, end, inside, first_column, HIDDEN_SIZE: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """At the flat places `at`, or where there are boxes, as the rows are sorted."""
    if row_boxes is not None:
        # Triton's `store_ragged`, which its interpreter cannot run (3.7: a list plus a tuple).
        i, j, row = to_ragged_indices(start, end - start, 0)
        rows = narrow(product, row_boxes.dtype)
        row_boxes.store([i, j, row, first_column], rows.reshape(1, 1, rows.shape[0], rows.shape[1]))
    else:
        column = first_column + tl.arange(0, product.shape[1])[None, :]
        rows = narrow(product, at.dtype.element_ty)
        tl.store(at + column, rows, mask=inside & (column < HIDDEN_SIZE), eviction_policy=EVICTION)


@triton.jit
def _store_rows(
    rows_ptr,
    row_boxes,
    homes_ptr,
    rows_per_home,
    row_weights_ptr,
    order_ptr,
    bias_ptr,  # the slot's, or None
    product,
    start,
    end,
    first_column,
    HIDDEN_SIZE: tl.constexpr,
    EVICTION: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Store the rows of the tile that exist, times their routing weights: at their flat places, or in `row_boxes`."""
    BLOCK_M: tl.constexpr = product.shape[0]
    BLOCK_N: tl.constexpr = product.shape[1]
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    flat = tl.load(order_ptr + position, mask=inside, other=0)
    if bias_ptr is not None:
        column = first_column + tl.arange(0, BLOCK_N)
        product += widen(tl.load(bias_ptr + column, mask=column < HIDDEN_SIZE, other=0.0))[None, :]
    product *= tl.load(row_weights_ptr + flat, mask=inside, other=0.0)[:, None]
    at, inside = row_at(rows_ptr, flat, HIDDEN_SIZE, homes_ptr, rows_per_home)[:, None], inside[:, None]
    if HALVES:  # half the shared memory to bring rows into the order of memory
        left, right = product.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        _store_columns(at, row_boxes, left, start, end, inside, first_column, HIDDEN_SIZE, EVICTION)
        first_column += BLOCK_N // 2
        _store_columns(at, row_boxes, right, start, end, inside, first_column, HIDDEN_SIZE, EVICTION)
    else:
        _store_columns(at, None, product, start, end, inside, first_column, HIDDEN_SIZE, EVICTION)


@triton.jit
def _load_rows(rows, start, end, first, SWAP: tl.constexpr):
    """A box of rows from `start` on. Those from `end` on are zeros, but not with SWAP.

    To multiply the next lane's rows instead takes more power, and power is what limits products of many rows.
    """
    if SWAP:
        return rows.load([start, first])
    else:
        return load_ragged(rows, start, end - start, [0, first])


@triton.jit
def _down_tile(
    hidden,  # descriptor [N, I], ragged without SWAP
    hidden_extra,  # with boxes of EXTRA_M rows
    down,  # descriptor [S, H, I]
    row_weights_ptr,
    order_ptr,
    rows_ptr,
    row_boxes,  # None, or where to store instead, as the rows are sorted
    homes_ptr,
    rows_per_home,
    bias_ptr,
    stride_bias,
    start,
    end,
    slot,
    column_block,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EVICTION: tl.constexpr,
    SWAP: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """With SWAP rows past the tile's end are read (the next lane's, of no lane, or zero past the tensor's end) and not stored.

    EXTRA_M: so many rows behind the tile are multiplied by the same weights.
    """
    first_column = column_block * BLOCK_N
    product = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    if EXTRA_M > 0:
        extra = tl.zeros((EXTRA_M, BLOCK_N), dtype=tl.float32)
    for first in tl.range(0, INTERMEDIATE, BLOCK_K):
        block = _load_rows(hidden, start, end, first, SWAP)
        if EXTRA_M > 0:
            extra_block = _load_rows(hidden_extra, start + BLOCK_M, end, first, SWAP)
        weights = down.load([slot, first_column, first]).reshape(BLOCK_N, BLOCK_K)
        product = dot(weights, block.T, product) if SWAP else dot(block, weights.T, product)
        if EXTRA_M > 0:
            extra = dot(extra_block, weights.T, extra)
        if CLUSTERS > 0 and INTERMEDIATE >= CLUSTERS:
            keep_in_step()
    if SWAP:
        product = product.T
    if bias_ptr is not None:
        bias_ptr += slot.to(tl.int64) * stride_bias
    pointers = (rows_ptr, row_boxes, homes_ptr, rows_per_home, row_weights_ptr, order_ptr, bias_ptr)
    _store_rows(*pointers, product, start, end, first_column, HIDDEN_SIZE, EVICTION, HALVES)
    if EXTRA_M > 0:
        _store_rows(*pointers, extra, start + BLOCK_M, end, first_column, HIDDEN_SIZE, EVICTION, HALVES)


@Launcher
@triton.jit(do_not_specialize=["num_programs", "rows_per_home"])
def _expert_down_tma_kernel(
    # inputs
    hidden,
    hidden_tail,  # with boxes of TAIL_M rows
    hidden_extra,  # with boxes of EXTRA_M rows
    down,
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    row_weights_ptr,
    order_ptr,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    homes_ptr,  # None: all rows go to `rows_ptr`
    # outputs
    rows_ptr,
    row_boxes,  # None, or a ragged descriptor of the rows, which are then stored as they are sorted: if PERSISTENT
    # shapes
    rows_per_home,
    stride_bias,
    num_programs,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    # constants
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    PERSISTENT: tl.constexpr,
    SWAP: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BY_LANE: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """One tile of rows, BLOCK_N columns of the output; if PERSISTENT, every num_programs-th such, and the loads of the
    next begin before the last is stored. TAIL_M, EXTRA_M and CLUSTERS: see `_expert_up_tma_kernel`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if CLUSTERS > 0 and tl.program_id(0) >= num_programs:
        return
    num_column_blocks: tl.constexpr = (HIDDEN_SIZE + BLOCK_N - 1) // BLOCK_N
    tiles = (offsets_ptr, tile_lane_ptr, tile_start_ptr, tile_end_ptr)
    if PERSISTENT:
        num_tiles = tl.load(num_tiles_ptr)
        for program in tl.range(tl.program_id(0), num_tiles * num_column_blocks, num_programs, flatten=True):
            column_block, lane, start, end = choose_tile(
                program, num_tiles, num_column_blocks, *tiles, BLOCK_M, 0, GROUP_M, BY_LANE
            )
            slot = tl.load(lane_to_slot_ptr + lane)
            _down_tile(
                hidden, hidden_extra, down, row_weights_ptr, order_ptr, rows_ptr, row_boxes, homes_ptr, rows_per_home,
                bias_ptr, stride_bias, start, end, slot, column_block,
                HIDDEN_SIZE, INTERMEDIATE, EVICTION, SWAP, True, BLOCK_M, 0, BLOCK_N, BLOCK_K, CLUSTERS,
            )  # fmt: skip
        return
    column_block, lane, start, end = choose_tile(
        tl.program_id(0),
        tl.num_programs(0) // num_column_blocks,
        num_column_blocks,
        *tiles,
        BLOCK_M,
        EXTRA_M,
        GROUP_M,
        BY_LANE,
    )
    if lane < 0:
        return
    slot = tl.load(lane_to_slot_ptr + lane)
    if (TAIL_M > 0) & (end - start <= TAIL_M):  # not `and`: without tails the compiler drops the branch
        _down_tile(
            hidden_tail, hidden_extra, down, row_weights_ptr, order_ptr, rows_ptr, None, homes_ptr, rows_per_home,
                bias_ptr, stride_bias, start, end, slot, column_block,
            HIDDEN_SIZE, INTERMEDIATE, EVICTION, SWAP, False, TAIL_M if TAIL_M > 0 else BLOCK_M, 0, BLOCK_N, BLOCK_K, CLUSTERS,
        )  # fmt: skip
    elif (EXTRA_M > 0) & (end - start > BLOCK_M):
        _down_tile(
            hidden, hidden_extra, down, row_weights_ptr, order_ptr, rows_ptr, None, homes_ptr, rows_per_home,
                bias_ptr, stride_bias, start, end, slot, column_block,
            HIDDEN_SIZE, INTERMEDIATE, EVICTION, SWAP, False, BLOCK_M, EXTRA_M, BLOCK_N, BLOCK_K, CLUSTERS,
        )  # fmt: skip
    else:
        _down_tile(
            hidden, hidden_extra, down, row_weights_ptr, order_ptr, rows_ptr, None, homes_ptr, rows_per_home,
                bias_ptr, stride_bias, start, end, slot, column_block,
            HIDDEN_SIZE, INTERMEDIATE, EVICTION, SWAP, False, BLOCK_M, 0, BLOCK_N, BLOCK_K, CLUSTERS,
        )  # fmt: skip


def expert_down_tma(
    hidden_NI: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    config: GemmConfig,
    homes: RowHomes | None = None,
) -> torch.Tensor:
    """Launches the kernel; arguments as `expert_down`'s and `expert_mlp_home`'s."""
    down_SHI, bias_SH = matrices.down_SHI, matrices.down_bias_SH
    check_tma_address("hidden_NI", hidden_NI)
    check_tma_address("matrices.down_SHI", down_SHI)
    slots, hidden_size, intermediate = down_SHI.shape
    rows_NH = hidden_NI.new_empty((schedule.order_N.shape[0], hidden_size)) if homes is None else homes.own
    num_programs = schedule.tile_lane.shape[0] * cdiv(hidden_size, config.block_n)
    if not num_programs:
        return rows_NH
    if config.programs_per_sm:
        num_programs = min(num_programs, config.programs_per_sm * num_multiprocessors(hidden_NI.device))

    # As they are sorted, and by TMA; to flat places it cannot.
    is_sorted = schedule.places_N is not None
    assert not is_sorted or (homes is None and config.sorts_rows)
    boxes = create_ragged_descriptor(rows_NH, [config.block_m, config.block_n // 2]) if is_sorted else None

    if len(hidden_NI) == 1:  # then its stride may be anything
        hidden_NI = hidden_NI.as_strided(hidden_NI.shape, (intermediate, 1))

    def rows_of(block_m: int) -> TensorDescriptor:
        box = [block_m, config.block_k]
        if config.swap:
            return TensorDescriptor(hidden_NI, list(hidden_NI.shape), [hidden_NI.stride(0), 1], box)
        return create_ragged_descriptor(hidden_NI, box)

    hidden = rows_of(config.block_m)
    _expert_down_tma_kernel[(num_programs,)](
        hidden,
        rows_of(config.tail_m) if config.tail_m else hidden,
        rows_of(config.extra_m) if config.extra_m else hidden,
        TensorDescriptor(
            down_SHI,
            [slots, hidden_size, intermediate],
            [slot_stride(down_SHI), intermediate, 1],
            [1, config.block_n, config.block_k],
        ),
        bias_SH,
        lane_to_slot_L,
        row_weights_N,
        schedule.order_N,
        schedule.offsets_L1,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        schedule.num_tiles,
        None if homes is None else homes.addresses_W,
        rows_NH,
        boxes,
        1 if homes is None else homes.rows_per_home,
        0 if bias_SH is None else bias_SH.stride(0),
        num_programs,
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=intermediate,
        EVICTION="evict_last" if config.keep else "",
        PERSISTENT=config.programs_per_sm > 0,
        SWAP=config.swap,
        TAIL_M=config.tail_m,
        BLOCK_M=config.block_m,
        EXTRA_M=config.extra_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        BY_LANE=config.by_lane,
        CLUSTERS=config.pairs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return rows_NH
