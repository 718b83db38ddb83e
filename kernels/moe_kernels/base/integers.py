"""All steps of a forward: integer functions for launches, on the host. Triton's own are slow outside kernels."""


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(value: int) -> int:
    """The least power of two that is not less; at least 1."""
    return 1 << (value - 1).bit_length() if value > 0 else 1
