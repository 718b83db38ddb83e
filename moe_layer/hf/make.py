"""Swap: makes the modules that take the places of the model's, and moves the weights without holding them twice.

Legend: E experts.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from eplb.planning.placement import Placement
from eplb.relocation.pool import SlotPool, TensorSpec
from eplb.relocation.resident import ResidentExperts
from eplb.streams import streams_of
from moe_kernels import resolve_backend
from moe_layer.dispatch import Dispatcher, make_dispatcher
from moe_layer.forward.executors import Executor, ExpertParallelExecutor, LocalExecutor
from moe_layer.hf.inspect import Understood
from moe_layer.hf.swapped import Swapped, SwappedParameters, SwappedSlots
from moe_layer.weights.owned import OwnedExperts
from moe_layer.weights.shared_pool import resolve_pool

_Kind = tuple[tuple[TensorSpec, ...], torch.device]
_Weights = dict[int, dict[str, torch.Tensor]]
"""{expert: {name: tensor}}, as our kernels read them."""
Start = tuple[Placement | None, np.ndarray | None]
"""Placement and shares_WS that a block begins with; None for the usual ones."""


class Maker:
    """Makes one swapped module after the other; the caller puts it in the original's place.

    Args:
        pool: a pool for all blocks; "shared": one for all blocks of a kind; "own": one for each block.
        starts: placement and shares of blocks that do not begin with the usual ones.
        max_tokens: most tokens of any rank in one forward; None: any number.
        top_k: of a block: how many experts a token has. Asked for if `max_tokens` is given and buffers depend on it.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        *,
        trainable: bool,
        num_redundant_experts: int,
        num_shadow_slots: int,
        pool: str | SlotPool,
        starts: Mapping[nn.Module, Start],
        dispatcher: str | Dispatcher,
        max_tokens: int | None,
        top_k: Callable[[nn.Module], int],
        backend: str,
    ) -> None:
        self.group = process_group
        self.num_ranks = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.trainable = trainable
        self.num_redundant_experts = num_redundant_experts
        self.num_shadow_slots = num_shadow_slots
        self.dispatcher = dispatcher
        self.max_tokens = max_tokens
        self.backend = backend
        self._top_k = top_k
        self._pool = pool
        self._starts = starts
        self._pools: dict[_Kind, SlotPool] = {}
        self._executors: dict[nn.Module, Executor] = {}
        self._staged: dict[int, _Weights] = {}

    def prepare(self, blocks: Mapping[nn.Module, Understood]) -> None:
        """Make executors and the shared pools. Of blocks on a GPU this moves the weights to host memory first, and frees them.

        So the GPU never holds them twice. On a CPU a new pool has no memory before it is written. Collective if dispatchers
        connect.

        Raises:
            ValueError: the pool that was given does not fit, or the dispatcher does not go with the rest; nothing is freed.
        """
        self._executors = {module: self._executor(module, one) for module, one in blocks.items()}
        if self.trainable or not self._is_shared:
            return
        kinds: dict[_Kind, list[nn.Module]] = {}
        for module, one in blocks.items():
            kinds.setdefault((one.format.specs, one.device), []).append(module)
        if isinstance(self._pool, SlotPool):
            for one in blocks.values():
                resolve_pool(self._pool, one.format, 0, one.device)
            self._pools = dict.fromkeys(kinds, self._pool)
            return
        for (specs, device), modules in kinds.items():
            num_slots = self.num_shadow_slots
            for module in modules:
                one = blocks[module]
                num_slots += (one.num_experts + self.num_redundant_experts) // self.num_ranks
                if device.type == "cuda" and not one.is_meta:
                    self._staged[id(module)] = self._on_host(module, one)
                    free(module)
            self._pools[specs, device] = SlotPool(specs, num_slots, device)

    @property
    def _is_shared(self) -> bool:
        """Whether blocks share a pool. Without free slots they would share nothing but the time when memory is freed."""
        return isinstance(self._pool, SlotPool) or (self._pool == "shared" and self.num_shadow_slots > 0)

    def make(self, original: nn.Module, one: Understood) -> Swapped:
        """What takes the place of `original`, with its weights, if there are any. Frees those of the original."""
        num_physical = (one.num_experts + self.num_redundant_experts) // self.num_ranks
        executor = self._executors[original]
        if self.trainable:
            fixed = OwnedExperts(one.num_experts, self.rank, self.num_ranks, one.device)
            swapped = SwappedParameters(original, one, fixed, self.group, executor, self.backend)
            swapped.is_loaded = not one.is_meta
            if all(parameter is not getattr(swapped, name) for name, parameter in original.named_parameters()):
                free(original)
            return swapped
        pool = self._pools.get((one.format.specs, one.device))
        placement, shares_WS = self._starts.get(original, (None, None))
        if pool is None:
            pool = SlotPool(one.format.specs, num_physical + self.num_shadow_slots, one.device)
        resident = ResidentExperts(
            num_experts=one.num_experts,
            num_redundant_experts=self.num_redundant_experts,
            num_shadow_slots=self.num_shadow_slots,
            rank=self.rank,
            num_ranks=self.num_ranks,
            pool=pool,
            streams=streams_of(one.device),
            placement=placement,
            shares_WS=shares_WS,
        )
        slots = SwappedSlots(original, one, resident, self.group, executor, self.backend)
        if one.is_meta:
            slots.is_loaded = False
            return slots
        staged = self._staged.pop(id(original), None)
        with torch.no_grad():
            for expert, places in resident.live_slots().items():
                tensors = one.expert(original, expert) if staged is None else staged.pop(expert)
                for name, value in tensors.items():
                    for slot in places:
                        pool.tensors[name][slot].copy_(value)
        free(original)
        return slots

    def _executor(self, module: nn.Module, one: Understood) -> Executor:
        needs_top_k = self.num_ranks > 1 and self.max_tokens is not None and self.dispatcher in ("auto", "symm_mem")
        sender = make_dispatcher(
            self.dispatcher,
            self.group,
            self.num_ranks,
            (one.num_experts + self.num_redundant_experts) // self.num_ranks + self.num_shadow_slots,
            num_experts=one.num_experts,
            backend=resolve_backend(self.backend, one.device),
            max_tokens=self.max_tokens,
            hidden_size=one.format.hidden_size,
            top_k=self._top_k(module) if needs_top_k else 1,
            dtype=one.format.dtype,
            device=one.device,
            trainable=self.trainable,
        )
        return LocalExecutor() if sender is None else ExpertParallelExecutor(sender)

    def _on_host(self, module: nn.Module, one: Understood) -> _Weights:
        """The experts of `module` that this rank begins with."""
        placement, _ = self._starts.get(module, (None, None))
        if placement is None:
            num_lanes = (one.num_experts + self.num_redundant_experts) // self.num_ranks + self.num_shadow_slots
            placement = Placement.initial(one.num_experts, self.num_redundant_experts, self.num_ranks, num_lanes)
        mine = sorted({expert for expert in placement.lanes_WS[self.rank].tolist() if expert >= 0})
        host = torch.device("cpu")
        return {e: {name: t.to(host) for name, t in one.expert(module, e).items()} for e in mine}


def free(original: nn.Module) -> None:
    """Give the memory of its parameters back. The parameters themselves stay, for `unswap_experts`."""
    for parameter in original.parameters():
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)
