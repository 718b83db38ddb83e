"""`ExpertFormat`: the tensors of one expert. Pool, loaders, initialisation and the kernels' arguments derive from it.

Legend: H hidden, I intermediate, S slots or experts side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from eplb.relocation.pool import TensorSpec
from moe_kernels import ExpertMatrices
from moe_kernels.activation import ACTIVATIONS, parse_activation
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
    """Between the two matrices.

    With a gate: ``name(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)``; without: ``name(up)``.

    Attributes:
        name: "silu" (``g * sigmoid(alpha * g)``), "gelu" (exact, with erf), "gelu_tanh", "relu2" (relu squared).
        limit: of the clamps, positive; None for no clamps. Only with a gate.
        alpha: of "silu".
        up_offset: 1 in GPT-OSS.
    """

    name: str
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0

    @property
    def for_kernels(self) -> str:
        """As `moe_kernels.activation.parse_activation` reads it."""
        if not self.gated:
            return f"{self.name} ungated"
        numbers = {"limit": (self.limit or 0.0, 0.0), "alpha": (self.alpha, 1.0), "up_offset": (self.up_offset, 0.0)}
        parts = [f"{name}={value!r}" for name, (value, default) in numbers.items() if value != default]
        return " ".join([self.name, *parts])


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

    @property
    def hidden_size(self) -> int:
        """H."""
        return next(tensor.shape[0] for tensor in self.tensors if tensor.name == "down_proj")

    @property
    def intermediate_size(self) -> int:
        """I."""
        return next(tensor.shape[1] for tensor in self.tensors if tensor.name == "down_proj")

    def describe(self) -> str:
        """In a few words."""
        act = self.activation
        parts = [f"{act.name} {'gated' if act.gated else 'ungated'}"]
        parts += [f"{name} {value:g}" for name, value in vars(act).items() if name in ("limit", "up_offset") and value]
        parts += [f"alpha {act.alpha:g}"] if act.alpha != 1 else []
        if len(self.tensors) > 2:
            parts.append("biases")
        return f"{', '.join(parts)}, {self.hidden_size} × {self.intermediate_size}, {str(self.dtype)[6:]}"

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
        up = "gate_up_proj" if self.activation.gated else "up_proj"
        return ExpertMatrices(
            tensors[up],
            tensors["down_proj"],
            self.activation.for_kernels,
            tensors.get(f"{up}_bias"),
            tensors.get("down_proj_bias"),
        )


def gated_format(hidden_size: int, intermediate_size: int, dtype: torch.dtype, activation: str) -> ExpertFormat:
    """``down(act(gate(x)) * up(x))`` in one dtype, stored as Hugging Face stores it: gate rows, then up rows.

    Raises:
        ValueError: an unknown activation, or a dtype that no kernel computes in.
    """
    check_choice("activation", activation, ACTIVATIONS)
    return expert_format(hidden_size, intermediate_size, dtype, Activation(activation))


def expert_format(
    hidden_size: int, intermediate_size: int, dtype: torch.dtype, activation: Activation, *, has_bias: bool = False
) -> ExpertFormat:
    """Experts of two matrices in one dtype, under Hugging Face's names.

    Args:
        has_bias: whether each matrix has a bias, "…_bias".

    Raises:
        ValueError: no kernel computes these.
    """
    resolve_dtype(dtype)
    parse_activation(activation.for_kernels)
    name, rows = ("gate_up_proj", 2 * intermediate_size) if activation.gated else ("up_proj", intermediate_size)
    tensors = [
        ExpertTensor(name, (rows, hidden_size), dtype),
        ExpertTensor("down_proj", (hidden_size, intermediate_size), dtype),
    ]
    if has_bias:
        tensors.append(ExpertTensor(f"{name}_bias", (rows,), dtype, "bias"))
        tensors.append(ExpertTensor("down_proj_bias", (hidden_size,), dtype, "bias"))
    return ExpertFormat("gated" if activation.gated else "ungated", tuple(tensors), activation, dtype)
