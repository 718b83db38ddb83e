"""Swap: finds out what a module computes between its two matrices, by trying it on a grid of numbers.

Names say little: models clamp, scale and shift under the name "silu". What a module computes can be seen.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moe_kernels.operands.activation import ACTIVATIONS, gated, ungated
from moe_layer.weights.expert_format import Activation

# Both signs, near 0, around usual limits (7, 10), and so far out that any clamp shows.
_GRID = (0.0, 1e-3, 0.02, 0.1, 0.5, 0.9, 1.7, 2.5, 4.0, 6.0, 7.5, 9.0, 11.0, 16.0, 30.0, 100.0, 1e3, 1e4)


def apply_activation(activation: Activation, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """What the kernels' reference makes of `activation`; without a gate `gate` is None."""
    return ungated(activation.for_kernels, up) if gate is None else gated(activation.for_kernels, gate, up)


def find_activation(
    experts: nn.Module, intermediate_size: int, is_gated: bool, is_concatenated: bool, device: torch.device
) -> Activation | None:
    """What `experts` computes between its matrices: by `_apply_gate` if gated, else by `act_fn`. None if none that we know.

    Limits and slopes are looked for among the module's own numbers.
    """
    positive = torch.tensor(_GRID, device=device)
    numbers = torch.cat([-positive.flip(0)[:-1], positive])
    with torch.no_grad():
        if not is_gated:
            found = experts.act_fn(numbers.clone())  # type: ignore[operator]
            return _first(_candidates(experts, False), None, numbers, found)
        pairs = torch.cartesian_prod(numbers, numbers)
        num_rows = -(-len(pairs) // intermediate_size)
        pairs = pairs[torch.arange(num_rows * intermediate_size, device=device) % len(pairs)]
        gate, up = pairs.view(num_rows, intermediate_size, 2).unbind(-1)
        joined = torch.cat([gate, up], dim=-1) if is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
        found = experts._apply_gate(joined)  # type: ignore[operator]
        return _first(_candidates(experts, True), gate, up, found)


def _first(
    candidates: Iterator[Activation], gate: torch.Tensor | None, up: torch.Tensor, found: Any
) -> Activation | None:
    if not isinstance(found, torch.Tensor) or found.shape != up.shape:
        return None
    for candidate in candidates:
        expected = apply_activation(candidate, gate, up)
        if torch.allclose(found.to(expected.dtype), expected, rtol=2e-5, atol=1e-7):
            return candidate
    return None


def _candidates(experts: nn.Module, is_gated: bool) -> Iterator[Activation]:
    """From the plainest on."""
    if not is_gated:
        yield from (Activation(name, gated=False) for name in ACTIVATIONS)
        return
    values = [
        value for value in vars(experts).values() if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    numbers = sorted({float(value) for value in values if value > 0 and math.isfinite(value)})
    for limit in (None, *numbers):
        for name in ACTIVATIONS:
            for alpha in dict.fromkeys((1.0, *numbers)) if name == "silu" else (1.0,):
                for up_offset in (0.0, 1.0):
                    yield Activation(name, limit=limit, alpha=alpha, up_offset=up_offset)
