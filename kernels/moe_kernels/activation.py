"""Step 4 of a forward: the gated activations, hidden = act(gate) * up."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu")


def check_activation(activation: str) -> None:
    """Raises ValueError for one that the kernels do not have."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: the kernels have {ACTIVATIONS}, each gated: act(gate) * up")


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act(gate) * up; "gelu" is the exact one (with erf)."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate)) * up


def gated_backward_gate(activation: str, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gradient of `gated` with respect to the gate."""
    derivative = torch.ops.aten.silu_backward if activation == "silu" else torch.ops.aten.gelu_backward
    return derivative(grad * up, gate)


def gated_backward_up(activation: str, grad: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The gradient of `gated` with respect to up."""
    return grad * (F.silu(gate) if activation == "silu" else F.gelu(gate))
