"""The backward of a layer whose experts may move between its forward and its backward.

Legend: T tokens, H hidden, K top-k, L lanes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_layer.experts import Experts


class Recomputed(torch.autograd.Function):
    """Dispatch, experts and combine; the backward repeats them from the hidden states and *the lanes of this forward*.

    How many rows arrive depends on the placement, and an outer checkpoint that repeats the forward after a flip chooses
    other lanes. So nothing that depends on lanes is kept but the lanes themselves and their counts, as attributes, which no
    checkpoint replaces; and a pin keeps the slots they lead to (I3).
    """

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., torch.Tensor],  # of (x_TH, weights_TK, lanes_TK, counts_L)
        experts: Experts,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        ctx.compute, ctx.experts, ctx.lanes_TK, ctx.counts_L = compute, experts, lanes_TK, counts_L
        ctx.parameters = parameters
        ctx.pin = experts.resident.pin()
        # Parameters only so that autograd notices if they are changed in between.
        ctx.save_for_backward(x_TH, weights_TK, *(parameter for parameter in parameters if parameter.requires_grad))
        return compute(x_TH, weights_TK, lanes_TK, counts_L)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, weights_TK, *_ = ctx.saved_tensors
        parameters = tuple(ctx.experts.parameters())
        if any(now is not then for now, then in zip(parameters, ctx.parameters, strict=True)):
            raise RuntimeError(
                "the experts' parameters are no longer those of the forward, which this backward repeats with what the layer "
                "holds: torch.func.functional_call() cannot replace the experts' parameters of a layer that is registered "
                "with an EplbController or spread over ranks"
            )
        # The first two also where nobody wants them: their gradients travel between ranks, and a rank that asked for fewer
        # (x may require grad on some ranks alone) would take part in fewer collectives than the others.
        asked = (True, True, *ctx.needs_input_grad[6:])
        x_TH, weights_TK = x_TH.detach().requires_grad_(), weights_TK.detach().requires_grad_()
        with torch.enable_grad():
            y_TH = ctx.compute(x_TH, weights_TK, ctx.lanes_TK, ctx.counts_L)
        inputs = (x_TH, weights_TK, *parameters)
        kept = [tensor for tensor, is_asked in zip(inputs, asked, strict=True) if is_asked]
        grads = iter(torch.autograd.grad(y_TH, kept, grad_TH))
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.pin.release()
        return None, None, None, None, *(next(grads) if is_asked else None for is_asked in asked)
