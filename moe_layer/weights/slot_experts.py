"""`SlotExperts`: the experts of a serving layer. Their weights are in the slots of a pool, and are no parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version

from eplb.relocation.pool import SlotPool, SlotState
from eplb.relocation.resident import ResidentExperts
from eplb.streams import streams_of
from moe_kernels import ExpertMatrices
from moe_kernels.base.checks import FLOATS, check_kind
from moe_layer.arguments import home_of
from moe_layer.weights.expert_format import ExpertFormat
from moe_layer.weights.experts import Experts
from moe_layer.weights.logical import LogicalWeights
from moe_layer.weights.owned import OwnedExperts

Convert = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Of one expert's tensors to those of another format, by name."""


class SlotExperts(Experts):
    """Experts in slots. `state_dict()` and `load_state_dict()` speak logical order; the rest of PyTorch sees no weights.

    To write weights while the layer serves use `MoELayer.load_experts()` or `load_state_dict()`. Nothing else waits for
    relocations and reaches all replicas.

    Attributes:
        state_dict_scope: "range": `state_dict()` holds this rank's range of logical experts (see `ranges()`; on one
            rank all), "all": every rank gets all of them. Loading takes either.
        state_dict_on_host: whether `state_dict()` returns the experts in host memory.
        state_dict_timeout: seconds to wait for other ranks where saving or loading needs them.
    """

    trainable = False
    _version = 2  # that PyTorch notes in a state dict; 1: mxfp4's codes lay in another order

    def __init__(
        self,
        format: ExpertFormat,
        resident: ResidentExperts,
        process_group: dist.ProcessGroup | None,
        backend: str,
    ) -> None:
        super().__init__(format, resident, process_group, backend)
        self.state_dict_scope = "range"
        self.state_dict_on_host = False
        self.state_dict_timeout = 60.0

    def _attach(self, resident: ResidentExperts | OwnedExperts) -> None:
        super()._attach(resident)
        self.device, self.dtype = self.pool.device, self.format.dtype
        # `.data`: the same memory with a version counter of its own, as a slot that is filled between a forward and its
        # backward is one that neither reads (I1, I3).
        self._matrices = self.format.matrices({name: tensor.data for name, tensor in self.pool.tensors.items()})

    @property
    def pool(self) -> SlotPool:
        assert isinstance(self.resident, ResidentExperts)
        return self.resident.pool

    def matrices(self) -> ExpertMatrices:
        if not self.is_loaded:
            self.check_loaded()
        return self._matrices

    def _rows(self, name: str) -> torch.Tensor:
        return self.pool.tensors[name]

    # ---- saving and loading

    def logical(self) -> LogicalWeights:
        """Its weights in logical order."""
        if self.state_dict_scope not in ("all", "range"):
            raise ValueError(f"state_dict_scope must be 'all' or 'range', got {self.state_dict_scope!r}")
        if self.device.type == "meta":
            raise RuntimeError(
                "the layer is on the meta device and has no weights: give it memory with to_empty() first"
            )
        assert isinstance(self.resident, ResidentExperts)
        return LogicalWeights(self.resident, self.ranges(), self.process_group, self.state_dict_timeout)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        del keep_vars  # logical tensors are copies: no graph leads to them
        self.check_loaded()
        device = torch.device("cpu") if self.state_dict_on_host else self.device
        is_all = self.state_dict_scope == "all"
        for name, tensor in self.logical().read(is_all, device).items():
            destination[prefix + name] = tensor
        self._note_range(destination, prefix, range(self.num_experts) if is_all else self.ranges()[self.resident.rank])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        specs = self.format.specs
        names = {prefix + spec.name for spec in specs}
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in names]
        given = {spec: state_dict[prefix + spec.name] for spec in specs if prefix + spec.name in state_dict}
        missing_keys += [prefix + spec.name for spec in specs if spec not in given]
        for spec, value in given.items():
            check_kind(prefix + spec.name, value, torch.Tensor)
        counts = {self.resident.num_experts, len(self.ranges()[self.resident.rank])}
        shapes = {spec: [(count, *spec.shape) for count in sorted(counts)] for spec in specs}
        wrong = [
            f"size mismatch for {prefix}{spec.name}: {tuple(value.shape)} in the state dict, but "
            f"{' or '.join(map(str, shapes[spec]))} (logical experts first: this rank's range or all) in the layer"
            for spec, value in given.items()
            if tuple(value.shape) not in shapes[spec]
        ]
        exact = {tensor.name for tensor in self.format.tensors if not tensor.follows_casts}
        wrong += [
            f"dtype mismatch for {prefix}{spec.name}: {value.dtype} in the state dict, but it is {spec.dtype} in the layer, "
            "and is not cast"
            for spec, value in given.items()
            if spec.name in exact and value.dtype != spec.dtype
        ]
        wrong += [
            f"dtype mismatch for {prefix}{spec.name}: {value.dtype} in the state dict, but it is {spec.dtype} in the layer, "
            "and only floats of 16 bits or more are cast"
            for spec, value in given.items()
            if spec.name not in exact and value.dtype not in (*FLOATS, torch.float64)
        ]
        if given and self.format.scheme == "mxfp4" and local_metadata.get("version", 2) < 2:
            wrong.append(f"{prefix[:-1]} was saved with another order of mxfp4's codes: load the checkpoint instead")
        torn = self.format.torn({spec.name for spec in given})
        if torn is not None:
            wrong.append(f"{prefix}{torn[0]} must come with {prefix}{torn[1]}: apart they mean nothing")
        if len({len(value) for value in given.values()}) > 1:
            wrong.append(f"{prefix[:-1]}: some tensors are of all experts, others of this rank's range")
        if local_metadata.get("assign_to_params_buffers", False):
            wrong.append(f"assign=True cannot be had for {prefix[:-1]}: its weights live in the slots of a pool")
        self._check_range(state_dict, prefix, local_metadata, wrong)
        error_msgs += wrong
        if given and not wrong:
            logical = self.logical()
            with self.resident.quiesced(), torch.no_grad():
                logical.write({spec.name: value for spec, value in given.items()})
                self._count_write()
            if len(given) == len(specs):
                self.is_loaded = True

    def _write(self, tensors: Mapping[str, torch.Tensor], slots: Sequence[int]) -> None:
        super()._write(tensors, slots)
        if tensors:
            self._count_write()

    def _count_write(self) -> None:
        """Backwards of earlier forwards are errors now, as they are where a parameter was written in place."""
        increment_version((self._matrices.gate_up_SNH, self._matrices.down_SHI))

    # ---- what would break the pool, or miss the slots

    def refuse_if_bound(self, what: str) -> None:
        """Raises RuntimeError if a controller or another layer holds what `what` would change."""
        if self.resident.controller is not None:
            raise RuntimeError(
                f"{what} is refused: the layer is registered with an EplbController, whose worker and captured graphs "
                "hold the addresses of its slots and table. Do it before register()."
            )
        if self.pool.count(SlotState.LIVE) != self.resident.num_physical_per_rank:
            raise RuntimeError(f"{what} is refused: the layer shares its pool of slots with other layers")

    def refuse_conversion(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._converted(fn) != (self.format, self.device):
            self.refuse_if_bound("moving or casting the experts")

    def _apply(self, fn: Any, recurse: bool = True) -> "SlotExperts":
        del recurse
        self.refuse_conversion(fn)
        format, device = self._converted(fn)
        if (format, device) != (self.format, self.device):
            self.format = format
            self._attach(self._resident_on(device))
        return self

    def store_as(self, format: ExpertFormat, convert: Convert) -> None:
        """Take new slots of `format` in the place of the old ones; `convert` makes an expert's new tensors of its old ones."""
        self.refuse_if_bound("storing the experts otherwise")
        self.format = format
        self._attach(self._resident_on(self.device, convert))

    def _resident_of_copy(self) -> ResidentExperts:
        self.refuse_if_bound("deepcopy")
        return self._resident_on(self.device)

    def _resident_on(self, device: torch.device, convert: Convert | None = None) -> ResidentExperts:
        assert isinstance(self.resident, ResidentExperts)
        pool = SlotPool(self.format.specs, self.pool.num_slots, device)
        return self.resident.copied_to(pool, streams_of(home_of(device)), convert)

    def __getattr__(self, name: str) -> Any:
        if "format" in self.__dict__ and name in {tensor.name for tensor in self.format.tensors}:
            raise AttributeError(
                f"{name} cannot be read here: the weights of a serving layer live in slots, not in the module. Read them by "
                "state_dict()"
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "format" in self.__dict__ and name in {tensor.name for tensor in self.format.tensors}:
            raise RuntimeError(
                f"{name} cannot be set: the weights of a serving layer live in slots, not in the module. Write them with "
                "load_experts() or load_state_dict(), or build the layer with trainable=True"
            )
        super().__setattr__(name, value)
