"""`MoELayer`: check → route → execute. A forward starts and ends here.

`router.py` chooses experts, `forward/` computes them, `dispatch/` moves rows between ranks. The weights are in slots
(`weights/slot_experts.py`) or are parameters (`trainable/trainable_experts.py`).

Legend: T tokens, H hidden, E logical experts, K top-k.
"""

import copy
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import nn

from eplb.groups import check_member
from eplb.planning.placement_file import SavedLayer
from eplb.relocation.pool import SlotPool
from eplb.relocation.resident import ResidentExperts
from eplb.streams import streams_of
from moe_kernels import resolve_backend
from moe_kernels.base.checks import FLOATS
from moe_layer.arguments import (
    as_rows,
    check_bool,
    check_integer,
    check_mask,
    check_per_token,
    check_sizes,
    check_tokens,
    check_trainable,
    check_x,
    given_choice,
    home_of,
    is_autocast_enabled,
    physical_per_rank,
    resolve_device,
    resolve_dtype,
)
from moe_layer.collectives import broadcast_
from moe_layer.dispatch import Dispatcher, make_dispatcher
from moe_layer.forward.batch_shares import BatchShares, resolve_shares
from moe_layer.forward.executors import Executor, ExpertParallelExecutor, LocalExecutor
from moe_layer.relocatable import Relocatable
from moe_layer.router import Router, RouterRule
from moe_layer.trainable.ddp import check_ddp
from moe_layer.trainable.trainable_experts import TrainableExperts
from moe_layer.weights.expert_format import gated_format
from moe_layer.weights.experts import Experts, NewWeights, refuse_pickling
from moe_layer.weights.owned import OwnedExperts
from moe_layer.weights.quantisation import Quantisation
from moe_layer.weights.shared_pool import resolve_pool
from moe_layer.weights.slot_experts import SlotExperts
from moe_layer.weights.starting import starting_point


