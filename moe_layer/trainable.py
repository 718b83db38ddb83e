"""`TrainableExperts`: the experts of a trainable layer are ordinary parameters: this rank's fixed range."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_kernels import ExpertMatrices
from moe_layer.ddp import refuse_sharding
from moe_layer.expert_format import ExpertFormat
from moe_layer.experts import Experts
from moe_layer.fixed import FixedExperts


class TrainableExperts(Experts):
    """One parameter ``[experts of this rank, *shape]`` for each tensor of the format; the kernels read them directly.

    Optimizers, FSDP2's `fully_shard`, parametrizations and `state_dict()` treat them as those of any module. For
    `DistributedDataParallel` over ranks that share the experts see `moe_layer.ignore_in_ddp`; `fully_shard` over them
    needs ``ignored_params=moe_layer.ignore_in_fsdp(model)``, and raises RuntimeError without.
    """

    trainable = True

    def __init__(
        self,
        format: ExpertFormat,
        resident: FixedExperts,
        process_group: dist.ProcessGroup | None,
        backend: str,
        device: torch.device,
    ) -> None:
        super().__init__(format, resident, process_group, backend)
        for tensor in format.tensors:
            value = torch.empty((resident.num_lanes, *tensor.shape), dtype=tensor.dtype, device=device)
            self.register_parameter(tensor.name, nn.Parameter(value))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._rows(self.format.tensors[0].name).dtype  # FSDP's mixed precision changes it

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._rows(self.format.tensors[0].name).device

    def matrices(self) -> ExpertMatrices:
        if not self.is_loaded:
            self.check_loaded()
        weights = {tensor.name: getattr(self, tensor.name) for tensor in self.format.tensors}
        for name, weight in weights.items():
            if type(weight) not in (torch.Tensor, nn.Parameter):
                raise ValueError(
                    f"experts.{name} must be a plain tensor in the forward, got a {type(weight).__name__}: shard the "
                    "layer or a module around it, not its experts alone, as they are not called"
                )
        return self.format.matrices(weights)

    def _rows(self, name: str) -> torch.Tensor:
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        mesh = getattr(value, "device_mesh", None)  # a DTensor's: `fully_shard` puts one in the place of each parameter
        if mesh is not None and self.process_group is not None:
            refuse_sharding(name, mesh.mesh.flatten().tolist(), self.process_group)
        super().__setattr__(name, value)

    def refuse_conversion(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._converted(fn)

    def _resident_of_copy(self) -> FixedExperts:
        assert isinstance(self.resident, FixedExperts)
        return self.resident.moved_to(self.resident.streams.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "TrainableExperts":
        self.format, device = self._converted(fn)
        super()._apply(fn, recurse)
        if device.type != "meta" and device != self.resident.streams.device:
            assert isinstance(self.resident, FixedExperts)
            self._attach(self.resident.moved_to(device))
        return self
