"""`MoELayer`: route, dispatch, experts, combine.

Legend: T tokens, H hidden, E logical experts, K top-k.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eplb.groups import check_member, ranks_of
from eplb.relocation.pool import SlotPool
from eplb.relocation.resident import ResidentExperts
from eplb.streams import streams_of
from moe_kernels import (
    GOLDEN,
    SHARE_BITS,
    ExpertMatrices,
    LoadCounter,
    ReplicaTable,
    local_forward,
    resolve_backend,
    select_replicas,
)
from moe_kernels.activation import ACTIVATIONS
from moe_kernels.checks import FLOATS
from moe_layer.arguments import (
    check_choice,
    check_forward_input,
    check_integer,
    physical_per_rank,
    resolve_device,
    resolve_dtype,
)
from moe_layer.collectives import broadcast_
from moe_layer.dispatch import Dispatcher, LocalDispatcher, make_dispatcher
from moe_layer.experts import Experts, expert_specs
from moe_layer.parts import fits, is_call_changed, part
from moe_layer.recomputed import Recomputed
from moe_layer.router import Router, RouterRule


class MoELayer(nn.Module):
    """A mixture-of-experts layer whose experts can move between ranks while it serves.

    In place of a decoder block's MLP. On its own it is a plain layer; registered with an `EplbController`, its experts
    are relocated and replicated in the background as the load asks for, and every output stays what it was, bit for bit.
    Forwards that are compiled (`torch.compile`) or replayed from a CUDA graph must then run on the stream that calls `step()`;
    others may run on any.

    Args:
        hidden_size: H.
        intermediate_size: I, of each expert.
        num_experts: E, logical experts over all ranks.
        top_k: K, experts per token.
        router: name of a rule in `ROUTER_RULES`, or a `RouterRule`.
        activation: of the gate: "silu" (SwiGLU) or "gelu" (exact GELU; GeGLU).
        num_redundant_experts: physical experts beyond one per logical expert; E plus these must divide by the ranks.
        num_shadow_slots: experts of this layer that a relocation may replace at once on a rank; as many slots of memory
            on top, if the pool is the layer's own. 0: its experts never move.
        pool: slots shared with other layers, from `make_pool()`; the layer's own if None.
        process_group: the ranks that share the experts; None: all experts are on this rank.
        dispatcher: "auto", "local" (needs one rank), "all_to_all", or an object with `Dispatcher`'s methods.
        backend: of the kernels: "auto" (Triton on CUDA, PyTorch references on a CPU), "triton", "torch".
        trainable_experts: whether the experts' weights require gradients. Such experts cannot move in the background yet.
        device, dtype: of weights and hidden states; a CPU or CUDA device; float32, float16 or bfloat16.

    Raises:
        ValueError: an argument out of range, naming it, its value and the rule.
    """

    @torch.inference_mode(False)  # or its tensors could be written in that mode alone
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router: str | RouterRule = "softmax_renormalized",
        activation: str = "silu",
        num_redundant_experts: int = 0,
        num_shadow_slots: int = 1,
        pool: SlotPool | None = None,
        process_group: dist.ProcessGroup | None = None,
        dispatcher: str | Dispatcher = "auto",
        backend: str = "auto",
        trainable_experts: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_member(process_group)
        num_ranks, rank = 1, 0
        if process_group is not None:
            num_ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        num_physical = physical_per_rank(hidden_size, intermediate_size, num_experts, num_redundant_experts, num_ranks)
        check_integer("top_k", top_k, 1)
        check_integer("num_shadow_slots", num_shadow_slots, 0)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts={num_experts}, got {top_k}")
        check_choice("activation", activation, ACTIVATIONS)
        device, dtype = resolve_device(device), resolve_dtype(dtype)
        resolve_backend(backend, device)
        specs = expert_specs(hidden_size, intermediate_size, dtype)
        if pool is None:
            pool = SlotPool(specs, num_physical + num_shadow_slots, device)
        elif not isinstance(pool, SlotPool):
            raise ValueError(f"pool must be a SlotPool, made with make_pool(), or None; got {pool!r}")
        elif pool.specs != specs or pool.device != device:
            raise ValueError(
                f"pool holds {pool.specs} on {pool.device}, but the layer's experts are {specs} on {device}; "
                "make it with make_pool() and the layer's own sizes"
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.backend = backend
        self.process_group = process_group
        self.dispatcher = make_dispatcher(dispatcher, process_group, num_ranks, num_physical + num_shadow_slots)
        self.gate = Router(hidden_size, num_experts, top_k, router, backend, device, dtype)
        # Last, as it takes slots of the pool: a layer that is refused takes none.
        resident = ResidentExperts(
            num_experts=num_experts,
            num_redundant_experts=num_redundant_experts,
            num_shadow_slots=num_shadow_slots,
            rank=rank,
            num_ranks=num_ranks,
            pool=pool,
            streams=streams_of(device),
        )
        self.experts = Experts(
            resident=resident,
            top_k=top_k,
            activation=activation,
            process_group=process_group,
            backend=backend,
            trainable=trainable_experts,
        )
        self.reset_parameters()

    @property
    def resident(self) -> ResidentExperts:
        """Slots, table and load counters on this rank: what a controller registers."""
        return self.experts.resident

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """The global ranks that share the experts; empty for one rank alone."""
        return ranks_of(self.process_group)

    @property
    def dispatch_backend(self) -> str:
        return self.dispatcher.backend(self.resident.streams.device)

    def why_not_relocatable(self) -> str | None:
        """Why the experts must not move in the background, None if they may."""
        if not self.experts.is_frozen:
            return "its experts require gradients, and an optimizer's step would be lost on the way (trainable_experts)"
        if self.resident.num_shadow_slots == 0:
            return "it was built with num_shadow_slots=0"
        return None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, uniform as in `nn.Linear`; equal on all ranks (rank 0's random state decides). Collective.

        Like loading, it first waits until no relocation is under way.
        """
        seed = torch.randint(2**31, (1,), device="cpu").to(self.gate.weight.device)
        if self.process_group is not None:
            broadcast_(seed, 0, self.process_group)
        device = self.gate.weight.device
        bound = self.hidden_size**-0.5
        with self.resident.quiesced():
            self.gate.weight.uniform_(-bound, bound, generator=torch.Generator(device).manual_seed(int(seed)))
            self.experts.reset_parameters(int(seed) + 1)

    def forward(
        self,
        x: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        router_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Route each token to its experts and sum what they say.

        Args:
            x: hidden states ``[..., H]`` in the layer's dtype and on its device. Every rank of the group calls the
                layer and its backward equally often; a rank without tokens passes an empty tensor.
            token_mask: bool ``[...]``; False marks padding, which is routed nowhere, not counted, and comes back as 0.
            router_logits: ``[..., E]``, float32, float16 or bfloat16, from a router of the model's own; None: the layer's.

        Returns:
            The layer's output, shaped like `x`.

        Raises:
            ValueError: shape, dtype or device of an argument do not fit.
        """
        gate, experts = part(self, "gate"), part(self, "experts")
        resident = experts.resident
        weight_EH = part(gate, "weight")
        check_forward_input(x, token_mask, router_logits, weight_EH, self.hidden_size, resident.num_experts)
        x_TH = _rows(x)
        mask_T = None if token_mask is None else token_mask.reshape(-1).contiguous()
        logits_TE = gate(x_TH) if router_logits is None else _rows(router_logits)
        if not torch.compiler.is_compiling():
            resident.note_stream()
        alone = self._weights_alone(gate, experts, x_TH, logits_TE)
        if alone is not None:
            y_TH = _forward_alone(gate, experts, x_TH, logits_TE, mask_T, *alone)
        else:
            weights_TK, expert_ids_TK = gate.choose(logits_TE, mask_T)
            lanes_TK, counts_L = self._choose_replicas(resident, expert_ids_TK)
            y_TH = self._computed(x_TH, weights_TK, lanes_TK, counts_L)
        return y_TH if x.dim() == 2 else y_TH.reshape(x.shape)

    def _choose_replicas(
        self, resident: ResidentExperts, expert_ids_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The lane that computes each chosen expert, by the table and its shares, and each lane's count; records the load."""
        table = resident.table
        return select_replicas(
            expert_ids_TK,
            ReplicaTable(table.lanes_P, table.lane_to_slot_S, table.offsets_E1, table.cumulative_P),
            LoadCounter(resident.load_E, resident.load_increment_1),
            _rank_start(resident),
            num_lanes=resident.num_ranks * resident.num_lanes,
            backend=self.backend,
        )

    def _needs_grad(self, *tensors: torch.Tensor) -> bool:
        """Whether a gradient flows to these or to the experts' weights."""
        return torch.is_grad_enabled() and (
            any(tensor.requires_grad for tensor in tensors) or not self.experts.is_frozen
        )

    def _weights_alone(
        self, gate: nn.Module, experts: nn.Module, x_TH: torch.Tensor, logits_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """What the one op that does it all takes: gate_up, down, and the router's bias. None: it takes the separate ops.

        It does without gradients, where no expert can be on another rank. Not where somebody listens to the calls that it would
        pass over, or has put other functions in their places; nor with tensors that don't fit: the separate ops say
        what is wrong.
        """
        dispatcher = self.dispatcher
        if type(dispatcher) is not LocalDispatcher or type(experts) is not Experts or type(gate) is not Router:
            return None
        if (
            dispatcher.__dict__
            or "choose" in gate.__dict__
            or is_call_changed(experts)
            or resolve_backend(self.backend, x_TH.device) != "triton"
        ):
            return None
        gate_up, down = part(experts, "gate_up_proj"), part(experts, "down_proj")
        bias_E = part(gate, "e_score_correction_bias")
        num_experts, device = experts.resident.num_experts, x_TH.device
        if (
            not experts.fits("gate_up_proj", gate_up, x_TH.dtype)
            or not experts.fits("down_proj", down, x_TH.dtype)
            or not fits(logits_TE, (x_TH.shape[0], num_experts), FLOATS, device)
            or (bias_E is not None and not fits(bias_E, (num_experts,), (torch.float32,), device))
            or self._needs_grad(x_TH, logits_TE, gate_up, down, *(() if bias_E is None else (bias_E,)))
        ):
            return None
        return gate_up, down, bias_E

    def _computed(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, counts_L: torch.Tensor
    ) -> torch.Tensor:
        experts, resident = self.experts, self.resident
        with_grad = self._needs_grad(x_TH, weights_TK)
        if not with_grad or (resident.num_ranks == 1 and resident.controller is None):
            return self._dispatched(x_TH, weights_TK, lanes_TK, counts_L)
        if not experts.is_frozen and resident.controller is not None and resident.controller.config.use_async:
            raise RuntimeError(f"the layer's experts move in the background, but {self.why_not_relocatable()}")
        return Recomputed.apply(self._dispatched, experts, lanes_TK, counts_L, x_TH, weights_TK, *experts.parameters())

    def _dispatched(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, counts_L: torch.Tensor
    ) -> torch.Tensor:
        dispatched = self.dispatcher.dispatch(x_TH, weights_TK, lanes_TK, counts_L)
        return self.dispatcher.combine(self.experts(dispatched), dispatched, self.backend)

    @torch.inference_mode(False)  # or its new tensors could be written in that mode alone
    def _apply(self, fn: Any, recurse: bool = True) -> "MoELayer":
        self.experts.refuse_conversion(fn)  # before any other part has changed
        return super()._apply(fn, recurse)

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> "MoELayer":
        for shared in (self.process_group, self.dispatcher):
            memo[id(shared)] = shared
        fresh = MoELayer.__new__(MoELayer)
        memo[id(self)] = fresh
        fresh.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return fresh

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"


def make_pool(
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    *,
    num_redundant_experts: int = 0,
    num_shadow_slots: int = 1,
    num_ranks: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SlotPool:
    """A pool for `num_layers` like layers of one rank that share `num_shadow_slots` free slots.

    The price of relocation is then a few experts of memory for the whole model, not for each layer.

    Raises:
        ValueError: a count that is not positive, or experts that do not divide by the ranks.
    """
    for name, value in (("num_layers", num_layers), ("num_shadow_slots", num_shadow_slots), ("num_ranks", num_ranks)):
        check_integer(name, value, 1)
    num_physical = physical_per_rank(hidden_size, intermediate_size, num_experts, num_redundant_experts, num_ranks)
    specs = expert_specs(hidden_size, intermediate_size, resolve_dtype(dtype))
    return SlotPool(specs, num_layers * num_physical + num_shadow_slots, resolve_device(device))


def _forward_alone(
    gate: Router,
    experts: Experts,
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    token_mask_T: torch.Tensor | None,
    gate_up_SNH: torch.Tensor,
    down_SHI: torch.Tensor,
    bias_E: torch.Tensor | None,
) -> torch.Tensor:
    resident = experts.resident
    table = resident.table
    return local_forward(
        x_TH,
        logits_TE,
        ExpertMatrices(gate_up_SNH, down_SHI, experts.activation),
        ReplicaTable(table.lanes_P, table.lane_to_slot_S),  # each expert has one replica, as there is one rank
        LoadCounter(resident.load_E, resident.load_increment_1),
        gate.top_k,
        gate.rule.for_kernels(),
        bias_E=bias_E,
        token_mask_T=token_mask_T,
        backend="triton",
        validate=False,  # `check_forward_input` and `_weights_alone` have looked
    )


def _rank_start(resident: ResidentExperts) -> int:
    """Ranks start apart on the circles of shares, so that the first tokens of all of them don't meet on one replica."""
    return (resident.rank * GOLDEN) % 2**SHARE_BITS


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., n]`` as ``[T, n]``, contiguous; a reshape that changes nothing would take the host as long as a launch."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()
