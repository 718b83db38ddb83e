"""Steps 4 and 5 of a forward with fp8_block experts, on Hopper: the kernel of both products, whose programs are persistent.

A program takes the next tile when it has loaded the last one, so that none idles while others have tiles left: first all of
`expert_up`, then those of `expert_down`, each as soon as all hidden channels of its rows are stored. The ring of operands is in
`fp8_ring.py`, the ends of tiles in `store_hidden_fp8.py` and `store_rows_fp8.py`.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, S slots, L lanes. Written in Gluon, Triton's lower level.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import is_gated
from moe_kernels.quantised.fp8_ring import (
    FILL_REGISTERS,
    HALF,
    LINE_LAYOUT,
    REGISTERS,
    SIDE,
    fence_async,
    fill_tile,
    hear,
    load_slot,
    mma_layout,
    multiply_tile,
    new_ring,
    new_staging,
    tell_end,
)
from moe_kernels.quantised.store_hidden_fp8 import new_meeting, store_hidden
from moe_kernels.quantised.store_rows_fp8 import store_rows
from moe_kernels.tiles.tile_order import tile_and_column_block


@gluon.jit
def _are_stored(stored_at, parts):
    return gl.atomic_add(stored_at, 0, sem="acquire", scope="gpu") >= parts


@gluon.jit
def _say_stored(stored, turn, stored_at):
    """When both groups have stored their parts of the program's turn-th tile of `expert_up`, tell the other programs.

    Of two barriers in turn, groups that are a tile ahead of this can't pass one twice.
    """
    mbarrier.wait(stored.index(turn % 2), turn // 2 & 1)
    gl.atomic_add(stored_at, 1, sem="release", scope="gpu")


@gluon.jit
def _fill(
    ring, stored, tiles, x, hidden, gate_up, down, counters_ptr, lane_to_slot_ptr, order_ptr, strides,
    HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, FANOUT: gl.constexpr, BLOCKS: gl.constexpr,
    UP: gl.constexpr, DOWN: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps. `x`: rows, scales; `hidden`, `gate_up`, `down`: descriptor, scales. BLOCKS of `expert_up` in a tile."""
    if PDL:  # see `Launcher`; the warps are set up before
        gdc_wait()
        gdc_launch_dependents()
    tile_lane_ptr, tile_start_ptr, tile_end_ptr, num_tiles_ptr = tiles
    num_tiles = gl.load(num_tiles_ptr)
    stride_row, stride_up_scale, stride_down_scale = strides
    BOTH: gl.constexpr = UP and DOWN
    NUM_BLOCKS: gl.constexpr = (INTERMEDIATE + SIDE - 1) // SIDE
    NUM_STEPS: gl.constexpr = (HIDDEN_SIZE + SIDE - 1) // SIDE
    UP_COLUMNS: gl.constexpr = (NUM_BLOCKS + BLOCKS - 1) // BLOCKS
    DOWN_COLUMNS: gl.constexpr = (NUM_STEPS + 1) // 2
    stored_ptr = counters_ptr
    if BOTH:
        stored_ptr += 1
    num_up = num_tiles * UP_COLUMNS if UP else 0
    most = num_up + (num_tiles * DOWN_COLUMNS if DOWN else 0)
    count = 0
    turn = 0
    unsaid = -1  # the tile of `expert_up` before this one
    work = _next_work(counters_ptr, gl.program_id(0))
    while work < most:
        is_down = work >= num_up
        tile, column_block = tile_and_column_block(
            gl.where(is_down, work - num_up, work), num_tiles, gl.where(is_down, DOWN_COLUMNS, UP_COLUMNS), GROUP_M
        )
        lane, start, end = gl.load(tile_lane_ptr + tile), gl.load(tile_start_ptr + tile), gl.load(tile_end_ptr + tile)
        slot = load_slot(lane_to_slot_ptr, lane)
        work = _next_work(counters_ptr, work + gl.num_programs(0))
        if UP and not is_down:
            scale_at = gate_up[1] + slot.to(gl.int64) * stride_up_scale
            first = BLOCKS * column_block
            if BLOCKS == 1:
                second, second_row = NUM_BLOCKS + first, INTERMEDIATE + first * SIDE
            else:  # past the end there are no weights, and any scale does
                second, second_row = gl.minimum(first + 1, NUM_BLOCKS - 1), (first + 1) * SIDE
            count = fill_tile(
                ring, count, (0, column_block, lane, start, end), x[0], None, x[1], order_ptr, gate_up[0],
                scale_at + first * NUM_STEPS, scale_at + second * NUM_STEPS, slot, first * SIDE, second_row,
                stride_row, FANOUT, HIDDEN_SIZE, M, STAGES,
            )  # fmt: skip
        if DOWN and is_down:
            if BOTH:
                if not _are_stored(stored_ptr + tile, UP_COLUMNS):
                    if unsaid >= 0:  # or two programs might wait for each other
                        _say_stored(stored, turn, stored_ptr + unsaid)
                        turn += 1
                        unsaid = -1
                    while not _are_stored(stored_ptr + tile, UP_COLUMNS):
                        pass
                fence_async()
            scale_at = down[1] + slot.to(gl.int64) * stride_down_scale
            first = 2 * column_block
            second = gl.minimum(first + 1, NUM_STEPS - 1)  # as above
            count = fill_tile(
                ring, count, (1, column_block, lane, start, end), None, hidden[0], hidden[1], None, down[0],
                scale_at + first * NUM_BLOCKS, scale_at + second * NUM_BLOCKS, slot, first * SIDE, (first + 1) * SIDE,
                0, 1, INTERMEDIATE, M, STAGES,
            )  # fmt: skip
        if BOTH:  # only now: who multiplies is in this tile already, and has not to be waited for
            if unsaid >= 0:
                _say_stored(stored, turn, stored_ptr + unsaid)
                turn += 1
            unsaid = gl.where(is_down, -1, tile)
    tell_end(ring, count, STAGES)
    if BOTH and unsaid >= 0:
        _say_stored(stored, turn, stored_ptr + unsaid)


