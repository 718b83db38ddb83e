"""Saving: `save_experts_to`, of `MoELayer`s, and the writing that a transformers model's experts share.

Legend: E experts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_layer.checkpoint.folder import CONFIG, INDEX, Checkpoint, CheckpointError, config_in, path_of
from moe_layer.checkpoint.load import jobs_of, layers_of
from moe_layer.checkpoint.names import FUSED, PROJECTIONS, Names, recipes_of
from moe_layer.checkpoint.recipe import Job, Recipe
from moe_layer.checkpoint.stored import config_for, stored_of
from moe_layer.weights.meeting import meet
from moe_layer.weights.quantisation import Quantisation
from moe_layer.weights.rows import stacked
from moe_layer.weights.slot_experts import SlotExperts


def quantisation_of(folder: str | Path) -> Quantisation | None:
    """How the experts of a local checkpoint are stored, by `quantization_config` in its config.json; None: unquantised.

    What `MoELayer(quantisation=…)` and `swap_experts(quantisation=…)` need for `load_experts_from(folder)`.

    Raises:
        CheckpointError: (a ValueError) no such folder, or experts that our kernels do not compute.
    """
    stored = stored_of(config_in(folder))
    return None if stored is None else stored.quantisation


def save_experts_to(
    model: nn.Module,
    folder: str | Path,
    *,
    like: str | Path | None = None,
    names: Names | None = None,
    prefix: str = "",
) -> int:
    """Write the experts of every serving `MoELayer` in `model` as a checkpoint: what `load_experts_from` reads.

    Experts that were loaded come out as the same bytes, names and dtypes: where some value would have to be rounded, this
    is refused. One file for each layer, written by the first rank, with an index; config.json gets the `quantization_config`.
    Gates and all else are not saved. Collective over several ranks; a layer at a time is in the first rank's host memory.

    Args:
        model: a layer, or a module with layers. (A transformers model: `moe_layer.hf.save_experts_to`.)
        folder: is made. Other files there stay, if they hold none of the tensors.
        like: a local checkpoint whose names, layouts and dtypes are taken. None: those of `names` and of the layers.
        names: as of `load_experts_from`; None: those of `like`, else "{layer}.experts.{expert}.gate_proj.weight" and so on,
            or fused for mxfp4.
        prefix: the name of `model` in the checkpoint.

    Returns:
        How many experts were saved, in all layers together.

    Raises:
        CheckpointError: (a ValueError) `like` does not fit, or cannot hold the values; or `folder` has such tensors already.
        ValueError: no layers, or trainable ones (their state dict is complete on the ranks together).
        TimeoutError: other ranks did not call it.
        ImportError: safetensors is missing: ``pip install 'moe-layer[checkpoint]'``.
    """
    layers = layers_of(model, "save_experts_to")
    if like is not None:
        with Checkpoint(like) as checkpoint:
            return write(folder, jobs_of(layers, checkpoint, names, prefix), checkpoint)
    jobs = []
    for name, layer in layers.items():
        full, experts = ".".join(part for part in (prefix, name) if part), layer.experts
        quantisation = experts.format.quantisation
        stored = None if quantisation is None else stored_of({"quantization_config": config_for(quantisation)})
        default = FUSED if stored is not None and stored.is_interleaved else PROJECTIONS
        jobs.append(Job(full, experts, recipes_of(full, experts, names or default, stored), stored))
    return write(folder, jobs, None)


def write(folder: str | Path, jobs: Sequence[Job], like: Checkpoint | None) -> int:
    """Write what `jobs` name into `folder`; returns how many experts. Collective over their ranks."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            "save_experts_to() needs the package safetensors: pip install 'moe-layer[checkpoint]'"
        ) from error
    for job in jobs:
        if not isinstance(job.experts, SlotExperts):
            raise ValueError(f"{job.layer}: trainable experts are saved by state_dict() or TrainingState")
        job.experts.check_loaded()
        if like is not None:
            job.check(like)
        for name, recipe in job.recipes.items():
            if recipe.split is None:
                raise CheckpointError(f"{job.layer}: {name} cannot be turned back into the checkpoint's tensors")
    folder, index, written = path_of(folder), {}, 0
    is_writer = all(job.experts.resident.rank == 0 for job in jobs)
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        index = _index_of(folder)
    for number, job in enumerate(jobs, start=1):
        assert isinstance(job.experts, SlotExperts)
        tensors = job.experts.logical().read(True, torch.device("cpu"), only_rank=0)
        written += job.experts.num_experts
        if is_writer:
            made = _stored_tensors(job, tensors, like)
            both = sorted(made.keys() & index.keys())
            if both:
                raise CheckpointError(f"{str(folder)!r} holds {both[0]} already, in {index[both[0]]}")
            file = f"experts-{number:05d}-of-{len(jobs):05d}.safetensors"
            save_file(made, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(made, file)
    if is_writer:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2, sort_keys=True) + "\n")
        _write_config(folder, jobs, like)
    for group in {id(job.experts.process_group): job.experts.process_group for job in jobs}.values():
        if group is not None:
            meet(group, "save_experts_to()", 60.0)
    return written


