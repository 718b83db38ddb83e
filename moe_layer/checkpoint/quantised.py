"""Loading and saving: the recipes of a quantised matrix, of one tensor of the checkpoint, or of several by rows."""

from collections.abc import Sequence

import torch

from moe_layer.checkpoint.folder import Checkpoint, CheckpointError
from moe_layer.checkpoint.recipe import Part, Recipe
from moe_layer.checkpoint.stored import ROLES, Stored, stored_of
from moe_layer.weights.expert_format import ExpertFormat, Matrix
from moe_layer.weights.rows import deinterleaved, interleaved, stacked


def stored_for(format: ExpertFormat, checkpoint: Checkpoint) -> Stored | None:
    """How the checkpoint stores experts of this format; None if neither quantises.

    Raises:
        CheckpointError: the format is quantised and the checkpoint is not, or is otherwise.
    """
    if format.quantisation is None:
        return None  # what is there is found out tensor by tensor: experts may be plain beside quantised attention
    stored = stored_of(checkpoint.config)
    if stored is None:
        raise CheckpointError(
            f"the layer's experts are {format.quantisation}, but config.json in {str(checkpoint.folder)!r} has no "
            "quantization_config: load them into an unquantised layer, and then quantize_experts()"
        )
    if stored.quantisation != format.quantisation:
        raise CheckpointError(
            f"the layer's experts are {format.quantisation}, those of {str(checkpoint.folder)!r} are {stored.quantisation} by "
            "its quantization_config: build the layer with quantisation=moe_layer.quantisation_of(folder)"
        )
    return stored


def hint_for(format: ExpertFormat, checkpoint: Checkpoint) -> str:
    """For messages: what to do where plain experts are looked for in a quantised checkpoint; else nothing."""
    try:
        stored = stored_of(checkpoint.config) if format.quantisation is None else None
    except CheckpointError as error:
        return f" ({error})"
    if stored is None:
        return ""
    return f" (its quantization_config says {stored.quantisation}: give quantisation=moe_layer.quantisation_of(folder) first)"


def matrix_recipes(
    matrix: Matrix, stored: Stored, parts: Sequence[tuple[str, ...]], *, is_fused: bool, is_interleaved: bool
) -> dict[str, Recipe]:
    """The recipe of each tensor of `matrix`.

    Args:
        parts: names of what makes it, joined along the rows: each one name ``[E, …]`` or one for each expert, as an unquantised
            checkpoint would call them.
        is_interleaved: whether gate and up rows take turns, if one part holds both.
    """
    turns = is_interleaved and len(parts) == 1 and matrix.num_parts == 2
    return {
        tensor: _recipe(role, stored, parts, is_fused, turns)
        for tensor, role in zip(matrix.tensors, ROLES, strict=False)
    }


def _recipe(role: str, stored: Stored, parts: Sequence[tuple[str, ...]], is_fused: bool, turns: bool) -> Recipe:
    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        ours = stacked([stored.to_ours(role, tensor) for tensor in tensors])
        return stored.laid_out(role, deinterleaved(ours, 0) if turns else ours)

    def split(ours: torch.Tensor, dtypes: list[torch.dtype]) -> list[torch.Tensor]:
        ours = stored.laid_out(role, ours)
        ours = interleaved(ours, 0) if turns else ours
        rows = ours.chunk(len(dtypes))
        return [stored.to_stored(role, one, dtype) for one, dtype in zip(rows, dtypes, strict=True)]

    ending, dtypes = stored.endings[role], stored.dtypes[role]
    named = (tuple(name + ending for name in names) for names in parts)
    return Recipe(tuple(Part(names, is_fused, dtypes) for names in named), join, split)