@gluon.jit
def _next_work(counters_ptr, own_next):
    """By a counter: so every tile that is taken belongs to a program that runs, and one that has not begun has none."""
    if counters_ptr is None:
        return own_next
    else:
        return gl.atomic_add(counters_ptr, 1, sem="relaxed")


@gluon.jit
def _multiply(
    ring, stored, staging, meeting, lane_to_slot_ptr, biases, hidden_outputs, order_ptr, row_weights_ptr, outputs,
    boxes, strides,
    GROUP: gl.constexpr, HIDDEN_SIZE: gl.constexpr, INTERMEDIATE: gl.constexpr, ACTIVATION: gl.constexpr,
    UP: gl.constexpr, DOWN: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps, for the first or the second half of each tile's rows or, if they are few, of each block of columns.

    `biases` and `strides`: of `expert_up` and `expert_down`; `outputs`: rows, their homes, and rows of a home.
    """
    if PDL:
        gdc_wait()
    up_bias_ptr, down_bias_ptr = biases
    stride_up_bias, stride_down_bias = strides
    IS_FEW: gl.constexpr = M < SIDE
    OF_ROWS: gl.constexpr = LINE_LAYOUT if IS_FEW else gl.SliceLayout(1, mma_layout(SIDE))
    UP_STEPS: gl.constexpr = (HIDDEN_SIZE + SIDE - 1) // SIDE
    DOWN_STEPS: gl.constexpr = (INTERMEDIATE + SIDE - 1) // SIDE
    count = 0
    turn = 0
    meetings = 0
    kind, column_block, lane, start, end = hear(ring, count, STAGES)
    while kind >= 0:
        is_down = kind == 1
        if not IS_FEW:
            start += GROUP * HALF
        if DOWN:
            position = start + gl.arange(0, M if IS_FEW else HALF, OF_ROWS)
            has_row = is_down & (position < end)
            flat = gl.load(order_ptr + position, mask=has_row, other=0)
            row_weight = gl.load(row_weights_ptr + flat, mask=has_row, other=0.0)
        num_steps = gl.where(is_down, DOWN_STEPS, UP_STEPS)
        left, right, count = multiply_tile(ring, count, start < end, num_steps, GROUP, M, STAGES)
        if UP and not is_down:
            if start < end:
                bias_at = up_bias_ptr
                if up_bias_ptr is not None:
                    bias_at = up_bias_ptr + load_slot(lane_to_slot_ptr, lane).to(gl.int64) * stride_up_bias
                meetings = store_hidden(
                    left, right, staging, meeting, meetings, column_block, bias_at, hidden_outputs, start, end, INTERMEDIATE,
                    GROUP, ACTIVATION, IS_FEW,
                )  # fmt: skip
            if DOWN:
                mbarrier.arrive(stored.index(turn % 2), count=1)
                turn += 1
        if DOWN and is_down & (start < end):
            bias_at = down_bias_ptr
            if down_bias_ptr is not None:
                bias_at = down_bias_ptr + load_slot(lane_to_slot_ptr, lane).to(gl.int64) * stride_down_bias
            first = 2 * column_block * SIDE + (GROUP * HALF if IS_FEW else 0)
            store_rows(
                left, right, staging, boxes, bias_at, row_weight, flat, outputs, first, start, end, HIDDEN_SIZE, IS_FEW
            )  # fmt: skip
        kind, column_block, lane, start, end = hear(ring, count, STAGES)
    if boxes is not None:
        tma.store_wait(0)


@Launcher
@gluon.jit(do_not_specialize=["rows_per_home"])
def experts_fp8_kernel(
    # inputs
    hidden,  # descriptor [N, I]; of UP an output
    x_ptr,
    x_scale_ptr,
    gate_up,  # descriptor [S, 2I, H], or [S, I, H] without a gate
    gate_up_scale_ptr,
    up_bias_ptr,  # None: no biases
    down,  # descriptor [S, H, I]
    down_scale_ptr,
    down_bias_ptr,
    lane_to_slot_ptr,
    row_weights_ptr,
    order_ptr,
    tile_lane_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles_ptr,
    homes_ptr,  # None: all rows go to `rows_ptr`
    boxes,  # descriptor of rows [N, H], ragged: there they go where they are sorted. Or None
    # inputs and outputs
    counters_ptr,  # zeros: tiles taken; of each tile of rows, the blocks of hidden that are stored. None: not UP and DOWN
    # outputs
    hidden_ptr,
    hidden_scale_ptr,
    rows_ptr,
    # shapes and strides, in elements
    rows_per_home,
    stride_row,
    stride_up_scale,
    stride_down_scale,
    stride_up_bias,
    stride_down_bias,
    HIDDEN_SIZE: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    FANOUT: gl.constexpr,
    # constants
    PDL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    UP: gl.constexpr,
    DOWN: gl.constexpr,
    # tunables
    M: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Of UP: tiles of rows by 128 columns of gate and of up, or 256 of up alone. Of DOWN: by 256 columns of the output.

    Those of only one of the two are shared out beforehand.
    """
    ring = new_ring(M, STAGES)
    stored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(stored.index(place), count=2)
    staging = new_staging(M)
    meeting = new_meeting(min(M, 32))  # used with few rows only
    tiles = (tile_lane_ptr, tile_start_ptr, tile_end_ptr, num_tiles_ptr)
    biases = (up_bias_ptr, down_bias_ptr)
    bias_strides = (stride_up_bias, stride_down_bias)
    hidden_outputs = (hidden_ptr, hidden_scale_ptr)
    outputs = (rows_ptr, homes_ptr, rows_per_home)
    BLOCKS: gl.constexpr = 1 if is_gated(ACTIVATION) else 2
    gl.warp_specialize(
        [
            (_multiply, (
                ring, stored, staging.index(0), meeting, lane_to_slot_ptr, biases, hidden_outputs, order_ptr,
                row_weights_ptr, outputs, boxes, bias_strides, 0, HIDDEN_SIZE, INTERMEDIATE, ACTIVATION, UP, DOWN,
                M, STAGES, PDL,
            )),
            (_multiply, (
                ring, stored, staging.index(1), meeting, lane_to_slot_ptr, biases, hidden_outputs, order_ptr,
                row_weights_ptr, outputs, boxes, bias_strides, 1, HIDDEN_SIZE, INTERMEDIATE, ACTIVATION, UP, DOWN,
                M, STAGES, PDL,
            )),
            (_fill, (
                ring, stored, tiles, (x_ptr, x_scale_ptr), (hidden, hidden_scale_ptr), (gate_up, gate_up_scale_ptr),
                (down, down_scale_ptr), counters_ptr, lane_to_slot_ptr, order_ptr,
                (stride_row, stride_up_scale, stride_down_scale), HIDDEN_SIZE, INTERMEDIATE, FANOUT, BLOCKS, UP, DOWN,
                M, STAGES, GROUP_M, PDL,
            )),
        ],
        [4, 4],
        [REGISTERS, FILL_REGISTERS],
    )  # fmt: skip
