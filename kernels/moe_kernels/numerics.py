"""Steps 4 to 6 of a forward: rounding, products and activations, natively and in the interpreter.

Triton's interpreter keeps bfloat16 as raw 16-bit integers: it multiplies those, truncates when it narrows, and does not
keep a zero when it converts. So there values are widened first and rounded by hand; natively this adds nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.backend import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def widen(value):
    """→ float32, exactly."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 → `dtype`, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)  # a NaN stays one
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def to_e4m3(value):
    """float32 of at most 448 → e4m3, to nearest. (The interpreter loses carries into the exponent: it rounds nothing.)"""
    if _INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        small = tl.floor(value * 512.0 + 0.5) / 512.0
        value = tl.where(tl.abs(value) < 0.015625, small, normal)
    return value.to(tl.float8e4nv)


@triton.jit
def dot(a, b, accumulator):
    """`accumulator + a @ b` in float32; float32 operands are not shortened to TF32.

    NumPy's product gives a row other bits in another place of the block; the interpreter hides that by float64.
    """
    if _INTERPRETED:
        return accumulator + tl.dot(widen(a).to(tl.float64), widen(b).to(tl.float64), out_dtype=tl.float64).to(
            tl.float32
        )
    else:
        return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """act(gate) * up in float32."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate)) * up
    else:
        tl.static_assert(ACTIVATION == "gelu")
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
