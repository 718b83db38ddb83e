"""Backward of the experts: gradients of weights that are added to float32 buffers, as Megatron's training loops keep them.

There a parameter has the attribute `main_grad`, which outlives the micro-batches of a step. Its optimizer reads that instead
of `grad`. (Megatron-LM calls it gradient accumulation fusion.)
"""

from __future__ import annotations

import torch

from moe_kernels.base.checks import check_slots, check_tensor
from moe_kernels.gradients.expert_rows_torch import Gradients
from moe_kernels.operands.matrices import ExpertMatrices

_FIELDS = ("gate_up_SNH", "gate_up_bias_SN", "down_SHI", "down_bias_SH")

Parameters = tuple[torch.Tensor | None, ...]
"""In the order of `_FIELDS`; None: its gradient is not added to a `main_grad`."""


def has_main_grads(matrices: ExpertMatrices) -> bool:
    """Whether any of the tensors has the attribute."""
    return any(hasattr(getattr(matrices, field), "main_grad") for field in _FIELDS)


def main_parameters(matrices: ExpertMatrices, needs: set[str]) -> Parameters:
    """The tensors that have the attribute, of those whose gradient is asked for.

    Raises:
        ValueError: a `main_grad` does not fit.
    """
    found: list[torch.Tensor | None] = []
    for field in _FIELDS:
        tensor = getattr(matrices, field)
        main_grad = getattr(tensor, "main_grad", None)
        if main_grad is None or f"matrices_{field}" not in needs:
            found.append(None)
            continue
        name = f"matrices.{field}.main_grad"
        check_tensor(name, main_grad, tuple(tensor.shape), torch.float32, tensor.device, contiguous=False)
        if main_grad.dim() == 3:
            check_slots(name, main_grad)
        elif main_grad.stride(1) != 1 and main_grad.shape[1] > 1:
            raise ValueError(f"{name} has strides {main_grad.stride()}: the last must be 1")
        found.append(tensor)
    return tuple(found)


def main_grads_of(parameters: Parameters) -> Gradients:
    """The buffers, as they are in the backward."""
    return Gradients(None, None, *(None if one is None else one.main_grad for one in parameters))  # type: ignore[attr-defined]


def with_dummies(grads: Gradients, parameters: Parameters) -> Gradients:
    """With zeros for parameters that have `grad_added_to_main_grad`, which becomes True.

    Megatron's hooks run only where autograd has a gradient to hand over; by this attribute they know that it is none.
    """
    returned = list(grads)
    for place, parameter in enumerate(parameters, start=2):
        if parameter is not None and hasattr(parameter, "grad_added_to_main_grad"):
            parameter.grad_added_to_main_grad = True
            returned[place] = parameter.new_zeros(()).expand(parameter.shape)
    return Gradients(*returned)
