"""Before step 4 of a forward with fp8_block experts: rows become e4m3 with a float32 scale for each 128 channels.

R rows, H channels, G = ceil(H / 128) groups of channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from moe_kernels.base.backend import resolve_backend
from moe_kernels.base.checks import FLOATS, check_rows, check_tensor
from moe_kernels.base.integers import cdiv, next_power_of_2
from moe_kernels.base.launch import Launcher, gdc_launch_dependents, gdc_wait
from moe_kernels.base.numerics import widen
from moe_kernels.base.registered import registered_op
from moe_kernels.operands.quantised_weights import E4M3_MAX, divided, to_e4m3
from moe_kernels.operands.schemes import BLOCK
from moe_kernels.quantised.fp8 import as_e4m3, e4m3_argument, quantised


class QuantisedRows(NamedTuple):
    """Rows that mean ``values * scale``, each scale of 128 channels of a row (the last group may be smaller).

    Attributes:
        values_RH: [R, H] float8_e4m3fn, contiguous.
        scale_RG: [R, ceil(H / 128)] float32, contiguous.
        dtype: what the rows were; the experts' output has it.
    """

    values_RH: torch.Tensor
    scale_RG: torch.Tensor
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.values_RH.device

    def dequantised(self) -> torch.Tensor:
        """[R, H] float32."""
        scale_RH = self.scale_RG.repeat_interleave(BLOCK, dim=1)[:, : self.values_RH.shape[1]]
        return self.values_RH.float() * scale_RH

    def check(self, name: str) -> None:
        """Raises ValueError if shapes, dtypes or devices are wrong."""
        check_tensor(f"{name}.values_RH", self.values_RH, (None, None), torch.float8_e4m3fn)
        num_rows, hidden_size = self.values_RH.shape
        shape = (num_rows, cdiv(hidden_size, BLOCK))
        check_tensor(f"{name}.scale_RG", self.scale_RG, shape, torch.float32, self.device)


Rows = torch.Tensor | QuantisedRows
"""Of floats, or quantised."""


def values_of(rows: Rows) -> torch.Tensor:
    """The tensor of the rows' sizes and device."""
    return rows.values_RH if isinstance(rows, QuantisedRows) else rows


def check_values(name: str, rows: Rows) -> torch.Tensor:
    """`values_of`; raises ValueError unless the grouped GEMMs take such rows."""
    if isinstance(rows, QuantisedRows):
        rows.check(name)
        return rows.values_RH
    check_tensor(name, rows, (None, None), FLOATS, contiguous=False)
    check_rows(name, rows)
    return rows


def as_rows(values: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> Rows:
    """What an op's flat arguments mean."""
    return values if scale is None else QuantisedRows(values, scale, dtype)


def new_quantised_rows(like: torch.Tensor, num_rows: int, hidden_size: int, dtype: torch.dtype) -> QuantisedRows:
    """Unwritten ones, on the device of `like`."""
    values = like.new_empty((num_rows, hidden_size), dtype=torch.float8_e4m3fn)
    scale = like.new_empty((num_rows, cdiv(hidden_size, BLOCK)), dtype=torch.float32)
    return QuantisedRows(values, scale, dtype)


@Launcher
@triton.jit(do_not_specialize=["stride_row", "num_zeroed"])
def _quantise_rows_kernel(
    # inputs
    x_ptr,
    # outputs
    values_ptr,
    scale_ptr,
    zeroed_ptr,  # None: nothing is zeroed
    # shapes and strides, in elements
    hidden_size,
    stride_row,
    num_zeroed,
    # constants
    PDL: tl.constexpr,
    # tunables
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """BLOCK_H channels of a row."""
    if PDL:  # see `Launcher`
        gdc_wait()
        gdc_launch_dependents()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden_size
    x = widen(tl.load(x_ptr + row * stride_row + column, mask=inside, other=0.0))
    values, scale = quantised(x.reshape(BLOCK_H // GROUP, GROUP))
    tl.store(values_ptr + row * hidden_size + column, as_e4m3(values, values_ptr).reshape(BLOCK_H), mask=inside)
    group = block * (BLOCK_H // GROUP) + tl.arange(0, BLOCK_H // GROUP)
    num_groups = tl.cdiv(hidden_size, GROUP)
    tl.store(scale_ptr + row * num_groups + group, scale, mask=group < num_groups)
    if zeroed_ptr is not None and (row == 0) & (block == 0):
        for first in range(0, num_zeroed, BLOCK_H):
            i = first + tl.arange(0, BLOCK_H)
            tl.store(zeroed_ptr + i, tl.zeros((BLOCK_H,), tl.int32), mask=i < num_zeroed)


_MOST_COLUMNS = 1024  # that a program takes


def quantise_rows_triton(x_RH: torch.Tensor, zeroed: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`zeroed`: int32, contiguous; becomes zero, if there are rows."""
    num_rows, hidden_size = x_RH.shape
    rows = new_quantised_rows(x_RH, num_rows, hidden_size, x_RH.dtype)
    block = min(max(next_power_of_2(hidden_size), BLOCK), _MOST_COLUMNS)
    if num_rows:
        _quantise_rows_kernel[num_rows, cdiv(hidden_size, block)](
            x_RH,
            e4m3_argument(rows.values_RH),
            rows.scale_RG,
            zeroed,
            hidden_size,
            x_RH.stride(0),
            0 if zeroed is None else zeroed.shape[0],
            BLOCK_H=block,
            GROUP=BLOCK,
            num_warps=block // 256 or 1,
        )
    return rows.values_RH, rows.scale_RG


def quantise_rows_torch(x_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `quantise_rows`: values and scale.

    Example (two channels, so one group): [[224, -1.0]] → scale 0.5, values [[448, -2]].
    """
    x = x_RH.float()
    columns = x.shape[1]
    groups = F.pad(x, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    scale_RG = divided(groups.abs().amax(2), E4M3_MAX)
    scale_RG = torch.where(scale_RG == 0, 1.0, scale_RG)
    return to_e4m3((groups / scale_RG[:, :, None]).flatten(1)[:, :columns].contiguous()), scale_RG


@registered_op("moe_kernels::quantise_rows")
def _quantise_rows(x_RH: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        return quantise_rows_triton(x_RH)
    return quantise_rows_torch(x_RH)


@_quantise_rows.register_fake
def _quantise_rows_fake(x_RH, _):
    return new_quantised_rows(x_RH, x_RH.shape[0], x_RH.shape[1], x_RH.dtype)[:2]


def quantise_rows(x_RH: torch.Tensor, *, backend: str = "auto") -> QuantisedRows:
    """Rows in e4m3, each 128 channels with the scale amax / 448 (1 where that is 0); all of it rounded to nearest.

    Both backends give the same bits, on every device. Not differentiable.

    Args:
        x_RH: [R, H] float32, float16 or bfloat16. Rows may be padded.
        backend: see `resolve_backend`.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("x_RH", x_RH, (None, None), FLOATS, contiguous=False)
    check_rows("x_RH", x_RH)
    values_RH, scale_RG = _quantise_rows(x_RH, resolve_backend(backend, x_RH.device))
    return QuantisedRows(values_RH, scale_RG, x_RH.dtype)
