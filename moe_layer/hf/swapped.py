"""`SwappedSlots` and `SwappedParameters`: our experts in the place of a transformers model's, with its names and layout.

Each is itself the experts that executors and controllers know, so its tensors have the names that the model's had.

Legend: T tokens, H hidden, E experts, K top-k.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eplb.relocation.resident import ResidentExperts
from moe_kernels.base.checks import FLOATS
from moe_layer.arguments import check_per_token
from moe_layer.collectives import backend_of, is_absence
from moe_layer.forward.executors import Executor
from moe_layer.hf.absence import NcclWatch, absence, watch_of
from moe_layer.hf.inspect import Understood
from moe_layer.hf.layout import Layout
from moe_layer.hf.padding import Padding
from moe_layer.hf.replicated import GatherParts, Parts, TakePart
from moe_layer.relocatable import Relocatable
from moe_layer.trainable.ddp import check_ddp
from moe_layer.trainable.trainable_experts import TrainableExperts
from moe_layer.weights.experts import Experts, NewWeights
from moe_layer.weights.owned import OwnedExperts
from moe_layer.weights.slot_experts import SlotExperts


class Swapped(Relocatable, Experts):
    """What both have: transformers' call, its names, and the way back.

    Attributes:
        layout: how the model stores what our slots hold.
        executor: computes the experts.
        original: the module whose place this took. It has lost its weights.
        fused_gate: the router that chooses in our kernel, if one does; in a tuple, as it is no part of this module.
        tokens: "own" of each rank, or "replicated": all ranks hold the same.
        padding: says which tokens are padding, where they must not count.
        max_tokens: most tokens of any rank in one forward; None: any number.
        quantised: of an original that is quantised itself: its parameter for each of our tensors.
    """

    layout: Layout
    executor: Executor
    fused_gate: tuple[nn.Module, ...] = ()
    tokens: str = "own"
    padding: Padding | None = None
    max_tokens: int | None = None
    quantised: Mapping[str, str] | None = None

    def _take_place_of(self, original: nn.Module, layout: Layout, executor: Executor) -> None:
        self.layout = layout
        self.executor = executor
        self._original = (original,)  # not a submodule
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    @property
    def experts(self) -> Experts:  # type: ignore[override]
        return self

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum what the chosen experts say of each token.

        Args:
            hidden_states: ``[..., H]``, any float dtype; computed in the experts' own.
            top_k_index: int32 or int64 ``[..., K]``; -1 and E are computed nowhere.
            top_k_weights: ``[..., K]``, any float dtype; used in float32. Gradients flow to them.

        Returns:
            Shaped like `hidden_states`, and of its dtype.

        Raises:
            ValueError: shape, dtype or device of an argument do not fit; or there are more tokens than `max_tokens`.
            RuntimeError: the experts have no weights yet; or another rank does not take part, within the deadline of its
                process group or dispatcher.
        """
        if not self.is_loaded:
            self.check_loaded()
        x, shape = hidden_states, hidden_states.shape
        hidden_size = self.format.hidden_size
        if not shape or shape[-1] != hidden_size or x.device != self.device or x.dtype not in FLOATS:
            raise ValueError(
                f"hidden_states must be [..., {hidden_size}] in a float dtype on {self.device}, got {x.dtype} "
                f"{tuple(shape)} on {x.device}"
            )
        top_k = top_k_index.shape[-1]
        check_per_token("top_k_index", top_k_index, x, top_k, "choice", (torch.int32, torch.int64))
        check_per_token("top_k_weights", top_k_weights, x, top_k, "choice", (*FLOATS, torch.float64))
        if self.trainable and self.process_group is not None:
            check_ddp(self, self.process_group)
        if self.max_tokens is not None and x.numel() > self.max_tokens * hidden_size:
            raise ValueError(
                f"hidden_states has {x.numel() // hidden_size} tokens, more than the max_tokens={self.max_tokens} that "
                "swap_experts was given: unswap_experts(), and swap with a larger one, equal on all ranks"
            )
        x_TH = x.to(self.dtype).reshape(-1, hidden_size).contiguous()
        ids_TK = top_k_index.reshape(-1, top_k).int().contiguous()  # kernels skip what names no expert
        weights_TK = top_k_weights.reshape(-1, top_k).float().contiguous()
        mask_T = None if self.padding is None else self.padding.mask_of(len(x_TH))
        if mask_T is not None:
            ids_TK = ids_TK.masked_fill(~mask_T.to(ids_TK.device)[:, None], -1)
        with torch.autocast(x.device.type, enabled=False):
            if self.resident.num_ranks == 1:
                y_TH = self.executor.from_ids(self, x_TH, ids_TK, weights_TK, self.max_tokens)
            else:
                y_TH = self._over_ranks(x_TH, ids_TK, weights_TK)
        return y_TH.to(x.dtype).view(shape)

    @torch.compiler.disable
    def _over_ranks(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        watch = self._watch()
        try:
            if watch is None:
                return self._together(x_TH, ids_TK, weights_TK)
            with watch:
                return self._together(x_TH, ids_TK, weights_TK)
        except (RuntimeError, TimeoutError) as error:
            if is_absence(error):
                raise absence(self.resident.num_ranks, error) from error
            raise

    def _together(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        if self.tokens == "own":
            return self.executor.from_ids(self, x_TH, ids_TK, weights_TK, self.max_tokens)
        assert self.process_group is not None
        parts = Parts(len(x_TH), self.process_group, x_TH.device)
        x_NH, weights_NK = TakePart.apply(x_TH, parts), TakePart.apply(weights_TK, parts)
        bound = None if self.max_tokens is None else -(-self.max_tokens // self.resident.num_ranks)
        y_NH = self.executor.from_ids(self, x_NH, parts.mine(ids_TK).contiguous(), weights_NK, bound)
        return GatherParts.apply(y_NH, parts)

    def _watch(self) -> NcclWatch | None:
        """Of forwards that NCCL moves, and that need no gradient: trainers have deadlines of their own."""
        group, dispatcher = self.process_group, self.executor.dispatcher
        if torch.is_grad_enabled() or self.device.type != "cuda" or group is None or dispatcher is None:
            return None
        moved_by = {dispatcher.backend(self.device)}
        if self.tokens == "replicated":
            moved_by.add(backend_of(group, self.device))
        return watch_of(group, self.device) if "nccl" in moved_by else None

    def check_all_came(self) -> None:
        """Look, once the device is done, whether a rank did not come to a forward until now.

        Raises:
            RuntimeError: one did not.
        """
        watch, check = self._watch(), getattr(self.executor.dispatcher, "raise_if_failed", None)
        if self.resident.num_ranks == 1 or (watch is None and check is None):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        try:
            if watch is not None:
                watch.raise_if_over()
            if check is not None:
                check()
        except TimeoutError as error:
            raise absence(self.resident.num_ranks, error) from error

    # ---- the model's names and layout

    @property
    def _kept_layout(self) -> Layout:
        """How tensors lie that come and go by name: as in the model, but quantised records as in the slots."""
        return self.layout if self.format.quantisation is None else Layout()

    def load_experts(self, weights: NewWeights) -> None:
        """As `MoELayer.load_experts`, of tensors as the model stores them; quantised ones as our slots do."""
        to_ours = self._kept_layout.to_ours
        super().load_experts(
            {
                expert: {
                    name: to_ours(name, value) if self._fits(name, value, 0) else value for name, value in one.items()
                }
                for expert, one in weights.items()
            }
        )

    def _fits(self, name: str, value: Any, extra_dims: int) -> bool:
        """Whether `value` has as many dimensions as an expert's tensor of this name, and `extra_dims` in front."""
        dims = {tensor.name: len(tensor.shape) + extra_dims for tensor in self.format.tensors}
        return isinstance(value, torch.Tensor) and value.dim() == dims.get(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.check_loaded()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._kept_layout.is_ours:
            for tensor in self.format.tensors:
                destination[prefix + tensor.name] = self.layout.to_stored(
                    tensor.name, destination[prefix + tensor.name]
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not self._kept_layout.is_ours:
            converted = {}
            for tensor in self.format.tensors:
                value = state_dict.get(prefix + tensor.name)
                if value is not None and self._fits(tensor.name, value, 1):
                    converted[prefix + tensor.name] = self.layout.to_ours(tensor.name, value)
            state_dict = {**state_dict, **converted}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Swapped":
        memo[id(self.executor.dispatcher)] = self.executor.dispatcher
        copy = super().__deepcopy__(memo)
        assert isinstance(copy, Swapped)
        return copy


class SwappedSlots(Swapped, SlotExperts):
    """Experts of a model that serves: in slots, and no parameters. They may move.

    `state_dict()` holds all experts on every rank, in host memory if there are several ranks.
    """

    def __init__(
        self,
        original: nn.Module,
        understood: Understood,
        resident: ResidentExperts,
        process_group: dist.ProcessGroup | None,
        executor: Executor,
        backend: str,
    ) -> None:
        super().__init__(understood.format, resident, process_group, backend)
        self.state_dict_scope = "all"
        self.state_dict_on_host = resident.num_ranks > 1
        self.quantised = understood.quantised
        self._take_place_of(original, understood.layout, executor)


class SwappedParameters(Swapped, TrainableExperts):
    """Experts of a model that is trained: parameters, on one rank the very ones of the original if it has our layout."""

    def __init__(
        self,
        original: nn.Module,
        understood: Understood,
        resident: OwnedExperts,
        process_group: dist.ProcessGroup | None,
        executor: Executor,
        backend: str,
    ) -> None:
        format = understood.format
        super().__init__(format, resident, process_group, backend, torch.device("meta"))
        with torch.no_grad():
            for tensor in format.tensors:
                parameter = getattr(original, tensor.name)
                if understood.is_meta:
                    value = torch.empty(
                        (resident.num_lanes, *tensor.shape), dtype=tensor.dtype, device=understood.device
                    )
                    parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
                elif resident.num_ranks > 1 or not understood.layout.is_ours:
                    mine = parameter.detach()[resident.experts.start : resident.experts.stop]
                    value = understood.layout.to_ours(tensor.name, mine).clone(memory_format=torch.contiguous_format)
                    parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
                elif not parameter.is_contiguous():
                    parameter.data = parameter.data.contiguous()
                self.register_parameter(tensor.name, parameter)
        self._attach(resident)
        self._take_place_of(original, understood.layout, executor)


@torch.no_grad()
def check_all_came(model: nn.Module) -> None:
    """`Swapped.check_all_came` of all that `model` has."""
    for module in model.modules():
        if isinstance(module, Swapped):
            module.check_all_came()
