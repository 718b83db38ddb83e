"""Steps 4 to 6 of a forward as one op that has a gradient: rows to the experts' outputs, or to their sums.

R source rows, N = R * fanout flat rows, H hidden, I intermediate, J = 2I (gate, up; I without a gate), S slots, L lanes,
T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import FLOATS, check_integer, check_kind, check_pair, check_rows, check_tensor, check_tma
from moe_kernels.base.once import refuse_second
from moe_kernels.base.registered import registered_op
from moe_kernels.gemms.expert_up import expert_up_torch
from moe_kernels.gemms.expert_up_triton import pre_activation_triton
from moe_kernels.gradients.expert_rows_torch import Gradients, Wanted, expert_rows_backward_torch, expert_rows_torch
from moe_kernels.gradients.expert_rows_triton import expert_rows_backward_triton, expert_rows_triton
from moe_kernels.gradients.gradient_configs import GradientConfigs
from moe_kernels.gradients.main_grads import main_grads_of, main_parameters, with_dummies
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.tiles.row_blocks import unversioned
from moe_kernels.tiles.tiles import TileSchedule


@registered_op("moe_kernels::expert_rows", has_gradient=True)
def _expert_rows(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    lanes_TK: torch.Tensor | None,
    fanout: int,
    up: GemmConfig,
    down: GemmConfig,
    grad_hidden: GemmConfig,
    grad_weights: GemmConfig,
    grad_x: GemmConfig,
    recompute: bool,
    adds_to_main_grads: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the pre-activation for the backward, empty if that recomputes it."""
    pre_NJ = _new_pre(x_RH, matrices, schedule, recompute)
    arguments = (x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, lanes_TK, fanout)
    kept = None if recompute else pre_NJ
    if backend == "triton":
        return expert_rows_triton(*arguments, up, down, kept), pre_NJ
    return expert_rows_torch(*arguments, kept), pre_NJ


def _new_pre(
    x_RH: torch.Tensor, matrices: ExpertMatrices, schedule: TileSchedule, is_empty: bool = False
) -> torch.Tensor:
    num_rows = 0 if is_empty else schedule.order_N.shape[0]
    return x_RH.new_empty((num_rows, matrices.gate_up_SNH.shape[1]))


@_expert_rows.register_fake
def _expert_rows_fake(x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, lanes_TK, fanout, *rest):
    *_, recompute, _, _ = rest
    outputs = schedule.order_N.shape[0] if lanes_TK is None else lanes_TK.shape[0]
    return x_RH.new_empty((outputs, matrices.down_SHI.shape[1])), _new_pre(x_RH, matrices, schedule, recompute)


class _Saved(NamedTuple):
    """What a backward is computed of; see `expert_rows_backward_torch`."""

    grad_GH: torch.Tensor
    x_RH: torch.Tensor | None
    pre_NJ: torch.Tensor | None  # None: it is computed again
    matrices: ExpertMatrices
    lane_to_slot_L: torch.Tensor
    schedule: TileSchedule
    row_weights_N: torch.Tensor
    fanout: int
    grad_fanout: int
    up: GemmConfig


def _backward_of(
    saved: _Saved,
    configs: GradientConfigs,
    wanted: Wanted,
    backend: str,
    overwrites_pre: bool = False,
    main_grads: Gradients | None = None,
) -> Gradients:
    """Of either backend."""
    grad_GH, x_RH, pre_NJ, matrices, lane_to_slot_L, schedule, row_weights_N, fanout, grad_fanout, up = saved
    rows = (matrices, lane_to_slot_L, schedule)
    if pre_NJ is None:
        assert x_RH is not None
        overwrites_pre = True
        if backend == "triton":
            pre_NJ = pre_activation_triton(x_RH, *rows, fanout, up)
        else:
            pre_NJ = _new_pre(x_RH, matrices, schedule)
            expert_up_torch(x_RH, *rows, fanout=fanout, pre_NJ=pre_NJ)
    inputs = (grad_GH.contiguous(), x_RH, pre_NJ, matrices, lane_to_slot_L, schedule.order_N, schedule.offsets_L1)
    sizes = (row_weights_N, fanout, grad_fanout, wanted)
    if backend == "triton":
        return expert_rows_backward_triton(
            *inputs, *sizes, configs, overwrites_pre=overwrites_pre, main_grads=main_grads
        )
    return expert_rows_backward_torch(*inputs, *sizes, main_grads=main_grads)


