"""Loading: the recipes of a `MoELayer` by a plain mapping of names; and the mappings that are tried if none is given."""

from collections.abc import Mapping, Sequence

import torch

from moe_layer.checkpoint.folder import Checkpoint, CheckpointError
from moe_layer.checkpoint.recipe import Part, Recipe
from moe_layer.experts import Experts

Names = Mapping[str, str | Sequence[str]]
"""{our tensor: names in the checkpoint}: with ``{expert}`` one tensor for each expert, without one for all, ``[E, …]``. Several
names are joined along the outputs: the gate's first, then the up projection's."""

KNOWN: tuple[Names, ...] = (
    {"gate_up_proj": "{layer}.experts.gate_up_proj", "down_proj": "{layer}.experts.down_proj"},
    {
        "gate_up_proj": (
            "{layer}.experts.{expert}.gate_proj.weight",
            "{layer}.experts.{expert}.up_proj.weight",
        ),
        "down_proj": "{layer}.experts.{expert}.down_proj.weight",
    },
    {
        "gate_up_proj": ("{layer}.experts.{expert}.w1.weight", "{layer}.experts.{expert}.w3.weight"),
        "down_proj": "{layer}.experts.{expert}.w2.weight",
    },
)


def recipes_by_names(layer: str, experts: Experts, names: Names | None, checkpoint: Checkpoint) -> dict[str, Recipe]:
    """The recipes of each tensor of `experts`, whose layer is called `layer` in the checkpoint.

    Raises:
        ValueError: `names` are not of the tensors that the layer has.
        CheckpointError: no names are given, and none or several of the known ones are there.
    """
    wanted = [tensor.name for tensor in experts.format.tensors]
    if names is None:
        names = _known(layer, wanted, checkpoint)
    if sorted(names) != sorted(wanted):
        raise ValueError(f"names must be of the tensors {sorted(wanted)}, are of {sorted(names)}")
    return {name: _recipe(layer, one, experts.num_experts) for name, one in names.items()}


def _recipe(layer: str, names: str | Sequence[str], num_experts: int) -> Recipe:
    templates = [names] if isinstance(names, str) else list(names)
    return Recipe(tuple(_part(layer, one, num_experts) for one in templates), _joined)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)


def _part(layer: str, template: str, num_experts: int) -> Part:
    name = template.replace("{layer}.", f"{layer}." if layer else "")
    if "{expert}" not in name:
        return Part((name,), is_fused=True)
    return Part(tuple(name.replace("{expert}", str(e)) for e in range(num_experts)), is_fused=False)


def _known(layer: str, wanted: list[str], checkpoint: Checkpoint) -> Names:
    """The one among `KNOWN` of which the checkpoint has anything."""

    def is_there(names: Names) -> bool:
        parts = [part for one in names.values() for part in _recipe(layer, one, 1).parts]
        return sorted(names) == sorted(wanted) and any(part.names[0] in checkpoint for part in parts)

    found = [names for names in KNOWN if is_there(names)]
    if len(found) != 1:
        prefix = f"{layer}." if layer else ""
        raise CheckpointError(
            f"{layer or 'the layer'}: {len(found)} of the known ways to name experts are in the checkpoint; give names=. "
            f"({checkpoint.beside(prefix)})"
        )
    return found[0]
