"""Step 2 of a forward: the load counter, how many tokens each expert got. Each forward counts once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moe_kernels.base.checks import check_tensor


@dataclass(frozen=True)
class LoadCounter:
    """Counts that only grow. Kernels add to them with atomics, so streams that run one layer at once lose no count.

    A forward that runs inside a backward is not counted, because it repeats one that was (activation checkpointing). The op
    decides that when it runs, not when it is traced: so it also holds in compiled code and in captured CUDA graphs. A
    caller who runs a layer in a backward on purpose, in a hook say, is not counted either.

    Attributes:
        load_E: [E] int64; added to in place. The choice of replicas reads the value before the batch.
        increment_1: [1] int64, on the device; what one token adds: 1 counts, 0 does not (warm-up), without a new graph
            capture. None: nothing is recorded.
    """

    load_E: torch.Tensor
    increment_1: torch.Tensor | None = None

    def check(self, device: torch.device) -> None:
        """Raises ValueError if shapes, dtypes or devices are wrong."""
        check_tensor("load.load_E", self.load_E, (None,), torch.int64, device)
        if self.increment_1 is not None:
            check_tensor("load.increment_1", self.increment_1, (1,), torch.int64, device)

    def counted_once(self) -> LoadCounter:
        """Itself, or inside a backward the counter without an increment; for the ops' implementations."""
        if self.increment_1 is None or torch._C._current_graph_task_id() == -1:
            return self
        return replace(self, increment_1=None)
