"""Saving and loading of swapped experts: how an expert's tensors lie in the model's checkpoint, and in our slots.

Legend: E experts, H hidden, I intermediate.
"""

from dataclasses import dataclass

import torch

from moe_layer.weights.rows import deinterleaved, interleaved

_JOINED = ("gate_up_proj", "gate_up_proj_bias")
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layout:
    """How a model stores its experts. Our kernels read ``[out, in]``, gate rows first and then up rows.

    Attributes:
        is_transposed: matrices are ``[in, out]`` (GPT-OSS, Aria).
        is_interleaved: gate and up take turns, along the outputs (GPT-OSS).
    """

    is_transposed: bool = False
    is_interleaved: bool = False

    @property
    def is_ours(self) -> bool:
        return not self.is_transposed and not self.is_interleaved

    def to_ours(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """A tensor of the model ``[..., *shape]`` (`name` is its own, without prefix), as our kernels read it; often a view."""
        if self.is_transposed and name in _MATRICES:
            stored = stored.transpose(-1, -2)
        if self.is_interleaved and name in _JOINED:
            stored = deinterleaved(stored, _outputs(name))
        return stored

    def to_stored(self, name: str, ours: torch.Tensor) -> torch.Tensor:
        """The reverse of `to_ours`; contiguous."""
        if self.is_interleaved and name in _JOINED:
            ours = interleaved(ours, _outputs(name))
        if self.is_transposed and name in _MATRICES:
            ours = ours.transpose(-1, -2)
        return ours.contiguous()

    def shape_of(self, name: str, stored: torch.Tensor) -> tuple[int, ...]:
        """The shape of one expert's tensor in our slots, given the model's ``[E, *shape]``."""
        return tuple(self.to_ours(name, stored.detach()[:1].to("meta")).shape[1:])


def _outputs(name: str) -> int:
    """The dimension of the outputs, from the end, in our layout."""
    return -1 if name.endswith("_bias") else -2
