"""`load_experts_from`: streams a Hugging Face checkpoint into the slots of a swapped model's experts, each rank its own.

Which tensors make an expert is what transformers' own table of conversions says of the model: no names of ours.

Legend: E experts.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_layer.checkpoint.folder import Checkpoint, CheckpointError
from moe_layer.checkpoint.load import stream
from moe_layer.checkpoint.recipe import Job, Part, Recipe, numbered
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
    rank's own. The rest of the model is not loaded.

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
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    if not layers:
        raise ValueError("model must have swapped experts, has none: swap_experts(model) comes first")
    return stream(folder, lambda checkpoint: _jobs(model, layers, checkpoint), progress)


def _jobs(model: nn.Module, layers: Mapping[str, Swapped], checkpoint: Checkpoint) -> list[Job]:
    sources = _Sources(model, layers, checkpoint)
    return [Job(name, layer, sources.recipes(name, layer)) for name, layer in layers.items()]


class _Sources:
    """For each tensor of the swapped experts, the tensors of the checkpoint that transformers would load it from."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Swapped], checkpoint: Checkpoint) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._model, self._checkpoint = model, checkpoint
        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        wanted = {f"{name}.{one.name}" for name, layer in layers.items() for one in layer.format.tensors}
        others = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
        there = dict.fromkeys([*others, *wanted], True)  # for transformers: which names the model has
        prefix = getattr(model, "base_model_prefix", None)
        self._found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in checkpoint.names:
            target, pattern = rename_source_key(name, renamings, converters, prefix, there)
            if target not in there and name in there:
                target, pattern = name, None
            if target in wanted:
                self._found[target][pattern].append(name)

    def recipes(self, layer: str, experts: Swapped) -> dict[str, Recipe]:
        return {one.name: self._recipe(layer, one.name, experts) for one in experts.format.tensors}

    def _recipe(self, layer: str, name: str, experts: Swapped) -> Recipe:
        """
        Raises:
            CheckpointError: there is nothing of it, or we cannot tell an expert's part.
        """
        target, layout = f"{layer}.{name}", experts.layout
        sources = self._found.get(target)
        if not sources:
            number = re.search(r"(?:^|\.)\d+\.", layer)
            beside = self._checkpoint.beside(layer[: number.end()] if number else "")
            raise CheckpointError(f"the checkpoint has nothing that transformers would load as {target}: {beside}")
        if None in sources:
            if len(sources) > 1 or len(sources[None]) > 1:
                every = sorted(one for names in sources.values() for one in names)
                raise CheckpointError(f"{target} is in the checkpoint more than once: {', '.join(every[:6])}")
            part = Part((sources[None][0],), is_fused=True)
            return Recipe((part,), lambda parts: layout.to_ours(name, parts[0]))
        converters = {id(self._converters[pattern]): self._converters[pattern] for pattern in sources if pattern}
        if len(converters) > 1:
            raise CheckpointError(f"{target} is in the checkpoint in several layouts: {sorted(map(str, sources))}")
        converter = converters.popitem()[1]
        is_merged = _check_steps(target, converter)
        patterns = [pattern for pattern in converter.source_patterns if pattern in sources]
        lacking = [pattern for pattern in converter.source_patterns if pattern not in sources]
        if lacking:
            raise CheckpointError(f"{target}: the checkpoint has {patterns[0]}, but lacks {', '.join(lacking)}")
        parts = []
        for pattern in patterns:
            names = sources[pattern]
            if not is_merged and len(names) > 1:
                raise CheckpointError(f"{target} is in the checkpoint more than once: {', '.join(sorted(names)[:6])}")
            names_of_all = numbered(names, experts.num_experts) if is_merged else tuple(names)
            parts.append(Part(names_of_all, is_fused=not is_merged))
        stored = layout.to_stored(name, torch.empty(_shape(experts, name), device="meta"))
        steps = (
            converter.operations[1:] if is_merged else converter.operations
        )  # of one expert there is nothing to merge
        convert = _Conversion(self._model, converter, steps, patterns, target, stored.shape)
        return Recipe(tuple(parts), lambda parts: layout.to_ours(name, convert(parts)))


class _Conversion:
    """transformers' steps, done to one expert: `convert(parts)` takes and gives tensors without a dimension for experts."""

    def __init__(
        self,
        model: nn.Module,
        converter: Any,
        steps: Sequence[Any],
        patterns: list[str],
        target: str,
        shape: torch.Size,
    ) -> None:
        self._converter, self._steps, self._patterns, self._target = converter, steps, patterns, target
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
