"""The experts of a layer: their weights by slot here, in logical order wherever they are loaded or saved.

Legend: E logical experts, S slots of the pool, H hidden, I intermediate.
"""

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eplb.relocation.pool import SlotPool, SlotState, TensorSpec
from eplb.relocation.resident import ResidentExperts
from eplb.streams import streams_of
from moe_kernels import ExpertMatrices, build_schedule, expert_down, expert_up, gemm_configs, has_tma
from moe_layer.arguments import resolve_device
from moe_layer.collectives import all_gather_flags, broadcast_
from moe_layer.dispatch import Dispatched


def expert_specs(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    """All that belongs to one expert, as Hugging Face stores it: gate rows, then up rows; then the down projection."""
    return (
        TensorSpec("gate_up_proj", (2 * intermediate_size, hidden_size), dtype),
        TensorSpec("down_proj", (hidden_size, intermediate_size), dtype),
    )


class Experts(nn.Module):
    """Gated feed-forward experts: ``down(act(gate(x)) * up(x))``.

    Attributes:
        gate_up_proj: ``[S, 2I, H]``, a view of the pool: row s is what slot s holds, of whichever layer and expert.
        down_proj: ``[S, H, I]``, likewise.
        state_dict_scope: "all": `state_dict()` holds the full ``[E, …]`` tensors on every rank; "range": this rank's
            fixed range of logical experts, ``[E·rank // ranks, E·(rank + 1) // ranks)``. Loading accepts the one set.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self,
        *,
        resident: ResidentExperts,
        top_k: int,
        activation: str,
        process_group: dist.ProcessGroup | None,
        backend: str,
        trainable: bool,
    ) -> None:
        super().__init__()
        self.resident = resident
        self.top_k = top_k
        self.activation = activation
        self.backend = backend
        self.process_group = process_group
        self.state_dict_scope = "all"
        self._view_slots(dict.fromkeys(resident.pool.tensors, trainable))

    def _view_slots(self, trainable: dict[str, bool]) -> None:
        self._tma = has_tma(self.resident.pool.device)
        self.own_parameters: dict[str, nn.Parameter] = {}  # whatever may be put in their places
        for name, tensor in self.resident.pool.tensors.items():
            # `.data`: the same memory with a version counter of its own, as a slot that is filled between a forward and
            # its backward is one that neither reads (I1, I3).
            self.own_parameters[name] = nn.Parameter(tensor.data, requires_grad=trainable[name])
            self.register_parameter(name, self.own_parameters[name])

    def fits(self, name: str, weights: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether `weights`, found in the place of a parameter, are what kernels take for it without another look."""
        own = self.own_parameters[name]
        if weights is own:
            return weights.dtype == dtype
        of_own = (dtype, own.device, own.shape, own.stride()[1:])
        return (weights.dtype, weights.device, weights.shape, weights.stride()[1:]) == of_own

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, dispatched: Dispatched) -> torch.Tensor:
        """The rows to compute, each by the expert in its lane and scaled by its routing weight: rows_NH, unordered as sent."""
        resident = self.resident
        _, hidden_size, intermediate_size = self.down_proj.shape
        if hidden_size != dispatched.rows_RH.shape[1]:  # which no op asks, as each sees one of the two
            shape = tuple(self.down_proj.shape)
            raise ValueError(f"down_proj has shape {shape}: dimension 1 must be {dispatched.rows_RH.shape[1]}")
        up, down = gemm_configs(
            hidden_size,
            intermediate_size,
            dispatched.rows_RH.dtype,
            dispatched.num_tokens,
            self.top_k,
            resident.num_experts,
            tma=self._tma,
        )
        lane_to_slot_S = resident.table.lane_to_slot_S
        schedule = build_schedule(
            dispatched.lanes_N, dispatched.counts_S, block_m=up.block_m, extra_m=up.extra_m, backend=self.backend
        )
        matrices = ExpertMatrices(self.gate_up_proj, self.down_proj, self.activation)
        hidden_NI = expert_up(
            dispatched.rows_RH,
            matrices,
            lane_to_slot_S,
            schedule,
            fanout=dispatched.fanout,
            config=up,
            backend=self.backend,
        )
        return expert_down(
            hidden_NI,
            matrices,
            lane_to_slot_S,
            schedule,
            dispatched.row_weights_N,
            config=down,
            backend=self.backend,
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill every logical expert from `seed` and its id: equal in all replicas, whatever the placement or rank count."""
        device = self.resident.pool.device
        for expert, slots in self.resident.live_slots().items():
            generator = torch.Generator(device).manual_seed(seed * self.resident.num_experts + expert)
            for name, parameter in self.named_parameters():
                bound = parameter.shape[-1] ** -0.5
                value = torch.empty(parameter.shape[1:], device=device, dtype=torch.float32)
                value.uniform_(-bound, bound, generator=generator)
                for slot in slots:
                    self.get_parameter(name)[slot].copy_(value)

    # ---- saving and loading, collective over the process group

    def _ranges(self) -> list[range]:
        count, ranks = self.resident.num_experts, self.resident.num_ranks
        return [range(count * rank // ranks, count * (rank + 1) // ranks) for rank in range(ranks)]

    def _scope(self) -> range:
        if self.state_dict_scope not in ("all", "range"):
            raise ValueError(f"state_dict_scope must be 'all' or 'range', got {self.state_dict_scope!r}")
        return (
            range(self.resident.num_experts) if self.state_dict_scope == "all" else self._ranges()[self.resident.rank]
        )

    def _owners(self, live: Collection[int], retiring: Collection[int]) -> list[int]:
        """The rank that each logical expert is saved from, the lowest of those that have it; given what this one has."""
        resident = self.resident
        if resident.num_ranks == 1:
            return [0] * resident.num_experts
        assert self.process_group is not None
        mine = torch.zeros(2, resident.num_experts, dtype=torch.bool)
        mine[0, list(live)] = True
        # Ranks may be one version apart, and an expert that has moved be in none's own current table: then it is still where
        # it was, on a rank that has flipped, as another has not.
        mine[1, list(retiring)] = True
        flags = all_gather_flags(mine.flatten(), resident.pool.device, self.process_group).int()
        now, before = flags.view(len(flags), 2, -1).unbind(1)
        return torch.where(now.any(dim=0), now.argmax(dim=0), before.argmax(dim=0)).tolist()

    def _logical_slabs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Every logical expert's slab, in order, on every rank."""
        resident = self.resident
        live, retiring = resident.live_slots(), resident.retiring_slots()
        slots = retiring | {expert: slots[0] for expert, slots in live.items()}
        for expert, owner in enumerate(self._owners(live, retiring)):
            is_here = owner == resident.rank
            # A copy: once all have heard it, a slot that was given up may be written anew.
            slab = resident.pool.slab(slots[expert]).clone() if is_here else torch.empty_like(resident.pool.slab(0))
            if resident.num_ranks > 1:
                assert self.process_group is not None
                broadcast_(slab, owner, self.process_group)
            yield expert, slab

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        del keep_vars  # logical tensors are copies: no graph leads to them
        pool, scope = self.resident.pool, self._scope()
        logical = {
            spec.name: torch.empty(len(scope), *spec.shape, dtype=spec.dtype, device=pool.device) for spec in pool.specs
        }
        views = SlotPool(pool.specs, 1, pool.device)
        for expert, slab in self._logical_slabs():
            if expert in scope:
                views.slab(0).copy_(slab)
                for name, tensor in logical.items():
                    tensor[expert - scope.start].copy_(views.tensors[name][0])
        for name, tensor in logical.items():
            destination[prefix + name] = tensor

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
        specs, scope = self.resident.pool.specs, self._scope()
        names = {prefix + spec.name for spec in specs}
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in names]
        given = {spec: state_dict[prefix + spec.name] for spec in specs if prefix + spec.name in state_dict}
        missing_keys += [prefix + spec.name for spec in specs if spec not in given]
        wrong = [
            f"size mismatch for {prefix}{spec.name}: {tuple(value.shape)} in the state dict, but "
            f"{(len(scope), *spec.shape)} (logical experts first, state_dict_scope={self.state_dict_scope!r})"
            for spec, value in given.items()
            if tuple(value.shape) != (len(scope), *spec.shape)
        ]
        if local_metadata.get("assign_to_params_buffers", False):
            wrong.append(f"assign=True cannot be had for {prefix[:-1]}: its weights live in the slots of a pool")
        error_msgs += wrong
        if given and not wrong:
            with self.resident.quiesced(), torch.no_grad():
                self._write_logical({spec.name: value for spec, value in given.items()}, scope)

    def _write_logical(self, given: dict[str, torch.Tensor], scope: range) -> None:
        """Write all replicas on this rank; with the scope "range" every rank gives the experts of its range to all."""
        pool, live = self.resident.pool, self.resident.live_slots()
        if self.state_dict_scope == "range" and self.resident.num_ranks > 1:
            assert self.process_group is not None
            for rank, experts in enumerate(self._ranges()):
                for expert in experts:
                    for name, value in given.items():
                        buffer = torch.empty(value.shape[1:], dtype=pool.tensors[name].dtype, device=pool.device)
                        if rank == self.resident.rank:
                            buffer.copy_(value[expert - scope.start])
                        broadcast_(buffer, rank, self.process_group)
                        for slot in live.get(expert, []):
                            pool.tensors[name][slot].copy_(buffer)
            return
        for expert, slots in live.items():
            for name, value in given.items():
                for slot in slots:
                    pool.tensors[name][slot].copy_(value[expert - scope.start])

    # ---- what would break the pool behind the parameters

    def refuse_if_bound(self, what: str) -> None:
        """Raises RuntimeError if a controller or another layer holds what `what` would change."""
        reserved = self.resident.num_physical_per_rank
        if self.resident.controller is not None:
            raise RuntimeError(
                f"{what} is refused: the layer is registered with an EplbController, whose worker and captured graphs "
                "hold the addresses of its slots and table. Do it before register()."
            )
        if self.resident.pool.count(SlotState.LIVE) != reserved:
            raise RuntimeError(f"{what} is refused: the layer shares its pool of slots with other layers")

    def _specs_after(self, fn: Any) -> tuple[tuple[TensorSpec, ...], torch.device]:
        """What `fn`, which `nn.Module.to()` and its kin apply to every tensor, makes of the slots."""
        pool = self.resident.pool
        probes = [fn(torch.empty(0, dtype=spec.dtype, device=pool.device)) for spec in pool.specs]
        specs = tuple(
            TensorSpec(spec.name, spec.shape, probe.dtype) for spec, probe in zip(pool.specs, probes, strict=True)
        )
        return specs, probes[0].device

    def refuse_conversion(self, fn: Any) -> None:
        """Raises RuntimeError if `fn` would move or cast experts whose addresses others hold, ValueError for a bad device."""
        pool = self.resident.pool
        specs, device = self._specs_after(fn)
        if (specs, device) != (pool.specs, pool.device):
            self.refuse_if_bound("moving or casting the experts")
        resolve_device(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "Experts":
        del recurse
        self.refuse_conversion(fn)
        specs, device = self._specs_after(fn)
        pool = self.resident.pool
        if (specs, device) != (pool.specs, pool.device):
            trainable = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
            self.resident = self.resident.copied_to(SlotPool(specs, pool.num_slots, device), streams_of(device))
            self._view_slots(trainable)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Experts":
        self.refuse_if_bound("deepcopy")
        old = self.resident
        memo[id(self.process_group)] = self.process_group
        memo[id(old)] = old.copied_to(SlotPool(old.pool.specs, old.pool.num_slots, old.pool.device), old.streams)
        fresh = Experts.__new__(Experts)
        memo[id(self)] = fresh
        views = ("_parameters", "own_parameters")
        state = {name: value for name, value in self.__dict__.items() if name not in views}
        fresh.__dict__.update(copy.deepcopy(state, memo), _parameters={})
        fresh._view_slots({name: parameter.requires_grad for name, parameter in self.named_parameters()})
        return fresh

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, nn.Parameter) or name not in self._parameters:
            return super().__setattr__(name, value)
        # The parameter is a view of the slots and stays one: a new value is written into it.
        self.refuse_if_bound(f"replacing the parameter {name}")
        parameter = self.get_parameter(name)
        if (value.shape, value.dtype, value.device) != (parameter.shape, parameter.dtype, parameter.device):
            raise ValueError(
                f"{name} must be {parameter.dtype} {tuple(parameter.shape)} on {parameter.device} (one row per slot), got "
                f"{value.dtype} {tuple(value.shape)} on {value.device}"
            )
        with torch.no_grad():
            parameter.copy_(value)
        parameter.requires_grad_(value.requires_grad)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            self.refuse_if_bound(f"removing the parameter {name} (does FSDP wrap the layer?)")
        super().__delattr__(name)

    def extra_repr(self) -> str:
        resident = self.resident
        return (
            f"num_experts={resident.num_experts}, redundant={resident.num_redundant_experts}, "
            f"rank={resident.rank}/{resident.num_ranks}, slots={resident.pool.num_slots}, activation={self.activation!r}"
        )
