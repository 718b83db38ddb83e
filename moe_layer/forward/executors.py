"""Forward, execute: choose replicas → dispatch → schedule → GEMMs → combine. The executor is chosen when the layer is built.

Legend: T tokens, H hidden, E logical experts, K top-k, L lanes of all ranks, R rows.
"""

from collections.abc import Callable

import torch

from moe_kernels import (
    TileSchedule,
    build_schedule,
    combine,
    count_experts,
    expert_mlp,
    expert_rows,
    gemm_configs,
    gradient_configs,
    local_experts,
    local_forward,
    select_replicas,
)
from moe_kernels.base.once import refuse_tangents
from moe_kernels.gemms.expert_mlp import expert_mlp_home
from moe_kernels.gradients.main_grads import has_main_grads
from moe_layer.dispatch import Dispatched, Dispatcher
from moe_layer.dispatch.base import Incoming
from moe_layer.forward.batch_shares import BatchShares
from moe_layer.forward.divided import with_gradients_over, with_gradients_times
from moe_layer.forward.recomputed import Recomputed
from moe_layer.router import Router
from moe_layer.weights.experts import Experts
from moe_layer.weights.versions import Held, KeepVersion, hold_version


class LocalExecutor:
    """All experts are on this rank: one fused op; where a gradient is needed, ops that have one."""

    dispatcher: Dispatcher | None = None

    def from_logits(
        self,
        experts: Experts,
        gate: Router,
        x_TH: torch.Tensor,
        logits_TE: torch.Tensor,
        token_mask_T: torch.Tensor | None,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """y_TH of the experts that `gate` chooses by the logits. The bound is for executors that dispatch."""
        del max_tokens
        if needs_grad(experts, x_TH, logits_TE):
            weights_TK, ids_TK = gate.choose(logits_TE, token_mask_T)
            return self._differentiable(experts, x_TH, ids_TK, weights_TK)
        rule = gate.rule
        bias_E = gate.e_score_correction_bias if rule.correction_bias else None

        def fused() -> torch.Tensor:
            return local_forward(
                x_TH,
                logits_TE,
                experts.matrices(),
                experts.table,
                experts.load,
                gate.top_k,
                rule.for_kernels,
                bias_E=bias_E,
                token_mask_T=token_mask_T,
                backend=experts.backend,
                validate=experts.trainable or bias_E is not None,  # others keep the rules by construction
            )

        return under_one_version(experts, fused)

    def from_ids(
        self,
        experts: Experts,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """y_TH of the experts given by ids (int32, -1 for none) and float32 weights."""
        del max_tokens
        if needs_grad(experts, x_TH, weights_TK):
            return self._differentiable(experts, x_TH, ids_TK, weights_TK)

        def fused() -> torch.Tensor:
            return local_experts(
                x_TH,
                ids_TK,
                weights_TK,
                experts.matrices(),
                experts.table,
                experts.load,
                backend=experts.backend,
                validate=experts.trainable,
            )

        return under_one_version(experts, fused)

    def _differentiable(
        self, experts: Experts, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        resident = experts.resident
        if experts.trainable:  # its table never changes
            lanes_TK, counts_L = choose_replicas(experts, ids_TK)
        elif torch.compiler.is_compiling():
            x_TH, weights_TK, ids_TK, _ = hold_version(x_TH, weights_TK, ids_TK, experts.number)
            lanes_TK, counts_L = choose_replicas(experts, ids_TK)
        else:
            with resident.choice() as pin:
                lanes_TK, counts_L = choose_replicas(experts, ids_TK)
            x_TH, weights_TK = KeepVersion.apply(x_TH, weights_TK, Held(experts, pin))
        num_tokens, top_k = ids_TK.shape

        def schedule(block_m: int, extra_m: int) -> TileSchedule:
            return build_schedule(
                lanes_TK.view(-1), counts_L, block_m=block_m, extra_m=extra_m, backend=experts.backend
            )

        rows = Dispatched(x_TH, top_k, weights_TK.reshape(-1), schedule, num_tokens)
        y_TH = compute_rows(experts, rows, top_k, combine_into=lanes_TK)
        assert y_TH is not None
        return y_TH


class ExpertParallelExecutor:
    """Experts are spread over ranks: choose replica → dispatch → compute rows → combine."""

    def __init__(self, dispatcher: Dispatcher, batch_shares: BatchShares | None = None) -> None:
        self.dispatcher: Dispatcher | None = dispatcher
        self.batch_shares = batch_shares

    def from_logits(
        self,
        experts: Experts,
        gate: Router,
        x_TH: torch.Tensor,
        logits_TE: torch.Tensor,
        token_mask_T: torch.Tensor | None,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """y_TH of the experts that `gate` chooses by the logits; for `max_tokens` see `from_ids`. Collective."""
        weights_TK, ids_TK = gate.choose(logits_TE, token_mask_T)
        return self.from_ids(experts, x_TH, ids_TK, weights_TK, max_tokens)

    @torch.compiler.disable
    def from_ids(
        self,
        experts: Experts,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """y_TH of the experts given by ids (int32, -1 for none) and float32 weights. Collective.

        Args:
            max_tokens: no rank has more tokens; equal on all ranks. None: the dispatcher's own bound.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "torch.export needs all experts on one rank: how many rows are sent is known by running only"
            )
        refuse_tangents("a MoELayer of several ranks", (x_TH, weights_TK))
        incoming = None
        if self.batch_shares is not None:
            assert self.dispatcher is not None
            gradients = torch.is_grad_enabled() and (x_TH.requires_grad or weights_TK.requires_grad)
            pin, lanes_TK, counts_L, incoming = self.batch_shares.choose(experts, self.dispatcher, ids_TK, gradients)
        else:
            with experts.resident.choice() as pin:
                lanes_TK, counts_L = choose_replicas(experts, ids_TK)

        def compute(
            x_TH: torch.Tensor, weights_TK: torch.Tensor, lanes_TK: torch.Tensor, counts_L: torch.Tensor
        ) -> torch.Tensor:
            return self._computed(experts, x_TH, weights_TK, lanes_TK, counts_L, max_tokens, incoming)

        if needs_grad(experts, x_TH, weights_TK) and not experts.trainable:
            return Recomputed.apply(compute, Held(experts, pin), lanes_TK, counts_L, x_TH, weights_TK)
        if not torch.is_grad_enabled() and (x_TH.requires_grad or weights_TK.requires_grad):
            x_TH, weights_TK = x_TH.detach(), weights_TK.detach()  # no backward comes, which the dispatcher asks
        asks = getattr(self.dispatcher, "asks_for_gradients", False)
        if asks and needs_grad(experts) and not (x_TH.requires_grad or weights_TK.requires_grad):
            x_TH = x_TH.detach().requires_grad_()  # a backward comes, for the experts alone
        try:
            return compute(x_TH, weights_TK, lanes_TK, counts_L)
        finally:
            pin.release()

    def _computed(
        self,
        experts: Experts,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        max_tokens: int | None,
        incoming: Incoming | None,
    ) -> torch.Tensor:
        """In one turn, or in as many as the dispatcher's bound asks for: that depends on nothing of this rank alone."""
        assert self.dispatcher is not None
        most = self.dispatcher.max_tokens
        if most is None or max_tokens is None or max_tokens <= most:
            bound = None if most is None else max_tokens or most
            return self._one_turn(experts, x_TH, weights_TK, lanes_TK, counts_L, bound, incoming)
        assert incoming is None, "known of the whole batch, not of a turn"
        parts = []
        for first in range(0, max_tokens, most):
            turn = slice(first, first + most)
            lanes = lanes_TK[turn]
            counts = count_experts(lanes, counts_L.numel(), backend=experts.backend)
            bound = min(most, max_tokens - first)
            parts.append(self._one_turn(experts, x_TH[turn], weights_TK[turn], lanes, counts, bound))
        return torch.cat(parts)

    def _one_turn(
        self,
        experts: Experts,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        lanes_TK: torch.Tensor,
        counts_L: torch.Tensor,
        max_tokens: int | None,
        incoming: Incoming | None = None,
    ) -> torch.Tensor:
        assert self.dispatcher is not None
        known = {} if incoming is None else {"incoming": incoming}  # only where the dispatcher has asked for it
        sent = self.dispatcher.dispatch(x_TH, weights_TK, lanes_TK, counts_L, experts.backend, max_tokens, **known)
        divisor = experts.gradient_divisor or 1
        if divisor != 1 and torch.is_grad_enabled():
            rows_NH = compute_rows(experts, with_gradients_times(sent, divisor), lanes_TK.shape[1])
            assert rows_NH is not None
            rows_NH = with_gradients_over(rows_NH, divisor)
        else:
            rows_NH = compute_rows(experts, sent, lanes_TK.shape[1])
        return self.dispatcher.combine(rows_NH, sent, lanes_TK, experts.backend)


Executor = LocalExecutor | ExpertParallelExecutor


def needs_grad(experts: Experts, *tensors: torch.Tensor) -> bool:
    """Whether a gradient flows to these or to the experts' weights.

    Raises:
        RuntimeError: one does, through quantised experts.
    """
    if not torch.is_grad_enabled() or not (experts.trainable or any(tensor.requires_grad for tensor in tensors)):
        return False
    if experts.format.quantisation is not None:
        raise RuntimeError(
            f"{experts.format.quantisation} experts have no gradients, neither of weights nor of hidden states: call the model "
            "under torch.no_grad() or torch.inference_mode(), or with inputs that need no gradient"
        )
    return True


def under_one_version(experts: Experts, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`run()`, which reads the table and the slots and keeps nothing for a backward."""
    if torch.compiler.is_compiling():  # compiled forwards run on the stream that flips, between flips
        return run()
    with experts.resident.choice() as pin:
        try:
            return run()
        finally:
            pin.release()


def choose_replicas(experts: Experts, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lane that computes each chosen expert, by the table and its shares, and each lane's count; records the load."""
    resident = experts.resident
    return select_replicas(
        ids_TK,
        experts.table,
        experts.load,
        experts.rank_start,
        num_lanes=resident.num_ranks * resident.num_lanes,
        backend=experts.backend,
    )


def compute_rows(
    experts: Experts, rows: Dispatched, top_k: int, combine_into: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Each row by the expert in its lane, scaled by its routing weight: rows_NH, in the order before the schedule's.

    With `combine_into`, the lanes [T, K] of the rows, their sums y_TH. None if the rows have homes: they are there.
    """
    backend, matrices, lane_to_slot_S = experts.backend, experts.matrices(), experts.table.lane_to_slot_L
    sizes = (matrices.hidden_size, matrices.intermediate_size)
    batch = (*sizes, rows.rows_RH.dtype, rows.num_tokens, top_k, experts.num_experts)
    up, down = gemm_configs(*batch, tma=experts.tma, scheme=matrices.scheme)
    schedule = rows.schedule(up.block_m, up.schedule_extra_m)
    inputs = (rows.rows_RH, matrices, lane_to_slot_S, schedule)
    if needs_grad(experts, rows.rows_RH, rows.row_weights_N):
        assert rows.homes is None, "rows that have homes have no gradient"
        return expert_rows(
            *inputs,
            rows.row_weights_N,
            fanout=rows.fanout,
            configs=(up, down),
            gradient_configs=gradient_configs(*batch, tma=experts.tma),
            combine_into=combine_into,
            recompute=experts.recompute,
            adds_to_main_grads=experts.trainable and has_main_grads(matrices),
            backend=backend,
        )
    if rows.homes is not None:
        expert_mlp_home(*inputs, rows.row_weights_N, rows.homes, fanout=rows.fanout, configs=(up, down))
        return None
    rows_NH = expert_mlp(*inputs, rows.row_weights_N, fanout=rows.fanout, configs=(up, down), backend=backend)
    return rows_NH if combine_into is None else combine(rows_NH, combine_into, backend=backend)