class MoELayer(Relocatable, nn.Module):
    """A mixture-of-experts layer whose experts can move between ranks while it serves.

    In place of a decoder block's MLP. On its own it is a plain layer; registered with an `EplbController`, its experts
    are relocated and replicated in the background as the load asks for, and every output stays what it was, bit for bit.
    Compiled forwards and replayed CUDA graphs must then run on the stream that calls `step()`; others may run on any.

    A serving layer (the default) has its experts in slots, no parameters: write them with `load_experts()` or
    `load_state_dict()`, which alone wait for relocations and reach all replicas. A trainable layer has ordinary parameters;
    where they compute may change between steps (`experts.place()`, `moe_layer.TrainingBalancer`).

    Args:
        hidden_size: H.
        intermediate_size: I, of each expert.
        num_experts: E, logical experts over all ranks.
        top_k: K, experts per token.
        router: name of a rule in `ROUTER_RULES`, or a `RouterRule`. None: the layer has no gate, and each forward is
            given `expert_ids` and `expert_weights`.
        router_dtype: what the router's weight is and its logits are computed in, whatever the layer is cast to; None:
            the layer's dtype.
        activation: of the gate: "silu" (SwiGLU), "gelu" (exact GELU; GeGLU), "gelu_tanh" or "relu2" (relu squared).
        quantisation: how the experts' matrices are stored: None: in `dtype`; "fp8_block", "mxfp4", "int4", or a
            `Quantisation`. They are drawn and then rounded; see also `quantize_experts`.
        trainable: whether the router's and the experts' weights are parameters that require gradients. The experts are
            then this rank's E / ranks, at `experts.gate_up_proj` and `experts.down_proj`; `pool` must be left alone, and the
            layer cannot be registered. For DDP see `moe_layer.ignore_in_ddp`, for FSDP2 `ignore_in_fsdp`; for losses and
            clipping `moe_layer.training`.
        num_redundant_experts: physical experts beyond one per logical expert; E plus these must divide by the ranks.
        num_shadow_slots: experts that a relocation may replace at once on a rank: free slots of its own pool. 0: none move.
        pool: slots shared with other layers, from `make_pool()`; the layer's own if None.
        placement: where the experts are at first, and their shares, from `eplb.load_placements()`; equal on all ranks. None:
            in order, replicas of the first experts after them.
        process_group: the ranks that share the experts; None: all experts are on this rank.
        dispatcher: "auto", "local" (needs one rank), "all_to_all", "all_gather" and "symm_mem" (need `max_tokens`; the
            latter GPUs, or CPUs, of one host), or a `Dispatcher`. "auto" logs its choice, never "symm_mem" to train.
        max_tokens: most tokens of any rank in one forward, equal on all ranks: buffers are made for so many. A forward may set
            another bound. None: any number.
        shares: how an expert's tokens are divided among its replicas: "window" (as planned from the last load window), "batch"
            or `BatchShares(expert_cost)` (solved anew in each batch, from the counts of all ranks).
        recompute: whether backwards compute the pre-activation, ``[rows, 2I]``, again instead of keeping it; the same bits.
        backend: of the kernels: "auto" (Triton on CUDA, PyTorch references on a CPU), "triton", "torch".
        device: of the weights: a CPU, CUDA or "meta" device (that takes no memory until `to_empty()`).
        dtype: of hidden states, and of weights that are not quantised: float32, float16 or bfloat16.

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
        router: str | RouterRule | None = "softmax_renormalized",
        router_dtype: torch.dtype | None = None,
        activation: str = "silu",
        quantisation: str | Quantisation | None = None,
        trainable: bool = False,
        num_redundant_experts: int = 0,
        num_shadow_slots: int = 1,
        pool: SlotPool | None = None,
        placement: SavedLayer | None = None,
        process_group: dist.ProcessGroup | None = None,
        dispatcher: str | Dispatcher = "auto",
        max_tokens: int | None = None,
        shares: str | BatchShares = "window",
        recompute: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_member(process_group)
        num_ranks, rank = 1, 0
        if process_group is not None:
            num_ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        sizes = (hidden_size, intermediate_size, num_experts, num_redundant_experts)
        hidden_size, intermediate_size, num_experts, num_redundant_experts = check_sizes(*sizes)
        num_physical = physical_per_rank(num_experts, num_redundant_experts, num_ranks)
        top_k = check_integer("top_k", top_k, 1)
        num_shadow_slots = check_integer("num_shadow_slots", num_shadow_slots, 0)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts={num_experts}, got {top_k}")
        check_bool("recompute", recompute)
        check_trainable(trainable, num_experts, num_ranks, pool=pool, quantisation=quantisation)
        max_tokens = None if max_tokens is None else check_integer("max_tokens", max_tokens, 1)
        device, dtype = resolve_device(device), resolve_dtype(dtype)
        router_dtype = None if router_dtype is None else resolve_dtype(router_dtype, "router_dtype")
        format = gated_format(hidden_size, intermediate_size, dtype, activation, quantisation)
        kernels = resolve_backend(backend, home_of(device))
        num_lanes = num_physical if trainable else num_physical + num_shadow_slots
        sender = make_dispatcher(
            dispatcher,
            process_group,
            num_ranks,
            num_lanes,
            num_experts=num_experts,
            backend=kernels,
            max_tokens=max_tokens,
            hidden_size=hidden_size,
            top_k=top_k,
            dtype=dtype,
            device=device,
            trainable=trainable,
        )
        batch_shares = resolve_shares(shares, num_ranks, num_experts, trainable, sender)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.top_k = top_k
        self.max_tokens = max_tokens
        self.backend = backend
        self.process_group = process_group
        self.executor: Executor = LocalExecutor() if sender is None else ExpertParallelExecutor(sender, batch_shares)
        routed = (hidden_size, num_experts, top_k)
        options: dict[str, Any] = {"device": device, "layer_dtype": dtype, "dtype": router_dtype}
        gate = None if router is None else Router(*routed, router, backend, trainable=trainable, **options)
        self.gate: Router | None
        self.register_module("gate", gate)
        self.experts: Experts
        sizes = (num_experts, num_redundant_experts, num_ranks, num_lanes)
        start, start_shares = starting_point(placement, *sizes, process_group)
        if trainable:
            where = (num_redundant_experts, start, start_shares)
            owned = OwnedExperts(num_experts, rank, num_ranks, home_of(device), *where)
            self.experts = TrainableExperts(format, owned, process_group, backend, device)
            if num_ranks > 1:
                names = [f"experts.{name}" for name, _ in self.experts.named_parameters()]
                self._ddp_params_and_buffers_to_ignore = names
        else:
            # Last, as it takes slots of the pool: a layer that is refused takes none.
            resident = ResidentExperts(
                num_experts=num_experts,
                num_redundant_experts=num_redundant_experts,
                num_shadow_slots=num_shadow_slots,
                rank=rank,
                num_ranks=num_ranks,
                pool=resolve_pool(pool, format, num_physical + num_shadow_slots, device),
                streams=streams_of(home_of(device)),
                placement=start,
                shares_WS=start_shares,
            )
            self.experts = SlotExperts(format, resident, process_group, backend)
        self.experts.recompute = recompute and (trainable or num_ranks == 1)  # else the whole forward is repeated
        if self.experts.device.type != "meta":  # where `accelerate.init_empty_weights()` puts parameters, too
            self.reset_parameters()

    @property
    def resident(self) -> ResidentExperts:
        """Slots, table and load counters on this rank: what a controller registers. (`OwnedExperts` if trainable.)"""
        return cast(ResidentExperts, self.experts.resident)

    # ---- weights

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, uniform as in `nn.Linear`; equal on all ranks (rank 0's random state decides). Collective.

        Like loading, it first waits until no relocation is under way.
        """
        device = self.experts.device
        seed = torch.randint(2**31, (1,), device="cpu").to(device)
        if self.process_group is not None:
            broadcast_(seed, 0, self.process_group)
        with self.resident.quiesced():
            if self.gate is not None:
                bound = self.hidden_size**-0.5
                self.gate.weight.uniform_(-bound, bound, generator=torch.Generator(device).manual_seed(int(seed)))
            self.experts.reset_parameters(int(seed) + 1)

    def load_experts(self, weights: NewWeights) -> None:
        """Write single experts in place, while the layer serves: *the* way to sync weights, from a trainer say.

        It waits until no relocation is under way, and writes all replicas on this rank. Experts that live elsewhere are
        skipped, so every rank may be given the same. Collective where the layer is registered with a controller.

        Args:
            weights: ``{expert: {name: tensor}}`` with logical ids, the names of `state_dict()` without "experts.", and
                tensors of one expert, of any device and of any float dtype the layer may have.

        Raises:
            ValueError: an unknown expert or name, or a shape or dtype that does not fit. Nothing is written then.
            TimeoutError, RuntimeError: relocations did not come to rest. Nothing is written then.
        """
        self.experts.load_experts(weights)

    # ---- forward

    def forward(
        self,
        x: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        router_logits: torch.Tensor | None = None,
        *,
        expert_ids: torch.Tensor | None = None,
        expert_weights: torch.Tensor | None = None,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """Route each token to its experts and sum what they say.

        The router's choice is taken from the first of these that is there: `expert_ids` with `expert_weights`,
        `router_logits`, the layer's own gate.

        Every rank of the group calls the layer, and its backward, equally often; a rank without tokens passes an empty
        tensor. So either all ranks need a gradient or none.

        Args:
            x: hidden states ``[..., H]`` in the layer's dtype and on its device. Under `torch.autocast` also in another
                float dtype.
            token_mask: bool ``[...]``; False marks padding, which is routed nowhere, not counted, and comes back as 0.
                What is in it changes neither outputs nor gradients.
            router_logits: ``[..., E]``, float32, float16 or bfloat16, from a router of the model's own.
            expert_ids: int32 or int64 ``[..., K]``, logical experts; -1, like any id out of range, is computed nowhere.
            expert_weights: ``[..., K]``, any float dtype; used in float32. Gradients flow to them.
            max_tokens: most tokens of any rank in this forward, equal on all ranks; None: the constructor's. A smaller bound
                saves time where batches are padded to it. With a larger one such a dispatcher takes several turns, the
                same number on all ranks.

        Returns:
            The layer's output, shaped like `x` and of its dtype; under `torch.autocast` of the autocast dtype.

        Raises:
            ValueError: shape, dtype or device of an argument do not fit; `x` has more tokens than `max_tokens` (nothing is
                sent then); or only some ranks need a gradient (see the dispatcher which of them say so).
        """
        modules = self._modules  # nn.Module's attribute access takes the host longer than the checks
        experts, gate = cast(Experts, modules["experts"]), cast(Router | None, modules["gate"])
        if is_autocast_enabled(x):
            return self._under_autocast(x, token_mask, router_logits, expert_ids, expert_weights, max_tokens)
        check_x(x, self.hidden_size, experts.dtype, experts.device)
        x_TH, mask_T = as_rows(x), None
        if max_tokens is not None or self.max_tokens is not None:
            max_tokens = check_tokens(x_TH.shape[0], max_tokens, self.max_tokens)
        if token_mask is not None:
            check_mask(token_mask, x)
            mask_T = token_mask.reshape(-1).contiguous()
            if torch.is_grad_enabled():
                x_TH = x_TH.masked_fill(~mask_T[:, None], 0)  # or the router's gradient would be 0 · NaN
        if experts.trainable and self.process_group is not None:
            check_ddp(experts, self.process_group)
        if expert_ids is not None or expert_weights is not None:
            ids_TK, weights_TK = given_choice(x, mask_T, expert_ids, expert_weights, self.top_k, experts.num_experts)
            y_TH = self.executor.from_ids(experts, x_TH, ids_TK, weights_TK, max_tokens)
        else:
            if gate is None:
                raise ValueError("expert_ids and expert_weights must be given, as the layer was built with router=None")
            if router_logits is None:
                logits_TE = as_rows(gate(x_TH))
                check_per_token("the gate's output", logits_TE, x_TH, experts.num_experts, "expert", FLOATS)
            else:
                check_per_token("router_logits", router_logits, x, experts.num_experts, "expert", FLOATS)
                logits_TE = as_rows(router_logits)
            y_TH = self.executor.from_logits(experts, gate, x_TH, logits_TE, mask_T, max_tokens)
        return y_TH if x.dim() == 2 else y_TH.reshape(x.shape)

    def _under_autocast(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        logits: torch.Tensor | None,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        max_tokens: int | None,
    ) -> torch.Tensor:
        """Computed in the layer's dtype, router and experts alike; returned as `nn.Linear` would return it."""
        dtype, device_type = self.experts.dtype, x.device.type
        with torch.autocast(device_type, enabled=False):
            x = x.to(dtype) if x.dtype in FLOATS else x
            y = self.forward(x, mask, logits, expert_ids=ids, expert_weights=weights, max_tokens=max_tokens)
        return y.to(torch.get_autocast_dtype(device_type))

    # ---- copies

    @torch.inference_mode(False)  # or its new tensors could be written in that mode alone
    def _apply(self, fn: Any, recurse: bool = True) -> "MoELayer":
        self.experts.refuse_conversion(fn)  # before any other part has changed
        return super()._apply(fn, recurse)

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> "MoELayer":
        for shared in (self.process_group, self.executor.dispatcher):
            memo[id(shared)] = shared
        fresh = self.__class__.__new__(self.__class__)
        memo[id(self)] = fresh
        fresh.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return fresh

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickling()

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"
