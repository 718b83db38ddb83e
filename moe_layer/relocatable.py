"""Before the first rebalance: what a controller reads of a layer (`eplb.registration.RelocatableLayer`)."""

import torch.distributed as dist

from eplb.groups import ranks_of
from moe_layer.forward.executors import Executor
from moe_layer.weights.experts import Experts


class Relocatable:
    """Mixin of modules that have `experts`, `executor` and `process_group`, and beside these `resident`."""

    experts: Experts
    executor: Executor
    process_group: dist.ProcessGroup | None

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """The global ranks that share the experts; empty for one rank alone."""
        return ranks_of(self.process_group)

    @property
    def dispatch_backend(self) -> str:
        """What moves rows between ranks: "local", "gloo", "nccl" or "symm_mem"."""
        dispatcher = self.executor.dispatcher
        return "local" if dispatcher is None else dispatcher.backend(self.experts.device)

    def why_not_relocatable(self) -> str | None:
        """Why the experts must not move, None if they may."""
        experts = self.experts
        if experts.trainable:
            return "its experts are parameters (trainable=True), whose gradients and optimizer state would stay behind"
        if experts.device.type == "meta":
            return "it is on the meta device: give it memory with to_empty() first"
        if experts.resident.num_shadow_slots == 0:
            return "it was built with num_shadow_slots=0"
        return None

    def dispatch_failure(self) -> str | None:
        """Why outputs mean nothing any more: a forward waited in vain for a rank. None while none did. Never blocks.

        Of dispatchers that show it (`why_failed`): the one-sided one, whose forwards fail on the device. Others raise at once.
        """
        why_failed = getattr(self.executor.dispatcher, "why_failed", None)
        return None if why_failed is None else why_failed()
