"""`TrainableExperts`: the experts of a trainable layer are ordinary parameters: this rank's fixed range."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from eplb.planning.placement import Placement
from eplb.relocation.resident import ResidentExperts
from moe_kernels import ExpertMatrices
from moe_kernels.gradients.main_grads import has_main_grads
from moe_layer.collectives import all_gather_rows
from moe_layer.trainable.copies import Copies
from moe_layer.trainable.ddp import refuse_sharding
from moe_layer.weights.expert_format import ExpertFormat
from moe_layer.weights.experts import Experts, NewWeights
from moe_layer.weights.owned import OwnedExperts

_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)  # the last two are of `torch.export`


class TrainableExperts(Experts):
    """One parameter ``[experts of this rank, *shape]`` for each tensor of the format.

    Optimizers, FSDP2's `fully_shard`, parametrizations and `state_dict()` treat them as those of any module, whatever the
    placement. For `DistributedDataParallel` over ranks that share the experts see `moe_layer.ignore_in_ddp`; `fully_shard`
    over them needs ``ignored_params=moe_layer.ignore_in_fsdp(model)``, and raises RuntimeError without.

    While each expert computes at its owner alone, the kernels read the parameters themselves. Else they read copies, one a
    lane: the first forward after a backward, a load or `place()` sends the weights to them, and each backward returns their
    gradients. What writes parameters otherwise must call `publish()`, on all ranks: without it, a write that PyTorch counts
    (not those through ``.data``) is an error in the next forward.
    """

    trainable = True
    copies: Copies

    def __init__(
        self,
        format: ExpertFormat,
        resident: OwnedExperts,
        process_group: dist.ProcessGroup | None,
        backend: str,
        device: torch.device,
    ) -> None:
        super().__init__(format, resident, process_group, backend)
        for tensor in format.tensors:
            value = torch.empty((resident.num_owned, *tensor.shape), dtype=tensor.dtype, device=device)
            self.register_parameter(tensor.name, nn.Parameter(value))

    def _attach(self, resident: ResidentExperts | OwnedExperts) -> None:
        super()._attach(resident)
        self._forget_copies()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._rows(self.format.tensors[0].name).dtype  # FSDP's mixed precision changes it

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._rows(self.format.tensors[0].name).device

    @property
    def owned(self) -> OwnedExperts:
        assert isinstance(self.resident, OwnedExperts)
        return self.resident

    def matrices(self) -> ExpertMatrices:
        if not self.is_loaded:
            self.check_loaded()
        weights = {tensor.name: getattr(self, tensor.name) for tensor in self.format.tensors}
        for name, weight in weights.items():
            if type(weight) not in _PLAIN:
                raise ValueError(
                    f"experts.{name} must be a plain tensor in the forward, got a {type(weight).__name__}: shard the "
                    "layer or a module around it, not its experts alone, as they are not called"
                )
        if not self.resident.is_at_home:  # type: ignore[union-attr]
            assert self.process_group is not None
            if has_main_grads(self.format.matrices(weights)):
                raise ValueError(
                    "experts that compute away from their owners cannot have a main_grad: their gradients come back to grad"
                )
            weights = self.copies.of(weights)
        return self.format.matrices(weights)

    # ---- placement

    def place(self, placement: Placement, shares_WS: np.ndarray | None = None) -> None:
        """Let experts compute elsewhere from the next forward on. Collective; between steps, with no backward to come.

        Parameters, gradients and the optimizer's state stay where they are. Outputs and gradients stay the same: bit for bit
        where an expert has one replica before and after, else to rounding.

        Args:
            placement: of all lanes of all ranks, equal on all ranks.
            shares_WS: the part of its expert's tokens that each lane gets; equal parts if None.

        Raises:
            RuntimeError: gradients wait in `moe_layer.training.no_sync`, or a rank does not take part.
            ValueError: it does not fit, or differs between ranks; nothing has changed then. Or all experts are on this rank.
        """
        if self.process_group is None or self.owned.num_ranks == 1:
            raise ValueError("place() needs a process_group of several ranks: here all experts are on one")
        self.copies.check_nothing_waits("place()")
        problem = None
        try:
            self.owned.check(placement, shares_WS)
        except ValueError as error:
            problem = error  # said to the others first, who would wait
        digest = -1 if problem else placement.digest()
        with self.copies.begin("agreeing on a placement") as group:
            mine = torch.tensor([[digest]], dtype=torch.int64, device=self.device)
            digests = all_gather_rows(mine, group).flatten().tolist()
        if problem:
            raise problem
        if set(digests) != {digest}:
            fit = [rank for rank, other in enumerate(digests) if other < 0]
            why = f": it does not fit on the ranks {fit} of process_group" if fit else ""
            raise ValueError(f"placement must be equal on all ranks{why}")
        moves = placement != self.owned.placement
        self.owned.place(placement, shares_WS)
        if moves:  # with new shares alone the copies are where they are wanted
            self.copies.moved()

    def publish(self) -> None:
        """The next forward sends the weights to all copies. On all ranks, where parameters were written otherwise."""
        self.copies.is_stale = True

    def _forget_copies(self) -> None:
        self.copies = Copies(self.owned, self.process_group, self.owned.streams.device)

    # ---- writing the parameters

    def reset_parameters(self, seed: int) -> None:
        super().reset_parameters(seed)
        self.publish()

    def load_experts(self, weights: NewWeights) -> None:
        super().load_experts(weights)
        self.publish()

    def load_own_experts(
        self, read: Callable[[Sequence[int]], Iterator[tuple[int, Mapping[str, torch.Tensor]]]]
    ) -> int:
        written = super().load_own_experts(read)
        self.publish()
        return written

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._note_range(destination, prefix, self.ranges()[self.resident.rank])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        errors: list[str] = rest[-1]
        before = len(errors)
        self._check_range(state_dict, prefix, local_metadata, errors)
        if len(errors) > before:
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if len(errors) == before and all(prefix + tensor.name in state_dict for tensor in self.format.tensors):
            self.is_loaded = True
        self.publish()

    def _rows(self, name: str) -> torch.Tensor:
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        mesh = getattr(value, "device_mesh", None)  # a DTensor's: `fully_shard` puts one in the place of each parameter
        if mesh is not None and self.process_group is not None:
            refuse_sharding(name, mesh.mesh.flatten().tolist(), self.process_group)
        super().__setattr__(name, value)

    def refuse_conversion(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._converted(fn)

    def _resident_of_copy(self) -> OwnedExperts:
        return self.owned.moved_to(self.owned.streams.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "TrainableExperts":
        self.format, device = self._converted(fn)
        super()._apply(fn, recurse)
        if device.type != "meta" and device != self.resident.streams.device:
            self._attach(self.owned.moved_to(device))
        self._forget_copies()
        return self
