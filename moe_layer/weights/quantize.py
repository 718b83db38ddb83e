"""`quantize_experts`: rounds the experts of serving layers in place, and says how far off each tensor then is."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moe_kernels.base.checks import check_kind
from moe_layer.weights.experts import Experts
from moe_layer.weights.quantisation import Quantisation
from moe_layer.weights.saving_guard import refuse_saving
from moe_layer.weights.slot_experts import SlotExperts


@dataclass(frozen=True)
class QuantisationReport:
    """What `quantize_experts` did on this rank.

    Attributes:
        quantisation: how the experts are stored now.
        errors: of each layer, by name, and each of its matrices, by name: ``‖rounded − before‖ / ‖before‖`` (Frobenius), of
            all experts in this rank's slots together.
        bytes_before, bytes_after: of a slot, in all layers together.
    """

    quantisation: Quantisation
    errors: dict[str, dict[str, float]]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [f"quantised the experts of {len(self.errors)} layers: {self.quantisation}"]
        for name in dict.fromkeys(one for errors in self.errors.values() for one in errors):
            every = [errors[name] for errors in self.errors.values() if name in errors]
            lines.append(f"  {name}: relative error {min(every):.2e} to {max(every):.2e}")
        lines.append(f"  bytes of an expert: {self.bytes_after / self.bytes_before:.3f} of before")
        return "\n".join(lines)


@torch.inference_mode(False)
def quantize_experts(model: nn.Module, quantisation: str | Quantisation) -> QuantisationReport:
    """Round the experts of all serving layers in `model` in place, one after the other.

    Gates and everything else stay. A layer's slots are replaced, so at most one layer is held twice. Each rank does its own;
    equal replicas stay equal. Before `EplbController.register()` and before graphs are captured.

    Args:
        model: a `MoELayer`, or a module with such layers or with experts that `swap_experts` has swapped.
        quantisation: "fp8_block", "mxfp4", "int4" or a `Quantisation`.

    Returns:
        The relative error of each matrix.

    Raises:
        ValueError: an unknown quantisation; no layers; experts that are quantised already, that are trainable, or whose sizes
            do not divide into groups. Nothing has changed then.
        RuntimeError: a layer is registered with a controller, shares its pool of slots with others (build the layers with
            `quantisation`, or swap with ``pool="own"``), or waits for its weights. Nothing has changed then.
    """
    wanted = Quantisation.of(quantisation)
    if wanted is None:
        raise ValueError("quantisation must be a scheme or a Quantisation, got None")
    check_kind("model", model, nn.Module)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, Experts)}
    if not layers:
        raise ValueError("model must hold MoELayers or swapped experts, has none")
    slots: dict[str, SlotExperts] = {}
    for name, experts in layers.items():
        if not isinstance(experts, SlotExperts):
            raise ValueError(f"{name or 'model'} is trainable: quantised experts do not train")
        try:
            experts.format.quantised(wanted)
        except ValueError as error:
            raise ValueError(f"{name or 'model'}: {error}") from error
        experts.refuse_if_bound("quantize_experts()")
        experts.check_loaded()
        slots[name] = experts
    refuse_saving(model)
    before = sum(experts.pool.slot_bytes for experts in slots.values())
    errors = {name: _quantise(experts, wanted) for name, experts in slots.items()}
    return QuantisationReport(wanted, errors, before, sum(experts.pool.slot_bytes for experts in slots.values()))


def _quantise(experts: SlotExperts, wanted: Quantisation) -> dict[str, float]:
    """Give `experts` new slots; returns the relative error of each matrix."""
    format = experts.format.quantised(wanted)
    squares = {matrix.name: torch.zeros(2, dtype=torch.float64, device=experts.device) for matrix in format.parts}

    def convert(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = format.quantise(tensors)
        for name, rounded in format.dequantise(made).items():
            exact = tensors[name].float()
            squares[name] += torch.stack([(rounded - exact).square().sum(), exact.square().sum()]).double()
        return made

    experts.store_as(format, convert)
    if experts.device.type == "meta":
        return {}
    return {name: (float(off) / (float(whole) or 1.0)) ** 0.5 for name, (off, whole) in squares.items()}
