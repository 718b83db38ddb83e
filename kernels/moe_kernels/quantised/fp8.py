"""Steps 4 and 5 of a forward with fp8_block experts: e4m3 in kernels, also on GPUs that have no such type.

From compute capability 8.9 on kernels see e4m3. Below, and only there, they see bytes, and take them apart.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_kernels.base.numerics import to_e4m3

_E4M3_MAX = tl.constexpr(448.0)
_USUAL = tl.constexpr(2.0**90)


def e4m3_argument(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel takes for a tensor of e4m3: itself, or on a GPU without the type its bytes."""
    if tensor.is_cuda and not _has_e4m3(tensor.get_device()):
        return tensor.view(torch.uint8)
    return tensor


@functools.cache  # asked at each launch
def _has_e4m3(device_index: int) -> bool:
    return torch.version.cuda is None or torch.cuda.get_device_capability(device_index) >= (8, 9)


@triton.jit
def quantised(groups):
    """float32 [..., GROUP] → float32 of at most 448, not rounded yet, and the scale [...] of each group."""
    scale = tl.div_rn(tl.max(tl.abs(groups), axis=1), _E4M3_MAX)
    scale = tl.where(scale == 0, 1.0, scale)
    values = tl.div_rn(groups, tl.broadcast_to(scale[:, None], groups.shape))
    values = tl.where(values > _E4M3_MAX, _E4M3_MAX, values)  # the scale is rounded, so it may be; a NaN stays one
    return tl.where(values < -_E4M3_MAX, -_E4M3_MAX, values), scale


@triton.jit
def quantised_by(groups, largest, AXIS: tl.constexpr):
    """What `quantised` returns, in fewer instructions, for a conversion to e4m3 that saturates: it makes the same bits of it.

    `largest` has the largest absolute value of each group, whose values are along AXIS.

    One reciprocal serves a group. A correction by the remainder, which is exact, makes a quotient the nearest one, or one
    beside it if the true quotient is almost halfway between (Markstein, IA-64 and Elementary Functions, chapter 8). It is
    never so near to a middle of two numbers of e4m3, whose significands have four bits, that this would change a bit. All of
    that needs scales far from the ends of float32's range: a power of two brings those there. What is lost of small values then
    is far below e4m3's smallest.
    """
    scale = tl.div_rn(largest, _E4M3_MAX)
    scale = tl.where(scale == 0, 1.0, scale)
    power = tl.where(scale < 1.0 / _USUAL, _USUAL, tl.where(scale > _USUAL, 1.0 / _USUAL, 1.0))
    inverse = tl.div_rn(
        (scale == scale).to(tl.float32) * -1.0, scale * power
    )  # negated; of an infinite scale negative zero
    divisor = tl.where(inverse == 0, 0.0, scale * power)
    power = tl.broadcast_to(tl.expand_dims(power * -1.0, AXIS), groups.shape)
    inverse = tl.broadcast_to(tl.expand_dims(inverse, AXIS), groups.shape)
    divisor = tl.broadcast_to(tl.expand_dims(divisor, AXIS), groups.shape)
    negated = groups * power  # so a negative zero stays one
    values = negated * inverse
    return tl.fma(tl.fma(values, divisor, negated), inverse, values), scale


@triton.jit
def as_e4m3(values, pointer):
    """float32 of at most 448 → what `pointer` points to: e4m3, or its bytes."""
    if pointer.dtype.element_ty == tl.uint8:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = bits & 0x7FFFFFFF
        normal = (rounded + 0x7FFFF + ((rounded >> 20) & 1)) >> 20  # the exponent is biased by 127, not by 7
        # Adding 2 ** 14 leaves a sum whose last bit is worth 2 ** -9, rounded to nearest even.
        small = (tl.abs(values) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
        code = tl.where(tl.abs(values) < 0.015625, small, normal - (120 << 3))
        code = tl.where(values == values, code, 0x7F)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return to_e4m3(values)


@triton.jit
def operand(values):
    """What a product takes for e4m3: itself; bytes become float16, which has all of its values."""
    if values.dtype == tl.uint8:
        bits = values.to(tl.uint16)
        # Seven bits of exponent and mantissa at the place of float16's, whose exponent is biased by 15, not by 7.
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return half * 256.0
    else:
        return values
