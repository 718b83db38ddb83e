"""Step 4 of a forward, on Hopper: `expert_up` loads weights by TMA (tensor memory accelerator), the slot as coordinate.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.base.checks import check_tma_address, slot_stride
from moe_kernels.base.integers import cdiv
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import dot, is_gated
from moe_kernels.base.pairs import keep_in_step
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.tiles.store_hidden import store_activated
from moe_kernels.tiles.tile_order import choose_tile
from moe_kernels.tiles.tiles import TileSchedule


@triton.jit
def _rows_of_tile(x_ptr, order_ptr, start, end, fanout, stride_row, BLOCK_M: tl.constexpr):
    """Sorted positions of the tile's rows, which of them exist, and where their source rows begin."""
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    source = tl.load(order_ptr + position, mask=inside, other=0) // fanout
    return position, inside[:, None], x_ptr + source.to(tl.int64)[:, None] * stride_row


@triton.jit
def _load_x(row_at, inside, first, HIDDEN_SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Zeros for rows that are not `inside`: to read any others instead would take as much of the L2's bandwidth."""
    k = first + tl.arange(0, BLOCK_K)[None, :]
    if HIDDEN_SIZE % BLOCK_K != 0:
        inside &= k < HIDDEN_SIZE
    return tl.load(row_at + k, mask=inside, other=0.0)


@triton.jit
def _store_product(
    product,
    bias_ptr,
    hidden_ptr,
    pre_ptr,
    position,
    end,
    first_column,
    INTERMEDIATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Of a product whose columns are gate and up, interleaved by eight; or up alone."""
    gate = product
    up = product
    if is_gated(ACTIVATION):
        gate, up = product.reshape(BLOCK_M, BLOCK_I // 8, 2, 8).permute(0, 1, 3, 2).split()
        gate, up = gate.reshape(BLOCK_M, BLOCK_I), up.reshape(BLOCK_M, BLOCK_I)
    store_activated(
        gate,
        up,
        bias_ptr,
        hidden_ptr,
        pre_ptr,
        position,
        end,
        first_column,
        INTERMEDIATE,
        ACTIVATION,
        EVICTION,
        BLOCK_I,
    )


@triton.jit
def _load_rows(
    gate_up, slot, column_block, first, ACTIVATION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Gate and up rows of BLOCK_I columns, interleaved by eight; or up rows alone."""
    if is_gated(ACTIVATION):
        rows = gate_up.load([slot, column_block * (BLOCK_I // 8), 0, 0, first])
        return rows.reshape(2 * BLOCK_I, BLOCK_K)
    else:
        return gate_up.load([slot, column_block * BLOCK_I, first]).reshape(BLOCK_I, BLOCK_K)


@triton.jit
def _wide_tile(
    x_ptr,
    gate_up,  # descriptor [S, I / 8, 2, 8, H], or [S, I, H] without a gate
    bias_ptr,  # the slot's, or None
    order_ptr,
    hidden_ptr,
    pre_ptr,
    start,
    end,
    slot,
    column_block,
    fanout,
    stride_row,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """Many rows: x on the M side. One product of gate and up rows, interleaved by eight, the columns that a thread of
    the tensor core's layout holds: so the activation stays within registers.

    EXTRA_M: so many rows behind the tile are multiplied by the same weights.
    """
    position, inside, row_at = _rows_of_tile(x_ptr, order_ptr, start, end, fanout, stride_row, BLOCK_M)
    COLUMNS: tl.constexpr = 2 * BLOCK_I if is_gated(ACTIVATION) else BLOCK_I
    product = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
    if EXTRA_M > 0:
        extra_position, extra_inside, extra_at = _rows_of_tile(
            x_ptr, order_ptr, start + BLOCK_M, end, fanout, stride_row, EXTRA_M
        )
        extra = tl.zeros((EXTRA_M, COLUMNS), dtype=tl.float32)
    for first in tl.range(0, HIDDEN_SIZE, BLOCK_K):
        x = _load_x(row_at, inside, first, HIDDEN_SIZE, BLOCK_K)
        if EXTRA_M > 0:
            extra_x = _load_x(extra_at, extra_inside, first, HIDDEN_SIZE, BLOCK_K)
        weights = _load_rows(gate_up, slot, column_block, first, ACTIVATION, BLOCK_I, BLOCK_K)
        product = dot(x, weights.T, product)
        if EXTRA_M > 0:
            extra = dot(extra_x, weights.T, extra)
        if CLUSTERS > 0 and HIDDEN_SIZE >= CLUSTERS:
            keep_in_step()
    first_column = column_block * BLOCK_I
    _store_product(
        product, bias_ptr, hidden_ptr, pre_ptr, position, end, first_column,
        INTERMEDIATE, ACTIVATION, EVICTION, BLOCK_M, BLOCK_I,
    )  # fmt: skip
    if EXTRA_M > 0:
        _store_product(
            extra, bias_ptr, hidden_ptr, pre_ptr, extra_position, end, first_column,
            INTERMEDIATE, ACTIVATION, EVICTION, EXTRA_M, BLOCK_I,
        )  # fmt: skip


@triton.jit
def _narrow_tile(
    x_ptr,
    gate_up,  # descriptor [S, 2I, H], or [S, I, H] without a gate
    bias_ptr,  # the slot's, or None
    order_ptr,
    hidden_ptr,
    pre_ptr,
    start,
    end,
    slot,
    column_block,
    fanout,
    stride_row,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Few rows: the weights on the M side, which takes at least 64 rows of them, and x on the N side, which takes 16."""
    position, inside, row_at = _rows_of_tile(x_ptr, order_ptr, start, end, fanout, stride_row, BLOCK_M)
    first_column = column_block * BLOCK_I
    UP_ROWS: tl.constexpr = INTERMEDIATE if is_gated(ACTIVATION) else 0  # where they begin
    gate = tl.zeros((BLOCK_I, BLOCK_M), dtype=tl.float32)
    up = tl.zeros((BLOCK_I, BLOCK_M), dtype=tl.float32)
    for first in tl.range(0, HIDDEN_SIZE, BLOCK_K):
        x = _load_x(row_at, inside, first, HIDDEN_SIZE, BLOCK_K).T
        if is_gated(ACTIVATION):
            gate = dot(gate_up.load([slot, first_column, first]).reshape(BLOCK_I, BLOCK_K), x, gate)
        up = dot(gate_up.load([slot, UP_ROWS + first_column, first]).reshape(BLOCK_I, BLOCK_K), x, up)
    store_activated(
        gate.T, up.T, bias_ptr, hidden_ptr, pre_ptr, position, end, first_column,
        INTERMEDIATE, ACTIVATION, EVICTION, BLOCK_I,
    )  # fmt: skip


@Launcher
@triton.jit
def _expert_up_tma_kernel(
    # inputs
    x_ptr,
    gate_up,
    bias_ptr,  # None: no biases
    lane_to_slot_ptr,
    order_ptr,
    offsets_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    # outputs
    hidden_ptr,  # None: not wanted
    pre_ptr,  # None: not wanted
    # shapes and strides, in elements
    fanout,
    stride_row,
    stride_bias,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    # constants
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    SWAP: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BY_LANE: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """One tile of rows, BLOCK_I columns of gate and of up.

    An expert's last rows are often few. A tile of at most TAIL_M rows is computed as one of TAIL_M; one of more than
    BLOCK_M rows (see `GemmConfig.extra_m`) has the weights in common for all of them.

    With CLUSTERS there may be a program more than tiles and column blocks.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_column_blocks: tl.constexpr = (INTERMEDIATE + BLOCK_I - 1) // BLOCK_I
    most_tiles = tl.num_programs(0) // num_column_blocks
    if CLUSTERS > 0 and tl.program_id(0) >= most_tiles * num_column_blocks:
        return
    tiles = (offsets_ptr, tile_lane_ptr, tile_start_ptr, tile_end_ptr)
    column_block, lane, start, end = choose_tile(
        tl.program_id(0),
        most_tiles,
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
    if bias_ptr is not None:
        bias_ptr += slot.to(tl.int64) * stride_bias
    if SWAP:
        _narrow_tile(
            x_ptr, gate_up, bias_ptr, order_ptr, hidden_ptr, pre_ptr, start, end, slot, column_block, fanout, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, ACTIVATION, EVICTION, BLOCK_M, BLOCK_I, BLOCK_K,
        )  # fmt: skip
    elif (TAIL_M > 0) & (end - start <= TAIL_M):  # not `and`: without tails the compiler drops the branch
        _wide_tile(
            x_ptr, gate_up, bias_ptr, order_ptr, hidden_ptr, pre_ptr, start, end, slot, column_block, fanout, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, ACTIVATION, EVICTION, TAIL_M if TAIL_M > 0 else BLOCK_M, 0, BLOCK_I, BLOCK_K, CLUSTERS,
        )  # fmt: skip
    elif (EXTRA_M > 0) & (end - start > BLOCK_M):
        _wide_tile(
            x_ptr, gate_up, bias_ptr, order_ptr, hidden_ptr, pre_ptr, start, end, slot, column_block, fanout, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, ACTIVATION, EVICTION, BLOCK_M, EXTRA_M, BLOCK_I, BLOCK_K, CLUSTERS,
        )  # fmt: skip
    else:
        _wide_tile(
            x_ptr, gate_up, bias_ptr, order_ptr, hidden_ptr, pre_ptr, start, end, slot, column_block, fanout, stride_row,
            HIDDEN_SIZE, INTERMEDIATE, ACTIVATION, EVICTION, BLOCK_M, 0, BLOCK_I, BLOCK_K, CLUSTERS,
        )  # fmt: skip


def expert_up_tma(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    fanout: int,
    config: GemmConfig,
    hidden_NI: torch.Tensor | None,
    pre_NJ: torch.Tensor | None,
) -> None:
    """Launches the kernel; arguments as `expert_up`'s, and where to write (see `expert_up_triton`)."""
    gate_up_SNH, bias_SN = matrices.gate_up_SNH, matrices.gate_up_bias_SN
    check_tma_address("matrices.gate_up_SNH", gate_up_SNH)
    slots, num_rows, hidden_size = gate_up_SNH.shape
    intermediate, block_i, stride_slot = matrices.down_SHI.shape[2], config.block_n // 2, slot_stride(gate_up_SNH)
    column_blocks = cdiv(intermediate, block_i)
    grid = (schedule.tile_lane.shape[0] * column_blocks,)
    if not grid[0]:
        return
    if config.swap or not matrices.is_gated:
        shape, strides = [slots, num_rows, hidden_size], [stride_slot, hidden_size, 1]
        block = [1, block_i, config.block_k]
    else:
        # Not in the order of their strides, which cuTensorMapEncodeTiled's documentation asks for and neither driver (580)
        # nor GPU minds: it is what brings gate and up rows into shared memory interleaved.
        shape = [slots, intermediate // 8, 2, 8, hidden_size]
        strides = [stride_slot, 8 * hidden_size, intermediate * hidden_size, hidden_size, 1]
        block = [1, block_i // 8, 2, 8, config.block_k]
    _expert_up_tma_kernel[grid](
        x_RH,
        TensorDescriptor(gate_up_SNH, shape, strides, block),
        bias_SN,
        lane_to_slot_L,
        schedule.order_N,
        schedule.offsets_L1,
        schedule.tile_lane,
        schedule.tile_start,
        schedule.tile_end,
        hidden_NI,
        pre_NJ,
        fanout,
        x_RH.stride(0),
        0 if bias_SN is None else bias_SN.stride(0),
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE=intermediate,
        ACTIVATION=matrices.activation,
        EVICTION="evict_last" if config.keep else "",
        SWAP=config.swap,
        TAIL_M=config.tail_m,
        BLOCK_M=config.block_m,
        EXTRA_M=config.extra_m,
        BLOCK_I=block_i,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        BY_LANE=config.by_lane,
        # The kernel counts tiles by its programs: with one column block, the one beside an odd last would pass for a tile.
        CLUSTERS=config.pairs if column_blocks > 1 else 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