def _stored_tensors(job: Job, ours: Mapping[str, torch.Tensor], like: Checkpoint | None) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors of one layer, by name, of our tensors ``[E, *shape]``."""
    made: dict[str, torch.Tensor] = {}
    for name, recipe in job.recipes.items():
        dtypes = _dtypes(recipe, like, ours[name].dtype)
        rows: list[list[torch.Tensor]] = [[] for _ in recipe.parts]
        for one in ours[name]:
            assert recipe.split is not None
            for held, piece in zip(rows, recipe.split(one, dtypes), strict=True):
                held.append(piece)
        for part, pieces in zip(recipe.parts, rows, strict=True):
            if part.is_fused:
                made[part.names[0]] = stacked([piece[None] for piece in pieces])
            else:
                made |= dict(zip(part.names, pieces, strict=True))
    made |= _shapes(job, like)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in made.items()}


def _dtypes(recipe: Recipe, like: Checkpoint | None, dtype: torch.dtype) -> list[torch.dtype]:
    """What each part is saved as: what `like` has, else our dtype, or the usual one of tensors that are stored otherwise."""
    if like is not None:
        return [like.like(part.names[0], part.dtypes).dtype for part in recipe.parts]
    return [dtype if dtype in part.dtypes else part.dtypes[0] for part in recipe.parts]


def _shapes(job: Job, like: Checkpoint | None) -> dict[str, torch.Tensor]:
    """The tensors that say the shape of packed weights."""
    ending = None if job.stored is None else job.stored.endings.get("shape")
    made: dict[str, torch.Tensor] = {}
    for matrix in job.experts.format.parts if ending is not None else ():
        assert job.stored is not None and ending is not None
        parts = job.recipes[matrix.name].parts
        for part in parts:
            for name in part.names:
                beside = name.removesuffix(job.stored.endings["weight"]) + ending
                if like is None or beside in like:
                    made[beside] = torch.tensor([matrix.rows // len(parts), matrix.columns])
    return made


def _index_of(folder: Path) -> dict[str, str]:
    """The file of each tensor that `folder` has."""
    if not any(folder.glob("*.safetensors")):
        return {}
    with Checkpoint(folder) as there:
        return there.files


def _write_config(folder: Path, jobs: Sequence[Job], like: Checkpoint | None) -> None:
    """Say in config.json how the experts are stored."""
    stored = next((job.stored for job in jobs if job.stored is not None), None)
    if stored is None:
        return
    config: dict[str, Any] = dict(config_in(folder) or ({} if like is None else like.config))
    if stored_of(config) is None:
        config["quantization_config"] = stored.config
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
