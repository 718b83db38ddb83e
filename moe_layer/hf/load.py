"""`load_experts_from`: streams a Hugging Face checkpoint into the slots of a swapped model's experts, each rank its own; and
`save_experts_to`, the way back.

Which tensors make an expert is what transformers' own table of conversions says of the model: no names of ours.

Legend: E experts.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_kernels.base.checks import check_kind
from moe_layer.checkpoint.exactly import exactly
from moe_layer.checkpoint.folder import Checkpoint, CheckpointError
from moe_layer.checkpoint.load import stream
from moe_layer.checkpoint.quantised import hint_for, matrix_recipes, stored_for
from moe_layer.checkpoint.recipe import Job, Part, Recipe, numbered
from moe_layer.checkpoint.save import write
from moe_layer.checkpoint.stored import Stored
from moe_layer.hf.swapped import Swapped

# transformers' steps of a conversion that do the same to one expert as to all: by name, and the dimensions that they may touch.
_OF_ONE_EXPERT = {"Concatenate": ("dim",), "Interleave": ("dim",), "Transpose": ("dim0", "dim1")}
_MERGE = "MergeModulelist"


def load_experts_from(model: nn.Module, folder: str | Path, *, progress: bool = True) -> int:
    """Stream the experts of a swapped transformers model from a checkpoint straight into the slots of this rank.

    A rank reads the experts that it holds and no others, one after the other, so it never needs more memory than one; with
    `experts_on_meta()` it never holds the others at all. All that will be read is checked by the files' headers before
    anything is written. Names and layouts are those that transformers converts for this model: per expert or fused.
    Relocations rest meanwhile: where the model is registered with a controller the call is collective, else it is this
    rank's own. The rest of the model is not loaded. Quantised checkpoints go into experts that were swapped with the same
    `quantisation`, byte for byte (see `moe_layer.quantisation_of`).

    Args:
        model: a model whose experts `swap_experts` has swapped.
        folder: a local checkpoint: ``*.safetensors``, with or without an index.
        progress: whether the first rank shows a progress bar, on stderr.

    Returns:
        How many experts this rank has loaded, in all layers together.

    Raises:
        CheckpointError: (a ValueError) tensors are missing, their shapes or dtypes do not fit, or they are stored in a way
            that cannot be read expert by expert. Nothing is written then.
        ValueError: the model has no swapped experts.
        TimeoutError, RuntimeError: relocations did not come to rest. That layer, and those behind it, are not written.
        ImportError: safetensors, tqdm or transformers is missing.

    If reading fails half-way, the layer in question refuses its forwards until it has been loaded.
    """
    layers = _swapped(model)
    return stream(folder, lambda checkpoint: _jobs(model, layers, checkpoint), progress)


def save_experts_to(model: nn.Module, folder: str | Path, like: str | Path) -> int:
    """Write the experts of a swapped transformers model under the names, in the layouts and dtypes of the checkpoint `like`.

    See `moe_layer.save_experts_to`. `save_pretrained()` does that for experts that are not quantised.

    Raises:
        CheckpointError: (a ValueError) `like` does not fit, or cannot hold the values; or `folder` has such tensors already.
        ValueError: the model has no swapped experts, or trainable ones.
        TimeoutError: other ranks did not call it.
        ImportError: safetensors or transformers is missing.
    """
    layers = _swapped(model)
    with Checkpoint(like) as checkpoint:
        return write(folder, _jobs(model, layers, checkpoint), checkpoint)


def _swapped(model: nn.Module) -> dict[str, Swapped]:
    check_kind("model", model, nn.Module)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    if not layers:
        raise ValueError("model must have swapped experts, has none: swap_experts(model) comes first")
    return layers


def _jobs(model: nn.Module, layers: Mapping[str, Swapped], checkpoint: Checkpoint) -> list[Job]:
    found: dict[str, Stored] = {}
    for name, layer in layers.items():
        stored = stored_for(layer.format, checkpoint)
        if stored is not None:
            found[name] = stored
    sources = _Sources(model, layers, checkpoint, next(iter(found.values()), None))
    return [
        Job(name, layer, sources.recipes(name, layer, found.get(name)), found.get(name))
        for name, layer in layers.items()
    ]


class _Sources:
    """For each tensor of the swapped experts, the tensors of the checkpoint that transformers would load it from."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Swapped], checkpoint: Checkpoint, stored: Stored | None
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._model, self._checkpoint = model, checkpoint
        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        wanted = {
            f"{name}.{one.name}" for name, layer in layers.items() for one in layer.format.tensors
        }  # scales: of none
        others = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
        there = dict.fromkeys([*others, *wanted], True)  # for transformers: which names the model has
        prefix = getattr(model, "base_model_prefix", None)
        self._found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in checkpoint.names if stored is None else filter(None, map(stored.plain_name, checkpoint.names)):
            target, pattern = rename_source_key(name, renamings, converters, prefix, there)
            if target not in there and name in there:
                target, pattern = name, None
            if target in wanted:
                self._found[target][pattern].append(name)

    def recipes(self, layer: str, experts: Swapped, stored: Stored | None) -> dict[str, Recipe]:
        matrices = {matrix.name: matrix for matrix in experts.format.parts}
        recipes: dict[str, Recipe] = {}
        for one in experts.format.tensors:
            if stored is None or one.role == "bias":
                recipes[one.name] = self._recipe(layer, one.name, experts)
            elif one.name in matrices:
                source = self._source(layer, one.name, experts)
                source.check_joined()
                options = {"is_fused": source.is_fused, "is_interleaved": experts.layout.is_interleaved}
                recipes |= matrix_recipes(matrices[one.name], stored, source.names, **options)
        return recipes

    def _source(self, layer: str, name: str, experts: Swapped) -> "_Source":
        """
        Raises:
            CheckpointError: there is nothing of it, or we cannot tell an expert's part.
        """
        target = f"{layer}.{name}"
        sources = self._found.get(target)
        if not sources:
            number = re.search(r"(?:^|\.)\d+\.", layer)
            beside = self._checkpoint.beside(layer[: number.end()] if number else "")
            hint = hint_for(experts.format, self._checkpoint)
            raise CheckpointError(
                f"the checkpoint has nothing that transformers would load as {target}: {beside}{hint}"
            )
        if None in sources:
            if len(sources) > 1 or len(sources[None]) > 1:
                every = sorted(one for names in sources.values() for one in names)
                raise CheckpointError(f"{target} is in the checkpoint more than once: {', '.join(every[:6])}")
            return _Source(target, [(sources[None][0],)], is_fused=True)
        converters = {id(self._converters[pattern]): self._converters[pattern] for pattern in sources if pattern}
        if len(converters) > 1:
            raise CheckpointError(f"{target} is in the checkpoint in several layouts: {sorted(map(str, sources))}")
        converter = converters.popitem()[1]
        is_merged = _check_steps(target, converter)
        patterns = [pattern for pattern in converter.source_patterns if pattern in sources]
        lacking = [pattern for pattern in converter.source_patterns if pattern not in sources]
        if lacking:
            raise CheckpointError(f"{target}: the checkpoint has {patterns[0]}, but lacks {', '.join(lacking)}")
        named = []
        for pattern in patterns:
            names = sources[pattern]
            if not is_merged and len(names) > 1:
                raise CheckpointError(f"{target} is in the checkpoint more than once: {', '.join(sorted(names)[:6])}")
            named.append(numbered(names, experts.num_experts) if is_merged else tuple(names))
        # Of one expert there is nothing to merge.
        steps = converter.operations[1:] if is_merged else converter.operations
        return _Source(target, named, not is_merged, converter, steps, patterns)

    def _recipe(self, layer: str, name: str, experts: Swapped) -> Recipe:
        """Of a tensor that is not quantised; for errors see `_source`."""
        layout, source = experts.layout, self._source(layer, name, experts)
        parts = tuple(Part(names, source.is_fused) for names in source.names)
        if source.converter is None:

            def split(ours: torch.Tensor, dtypes: list[torch.dtype]) -> list[torch.Tensor]:
                return [exactly(layout.to_stored(name, ours), dtypes[0])]

            return Recipe(parts, lambda parts: layout.to_ours(name, parts[0]), split)
        stored = layout.to_stored(name, torch.empty(_shape(experts, name), device="meta"))
        convert = _Conversion(self._model, source, stored.shape)
        return Recipe(parts, lambda parts: layout.to_ours(name, convert(parts)))


