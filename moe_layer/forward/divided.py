"""Training: divides the gradients of experts' weights, and no others, where those of dense parameters are averaged.

A rank's experts compute rows of all W ranks, so the gradient of their weights is the sum over all ranks' losses. DDP and
FSDP2 take the mean. One factor for both is what makes W ranks train as one does.
"""

import dataclasses
from typing import Any

import torch

from moe_layer.dispatch import Dispatched


class _ScaleGradient(torch.autograd.Function):
    """The same tensor; its gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


def with_gradients_times(rows: Dispatched, divisor: float) -> Dispatched:
    """`rows`, whose gradients leave the experts `divisor` times as large as they are computed."""
    return dataclasses.replace(
        rows,
        rows_RH=_ScaleGradient.apply(rows.rows_RH, divisor),
        row_weights_N=_ScaleGradient.apply(rows.row_weights_N, divisor),
    )


def with_gradients_over(rows_NH: torch.Tensor, divisor: float) -> torch.Tensor:
    """The experts' output, whose gradient enters them divided.

    Rows are fewer bytes than the weights' gradients, unless batches are large, and buffers to which the kernels add gradients
    (`main_grad`) get them divided too. Exact for powers of two.
    """
    return _ScaleGradient.apply(rows_NH, 1 / divisor)
