"""`ExpertFormat`: the tensors of one expert. Pool, loaders, initialisation and the kernels' arguments derive from it.

A quantised matrix is several tensors: weights, scales and perhaps zero points. They are one record with the biases, so a move
takes them all, and loading writes them together.

Legend: H hidden, I intermediate, S slots or experts side by side.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from eplb.relocation.pool import TensorSpec
from moe_kernels import ExpertMatrices
from moe_kernels.operands.activation import ACTIVATIONS, parse_activation
from moe_layer.arguments import check_bool, check_choice, is_number, resolve_dtype
from moe_layer.weights.quantisation import SCALE, ZERO, Quantisation


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of an expert.

    Attributes:
        name: as in checkpoints.
        shape: of one expert.
        role: "weight", or of a quantised matrix its "scale" or "zero" (points); "bias".
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

    Raises:
        ValueError: an unknown name, or a value of another type or out of range.
    """

    name: str
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        check_choice("activation", self.name, ACTIVATIONS)
        check_bool("Activation.gated", self.gated)
        if self.limit is not None and not (is_number(self.limit) and self.limit > 0):
            raise ValueError(f"Activation.limit must be a finite number above 0 or None, got {self.limit!r}")
        for name in ("alpha", "up_offset"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"Activation.{name} must be a finite number, got {getattr(self, name)!r}")

    @property
    def for_kernels(self) -> str:
        """As `moe_kernels.operands.activation.parse_activation` reads it."""
        if not self.gated:
            return f"{self.name} ungated"
        numbers = {"limit": (self.limit or 0.0, 0.0), "alpha": (self.alpha, 1.0), "up_offset": (self.up_offset, 0.0)}
        parts = [f"{name}={value!r}" for name, (value, default) in numbers.items() if value != default]
        return " ".join([self.name, *parts])


