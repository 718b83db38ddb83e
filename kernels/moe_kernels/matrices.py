"""Steps 4 and 5 of a forward: the experts' weights in their slots, and the activation between them.

S slots, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_kernels.activation import check_activation
from moe_kernels.checks import check_slots, check_tensor


@dataclass(frozen=True)
class ExpertMatrices:
    """Gated experts: `down(act(gate(x)) * up(x))`.

    Attributes:
        gate_up_SNH: [S, 2I, H] float32, float16 or bfloat16: gate rows, then up rows. The matrix of a slot is contiguous,
            slots may be any distance apart.
        down_SHI: [S, H, I] of the same dtype, likewise.
        activation: "silu", or "gelu" (the exact one, with erf). (A string, because a dataclass would cost each
            registered call as many arguments as it has fields.)
    """

    gate_up_SNH: torch.Tensor
    down_SHI: torch.Tensor
    activation: str = "silu"

    def check_up(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless gate and up projection take rows of this size and dtype."""
        check_tensor(
            "matrices.gate_up_SNH", self.gate_up_SNH, (None, None, hidden_size), dtype, device, contiguous=False
        )
        check_slots("matrices.gate_up_SNH", self.gate_up_SNH)
        self._check_together()
        check_activation(self.activation)

    def check_down(self, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless the down projection takes rows of this size and dtype."""
        check_tensor("matrices.down_SHI", self.down_SHI, (None, None, intermediate), dtype, device, contiguous=False)
        check_slots("matrices.down_SHI", self.down_SHI)
        self._check_together()

    def check(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless the experts take rows of this size and dtype."""
        self.check_up(hidden_size, dtype, device)
        self.check_down(self.down_SHI.shape[2], dtype, device)

    def _check_together(self) -> None:
        shape = tuple(self.gate_up_SNH.shape)
        if len(shape) != 3 or shape[1] % 2:
            raise ValueError(f"matrices.gate_up_SNH has shape {shape}: must be [slots, 2 * I (gate, up), H]")
        slots, double, hidden_size = shape
        if self.down_SHI.shape != (slots, hidden_size, double // 2):
            raise ValueError(
                f"matrices.down_SHI has shape {tuple(self.down_SHI.shape)}: must be {(slots, hidden_size, double // 2)} "
                f"beside gate_up_SNH of shape {shape}"
            )
