"""Before the first rebalance: which layers `register()` finds in a model, and what it asks of each."""

from typing import Protocol, runtime_checkable

from torch import nn

from eplb.config import EplbConfig
from eplb.relocation.resident import ResidentExperts


@runtime_checkable
class RelocatableLayer(Protocol):
    """What `register()` looks for among a model's modules: a layer whose experts it may move."""

    resident: ResidentExperts
    expert_ranks: tuple[int, ...]
    """The global ranks that share its experts, in their order; empty for one rank alone."""
    dispatch_backend: str
    """What its forward dispatches with: "nccl", "gloo", "symm_mem" or "local"."""

    def why_not_relocatable(self) -> str | None:
        """Why its experts must not move, None if they may."""
        ...

    def dispatch_failure(self) -> str | None:
        """Why its outputs mean nothing any more, because a forward's dispatch failed; None while none did. Never blocks."""
        ...


def find_layers(model: nn.Module) -> list[RelocatableLayer]:
    """The layers of `model` whose experts may move, each once: by what they hold, as a wrapper answers for the layer in it.

    Raises:
        ValueError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, got {model!r}")
    layers = [module for module in model.modules() if isinstance(module, RelocatableLayer)]
    return list({id(layer.resident): layer for layer in layers}.values())


def check_layer(layer: RelocatableLayer, first: ResidentExperts, ranks: tuple[int, ...], config: EplbConfig) -> None:
    """Raises ValueError if a controller of `config` over `ranks` cannot balance `layer` beside `first`."""
    resident = layer.resident
    if resident.controller is not None and not resident.controller.is_over:
        why = ""
        if resident.controller.is_closed:
            why = ", which is closed, but whose worker has not ended: it may still move the layer's experts"
        raise ValueError(f"a layer of the model is registered with a controller already{why}")
    if layer.expert_ranks != ranks:
        raise ValueError(
            f"process_group has the ranks {list(ranks)}, but a layer of the model shares its experts among "
            f"{list(layer.expert_ranks)} (empty: one rank alone); they must be the same"
        )
    if resident.streams.device != first.streams.device:
        raise ValueError(f"layers are on {first.streams.device} and on {resident.streams.device}; one device is needed")
    asserted = config.num_redundant_experts
    if asserted is not None and asserted != resident.num_redundant_experts:
        raise ValueError(
            f"num_redundant_experts={asserted} is asserted, but a layer of the model was built with "
            f"{resident.num_redundant_experts}"
        )
    if resident.num_experts % config.num_groups:
        raise ValueError(
            f"num_groups={config.num_groups} must divide the num_experts={resident.num_experts} of every layer"
        )
    reason = layer.why_not_relocatable()
    if reason is not None:
        raise ValueError(f"a layer of the model cannot be relocated: {reason}")
