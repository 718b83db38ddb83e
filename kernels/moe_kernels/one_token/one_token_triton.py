"""Steps 1 to 6 of a forward of a single token: three kernels (choice; up; down with combine).

They have neither schedule nor tiles nor tensor cores. What counts is how soon the memory is busy, and that it stays so.
K experts per token, E logical experts, H hidden, I intermediate, S slots, L lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import activated, is_gated, narrow, widen
from moe_kernels.quantised.weight_tiles import load_rows
from moe_kernels.routing.routing_triton import choose_experts

_MOST_STEPS = tl.constexpr(16)  # that a program of the down projection has unrolled


@triton.jit
def _prefetch(pointer, num_elements):
    """Start to load up to 32 lines of int32 into L2, if there are elements."""
    if num_elements > 0:
        address = pointer + tl.minimum(tl.arange(0, 32) * 32, num_elements - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def choice_in(scratch_ptr, SCRATCH: tl.constexpr):
    """Slots and weights' bits, int32 [2, K], behind the SCRATCH elements of hidden."""
    return (scratch_ptr + SCRATCH).to(tl.pointer_type(tl.int32), bitcast=True)


@Launcher
@triton.jit(
    do_not_specialize_on_alignment=[
        "logits_ptr", "bias_ptr", "mask_ptr", "table_lanes_ptr", "lane_to_slot_ptr", "increment_ptr", "load_ptr",
    ],
)  # fmt: skip
def _choice_kernel(
    # inputs
    logits_ptr,
    bias_ptr,  # None: no bias
    mask_ptr,  # None: the token counts
    scale,
    epsilon,
    table_lanes_ptr,
    lane_to_slot_ptr,
    increment_ptr,  # None: nothing is recorded
    # outputs
    load_ptr,  # added to
    scratch_ptr,
    # shapes
    num_experts,
    num_lanes,
    SCRATCH: tl.constexpr,
    # constants
    TOP_K: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SUM: tl.constexpr,
    ROUND_TO: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`topk_routing` of one token, and on to the slots; one warp.

    Where each expert is gets read beside the choice, not after it: two reads that depend on each other take as long. The last
    steps' reads and atomics would wait for memory, too, and the next kernel for them: so they find their lines in L2.

    Example: logits [1, 3, 3, 2], K = 2 (renormalized softmax); experts 1 and 2 in the lanes 1 and 2, these in the slots
    7 and 5 → slots [7, 5] and the bits of [0.5, 0.5] behind hidden, load [0, 1, 1, 0].
    """
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
        _prefetch(lane_to_slot_ptr, num_lanes)
        if increment_ptr is not None:
            _prefetch(increment_ptr.to(tl.pointer_type(tl.int32), bitcast=True), 1)
            _prefetch(load_ptr.to(tl.pointer_type(tl.int32), bitcast=True), 2 * num_experts)
    experts = tl.arange(0, BLOCK_E)
    lanes = tl.load(table_lanes_ptr + experts, mask=experts < num_experts, other=-1)
    slots = tl.load(lane_to_slot_ptr + lanes, mask=lanes >= 0, other=-1)
    weights, ids = choose_experts(
        *(logits_ptr, bias_ptr, 1, num_experts, scale, epsilon),
        *(TOP_K, SCORE_FUNCTION, RENORMALIZE, GROUPS, TOP_GROUPS, GROUP_SUM, ROUND_TO),
        *(1, BLOCK_E, BLOCK_K),
    )
    weights, ids = tl.reshape(weights, (BLOCK_K,)), tl.reshape(ids, (BLOCK_K,))
    k = tl.arange(0, BLOCK_K)
    counts = k < TOP_K
    if mask_ptr is not None:
        counts &= tl.load(mask_ptr) != 0
    slot = tl.where(counts, tl.gather(slots, ids, 0), -1)
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    tl.store(choice_ptr + k, slot, mask=k < TOP_K)
    weights = tl.where(slot >= 0, weights, 0.0)
    tl.store(choice_ptr + TOP_K + k, weights.to(tl.int32, bitcast=True), mask=k < TOP_K)
    if increment_ptr is not None:
        # An atomic, because another stream may run this layer at the same time. Nobody reads its result.
        tl.atomic_add(
            load_ptr + ids, tl.load(increment_ptr) + tl.zeros_like(ids).to(tl.int64), mask=counts, sem="relaxed"
        )


@Launcher
@triton.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _up_kernel(
    # inputs
    x_ptr,
    gate_up_ptr,
    bias_ptr,  # None: no biases
    scale_ptr,  # None: not quantised
    zero_ptr,  # None; for `one_token_four_bit`
    # input and output
    scratch_ptr,
    # shapes and strides, in elements
    stride_slot,
    stride_bias,
    stride_scale,
    stride_zero,
    SCRATCH: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    # constants
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK_H: tl.constexpr,
):
    """One element of hidden of one expert."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    column, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(choice_in(scratch_ptr, SCRATCH) + k).to(tl.int64)
    if slot < 0:
        return
    GATED: tl.constexpr = is_gated(ACTIVATION)
    UP_ROWS: tl.constexpr = INTERMEDIATE if GATED else 0  # where they begin
    if SCHEME != "plain":
        gate_up = gate_up_ptr + slot * stride_slot, scale_ptr + slot * stride_scale
        chosen = tl.full((1, 1), True, tl.int1)
    # Under way beside the weights: behind their sum they would be waited for once more.
    gate_bias = 0.0
    up_bias = 0.0
    if bias_ptr is not None:
        bias_at = bias_ptr + slot * stride_bias + column
        if GATED:
            gate_bias = widen(tl.load(bias_at))
        up_bias = widen(tl.load(bias_at + UP_ROWS))
    at = gate_up_ptr + slot * stride_slot + column * HIDDEN_SIZE
    gate = tl.zeros((BLOCK_H,), dtype=tl.float32)
    up = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for first in tl.static_range(0, HIDDEN_SIZE, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        if SCHEME != "plain":
            x = widen(tl.load(x_ptr + h, mask=h < HIDDEN_SIZE, other=0.0))
            if GATED:
                gate_weight = load_rows(*gate_up, column, 0, first, chosen, HIDDEN_SIZE, GROUP, EVICTION, BLOCK_H)
                gate_weight = tl.reshape(gate_weight, (BLOCK_H,))
            up_weight = load_rows(*gate_up, column, UP_ROWS, first, chosen, HIDDEN_SIZE, GROUP, EVICTION, BLOCK_H)
            up_weight = tl.reshape(up_weight, (BLOCK_H,))
        elif first + BLOCK_H <= HIDDEN_SIZE:
            gate_weight = tl.load(at + h, eviction_policy=EVICTION) if GATED else 0.0
            up_weight = tl.load(at + UP_ROWS * HIDDEN_SIZE + h, eviction_policy=EVICTION)
            x = widen(tl.load(x_ptr + h))
        else:
            inside = h < HIDDEN_SIZE
            gate_weight = tl.load(at + h, mask=inside, other=0.0, eviction_policy=EVICTION) if GATED else 0.0
            up_weight = tl.load(at + UP_ROWS * HIDDEN_SIZE + h, mask=inside, other=0.0, eviction_policy=EVICTION)
            x = widen(tl.load(x_ptr + h, mask=inside, other=0.0))
        if GATED:
            gate += widen(gate_weight) * x
        up += widen(up_weight) * x
    gate, up = tl.sum(gate, axis=0), tl.sum(up, axis=0)
    if bias_ptr is not None:
        gate, up = gate + gate_bias, up + up_bias
    hidden = activated(gate, up, ACTIVATION)
    tl.store(scratch_ptr + k * INTERMEDIATE + column, narrow(hidden, scratch_ptr.dtype.element_ty))


@triton.jit
def _down_weights(
    matrix, row, chosen, first, INTERMEDIATE: tl.constexpr, SCHEME: tl.constexpr, GROUP: tl.constexpr,
    EVICTION: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """float32 [K, BLOCK_I] of a row of each expert's matrix: `matrix` has where it begins, or the row of plain ones."""
    if SCHEME == "plain":
        i = first + tl.arange(0, BLOCK_I)[None, :]
        inside = chosen[:, None] & (i < INTERMEDIATE)
        return widen(tl.load(matrix[0] + i, mask=inside, other=0.0, eviction_policy=EVICTION))
    else:
        return load_rows(*matrix, row, 0, first, chosen[:, None], INTERMEDIATE, GROUP, EVICTION, BLOCK_I)


@triton.jit
def _hidden(hidden_at, chosen, first, INTERMEDIATE: tl.constexpr, BLOCK_I: tl.constexpr):
    i = first + tl.arange(0, BLOCK_I)[None, :]
    return widen(tl.load(hidden_at + i, mask=chosen[:, None] & (i < INTERMEDIATE), other=0.0))


@Launcher
@triton.jit(do_not_specialize_on_alignment=["bias_ptr"])
def _down_kernel(
    # inputs
    scratch_ptr,
    down_ptr,
    bias_ptr,  # None: no biases
    scale_ptr,  # None: not quantised
    zero_ptr,  # None; for `one_token_four_bit`
    # outputs
    y_ptr,
    # shapes and strides, in elements
    stride_slot,
    stride_bias,
    stride_scale,
    stride_zero,
    SCRATCH: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    # constants
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
    # tunables
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One element of y, the sum over all experts in a fixed order, in float32.

    With PDL the choice and the first weights are read before the wait. The choice is there, as every program of the
    kernel before has waited for it before it let this one start; weights in a slot that a table names don't change.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    choice_ptr = choice_in(scratch_ptr, SCRATCH)
    # From L2: before its own wait a program may have an older line of this memory in L1.
    slot = tl.load(choice_ptr + k, mask=k < TOP_K, other=-1, cache_modifier=".cg").to(tl.int64)
    chosen = slot >= 0
    at = down_ptr + (slot * stride_slot + row * INTERMEDIATE)[:, None]
    matrix = at, None
    if SCHEME != "plain":
        matrix = down_ptr + (slot * stride_slot)[:, None], scale_ptr + (slot * stride_scale)[:, None]
    down = _down_weights(matrix, row, chosen, 0, INTERMEDIATE, SCHEME, GROUP, EVICTION, BLOCK_I)
    bias = 0.0
    if bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + slot * stride_bias + row, mask=chosen, other=0.0))
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    hidden_at = scratch_ptr + k[:, None] * INTERMEDIATE
    product = down * _hidden(hidden_at, chosen, 0, INTERMEDIATE, BLOCK_I)
    # Unrolled, all loads are under way at once; but the compiler would choke on very long rows.
    UNROLLED: tl.constexpr = min(INTERMEDIATE, _MOST_STEPS * BLOCK_I)
    for first in tl.static_range(BLOCK_I, UNROLLED, BLOCK_I):
        down = _down_weights(matrix, row, chosen, first, INTERMEDIATE, SCHEME, GROUP, EVICTION, BLOCK_I)
        product += down * _hidden(hidden_at, chosen, first, INTERMEDIATE, BLOCK_I)
    for first in tl.range(UNROLLED, INTERMEDIATE, BLOCK_I):
        down = _down_weights(matrix, row, chosen, first, INTERMEDIATE, SCHEME, GROUP, EVICTION, BLOCK_I)
        product += down * _hidden(hidden_at, chosen, first, INTERMEDIATE, BLOCK_I)
    weights = tl.load(choice_ptr + TOP_K + k, mask=k < TOP_K, other=0, cache_modifier=".cg").to(
        tl.float32, bitcast=True
    )
    rows = tl.sum(product, axis=1)
    if bias_ptr is not None:
        rows += bias
    y = tl.sum(rows * weights, axis=0)
    tl.store(y_ptr + row, narrow(y, y_ptr.dtype.element_ty))