@dataclass(frozen=True)
class _Source:
    """What transformers would load one tensor of the model from.

    Attributes:
        names: of each part, one or one for each expert.
        converter, steps, patterns: what transformers makes of the parts; None if they are what the model has.
    """

    target: str
    names: list[tuple[str, ...]]
    is_fused: bool
    converter: Any = None
    steps: Sequence[Any] = ()
    patterns: Sequence[str] = ()

    def check_joined(self) -> None:
        """Raises CheckpointError unless the parts are `nn.Linear`'s, or these joined along the outputs."""
        others = [step for step in self.steps if type(step).__name__ != "Concatenate" or step.dim != 1]
        if others:
            raise CheckpointError(
                f"{self.target}: quantised experts must be joined along their outputs alone, not by transformers' step "
                f"{type(others[0]).__name__}"
            )


class _Conversion:
    """transformers' steps, done to one expert: `convert(parts)` takes and gives tensors without a dimension for experts."""

    def __init__(self, model: nn.Module, source: "_Source", shape: torch.Size) -> None:
        self._converter, self._steps, self._patterns = source.converter, source.steps, source.patterns
        self._target = source.target
        self._config = getattr(model, "config", None)
        self._like = torch.empty((1, *shape), device="meta")

    def get_parameter(self, name: str) -> torch.Tensor:
        """In the model's place: a step may ask for the shape of what it makes."""
        assert name == self._target
        return self._like

    def __call__(self, parts: list[torch.Tensor]) -> torch.Tensor:
        held = {pattern: part[None] for pattern, part in zip(self._patterns, parts, strict=True)}
        for step in self._steps:
            held = step.convert(
                held,
                source_patterns=self._converter.source_patterns,
                target_patterns=self._converter.target_patterns,
                full_layer_name=self._target,
                model=self,
                config=self._config,
                missing_keys=None,
            )
        (made,) = held.values()
        if made.shape[:1] != (1,):
            raise CheckpointError(f"transformers' conversion of one expert gives {tuple(made.shape)}")
        return made[0]


def _check_steps(target: str, converter: Any) -> bool:
    """Whether the experts are single tensors, that the first step merges.

    Raises:
        CheckpointError: one of the steps may not be the same for one expert as for all.
    """
    steps = list(converter.operations)
    is_merged = type(steps[0]).__name__ == _MERGE and steps[0].dim == 0
    for step in steps[1:] if is_merged else steps:
        dims = _OF_ONE_EXPERT.get(type(step).__name__)
        if dims is None or len(converter.target_patterns) > 1 or any(getattr(step, dim) < 1 for dim in dims):
            raise CheckpointError(
                f"{target}: the checkpoint stores experts in a way that cannot be read one by one (transformers' step "
                f"{type(step).__name__} of {converter.source_patterns} to {converter.target_patterns}): load the model as "
                "always, then swap_experts(model)"
            )
    return is_merged


def _shape(experts: Swapped, name: str) -> tuple[int, ...]:
    return next(one.shape for one in experts.format.tensors if one.name == name)
