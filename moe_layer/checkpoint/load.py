"""Loading: `load_experts_from`, of `MoELayer`s, and the streaming that a transformers model's experts share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from moe_kernels.base.checks import check_kind
from moe_layer.checkpoint.folder import Checkpoint, CheckpointError
from moe_layer.checkpoint.names import Names, recipes_by_names
from moe_layer.checkpoint.quantised import stored_for
from moe_layer.checkpoint.recipe import Job
from moe_layer.layer import MoELayer


def load_experts_from(
    model: nn.Module,
    folder: str | Path,
    *,
    names: Names | None = None,
    prefix: str = "",
    progress: bool = True,
) -> int:
    """Stream the experts of every `MoELayer` in `model` from a checkpoint straight into the slots of this rank.

    A rank reads the experts that it holds and no others, one after the other, so it never needs more memory than one. All
    that will be read is checked by the files' headers before anything is written. Gates are not loaded. Relocations rest
    meanwhile: where the model is registered with a controller the call is collective, else it is this rank's own.
    Quantised experts (fp8 in blocks, mxfp4, int4 of compressed-tensors) go into layers built with the same `quantisation`, byte
    for byte: config.json says what they are (see `quantisation_of`).

    Args:
        model: a layer, or a module with layers. (A transformers model: `moe_layer.hf.load_experts_from`.)
        folder: local, with ``*.safetensors``, with or without an index.
        names: of each tensor of an expert ("gate_up_proj", "down_proj"), its name in the checkpoint, or several that are
            joined along the outputs. ``{layer}`` stands for the layer's name, ``{expert}`` for the expert's number; without
            it one tensor ``[E, …]`` holds all. Matrices are ``[out, in]``, as `nn.Linear` has them. None: one of the known
            ways that the checkpoint follows: fused, ``gate_proj``/``up_proj``/``down_proj``, or ``w1``/``w3``/``w2``.
            Of quantised experts the names that unquantised ones would have, ending in ".weight" if not fused.
        prefix: the name of `model` in the checkpoint, as "model.layers.3.mlp" of a layer.
        progress: whether the first rank shows a progress bar, on stderr.

    Returns:
        How many experts this rank has loaded, in all layers together.

    Raises:
        CheckpointError: (a ValueError) tensors are missing, or their shapes or dtypes do not fit. Nothing is written then.
        ValueError: `names` do not fit, or the model has no layers.
        TimeoutError, RuntimeError: relocations did not come to rest. That layer, and those behind it, are not written.
        ImportError: safetensors or tqdm is missing: ``pip install 'moe-layer[checkpoint]'``.

    If reading fails half-way, the layer in question refuses its forwards until it has been loaded.
    """
    layers = layers_of(model, "load_experts_from")
    return stream(folder, lambda checkpoint: jobs_of(layers, checkpoint, names, prefix), progress)


def jobs_of(layers: Mapping[str, MoELayer], checkpoint: Checkpoint, names: Names | None, prefix: str) -> list[Job]:
    """What `checkpoint` has of these layers, by name; for errors see `load_experts_from`."""
    made = []
    for name, layer in layers.items():
        full, experts = ".".join(part for part in (prefix, name) if part), layer.experts
        stored = stored_for(experts.format, checkpoint)
        made.append(Job(full, experts, recipes_by_names(full, experts, names, checkpoint, stored), stored))
    return made


def layers_of(model: nn.Module, function: str) -> dict[str, MoELayer]:
    """The layers of `model`, by name; ValueError if there are none."""
    check_kind("model", model, nn.Module)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoELayer)}
    if not layers:
        raise ValueError(f"model must hold MoELayers, has none (a transformers model: moe_layer.hf.{function})")
    return layers


def stream(folder: str | Path, plan: Callable[[Checkpoint], Sequence[Job]], progress: bool) -> int:
    """Check all of `plan`'s jobs, then do them; returns how many experts were written. For errors see `load_experts_from`."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("load_experts_from() needs the package tqdm: pip install 'moe-layer[checkpoint]'") from error
    with Checkpoint(folder) as checkpoint:
        jobs = plan(checkpoint)
        for job in jobs:
            if job.experts.device.type == "meta":
                raise CheckpointError(f"{job.layer} is on the meta device: give it memory with to_empty() first")
            job.check(checkpoint)
        total = sum(len(job.experts.resident.live_slots()) for job in jobs)
        is_first = all(job.experts.resident.rank == 0 for job in jobs)
        with tqdm(total=total, desc="Loading experts", unit="expert", disable=not (progress and is_first)) as bar:
            written = 0
            for job in jobs:

                def read(experts: Sequence[int], job: Job = job) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
                    for expert in experts:
                        yield expert, job.read(checkpoint, expert)
                        bar.update()

                written += job.experts.load_own_experts(read)
    return written
