"""`MoELayer`: route, dispatch, experts, combine.

Legend: T tokens, H hidden, E logical experts, K top-k.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from eplb.pool import SlotPool
from eplb.resident import Pin, ResidentExperts
from eplb.streams import streams_of
from moe_kernels import GOLDEN, SHARE_BITS, record_load_, resolve_backend, select_replicas
from moe_layer.arguments import check_choice, check_integer, physical_per_rank, resolve_device, resolve_dtype
from moe_layer.collectives import broadcast_
from moe_layer.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from moe_layer.experts import ACTIVATIONS, Experts, expert_specs
from moe_layer.router import Router, RouterRule


class MoELayer(nn.Module):
    """A mixture-of-experts layer whose experts can move between ranks while it serves.

    In place of a decoder block's MLP. On its own it is a plain layer; registered with an `EplbController`, its experts
    are relocated and replicated in the background as the load asks for, and every output stays what it was, bit for bit.

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
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._arguments = arguments
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
        self.dispatcher = _make_dispatcher(dispatcher, process_group, num_ranks, num_physical + num_shadow_slots)
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
        """Draw all weights anew, uniform as in `nn.Linear`; equal on all ranks (rank 0's random state decides). Collective."""
        seed = torch.randint(2**31, (1,), device="cpu").to(self.gate.weight.device)
        if self.process_group is not None:
            broadcast_(seed, 0, self.process_group)
        device = self.gate.weight.device
        bound = self.hidden_size**-0.5
        self.gate.weight.uniform_(-bound, bound, generator=torch.Generator(device).manual_seed(int(seed)))
        self.experts.reset_parameters(int(seed) + 1)

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Route each token to its experts and sum what they say.

        Args:
            x: hidden states ``[..., H]`` in the layer's dtype and on its device. Every rank of the group calls the
                layer equally often; a rank without tokens passes an empty tensor.
            token_mask: bool ``[...]``; False marks padding, which is routed nowhere, not counted, and comes back as 0.

        Returns:
            The layer's output, shaped like `x`.

        Raises:
            ValueError: shape, dtype or device of an argument do not fit.
        """
        self._check_input(x, token_mask)
        x_TH = x.reshape(-1, self.hidden_size)
        weights_TK, expert_ids_TK = self.gate(x_TH, None if token_mask is None else token_mask.reshape(-1))
        lanes_TK = self._choose_replicas(expert_ids_TK)
        return self._computed(x_TH, weights_TK, lanes_TK).reshape(x.shape)

    def _choose_replicas(self, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """The lane that computes each chosen expert, by the table and its shares; counts the load."""
        resident = self.resident
        table = resident.table
        if not torch.compiler.is_compiling():
            resident.note_stream()
        lanes_TK = select_replicas(
            expert_ids_TK,
            table.offsets_E1,
            table.lanes_P,
            table.cumulative_P,
            resident.load_E,
            # Ranks start apart, so that the first tokens of all of them do not meet on one replica.
            (resident.rank * GOLDEN) % 2**SHARE_BITS,
            backend=self.backend,
        )
        if torch.compiler.is_compiling() or not _is_recomputing():
            record_load_(resident.load_E, expert_ids_TK, resident.load_increment_1, backend=self.backend)
        return lanes_TK

    def _computed(self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor) -> torch.Tensor:
        if not (
            torch.is_grad_enabled() and (x_TH.requires_grad or weights_TK.requires_grad or not self.experts.is_frozen)
        ):
            return self._dispatched(x_TH, weights_TK, lanes_TK)
        if self.resident.controller is not None:
            x_TH, weights_TK = self._pinned(x_TH, weights_TK)
        if self.resident.num_ranks == 1:
            return self._dispatched(x_TH, weights_TK, lanes_TK)
        # How many rows come depends on the placement. Recomputed from x and the lanes chosen here, nothing that autograd
        # keeps does, so that an outer checkpoint which recomputes after a flip still finds what it expects; and the
        # backward goes to the very slots of this forward (I3).
        return checkpoint(self._dispatched, x_TH, weights_TK, lanes_TK, use_reentrant=False, preserve_rng_state=False)

    def _dispatched(self, x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor) -> torch.Tensor:
        dispatched = self.dispatcher.dispatch(x_TH, weights_TK, lanes_TK)
        return self.dispatcher.combine(self.experts(dispatched), dispatched, self.backend)

    @torch.compiler.disable
    def _pinned(self, x_TH: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.experts.is_frozen and self.resident.controller.config.use_async:
            raise RuntimeError(f"the layer's experts move in the background, but {self.why_not_relocatable()}")
        return _Pinned.apply(x_TH, weights_TK, self.resident.pin(), self.resident.streams)

    def _check_input(self, x: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        weight = self.gate.weight
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x must have hidden_size={self.hidden_size} as its last dimension, got shape {tuple(x.shape)}"
            )
        if x.dtype != weight.dtype:
            raise ValueError(f"x must have the layer's dtype {weight.dtype}, got {x.dtype}")
        if x.device != weight.device:
            raise ValueError(f"x must be on the layer's device {weight.device}, got {x.device}")
        if token_mask is not None and (token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool):
            raise ValueError(
                f"token_mask must be bool of shape {tuple(x.shape[:-1])}, got {token_mask.dtype} {tuple(token_mask.shape)}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoELayer":
        self.experts._refuse_if_bound("deepcopy")
        fresh = MoELayer(**self._arguments)
        memo[id(self)] = fresh
        fresh.to(device=self.gate.weight.device, dtype=self.gate.weight.dtype)
        fresh.gate = copy.deepcopy(self.gate, memo)
        with torch.no_grad():
            fresh.resident.pool.slab_SB.copy_(self.resident.pool.slab_SB)
        fresh.experts.requires_grad_(not self.experts.is_frozen)
        fresh.resident.load_E.copy_(self.resident.load_E)
        return fresh.train(self.training)

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


class _Pinned(torch.autograd.Function):
    """The identity, upstream of all that reads slots: alive until its backward, which comes after all of theirs."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, pin: Pin, streams: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.pin, ctx.streams = pin, streams
        return x_TH.view_as(x_TH), weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(
        ctx: Any, grad_x_TH: torch.Tensor, grad_weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        ctx.pin.used_on(ctx.streams.current())
        return grad_x_TH, grad_weights_TK, None, None


def _is_recomputing() -> bool:
    """Whether this forward runs inside a backward, so it repeats one that was counted (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def _make_dispatcher(
    dispatcher: str | Dispatcher, group: dist.ProcessGroup | None, num_ranks: int, num_lanes: int
) -> Dispatcher:
    if callable(getattr(dispatcher, "dispatch", None)) and callable(getattr(dispatcher, "combine", None)):
        return dispatcher  # type: ignore[return-value]
    check_choice("dispatcher", dispatcher, ("auto", "local", "all_to_all"), " or a Dispatcher")
    if dispatcher == "local" and num_ranks > 1:
        raise ValueError(f"dispatcher='local' needs all experts on one rank, but process_group has {num_ranks}")
    if dispatcher == "all_to_all" and group is None:
        raise ValueError("dispatcher='all_to_all' needs a process_group, got None")
    if dispatcher == "local" or (dispatcher == "auto" and num_ranks == 1):
        return LocalDispatcher()
    assert group is not None
    return AllToAllDispatcher(group, num_lanes)
