"""`Quantisation`: how the matrices of an expert are stored in fewer bits, and the way there and back.

The kernels read these tensors as they are (`moe_kernels.ExpertMatrices`).

Legend: N rows (outputs) of a matrix, K its columns (inputs).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from eplb.relocation.pool import TensorSpec
from moe_kernels import dequantise, quantise_weights
from moe_layer.arguments import check_bool, check_choice

_GROUPS = {"fp8_block": (128,), "mxfp4": (32,), "int4": (32, 128)}
SCHEMES = tuple(_GROUPS)
SCALE, ZERO = "_scale", "_zero"
"""What the names of a matrix's scales and zero points end in."""


@dataclass(frozen=True)
class Quantisation:
    """How the two matrices of every expert are stored.

    Attributes:
        scheme: "fp8_block": e4m3, float32 scales of 128 × 128 blocks; hidden states are rounded to e4m3 too, with scales of
            a row's 128 channels. "mxfp4": e2m1 in groups of 32 with powers of two as scales. "int4": integers in groups with
            bfloat16 scales. In the latter two only the weights are quantised.
        group: columns that share a scale; None: 128 for "fp8_block", 32 for the others. "int4" has 128 too.
        zero_points: of "int4": whether each group has an integer that stands for 0. Otherwise that is 8.

    Raises:
        ValueError: an unknown scheme, or a group or zero points that it does not have.
    """

    scheme: str
    group: int | None = None
    zero_points: bool = False

    def __post_init__(self) -> None:
        check_choice("quantisation", self.scheme, SCHEMES)
        groups = _GROUPS[self.scheme]
        group = groups[0] if self.group is None else self.group
        if group not in groups:
            raise ValueError(f"group of {self.scheme} must be {' or '.join(map(str, groups))}, got {self.group!r}")
        check_bool("zero_points", self.zero_points)
        if self.zero_points and self.scheme != "int4":
            raise ValueError(f"zero_points=True is of int4 alone: {self.scheme} has none")
        object.__setattr__(self, "group", group)

    @staticmethod
    def of(value: Any) -> "Quantisation | None":
        """Of an argument: a scheme's name, a `Quantisation`, or None.

        Raises:
            ValueError: it is none of these.
        """
        if value is None or isinstance(value, Quantisation):
            return value
        check_choice("quantisation", value, SCHEMES, " or a Quantisation or None")
        return Quantisation(value)

    @property
    def columns_per_group(self) -> int:
        """`group`, resolved."""
        assert self.group is not None
        return self.group

    @property
    def values_per_byte(self) -> int:
        return 1 if self.scheme == "fp8_block" else 2

    def __str__(self) -> str:
        parts = [self.scheme]
        if self.scheme == "int4":
            parts.append(f"in groups of {self.group}{', zero points' if self.zero_points else ''}")
        return " ".join(parts)

    def specs(self, name: str, rows: int, columns: int, num_parts: int) -> tuple[TensorSpec, ...]:
        """What stores a matrix ``[rows, columns]`` called `name`: its weights, scales and zero points.

        Args:
            num_parts: matrices that are stacked along the rows: blocks of "fp8_block" are each one's own.

        Raises:
            ValueError: the columns do not divide into groups.
        """
        group = self.columns_per_group
        if self.scheme == "fp8_block":
            scales = (num_parts * -(-(rows // num_parts) // group), -(-columns // group))
            return (
                TensorSpec(name, (rows, columns), torch.float8_e4m3fn),
                TensorSpec(name + SCALE, scales, torch.float32),
            )
        if columns % group:
            raise ValueError(
                f"quantisation={self.scheme!r} needs hidden_size and intermediate_size divisible by its group {group}: "
                f"{name} has {columns} columns"
            )
        per_group = (columns // group, rows)
        specs = [TensorSpec(name, (rows, columns // 2), torch.uint8)]
        specs += [TensorSpec(name + SCALE, per_group, torch.uint8 if self.scheme == "mxfp4" else torch.bfloat16)]
        specs += [TensorSpec(name + ZERO, per_group, torch.uint8)] * self.zero_points
        return tuple(specs)

    def quantise(self, name: str, matrix: torch.Tensor, num_parts: int) -> dict[str, torch.Tensor]:
        """The tensors of `specs` for a float matrix ``[N, K]``, rounded to nearest."""
        options = (self.columns_per_group, self.zero_points, len(matrix) // num_parts)
        made = quantise_weights(matrix.float(), self.scheme, *options)
        names = (name, name + SCALE, name + ZERO)
        return {one: tensor for one, tensor in zip(names, made, strict=True) if tensor is not None}

    def dequantise(self, name: str, tensors: Mapping[str, torch.Tensor], num_parts: int) -> torch.Tensor:
        """The float32 matrix ``[N, K]`` of the tensors of `specs`."""
        stored = (tensors[name], tensors[name + SCALE], tensors.get(name + ZERO))
        return dequantise(*stored, self.scheme, blocks_of=len(tensors[name]) // num_parts)
