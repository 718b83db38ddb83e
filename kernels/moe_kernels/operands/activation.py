"""Step 4 of a forward: what is between the two matrices. As data it is a string, see `parse_activation`."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


class ParsedActivation(NamedTuple):
    """``name(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)``, or ``name(up)`` if not `is_gated`.

    Attributes:
        name: "silu" (``g * sigmoid(alpha * g)``), "gelu" (exact, with erf), "gelu_tanh", or "relu2" (relu squared).
        limit: of the clamps; 0.0 for none.
    """

    name: str
    is_gated: bool
    limit: float
    alpha: float
    up_offset: float


@functools.cache
def parse_activation(activation: str) -> ParsedActivation:
    """A name, then what differs from ``name(gate) * up``: "silu", "silu limit=7 alpha=1.702 up_offset=1", "relu2 ungated".

    Raises:
        ValueError: it is none that the kernels have.
    """
    name, *parts = activation.split() if isinstance(activation, str) else [""]
    numbers = {"limit": 0.0, "alpha": 1.0, "up_offset": 0.0}
    is_gated = parts[-1:] != ["ungated"]
    parts = parts if is_gated else parts[:-1]
    try:
        for part in parts:
            key, _, value = part.partition("=")
            if key not in numbers or not math.isfinite(float(value)):
                raise ValueError
            numbers[key] = float(value)
    except ValueError:
        name = ""
    if name not in ACTIVATIONS or numbers["limit"] < 0 or (parts and not is_gated):
        raise ValueError(
            f"activation={activation!r}: must be one of {ACTIVATIONS}, then 'ungated' or some of 'limit=', 'alpha=' and "
            "'up_offset=' with a finite number"
        )
    if name != "silu" and numbers["alpha"] != 1.0:
        raise ValueError(f"activation={activation!r}: only silu has an alpha")
    return ParsedActivation(name, is_gated, **numbers)


def _function(parsed: ParsedActivation, gate: torch.Tensor) -> torch.Tensor:
    if parsed.name == "silu":
        return F.silu(gate) if parsed.alpha == 1.0 else gate * torch.sigmoid(parsed.alpha * gate)
    if parsed.name == "relu2":
        return F.relu(gate).square()
    return F.gelu(gate, approximate="tanh" if parsed.name == "gelu_tanh" else "none")


def _derivative(parsed: ParsedActivation, grad: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`grad` times the derivative of the function at `gate`."""
    if parsed.name == "silu":
        if parsed.alpha == 1.0:
            return torch.ops.aten.silu_backward(grad, gate)
        sigmoid = torch.sigmoid(parsed.alpha * gate)
        return grad * (sigmoid + parsed.alpha * gate * sigmoid * (1 - sigmoid))
    if parsed.name == "relu2":
        return grad * 2 * F.relu(gate)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh" if parsed.name == "gelu_tanh" else "none")


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What a gated activation makes of gate and up."""
    parsed = parse_activation(activation)
    if parsed.limit:
        gate, up = gate.clamp(max=parsed.limit), up.clamp(-parsed.limit, parsed.limit)
    return _function(parsed, gate) * (up + parsed.up_offset if parsed.up_offset else up)


def gated_backward_gate(activation: str, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gradient of `gated` with respect to the gate."""
    parsed = parse_activation(activation)
    if not parsed.limit:
        return _derivative(parsed, grad * (up + parsed.up_offset if parsed.up_offset else up), gate)
    clamped = up.clamp(-parsed.limit, parsed.limit) + parsed.up_offset
    inside = gate <= parsed.limit
    return torch.where(inside, _derivative(parsed, grad * clamped, gate.clamp(max=parsed.limit)), 0.0)


def gated_backward_up(activation: str, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gradient of `gated` with respect to up."""
    parsed = parse_activation(activation)
    if not parsed.limit:
        return grad * _function(parsed, gate)
    return torch.where(up.abs() <= parsed.limit, grad * _function(parsed, gate.clamp(max=parsed.limit)), 0.0)


def ungated(activation: str, up: torch.Tensor) -> torch.Tensor:
    """What an activation without a gate makes of up."""
    return _function(parse_activation(activation), up)


def ungated_backward(activation: str, grad: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gradient of `ungated`."""
    return _derivative(parse_activation(activation), grad, up)
