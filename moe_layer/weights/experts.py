"""`Experts`: the weights, table and load counter that the executors read, of serving and trainable layers alike.

The module holds weights and is not called: hooks belong on the layer or on its gate.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from eplb.relocation.resident import ResidentExperts
from moe_kernels import GOLDEN, SHARE_BITS, ExpertMatrices, LoadCounter, ReplicaTable, has_tma, resolve_backend
from moe_kernels.base.checks import FLOATS, check_kind, is_integer
from moe_layer.arguments import resolve_device
from moe_layer.weights.expert_format import ExpertFormat
from moe_layer.weights.owned import OwnedExperts
from moe_layer.weights.versions import home_number

NewWeights = Mapping[int, Mapping[str, torch.Tensor]]
"""{expert: {name: tensor}}: weights of single experts."""


class Experts(nn.Module):
    """The experts of one layer on this rank.

    Attributes:
        trainable: whether the weights are parameters. If not, they live in slots and are not.
        format: the tensors of one expert and their meaning.
        resident: lanes, table and load counters on this rank.
        table, load: the same as the kernels' arguments. Their addresses change only with the device.
        rank_start: where this rank starts on the circles of shares, so that ranks don't all begin with one replica.
        device, dtype: of the weights, and so of hidden states.
        backend: of the kernels on this device: "triton" or "torch".
        tma: whether tiles are chosen for the tensor memory accelerator.
        number: names this object to compiled graphs.
        recompute: whether backwards compute the pre-activation again instead of keeping it.
        gradient_divisor: what gradients of the weights, if they are parameters, are divided by, because those of dense
            parameters are averaged over as many ranks; None: nobody has said, and they are not. See `moe_layer.trainable.ddp`.
        is_loaded: False while the weights are known to lack, or to be half-loaded: forwards are refused then.
    """

    trainable: bool
    device: torch.device
    dtype: torch.dtype
    recompute: bool = False
    gradient_divisor: float | None = None
    is_loaded: bool = True

    def __init__(
        self,
        format: ExpertFormat,
        resident: ResidentExperts | OwnedExperts,
        process_group: dist.ProcessGroup | None,
        backend: str,
    ) -> None:
        super().__init__()
        self.requested_backend = backend
        self.format = format
        self.process_group = process_group
        self.number = home_number(self)
        self._attach(resident)

    def _attach(self, resident: ResidentExperts | OwnedExperts) -> None:
        self.resident = resident
        self.num_experts = resident.num_experts
        self.backend = resolve_backend(self.requested_backend, resident.streams.device)
        self.tma = has_tma(resident.streams.device)
        table = resident.table
        self.table = ReplicaTable(table.lanes_P, table.lane_to_slot_S, table.offsets_E1, table.cumulative_P)
        if resident.num_ranks == 1:  # each expert has one replica
            self.table = ReplicaTable(table.lanes_P, table.lane_to_slot_S)
        self.load = LoadCounter(resident.load_E, resident.load_increment_1)
        self.rank_start = (resident.rank * GOLDEN) % 2**SHARE_BITS

    def matrices(self) -> ExpertMatrices:
        """The weights as the kernels take them."""
        raise NotImplementedError

    @property
    def written(self) -> torch.Tensor:
        """A tensor whose version grows when weights are written; another one if they got other memory."""
        return self.matrices().down_SHI

    def ranges(self) -> list[range]:
        """The logical experts of each rank in state dicts: equal parts in order, the last ones smaller if need be."""
        count, ranks = self.resident.num_experts, self.resident.num_ranks
        size = -(-count // ranks)
        return [range(min(count, rank * size), min(count, (rank + 1) * size)) for rank in range(ranks)]

    def _note_range(self, state_dict: dict[str, Any], prefix: str, saved: range) -> None:
        """In the state dict's metadata, where PyTorch keeps a module's version: whose experts they are."""
        metadata = getattr(state_dict, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["experts"] = (saved.start, saved.stop)

    def _check_range(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], errors: list[str]
    ) -> None:
        """Adds an error if the state dict has as many experts as this rank, but another rank's."""
        own, first = self.ranges()[self.resident.rank], state_dict.get(prefix + self.format.tensors[0].name)
        start, stop = metadata.get("experts", (own.start, own.stop))
        if not isinstance(first, torch.Tensor) or not first.dim():
            return
        # As many as are noted: who cuts a state dict of all experts into ranges may leave the note as it was.
        if len(first) == len(own) == stop - start < self.num_experts and start != own.start:
            errors.append(
                f"{prefix[:-1] or 'experts'}: the state dict is of another rank, with the experts {start} to {stop - 1}, "
                f"and this rank's are {own.start} to {own.stop - 1}"
            )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill every logical expert from `seed` and its id: equal in all replicas, whatever the placement or rank count."""
        for expert, slots in self.resident.live_slots().items():
            generator = torch.Generator(self.device).manual_seed(seed * self.resident.num_experts + expert)
            self._write(self.format.draw(generator), slots)

    def load_experts(self, weights: NewWeights) -> None:
        """See `MoELayer.load_experts`."""
        self._check_new(weights)
        with self.resident.quiesced():
            live = self.resident.live_slots()  # only now: what was under way may have moved experts
            for expert, tensors in weights.items():
                self._write(tensors, live.get(expert, []))
        if len(weights) == self.num_experts and all(len(one) == len(self.format.tensors) for one in weights.values()):
            self.is_loaded = True

    def load_own_experts(
        self, read: Callable[[Sequence[int]], Iterator[tuple[int, Mapping[str, torch.Tensor]]]]
    ) -> int:
        """Write the experts that this rank holds, as `read` of their ids yields them, whole; returns how many.

        If it fails half-way, forwards are refused until the layer has been loaded.
        """
        with self.resident.quiesced():
            live = self.resident.live_slots()
            self.is_loaded = False
            written = 0
            for expert, tensors in read(sorted(live)):
                self._check_new({expert: tensors})
                self._write(tensors, live[expert])
                written += 1
            assert written == len(live), "some experts were not read"
            self.is_loaded = True
        return written

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, torch.Tensor], slots: Sequence[int]) -> None:
        for name, value in tensors.items():
            for slot in slots:
                self._rows(name)[slot].copy_(value)

    def check_loaded(self) -> None:
        """Raises RuntimeError if the experts wait for their weights."""
        if not self.is_loaded:
            raise RuntimeError(
                "the experts have no weights, or only some: load them with load_experts_from() or load_state_dict()"
            )

    def _rows(self, name: str) -> torch.Tensor:
        """The tensors ``[S, *shape]`` that `resident.live_slots()` numbers."""
        raise NotImplementedError

    def _check_new(self, weights: NewWeights) -> None:
        """Raises ValueError unless all of `weights` can be written."""
        check_kind("weights", weights, Mapping)
        known = {tensor.name: tensor for tensor in self.format.tensors}
        for expert, tensors in weights.items():
            if not is_integer(expert) or not 0 <= expert < self.resident.num_experts:
                raise ValueError(
                    f"weights must be of experts 0 to {self.resident.num_experts - 1}, got the expert {expert!r}"
                )
            check_kind(f"weights of expert {expert}", tensors, (Mapping, torch.nn.ParameterDict))
            for name, value in tensors.items():
                if name not in known:
                    raise ValueError(f"weights of expert {expert} must be among {sorted(known)}, got {name!r}")
                shape, dtype = known[name].shape, known[name].dtype
                if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
                    got = tuple(value.shape) if isinstance(value, torch.Tensor) else value
                    raise ValueError(f"{name} of expert {expert} must be a tensor of shape {shape}, got {got!r}")
                if value.dtype != dtype and not (known[name].follows_casts and value.dtype in FLOATS):
                    raise ValueError(f"{name} of expert {expert} must have dtype {dtype}, got {value.dtype}")
                if value.is_meta:
                    raise ValueError(f"{name} of expert {expert} must hold values, got a tensor on the meta device")
            torn = self.format.torn(tensors)
            if torn is not None:
                raise ValueError(f"{torn[0]} of expert {expert} must come with its {torn[1]}: apart they mean nothing")

    def refuse_conversion(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raises if `fn`, which `layer.to()` and its kin apply to every tensor, cannot be applied to the experts."""
        raise NotImplementedError

    def _converted(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> tuple[ExpertFormat, torch.device]:
        """What `fn` makes of the format and the device.

        Raises:
            RuntimeError: `fn` shares memory between processes.
            ValueError: the dtype or the device is not supported.
        """
        probe = fn(torch.empty(0, dtype=self.format.dtype, device=self.device))
        if probe.device.type == "cpu" and probe.is_shared():
            raise RuntimeError(
                "share_memory() is refused: which slots are free, and the load counters, are this process's own"
            )
        return self.format.cast(probe.dtype), resolve_device(probe.device)

    def _resident_of_copy(self) -> ResidentExperts | OwnedExperts:
        """What a deep copy gets in the place of `resident`, with slots of its own."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> "Experts":
        resident = self._resident_of_copy()
        memo[id(self.process_group)] = self.process_group
        fresh = self.__class__.__new__(self.__class__)
        memo[id(self)] = fresh
        anew = ("resident", "table", "load", "number", "_matrices", "copies")
        fresh.__dict__.update(
            copy.deepcopy({name: one for name, one in self.__dict__.items() if name not in anew}, memo)
        )
        fresh.number = home_number(fresh)
        fresh._attach(resident)
        return fresh

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickling()

    def extra_repr(self) -> str:
        resident = self.resident
        quantised = "" if self.format.quantisation is None else f"quantisation='{self.format.quantisation}', "
        return (
            f"format={self.format.name!r}, {quantised}num_experts={resident.num_experts}, "
            f"redundant={resident.num_redundant_experts}, rank={resident.rank}/{resident.num_ranks}, "
            f"trainable={self.trainable}"
        )


def refuse_pickling() -> NoReturn:
    raise RuntimeError(
        "a MoELayer cannot be pickled, nor copied by copy.copy(), as its slots, streams and process group are this process's "
        "own: save its state_dict(), and load that into a new layer"
    )