@registered_op("moe_kernels::expert_rows_backward")
def _expert_rows_backward(
    grad_GH: torch.Tensor,
    x_RH: torch.Tensor | None,
    pre_NJ: torch.Tensor | None,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    fanout: int,
    grad_fanout: int,
    up: GemmConfig,
    grad_hidden: GemmConfig,
    grad_weights: GemmConfig,
    grad_x: GemmConfig,
    wanted: list[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a tracer. What is not wanted is empty."""
    saved = _Saved(grad_GH, x_RH, pre_NJ, matrices, lane_to_slot_L, schedule, row_weights_N, fanout, grad_fanout, up)
    grads = _backward_of(saved, GradientConfigs(grad_hidden, grad_weights, grad_x), Wanted(*wanted), backend)
    return tuple(grad_GH.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


@_expert_rows_backward.register_fake
def _expert_rows_backward_fake(grad_GH, x_RH, pre_NJ, matrices, lane_to_slot_L, schedule, row_weights_N, fanout, *rest):
    *_, wanted, _ = rest
    num_rows, hidden_size = schedule.order_N.shape[0], matrices.down_SHI.shape[1]
    shapes = (
        (grad_GH, (num_rows // fanout, hidden_size)),
        (row_weights_N, row_weights_N.shape),
        *(
            (one, None if one is None else one.shape)
            for one in (
                matrices.gate_up_SNH,
                matrices.gate_up_bias_SN,
                matrices.down_SHI,
                matrices.down_bias_SH,
            )
        ),
    )
    return tuple(
        one.new_empty(shape) if is_wanted and one is not None else grad_GH.new_empty(0)
        for (one, shape), is_wanted in zip(shapes, wanted, strict=True)
    )


_TENSORS = (
    "x_RH",
    "row_weights_N",
    "matrices_gate_up_SNH",
    "matrices_gate_up_bias_SN",
    "matrices_down_SHI",
    "matrices_down_bias_SH",
)
"""What has a gradient, in the order of `Wanted` and `Gradients`."""


def _setup_context(ctx, inputs, output):
    x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, lanes_TK, ctx.fanout, *configs = inputs[:-3]
    recompute, adds_to_main_grads, ctx.backend = inputs[-3:]
    ctx.up, _, *ctx.grad_configs = configs
    ctx.main_parameters = main_parameters(matrices, ctx.needs) if adds_to_main_grads else None
    if adds_to_main_grads and not ctx.is_direct:
        raise RuntimeError("adds_to_main_grads=True: needs a plain eager call, neither a tracer nor a dispatch mode")
    ctx.grad_fanout = 1 if lanes_TK is None else lanes_TK.shape[1]
    ctx.activation, ctx.block_m, ctx.extra_m = matrices.activation, schedule.block_m, schedule.extra_m
    _, pre_NJ = output
    ctx.mark_non_differentiable(pre_NJ)
    ctx.set_materialize_grads(False)
    # Nobody else can hold it: neither a caller nor a hook on saved tensors.
    ctx.owns_pre = ctx.is_direct and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    needs_x = recompute or "matrices_gate_up_SNH" in ctx.needs

    def slots(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else unversioned(tensor)

    routing: tuple[torch.Tensor, ...] = (schedule.order_N, schedule.offsets_L1)
    if recompute:
        routing += (schedule.tile_lane, schedule.tile_start, schedule.tile_end, schedule.num_tiles)
    ctx.save_for_backward(
        x_RH if needs_x else None,
        None if recompute else pre_NJ,
        slots(matrices.gate_up_SNH),
        slots(matrices.down_SHI),
        slots(matrices.gate_up_bias_SN),
        slots(matrices.down_bias_SH),
        unversioned(lane_to_slot_L),
        row_weights_N,
        *routing,
    )


def _backward(ctx, needs, grad_GH, _grad_pre):
    wanted = Wanted(*(name in needs for name in _TENSORS))
    if grad_GH is None or not any(wanted):
        return {}
    x_RH, pre_NJ, gate_up, down, up_bias, down_bias, lane_to_slot_L, row_weights_N, *routing = ctx.saved_tensors
    order_N, offsets_L1, *tiles = routing
    # The tiles of the forward serve the recomputation only.
    tile_lane, tile_start, tile_end, num_tiles = tiles or 4 * [offsets_L1]
    saved = _Saved(
        grad_GH,
        x_RH,
        pre_NJ,
        ExpertMatrices(gate_up, down, ctx.activation, up_bias, down_bias),
        lane_to_slot_L,
        TileSchedule(order_N, offsets_L1, tile_lane, tile_start, tile_end, num_tiles, ctx.block_m, ctx.extra_m),
        row_weights_N,
        ctx.fanout,
        ctx.grad_fanout,
        ctx.up,
    )
    grads: Sequence[torch.Tensor | None]
    is_traced = (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(grad_GH) is not torch.Tensor
    )
    main = ctx.main_parameters
    if main is not None or (ctx.owns_pre and not is_traced):
        overwrites = ctx.owns_pre and not torch._C._autograd._get_current_graph_task_keep_graph()
        main_grads = None if main is None else main_grads_of(main)
        with torch.no_grad():
            configs = GradientConfigs(*ctx.grad_configs)
            grads = _backward_of(saved, configs, wanted, ctx.backend, overwrites, main_grads)
        if main is not None:
            grads = with_dummies(grads, main)
    else:
        grads = _expert_rows_backward(*saved, *ctx.grad_configs, list(wanted), ctx.backend)
    found = {name: grad for name, grad, is_wanted in zip(_TENSORS, grads, wanted, strict=True) if is_wanted}
    if torch.is_grad_enabled():  # the gradients are to have gradients themselves
        inputs = (grad_GH, x_RH, gate_up, down, up_bias, down_bias, row_weights_N)
        return dict(zip(found, refuse_second("expert_rows", found.values(), inputs), strict=True))
    return found


_expert_rows.register_autograd(_backward, setup_context=_setup_context)


def expert_rows(
    x_RH: torch.Tensor,
    matrices: ExpertMatrices,
    lane_to_slot_L: torch.Tensor,
    schedule: TileSchedule,
    row_weights_N: torch.Tensor,
    *,
    fanout: int,
    configs: tuple[GemmConfig, GemmConfig],
    gradient_configs: GradientConfigs,
    combine_into: torch.Tensor | None = None,
    recompute: bool = False,
    adds_to_main_grads: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`expert_up`, `expert_down` and, if asked, `combine`, with gradients. The same bits as by these ops.

    Differentiable, once, with respect to `x_RH`, `row_weights_N` and the tensors of `matrices` (their gradients are dense, of
    their shapes; zero for slots without rows). For the backward it keeps `row_weights_N`, the routing, the pre-activation
    [N, J], and `x_RH` if the gradient of the up projection is wanted; neither hidden nor output rows. Until then the slots
    and lanes that have rows must keep what they hold, others may change. Forward and backward are deterministic, bit for bit,
    and wait for nothing on the host.

    Args:
        x_RH: [R, H] float32, float16 or bfloat16; the flat row n reads the row n // fanout. Rows may be padded.
        matrices: of the same dtype.
        lane_to_slot_L: [L] int32, contiguous; read on the device, also in the backward. Entries of lanes without rows are not
            used.
        schedule: of the R * fanout flat rows.
        row_weights_N: [N] float32, contiguous, in flat order.
        fanout: flat rows per source row: K before a dispatch, 1 after it.
        configs: of `expert_up` and `expert_down`; their `block_m` and `schedule_extra_m` must be the schedule's.
        gradient_configs: of the backward, from the function of that name.
        combine_into: lanes_TK [T, K] int32, contiguous, as of `combine`, T * K = N: return the sums. None: return the rows.
        recompute: keep x instead of the pre-activation, and compute that again in the backward, with the same bits.
        adds_to_main_grads: gradients of those tensors of `matrices` that have an attribute `main_grad` are added to it, in
            float32, and `grad` gets none: see `main_grads`. Needs eager mode.
        backend: see `resolve_backend`.

    Returns:
        y_TH [T, H], or without `combine_into` rows_NH [N, H], in flat order: rows with lane -1 are undefined, and their
        gradient is not read. Of the dtype of x.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("x_RH", x_RH, (None, None), FLOATS, contiguous=False)
    check_rows("x_RH", x_RH)
    check_kind("matrices", matrices, ExpertMatrices)
    check_kind("schedule", schedule, TileSchedule)
    check_pair("configs", configs, GemmConfig)
    check_kind("gradient_configs", gradient_configs, GradientConfigs)
    fanout = check_integer("fanout", fanout)
    device, num_rows = x_RH.device, schedule.order_N.shape[0]
    up, down = configs
    matrices.check(x_RH.shape[1], x_RH.dtype, device)
    matrices.check_plain("where a gradient is wanted: quantised experts have none (torch.no_grad() asks for none)")
    check_tensor("lane_to_slot_L", lane_to_slot_L, (schedule.offsets_L1.shape[0] - 1,), torch.int32, device)
    if fanout < 1:
        raise ValueError(f"fanout={fanout}: must be at least 1")
    check_tensor("schedule.order_N", schedule.order_N, (x_RH.shape[0] * fanout,), torch.int32, device)
    check_tensor("row_weights_N", row_weights_N, (num_rows,), torch.float32, device)
    schedule.check_config(up)
    schedule.check_config(down)
    if up.tma or gradient_configs.x.tma or gradient_configs.weights.tma:
        check_tma("matrices.gate_up_SNH", matrices.gate_up_SNH, columns=matrices.intermediate_size)
    if down.tma or gradient_configs.hidden.tma or gradient_configs.weights.tma:
        check_tma("matrices.down_SHI", matrices.down_SHI)
    if adds_to_main_grads and torch.compiler.is_compiling():
        raise ValueError("adds_to_main_grads=True: must be False under torch.compile, whose graphs see no attributes")
    if combine_into is not None:
        check_tensor("combine_into", combine_into, (None, None), torch.int32, device)
        if combine_into.shape[0] * combine_into.shape[1] != num_rows:
            raise ValueError(f"combine_into has shape {tuple(combine_into.shape)}: must be of {num_rows} flat rows")
    grads = (gradient_configs.hidden, gradient_configs.weights, gradient_configs.x)
    arguments = (x_RH, matrices, lane_to_slot_L, schedule, row_weights_N, combine_into, fanout, up, down, *grads)
    return _expert_rows(*arguments, recompute, adds_to_main_grads, resolve_backend(backend, device))[0]
