"""Loading and saving: the recipes of a `MoELayer` by a plain mapping of names; and the mappings that are tried without one."""

from collections.abc import Mapping, Sequence

import torch

from moe_layer.checkpoint.exactly import exactly
from moe_layer.checkpoint.folder import Checkpoint, CheckpointError
from moe_layer.checkpoint.quantised import hint_for, matrix_recipes
from moe_layer.checkpoint.recipe import Part, Recipe
from moe_layer.checkpoint.stored import Stored
from moe_layer.weights.expert_format import ExpertFormat
from moe_layer.weights.experts import Experts

Names = Mapping[str, str | Sequence[str]]
"""{our tensor: names in the checkpoint}: with ``{expert}`` one tensor for each expert, without one for all, ``[E, …]``. Several
names are joined along the outputs: the gate's first, then the up projection's."""

FUSED: Names = {"gate_up_proj": "{layer}.experts.gate_up_proj", "down_proj": "{layer}.experts.down_proj"}
PROJECTIONS: Names = {
    "gate_up_proj": ("{layer}.experts.{expert}.gate_proj.weight", "{layer}.experts.{expert}.up_proj.weight"),
    "down_proj": "{layer}.experts.{expert}.down_proj.weight",
}
KNOWN: tuple[Names, ...] = (
    FUSED,
    PROJECTIONS,
    {
        "gate_up_proj": ("{layer}.experts.{expert}.w1.weight", "{layer}.experts.{expert}.w3.weight"),
        "down_proj": "{layer}.experts.{expert}.w2.weight",
    },
)


def recipes_by_names(
    layer: str, experts: Experts, names: Names | None, checkpoint: Checkpoint, stored: Stored | None
) -> dict[str, Recipe]:
    """The recipes of each tensor of `experts`, whose layer is called `layer` in the checkpoint.

    Args:
        names: of the two matrices, and of biases. A quantised checkpoint's are those of its unquantised one: what these end in
            is `stored`'s to say.

    Raises:
        ValueError: `names` are not of what the layer has.
        CheckpointError: no names are given, and none or several of the known ones are there.
    """
    names = _known(layer, experts.format, checkpoint, stored) if names is None else names
    return recipes_of(layer, experts, names, stored)


def recipes_of(layer: str, experts: Experts, names: Names, stored: Stored | None) -> dict[str, Recipe]:
    """As `recipes_by_names`, whatever a checkpoint has."""
    wanted = _wanted(experts.format)
    if sorted(names) != sorted(wanted):
        raise ValueError(f"names must be of the tensors {sorted(wanted)}, are of {sorted(names)}")
    matrices = {matrix.name: matrix for matrix in experts.format.parts}
    recipes: dict[str, Recipe] = {}
    for name, templates in names.items():
        parts = _parts(layer, templates, experts.num_experts)
        if stored is None or name not in matrices:
            recipes[name] = Recipe(tuple(Part(*one) for one in parts), _joined, _divided)
            continue
        fused = {is_fused for _, is_fused in parts}
        if len(fused) > 1:
            raise ValueError(f"names of {name} must all have {{expert}}, or none, got {templates!r}")
        options = {"is_fused": fused.pop(), "is_interleaved": stored.is_interleaved}
        recipes |= matrix_recipes(matrices[name], stored, [one for one, _ in parts], **options)
    return recipes


def _wanted(format: ExpertFormat) -> list[str]:
    return [tensor.name for tensor in format.tensors if tensor.role in ("weight", "bias")]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)


def _divided(ours: torch.Tensor, dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    return [exactly(one, dtype) for one, dtype in zip(ours.chunk(len(dtypes)), dtypes, strict=True)]


def _parts(layer: str, templates: str | Sequence[str], num_experts: int) -> list[tuple[tuple[str, ...], bool]]:
    """Of each template the names, and whether it is one for all experts."""
    each = [templates] if isinstance(templates, str) else list(templates)
    return [_part(layer, one, num_experts) for one in each]


def _part(layer: str, template: str, num_experts: int) -> tuple[tuple[str, ...], bool]:
    name = template.replace("{layer}.", f"{layer}." if layer else "")
    if "{expert}" not in name:
        return (name,), True
    return tuple(name.replace("{expert}", str(e)) for e in range(num_experts)), False


def _known(layer: str, format: ExpertFormat, checkpoint: Checkpoint, stored: Stored | None) -> Names:
    """The one among `KNOWN` of which the checkpoint has anything."""
    ending = "" if stored is None else stored.endings["weight"]

    def is_there(names: Names) -> bool:
        parts = [part for one in names.values() for part in _parts(layer, one, 1)]
        return sorted(names) == sorted(_wanted(format)) and any(part[0] + ending in checkpoint for part, _ in parts)

    found = [names for names in KNOWN if is_there(names)]
    if len(found) != 1:
        prefix = f"{layer}." if layer else ""
        raise CheckpointError(
            f"{layer or 'the layer'}: {len(found)} of the known ways to name experts are in the checkpoint; give names=. "
            f"({checkpoint.beside(prefix)}){hint_for(format, checkpoint)}"
        )
    return found[0]
