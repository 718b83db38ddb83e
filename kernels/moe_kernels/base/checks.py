"""All steps of a forward: cheap checks of tensors; a `ValueError` names the argument, its value and the rule."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from moe_kernels.base.backend import has_tma

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """`tensor` has this shape (None: any size), one of these dtypes, this device, and is contiguous."""
    try:
        sizes = tensor.shape
    except AttributeError:
        raise ValueError(f"{name} is a {type(tensor).__name__}: must be a tensor") from None
    if len(sizes) != len(shape):
        raise ValueError(f"{name} has shape {tuple(sizes)}: must have {len(shape)} dimensions")
    for axis, (is_size, size) in enumerate(zip(sizes, shape, strict=True)):
        if size is not None and is_size != size:
            raise ValueError(f"{name} has shape {tuple(sizes)}: dimension {axis} must be {size}")
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {tensor.dtype}: must be one of {[str(dtype) for dtype in allowed]}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {device}, as the other arguments are")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: must be contiguous")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    """`value` is one of our dataclasses, or of another class."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(f"{name} is a {type(value).__name__}: must be a {' or '.join(one.__name__ for one in kinds)}")


def check_pair(name: str, value: Any, kind: type) -> None:
    """`value` is a tuple of two of one of our dataclasses."""
    check_kind(name, value, tuple)
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} entries: must be a pair of {kind.__name__}")
    for place, one in enumerate(value):
        check_kind(f"{name}[{place}]", one, kind)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer; NumPy's and a tracer's are, bools are not."""
    return isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def check_integer(name: str, value: Any) -> int:
    """`value` is an integer; what range it must be in is the caller's. Returns it as an int, as kernels take no other."""
    if type(value) is int:  # as nearly always, and eager forwards check many
        return value
    if not is_integer(value):
        raise ValueError(f"{name}={value!r}: must be an integer")
    return int(value) if isinstance(value, numbers.Integral) else value


def check_batch(
    sizes: tuple[tuple[str, int], ...], dtype: torch.dtype, num_tokens: int, top_k: int, num_experts: int
) -> list[int]:
    """Raises ValueError unless these are a layer and a batch; `sizes`: names and numbers of the matrices' rows and columns.

    Returns:
        The sizes, `num_tokens`, `top_k` and `num_experts` as ints.
    """
    checked = []
    for name, value in (*sizes, ("num_tokens", num_tokens), ("top_k", top_k), ("num_experts", num_experts)):
        value = check_integer(name, value)
        least = 0 if name == "num_tokens" else 1
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
        checked.append(value)
    if num_experts < top_k:
        raise ValueError(f"num_experts={num_experts}: must be at least top_k={top_k}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype}: must be torch.float32, torch.float16 or torch.bfloat16")
    return checked


def check_rows(name: str, rows: torch.Tensor) -> None:
    """The rows of a matrix may be padded, their elements must be adjacent."""
    if rows.stride(1) != 1 and rows.shape[1] > 1 and rows.numel() > 0:
        raise ValueError(f"{name} has strides {rows.stride()}: the last must be 1")


def check_slots(name: str, weights: torch.Tensor) -> None:
    """Slots may be padded (`stride(0)` is free); the matrix of a slot must be contiguous."""
    _, rows, columns = weights.shape
    if rows * columns == 0:
        raise ValueError(f"{name} has shape {tuple(weights.shape)}: a slot's matrix must not be empty")
    if (weights.stride(2) != 1 and columns > 1) or (weights.stride(1) != columns and rows > 1):
        raise ValueError(f"{name} has strides {weights.stride()}: the matrix of a slot must be contiguous")


def check_tma(name: str, weights: torch.Tensor, columns: int | None = None) -> None:
    """The tensor memory accelerator needs rows in units of 16 bytes, of 16-bit elements or, with fp8_block, of bytes."""
    _, rows, inner = weights.shape
    if weights.dtype == torch.float8_e4m3fn:
        if inner % 16:
            raise ValueError(f"{name} has shape {tuple(weights.shape)}: config.tma needs columns divisible by 16")
        return
    if weights.element_size() != 2:
        raise ValueError(f"{name} has dtype {weights.dtype}: config.tma needs torch.float16 or torch.bfloat16")
    if inner % 8 or (rows if columns is None else columns) % 8:
        raise ValueError(f"{name} has shape {tuple(weights.shape)}: config.tma needs sizes divisible by 8")


def check_tma_address(name: str, tensor: torch.Tensor) -> None:
    """It needs a GPU that has it, and aligned addresses. A tracer has no addresses, so the ops themselves call this."""
    if tensor.is_cuda and not has_tma(tensor.device):
        raise ValueError(f"{name} is on {tensor.device}: config.tma needs a GPU for which has_tma() is true")
    if (tensor.stride(0) * tensor.element_size() % 16 and tensor.shape[0] > 1) or tensor.data_ptr() % 16:
        raise ValueError(
            f"{name} has strides {tensor.stride()} and begins at {tensor.data_ptr():#x}: config.tma needs slots and rows that "
            "begin at multiples of 16 bytes"
        )


def slot_stride(weights: torch.Tensor) -> int:
    """Elements from slot to slot. (The stride of a tensor with a single slot may be anything.)"""
    return weights.stride(0) if weights.shape[0] > 1 else weights.shape[1] * weights.shape[2]
