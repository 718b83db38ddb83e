"""Steps 4 and 5 of a forward: the experts' weights in their slots, and the activation between them.

S slots, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_kernels.base.checks import check_kind, check_rows, check_slots, check_tensor
from moe_kernels.base.integers import cdiv
from moe_kernels.operands.activation import parse_activation
from moe_kernels.operands.config import GemmConfig
from moe_kernels.operands.quantised_weights import dequantise, group_of, num_block_rows
from moe_kernels.operands.schemes import BLOCK, MXFP4_GROUP, check_scheme


@dataclass(frozen=True)
class ExpertMatrices:
    """Experts of two matrices: `down(activation(gate(x), up(x)))`, or `down(activation(up(x)))`.

    All tensors have slots first, any distance apart; what belongs to a slot is contiguous.

    Attributes:
        gate_up_SNH: [S, 2I, H] float32, float16 or bfloat16: gate rows, then up rows; [S, I, H] if there is no gate.
            Quantised: as `scheme` says.
        down_SHI: [S, H, I] of the same dtype, likewise.
        activation: "silu", "gelu", …: see `parse_activation`. (A string, because a dataclass would cost each registered call
            as many arguments as it has fields.)
        gate_up_bias_SN: [S, 2I] or [S, I] of the dtype of x; None: no biases.
        down_bias_SH: [S, H], likewise; added before the routing weight multiplies.
        gate_up_scale, down_scale: of quantised weights, of blocks of 128 × 128 (fp8_block: [S, 2 * ceil(I / 128),
            ceil(H / 128)], gate rows' blocks first, and [S, ceil(H / 128), ceil(I / 128)]) or of groups of columns ([S,
            H / group, 2I] and [S, I / group, H]).
        gate_up_zero, down_zero: of int4 with zero points, of the shapes of the scales; else None.
        scheme: one of `schemes.SCHEMES`; `quantised_weights` says what they mean. Quantised experts have no gradient.
            "fp8_block" takes any sizes, "mxfp4" and "int4" need H and I divisible by the group.
    """

    gate_up_SNH: torch.Tensor
    down_SHI: torch.Tensor
    activation: str = "silu"
    gate_up_bias_SN: torch.Tensor | None = None
    down_bias_SH: torch.Tensor | None = None
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    gate_up_zero: torch.Tensor | None = None
    down_zero: torch.Tensor | None = None
    scheme: str = "plain"

    @property
    def is_gated(self) -> bool:
        return not str(self.activation).endswith("ungated")  # `parse_activation` refuses what is no string

    @property
    def hidden_size(self) -> int:
        """H, whatever the scheme."""
        return self.down_SHI.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I, whatever the scheme."""
        return self.gate_up_SNH.shape[1] // (2 if self.is_gated else 1)

    def gate_up_of(self, slot: int, dtype: torch.dtype) -> torch.Tensor:
        """What a reference multiplies rows of `dtype` with: [2I, H], for any scheme; [I, H] if there is no gate."""
        return self._float_matrix("gate_up", self.gate_up_SNH, slot, dtype)

    def down_of(self, slot: int, dtype: torch.dtype) -> torch.Tensor:
        """Likewise, [H, I]."""
        return self._float_matrix("down", self.down_SHI, slot, dtype)

    def check_up(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless gate and up projection take rows of this size and dtype."""
        self._check_weights("matrices.gate_up_SNH", self.gate_up_SNH, hidden_size, dtype, device)
        self._check_together()
        self._check_scales("gate_up", self.gate_up_SNH, hidden_size, device)
        self._check_bias("matrices.gate_up_bias_SN", self.gate_up_bias_SN, self.gate_up_SNH, dtype)

    def check_down(self, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless the down projection takes rows of this size and dtype."""
        self._check_weights("matrices.down_SHI", self.down_SHI, intermediate, dtype, device)
        self._check_together()
        self._check_scales("down", self.down_SHI, intermediate, device)
        self._check_bias("matrices.down_bias_SH", self.down_bias_SH, self.down_SHI, dtype)

    def check(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless the experts take rows of this size and dtype."""
        self.check_up(hidden_size, dtype, device)
        self.check_down(self.intermediate_size, dtype, device)

    def check_config(self, config: GemmConfig, which: str) -> None:
        """Raises ValueError unless the kernels of this scheme can run `config`; `which` is "up" or "down"."""
        if config.quantised != (self.scheme != "plain"):
            raise ValueError(
                f"config.quantised={config.quantised}: must be {self.scheme != 'plain'} with matrices.scheme={self.scheme!r}"
            )
        if self.scheme not in ("plain", "fp8_block") and config.tma and not config.swap:
            raise ValueError(f"config.swap=False: with config.tma it must be True with matrices.scheme={self.scheme!r}")
        if self.scheme == "fp8_block":
            if config.block_k != BLOCK:
                raise ValueError(f"config.block_k={config.block_k}: must be {BLOCK} with matrices.scheme='fp8_block'")
            # `expert_up` scales a whole group of hidden channels; columns of a block have one scale.
            # With TMA the down projection takes two such blocks.
            is_wide = which == "up" or config.tma
            if config.block_n != 2 * BLOCK if is_wide else config.block_n > BLOCK:
                rule = f"{2 * BLOCK}" if is_wide else f"at most {BLOCK}"
                raise ValueError(
                    f"config.block_n={config.block_n}: must be {rule} in `expert_{which}` with matrices.scheme='fp8_block'"
                )
        elif self.scheme != "plain" and config.tma and config.block_n > 192:
            raise ValueError(f"config.block_n={config.block_n}: must be 128 or 192 with config.tma and 4-bit weights")
        elif self.scheme != "plain" and config.block_k < MXFP4_GROUP:
            raise ValueError(f"config.block_k={config.block_k}: must be at least {MXFP4_GROUP} with 4-bit weights")

    def check_plain(self, why: str) -> None:
        """Raises ValueError if the experts are quantised."""
        if self.scheme != "plain":
            raise ValueError(f"matrices.scheme={self.scheme!r}: must be 'plain' {why}")

    def _float_matrix(self, which: str, weights: torch.Tensor, slot: int, dtype: torch.dtype) -> torch.Tensor:
        if self.scheme == "plain":
            return weights[slot]
        scale, zero = getattr(self, f"{which}_scale"), getattr(self, f"{which}_zero")
        blocks_of = self.intermediate_size if which == "gate_up" else None
        matrix = dequantise(
            weights[slot], scale[slot], None if zero is None else zero[slot], self.scheme, blocks_of=blocks_of
        )
        # Kernels dequantise 4-bit weights to the dtype of x; fp8 ones they multiply as they are, and scale in float32.
        return matrix if self.scheme == "fp8_block" else matrix.to(dtype)

    def _check_together(self) -> None:
        if not torch.compiler.is_compiling():  # which warns of its cache
            parse_activation(self.activation)
        for name in ("gate_up_SNH", "down_SHI"):
            check_kind(f"matrices.{name}", getattr(self, name), torch.Tensor)
        shape, rows_of_one = tuple(self.gate_up_SNH.shape), 2 if self.is_gated else 1
        if len(shape) != 3 or shape[1] % rows_of_one:
            what = "2 * I (gate, up)" if rows_of_one == 2 else "I"
            raise ValueError(f"matrices.gate_up_SNH has shape {shape}: must be [slots, {what}, H]")
        slots, rows, columns = shape
        packed = self._packed
        hidden_size, intermediate = columns * packed, rows // rows_of_one
        wanted = (slots, hidden_size, intermediate // packed)
        if self.down_SHI.shape != wanted or intermediate % packed:
            raise ValueError(
                f"matrices.down_SHI has shape {tuple(self.down_SHI.shape)}: must be {wanted} beside gate_up_SNH of shape "
                f"{shape}" + ("" if packed == 1 else f", with an even I={intermediate}")
            )
        for name in ("gate_up_scale", "down_scale", "gate_up_zero", "down_zero"):
            is_zero = name.endswith("zero")
            is_given, may_be = getattr(self, name) is not None, self.scheme == "int4"
            if is_given and (not may_be if is_zero else self.scheme == "plain"):
                raise ValueError(f"matrices.{name} is given: must be None with scheme={self.scheme!r}")
            if not is_given and not is_zero and self.scheme != "plain":
                raise ValueError(f"matrices.{name} is None: must be a tensor with scheme={self.scheme!r}")

    @property
    def _packed(self) -> int:
        """Weights in an element."""
        return 2 if self.scheme in ("mxfp4", "int4") else 1

    def _check_weights(
        self, name: str, weights: torch.Tensor, columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        check_scheme(self.scheme)
        stored = dtype if self.scheme == "plain" else torch.float8_e4m3fn if self._packed == 1 else torch.uint8
        if columns % self._packed:
            raise ValueError(f"{name} is packed, for {columns} columns: must be an even number")
        check_tensor(name, weights, (None, None, columns // self._packed), stored, device, contiguous=False)
        check_slots(name, weights)

    def _check_scales(self, which: str, weights: torch.Tensor, columns: int, device: torch.device) -> None:
        if self.scheme == "plain":
            return
        slots, rows, _ = weights.shape
        scale, zero = getattr(self, f"{which}_scale"), getattr(self, f"{which}_zero")
        if self.scheme == "fp8_block":
            blocks_of = self.intermediate_size if which == "gate_up" else None
            shape, dtype = (slots, num_block_rows(rows, blocks_of), cdiv(columns, BLOCK)), torch.float32
        else:
            group = group_of(weights, scale, self.scheme, f"matrices.{which}_scale")
            shape = (slots, columns // group, rows)
            dtype = torch.uint8 if self.scheme == "mxfp4" else torch.bfloat16
        check_tensor(f"matrices.{which}_scale", scale, shape, dtype, device, contiguous=False)
        check_slots(f"matrices.{which}_scale", scale)
        if zero is not None:
            check_tensor(f"matrices.{which}_zero", zero, shape, torch.uint8, device, contiguous=False)
            check_slots(f"matrices.{which}_zero", zero)

    @staticmethod
    def _check_bias(name: str, bias: torch.Tensor | None, weights: torch.Tensor, dtype: torch.dtype) -> None:
        if bias is not None:
            check_tensor(name, bias, tuple(weights.shape[:2]), dtype, weights.device, contiguous=False)
            check_rows(name, bias)
