"""Backward over several ranks: repeats dispatch, GEMMs and combine with the lanes that the forward chose.

Legend: T tokens, H hidden, K top-k, L lanes.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_kernels.base.once import refuse_second
from moe_layer.weights.versions import Held

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Dispatch, experts and combine, of (x_TH, weights_TK, lanes_TK, counts_L)."""


class Recomputed(torch.autograd.Function):
    """`compute`; the backward repeats it from the hidden states and *the lanes of this forward*.

    How many rows arrive depends on the placement, and an outer checkpoint that repeats the forward after a flip chooses
    other lanes. So nothing that depends on lanes is kept but the lanes themselves and their counts, as attributes, which no
    checkpoint replaces; and a pin keeps the slots they lead to (I3).
    """

    @staticmethod
    def forward(
        ctx: Any,
        compute: Compute,
        held: Held,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        ctx.compute, ctx.held, ctx.lanes_TK, ctx.counts_L = compute, held, lanes_TK, counts_L
        ctx.save_for_backward(x_TH, weights_TK)
        return compute(x_TH, weights_TK, lanes_TK, counts_L)

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Both gradients, also where only one is wanted: they travel between ranks, and each rank takes part in as many
        # collectives as the others.
        saved = ctx.saved_tensors
        inputs = tuple(one.detach().requires_grad_() for one in saved)
        with torch.enable_grad():
            y_TH = ctx.compute(*inputs, ctx.lanes_TK, ctx.counts_L)
        grads = torch.autograd.grad(y_TH, inputs, grad_TH)
        ctx.held.end_backward(read_again=True)
        if torch.is_grad_enabled():  # the gradients are to have gradients themselves
            grads = refuse_second("a MoELayer of several ranks", grads, (grad_TH, *saved))
        return None, None, None, None, *grads