@dataclass(frozen=True)
class Matrix:
    """One of the two matrices of an expert, however it is stored.

    Attributes:
        name: of its weights.
        rows, columns: outputs and inputs.
        num_parts: 2 if it is the gate's rows and then the up projection's, else 1.
        tensors: names of the tensors that store it, weights first.
    """

    name: str
    rows: int
    columns: int
    num_parts: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ExpertFormat:
    """The tensors of one expert, what they mean, and the dtype of the hidden states that they multiply.

    Attributes:
        quantisation: how the matrices are stored; None: in `dtype`.
    """

    name: str
    tensors: tuple[ExpertTensor, ...]
    activation: Activation
    dtype: torch.dtype
    quantisation: Quantisation | None = None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What a slot holds."""
        return tuple(TensorSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in self.tensors)

    @property
    def scheme(self) -> str:
        """As the kernels call it: "plain", "fp8_block", "mxfp4" or "int4"."""
        return "plain" if self.quantisation is None else self.quantisation.scheme

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None if nothing is quantised."""
        return None if self.quantisation is None else self.quantisation.group

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._down_shape[0]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self._down_shape[1] * (1 if self.quantisation is None else self.quantisation.values_per_byte)

    @property
    def _down_shape(self) -> tuple[int, ...]:
        return next(tensor.shape for tensor in self.tensors if tensor.name == "down_proj")

    @property
    def has_bias(self) -> bool:
        return any(tensor.role == "bias" for tensor in self.tensors)

    @property
    def parts(self) -> tuple[Matrix, Matrix]:
        """Its matrices: into the hidden rows, and out of them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        held = {tensor.name for tensor in self.tensors}

        def matrix(name: str, rows: int, columns: int, num_parts: int) -> Matrix:
            names = tuple(one for one in (name, name + SCALE, name + ZERO) if one in held)
            return Matrix(name, rows, columns, num_parts, names)

        num_parts = 2 if self.activation.gated else 1
        up = "gate_up_proj" if self.activation.gated else "up_proj"
        return matrix(up, num_parts * inner, hidden, num_parts), matrix("down_proj", hidden, inner, 1)

    def describe(self) -> str:
        """In a few words."""
        act = self.activation
        parts = [f"{act.name} {'gated' if act.gated else 'ungated'}"]
        parts += [f"{name} {value:g}" for name, value in vars(act).items() if name in ("limit", "up_offset") and value]
        parts += [f"alpha {act.alpha:g}"] if act.alpha != 1 else []
        parts += ["biases"] if self.has_bias else []
        stored = "" if self.quantisation is None else f", {self.quantisation} weights"
        return f"{', '.join(parts)}, {self.hidden_size} × {self.intermediate_size}, {str(self.dtype)[6:]}{stored}"

    def cast(self, dtype: torch.dtype) -> "ExpertFormat":
        """The format after `layer.to(dtype)`: hidden states and biases follow, quantised tensors stay what they are.

        Raises:
            ValueError: no kernel computes in `dtype`.
        """
        resolve_dtype(dtype)
        tensors = (replace(one, dtype=dtype) if one.follows_casts else one for one in self.tensors)
        return replace(self, tensors=tuple(tensors), dtype=dtype)

    def quantised(self, quantisation: Quantisation) -> "ExpertFormat":
        """The same experts with their matrices stored so.

        Raises:
            ValueError: they are quantised already, or their sizes do not divide into groups.
        """
        if self.quantisation is not None:
            raise ValueError(f"the experts are quantised already ({self.quantisation})")
        sizes = (self.hidden_size, self.intermediate_size, self.dtype, self.activation)
        return expert_format(*sizes, has_bias=self.has_bias, quantisation=quantisation)

    def quantise(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One expert of this format, of the tensors that the unquantised format has."""
        made = {tensor.name: tensors[tensor.name] for tensor in self.tensors if tensor.role == "bias"}
        for matrix in self.parts:
            if self.quantisation is None:
                made[matrix.name] = tensors[matrix.name]
            else:
                made |= self.quantisation.quantise(matrix.name, tensors[matrix.name], matrix.num_parts)
        return {tensor.name: made[tensor.name].to(tensor.dtype) for tensor in self.tensors}

    def dequantise(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The two matrices of one expert of this format, float32, by name."""
        if self.quantisation is None:
            return {matrix.name: tensors[matrix.name].float() for matrix in self.parts}
        dequantise = self.quantisation.dequantise
        return {matrix.name: dequantise(matrix.name, tensors, matrix.num_parts) for matrix in self.parts}

    def draw(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One expert on the generator's device: matrices uniform as in `nn.Linear`, then quantised; biases 0."""
        device, drawn = generator.device, {}
        for matrix in self.parts:
            bound = matrix.columns**-0.5
            value = torch.empty(matrix.rows, matrix.columns, device=device, dtype=torch.float32)
            drawn[matrix.name] = value.uniform_(-bound, bound, generator=generator)
        for tensor in self.tensors:
            if tensor.role == "bias":
                drawn[tensor.name] = torch.zeros(tensor.shape, device=device, dtype=tensor.dtype)
        return self.quantise(drawn)

    def torn(self, names: Collection[str]) -> tuple[str, str] | None:
        """Of tensors that are to be written, one whose companion is missing, and that: they mean nothing apart."""
        for matrix in self.parts:
            given = [name for name in matrix.tensors if name in names]
            if given and len(given) < len(matrix.tensors):
                return given[0], next(name for name in matrix.tensors if name not in names)
        return None

    def matrices(self, tensors: Mapping[str, torch.Tensor]) -> ExpertMatrices:
        """What the kernels take, of tensors ``[S, *shape]`` by name."""
        up, down = (matrix.name for matrix in self.parts)
        biases = (tensors.get(f"{up}_bias"), tensors.get(f"{down}_bias"))
        plain = (tensors[up], tensors[down], self.activation.for_kernels, *biases)
        if self.quantisation is None:
            return ExpertMatrices(*plain)
        return ExpertMatrices(
            *plain,
            gate_up_scale=tensors[up + SCALE],
            down_scale=tensors[down + SCALE],
            gate_up_zero=tensors.get(up + ZERO),
            down_zero=tensors.get(down + ZERO),
            scheme=self.quantisation.scheme,
        )


def gated_format(
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    activation: str,
    quantisation: str | Quantisation | None = None,
) -> ExpertFormat:
    """``down(act(gate(x)) * up(x))``, stored as Hugging Face stores it: gate rows, then up rows.

    Raises:
        ValueError: an unknown activation, a dtype that no kernel computes in, or sizes that cannot be quantised so.
    """
    sizes = (hidden_size, intermediate_size, dtype, Activation(activation))
    return expert_format(*sizes, quantisation=Quantisation.of(quantisation))


def expert_format(
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    activation: Activation,
    *,
    has_bias: bool = False,
    quantisation: Quantisation | None = None,
) -> ExpertFormat:
    """Experts of two matrices under Hugging Face's names, in `dtype` or quantised.

    Args:
        has_bias: whether each matrix has a bias, "…_bias", in `dtype`.

    Raises:
        ValueError: no kernel computes these.
    """
    resolve_dtype(dtype)
    parse_activation(activation.for_kernels)
    name, num_parts = ("gate_up_proj", 2) if activation.gated else ("up_proj", 1)
    rows = num_parts * intermediate_size
    tensors = [
        *_stored(name, rows, hidden_size, num_parts, dtype, quantisation),
        *_stored("down_proj", hidden_size, intermediate_size, 1, dtype, quantisation),
    ]
    if has_bias:
        tensors.append(ExpertTensor(f"{name}_bias", (rows,), dtype, "bias"))
        tensors.append(ExpertTensor("down_proj_bias", (hidden_size,), dtype, "bias"))
    kind = "gated" if activation.gated else "ungated"
    return ExpertFormat(kind, tuple(tensors), activation, dtype, quantisation)


def _stored(
    name: str, rows: int, columns: int, num_parts: int, dtype: torch.dtype, quantisation: Quantisation | None
) -> list[ExpertTensor]:
    """The tensors of one matrix."""
    if quantisation is None:
        return [ExpertTensor(name, (rows, columns), dtype)]
    roles = {name: "weight", name + SCALE: "scale", name + ZERO: "zero"}
    specs = quantisation.specs(name, rows, columns, num_parts)
    return [ExpertTensor(one.name, one.shape, one.dtype, roles[one.name], follows_casts=False) for one in specs]
