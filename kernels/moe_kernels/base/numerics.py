"""Steps 4 to 6 of a forward: rounding, products and activations, natively and in the interpreter.

Triton's interpreter keeps bfloat16 as raw 16-bit integers: it multiplies those, truncates when it narrows, and does not
keep a zero when it converts. So there values are widened first and rounded by hand; natively this adds nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.base.backend import INTERPRETED

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
        small = (tl.abs(value) + 16384.0) - 16384.0  # the sum's last bit is worth 2 ** -9, as that of small values
        small = tl.where(value < 0, -small, small)
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


# What `parse_activation` does, in functions that the compiler can run.
@triton.constexpr_function
def _name(activation):
    return activation.split()[0]


@triton.constexpr_function
def _number(activation, name, default):
    for part in activation.split():
        if part.startswith(name + "="):
            return float(part[len(name) + 1 :])
    return default


@triton.constexpr_function
def is_gated(activation):
    """Whether there are gate rows beside the up rows."""
    return not activation.endswith("ungated")


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    """What the activation (see `parse_activation`) makes of gate and up, in float32; without a gate, of up."""
    NAME: tl.constexpr = _name(ACTIVATION)
    LIMIT: tl.constexpr = _number(ACTIVATION, "limit", 0.0)
    ALPHA: tl.constexpr = _number(ACTIVATION, "alpha", 1.0)
    UP_OFFSET: tl.constexpr = _number(ACTIVATION, "up_offset", 0.0)
    if LIMIT > 0:  # a NaN stays one
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if UP_OFFSET != 0:
        up = up + UP_OFFSET
    x = gate if is_gated(ACTIVATION) else up
    if NAME == "silu":
        y = x / (1.0 + tl.exp(-x)) if ALPHA == 1 else x / (1.0 + tl.exp(-ALPHA * x))
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)); the constant is 2 * sqrt(2 / pi)
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(NAME == "relu2")
        y = tl.where(x < 0, 0.0, x)
        y = y * y
    return y * up if is_gated(ACTIVATION) else y


@triton.jit
def activated_backward(grad, gate, up, ACTIVATION: tl.constexpr):
    """`activated`, and the gradients of gate and up for the gradient of its result; without a gate, that of up twice."""
    NAME: tl.constexpr = _name(ACTIVATION)
    LIMIT: tl.constexpr = _number(ACTIVATION, "limit", 0.0)
    ALPHA: tl.constexpr = _number(ACTIVATION, "alpha", 1.0)
    UP_OFFSET: tl.constexpr = _number(ACTIVATION, "up_offset", 0.0)
    GATED: tl.constexpr = is_gated(ACTIVATION)
    x = gate if GATED else up
    factor = up
    if LIMIT > 0:
        x = tl.where(x > LIMIT, LIMIT, x)
        factor = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if UP_OFFSET != 0:
        factor = factor + UP_OFFSET
    if NAME == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-ALPHA * x))
        y = x * sigmoid
        slope = sigmoid + ALPHA * y * (1.0 - sigmoid)
    elif NAME == "gelu":  # the constants are 1 / sqrt(2) and 1 / sqrt(2 pi)
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        y = x * sigmoid
        slope = sigmoid + y * (1.0 - sigmoid) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        tl.static_assert(NAME == "relu2")
        positive = tl.where(x < 0, 0.0, x)
        y = positive * positive
        slope = 2.0 * positive
    if GATED:
        grad_gate = grad * factor * slope
        grad_up = grad * y
        if LIMIT > 0:
            grad_gate = tl.where(gate <= LIMIT, grad_gate, 0.0)
            grad_up = tl.where(tl.abs(up) <= LIMIT, grad_up, 0.0)
        return y * factor, grad_gate, grad_up
    else:
        return y, grad * slope, grad * slope
