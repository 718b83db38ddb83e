"""Loading: which tensors of a checkpoint make one expert's tensors, and how.

Legend: E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from moe_layer.checkpoint.folder import FLOAT_DTYPES, Checkpoint, CheckpointError, _some
from moe_layer.checkpoint.stored import Stored
from moe_layer.weights.experts import Experts

Join = Callable[[list[torch.Tensor]], torch.Tensor]
"""Of one expert's tensors, each ``[*shape]`` without a dimension for experts, in the order of the recipe's parts."""
Split = Callable[[torch.Tensor, list[torch.dtype]], list[torch.Tensor]]
"""The reverse: of our tensor of one expert and the dtypes of the parts."""


@dataclass(frozen=True)
class Part:
    """Tensors of a checkpoint that hold the same thing of all experts.

    Attributes:
        names: one, of a tensor ``[E, …]``, or E, one for each expert.
        is_fused: whether it is one tensor for all experts.
        dtypes: that they may have.
    """

    names: tuple[str, ...]
    is_fused: bool
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES

    def read(self, checkpoint: Checkpoint, expert: int) -> torch.Tensor:
        if self.is_fused:
            return checkpoint.read(self.names[0], expert)[0]
        return checkpoint.read(self.names[expert])

    def like(self, checkpoint: Checkpoint, num_experts: int) -> torch.Tensor:
        """One expert's tensor on the meta device.

        Raises:
            CheckpointError: tensors are missing, or differ in their shapes, or a fused one has not E rows.
        """
        missing = [name for name in self.names if name not in checkpoint]
        if missing:
            raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors: {_some(missing)}")
        if self.is_fused:
            whole = checkpoint.like(self.names[0], self.dtypes)
            if not whole.dim() or whole.shape[0] != num_experts:
                raise CheckpointError(
                    f"{self.names[0]} must have one row for each of {num_experts} experts, has the shape "
                    f"{tuple(whole.shape)}"
                )
            return whole[0]
        first = checkpoint.like(self.names[0], self.dtypes)
        for name in self.names[1:]:
            other = checkpoint.like(name, self.dtypes)
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{name} must be like {self.names[0]}, which is {first.dtype} {tuple(first.shape)}; is "
                    f"{other.dtype} {tuple(other.shape)}"
                )
        return first


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the format comes of a checkpoint.

    Attributes:
        split: how it goes back; None: in no known way.
    """

    parts: tuple[Part, ...]
    join: Join
    split: Split | None = None

    def read(self, checkpoint: Checkpoint, expert: int) -> torch.Tensor:
        return self.join([part.read(checkpoint, expert) for part in self.parts])


@dataclass(frozen=True)
class Job:
    """One layer's experts and the recipes of their tensors.

    Attributes:
        layer: its name, for messages.
        experts: what is written.
        recipes: of each tensor of the format, as our kernels read it.
        stored: how the checkpoint stores it, if it is quantised.
    """

    layer: str
    experts: Experts
    recipes: Mapping[str, Recipe]
    stored: Stored | None = None

    def check(self, checkpoint: Checkpoint) -> None:
        """From headers alone: all that this layer's ranks will read is there, and fits.

        Raises:
            CheckpointError: it is not; names the layer, the tensors and the rule.
        """
        for tensor in self.experts.format.tensors:
            recipe = self.recipes[tensor.name]
            try:
                likes = [part.like(checkpoint, self.experts.num_experts) for part in recipe.parts]
                made = recipe.join(likes)
            except CheckpointError as error:
                raise CheckpointError(f"{self.layer}: {tensor.name}: {error}") from error
            except Exception as error:  # transformers' own conversion, or torch.cat of shapes that do not fit
                shapes = ", ".join(str(tuple(one.shape)) for one in likes)
                raise CheckpointError(
                    f"{self.layer}: {tensor.name} cannot be made of tensors of the shapes {shapes}: {error}"
                ) from error
            if tuple(made.shape) != tensor.shape:
                names = _some(part.names[0] for part in recipe.parts)
                raise CheckpointError(
                    f"{self.layer}: {tensor.name} of one expert must have the shape {tensor.shape}, but {names} give "
                    f"{tuple(made.shape)}"
                )

    def read(self, checkpoint: Checkpoint, expert: int) -> dict[str, torch.Tensor]:
        """One expert, as our kernels read it, in host memory."""
        return {
            tensor.name: self.recipes[tensor.name].read(checkpoint, expert).to(tensor.dtype)
            for tensor in self.experts.format.tensors
        }


def numbered(names: Iterator[str] | list[str], num_experts: int) -> tuple[str, ...]:
    """Names that differ in one number, the expert's, in the order of the experts; those of experts that lack are made up.

    Raises:
        CheckpointError: they differ in more, or the numbers are not of 0 to E - 1.
    """
    found: dict[int, str] = {}
    shapes = set()
    for name in names:
        words = name.split(".")
        places = [place for place, word in enumerate(words) if word.isdigit()]
        if not places:
            raise CheckpointError(f"{name} has no number that could be its expert's")
        found[int(words[places[-1]])] = name
        shapes.add((".".join(words[: places[-1]]), ".".join(words[places[-1] + 1 :])))
    if len(shapes) != 1:
        raise CheckpointError(f"names must differ in the expert's number alone, got {_some(found.values())}")
    if max(found) >= num_experts:
        raise CheckpointError(f"{found[max(found)]} is of no expert: there are {num_experts}")
    before, after = shapes.pop()
    return tuple(found.get(e, f"{before}.{e}.{after}") for e in range(num_experts))
