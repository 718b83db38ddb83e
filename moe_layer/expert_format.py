"""`ExpertFormat`: the tensors of one expert. Pool, loaders, initialisation and the kernels' arguments derive from it.

Legend: H hidden, I intermediate, S slots or experts side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from eplb.relocation.pool import TensorSpec
from moe_kernels import ExpertMatrices
from moe_kernels.activation import ACTIVATIONS
from moe_layer.arguments import check_choice, resolve_dtype


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of an expert.

    Attributes:
        name: as in checkpoints.
        shape: of one expert.
        role: "weight" (drawn anew by `reset_parameters()`), "scale" (1 then) or "bias" (0 then).
        follows_casts: whether `layer.to(dtype)` casts it. Otherwise the dtype is part of the format.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str = "weight"
    follows_casts: bool = True


@dataclass(frozen=True)
class Activation:
    """Between the two matrices: `name(gate) * up` if gated, else `name(up)`."""

    name: str
    gated: bool = True


@dataclass(frozen=True)
class ExpertFormat:
    """The tensors of one expert, what they mean, and the dtype of the hidden states that they multiply."""

    name: str
    tensors: tuple[ExpertTensor, ...]
    activation: Activation
    dtype: torch.dtype

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What a slot holds."""
        return tuple(TensorSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in self.tensors)

    def cast(self, dtype: torch.dtype) -> "ExpertFormat":
        """The format after `layer.to(dtype)`.

        Raises:
            ValueError: no kernel computes in `dtype`.
        """
        resolve_dtype(dtype)
        tensors = (replace(one, dtype=dtype) if one.follows_casts else one for one in self.tensors)
        return replace(self, tensors=tuple(tensors), dtype=dtype)

    def initialise(self, tensor: ExpertTensor, out: torch.Tensor, generator: torch.Generator) -> None:
        """Fill `out`, one expert's `tensor`: weights uniform as in `nn.Linear`."""
        if tensor.role != "weight":
            out.fill_(1.0 if tensor.role == "scale" else 0.0)
            return
        bound = tensor.shape[-1] ** -0.5
        drawn = torch.empty(tensor.shape, device=out.device, dtype=torch.float32)
        out.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def matrices(self, tensors: Mapping[str, torch.Tensor]) -> ExpertMatrices:
        """What the kernels take, of tensors ``[S, *shape]`` by name."""
        return ExpertMatrices(tensors["gate_up_proj"], tensors["down_proj"], self.activation.name)


def gated_format(hidden_size: int, intermediate_size: int, dtype: torch.dtype, activation: str) -> ExpertFormat:
    """``down(act(gate(x)) * up(x))`` in one dtype, stored as Hugging Face stores it: gate rows, then up rows.

    Raises:
        ValueError: an unknown activation, or a dtype that no kernel computes in.
    """
    check_choice("activation", activation, ACTIVATIONS)
    resolve_dtype(dtype)
    tensors = (
        ExpertTensor("gate_up_proj", (2 * intermediate_size, hidden_size), dtype),
        ExpertTensor("down_proj", (hidden_size, intermediate_size), dtype),
    )
    return ExpertFormat("gated", tensors, Activation(activation), dtype)
