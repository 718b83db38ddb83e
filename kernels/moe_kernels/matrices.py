"""Steps 4 and 5 of a forward: the experts' weights in their slots, and the activation between them.

S slots, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_kernels.activation import parse_activation
from moe_kernels.checks import check_rows, check_slots, check_tensor


@dataclass(frozen=True)
class ExpertMatrices:
    """Experts of two matrices: `down(activation(gate(x), up(x)))`, or `down(activation(up(x)))`.

    Attributes:
        gate_up_SNH: [S, 2I, H] float32, float16 or bfloat16: gate rows, then up rows; [S, I, H] if there is no gate. The matrix
            of a slot is contiguous, slots may be any distance apart.
        down_SHI: [S, H, I] of the same dtype, likewise.
        activation: "silu", "gelu", …: see `parse_activation`. (A string, because a dataclass would cost each registered call
            as many arguments as it has fields.)
        gate_up_bias_SN: [S, 2I] or [S, I] of the same dtype, slots any distance apart; None: no biases.
        down_bias_SH: [S, H], likewise; added before the routing weight multiplies.
    """

    gate_up_SNH: torch.Tensor
    down_SHI: torch.Tensor
    activation: str = "silu"
    gate_up_bias_SN: torch.Tensor | None = None
    down_bias_SH: torch.Tensor | None = None

    @property
    def is_gated(self) -> bool:
        return not self.activation.endswith("ungated")

    def check_up(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless gate and up projection take rows of this size and dtype."""
        check_tensor(
            "matrices.gate_up_SNH", self.gate_up_SNH, (None, None, hidden_size), dtype, device, contiguous=False
        )
        check_slots("matrices.gate_up_SNH", self.gate_up_SNH)
        self._check_together()
        self._check_bias("matrices.gate_up_bias_SN", self.gate_up_bias_SN, self.gate_up_SNH)

    def check_down(self, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless the down projection takes rows of this size and dtype."""
        check_tensor("matrices.down_SHI", self.down_SHI, (None, None, intermediate), dtype, device, contiguous=False)
        check_slots("matrices.down_SHI", self.down_SHI)
        self._check_together()
        self._check_bias("matrices.down_bias_SH", self.down_bias_SH, self.down_SHI)

    def check(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless the experts take rows of this size and dtype."""
        self.check_up(hidden_size, dtype, device)
        self.check_down(self.down_SHI.shape[2], dtype, device)

    def _check_together(self) -> None:
        if not torch.compiler.is_compiling():  # which warns of its cache
            parse_activation(self.activation)
        shape, rows_of_one = tuple(self.gate_up_SNH.shape), 2 if self.is_gated else 1
        if len(shape) != 3 or shape[1] % rows_of_one:
            what = "2 * I (gate, up)" if rows_of_one == 2 else "I"
            raise ValueError(f"matrices.gate_up_SNH has shape {shape}: must be [slots, {what}, H]")
        slots, rows, hidden_size = shape
        wanted = (slots, hidden_size, rows // rows_of_one)
        if self.down_SHI.shape != wanted:
            raise ValueError(
                f"matrices.down_SHI has shape {tuple(self.down_SHI.shape)}: must be {wanted} beside gate_up_SNH of shape "
                f"{shape}"
            )

    @staticmethod
    def _check_bias(name: str, bias: torch.Tensor | None, weights: torch.Tensor) -> None:
        if bias is not None:
            check_tensor(name, bias, tuple(weights.shape[:2]), weights.dtype, weights.device, contiguous=False)
            check_rows(name, bias)
