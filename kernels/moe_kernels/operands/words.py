"""Formats of 4-bit experts: how a slot's record holds the codes of weights, so that a kernel unpacks two by one instruction.

A group of 32 columns is four words of 32 bits. Word t holds the columns 8i + 2t + e, for i of 0 to 3 and e of 0 and 1: what a
thread of a tensor core's operand needs of the group (PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16"). Its lower 16
bits hold e = 0, the upper ones e = 1. `PLACES` says where in such a half the four bits of each i are.

- int4: one nibble after the other, lowest first.
- mxfp4: shifted by 0, 3 and 6 bits, those of i = 0, 1 and 2 are a bfloat16's sign, last two bits of exponent and first bit of
  mantissa. The last four bits have what is left over.
"""

from __future__ import annotations

import torch

from moe_kernels.base.checks import check_kind

WORD = 8
"""Weights in a word."""
GROUP = 32
"""Columns whose words lie together."""

# Of a half word, for each i: the places of a code's bits, lowest first. An e2m1 code is, from there, mantissa, exponent, sign.
PLACES = {
    "int4": ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)),
    "mxfp4": ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (13, 10, 11, 14)),
}


def check_bytes(name: str, values: torch.Tensor, multiple: int) -> None:
    """Raises ValueError unless `values` is uint8 [..., n], n divisible by `multiple`."""
    check_kind(name, values, torch.Tensor)
    if values.dtype != torch.uint8 or values.dim() < 1 or values.shape[-1] % multiple:
        raise ValueError(
            f"{name} has dtype {values.dtype} and shape {tuple(values.shape)}: must be uint8 with a last dimension "
            f"divisible by {multiple}"
        )


def _check_scheme(scheme: str) -> None:
    if scheme not in PLACES:
        raise ValueError(f"scheme={scheme!r}: must be one of {tuple(PLACES)}")


def pack_words(codes: torch.Tensor, scheme: str) -> torch.Tensor:
    """Codes of 0 to 15, uint8 [..., K] (K divisible by 32) → the bytes of a record, uint8 [..., K / 2].

    Raises:
        ValueError: another dtype, columns that do not divide into groups, or a scheme that is none of 4 bits.
    """
    check_bytes("codes", codes, GROUP)
    _check_scheme(scheme)
    # [..., group, i, t, e] → [..., group, t, e, i]: a byte for each code, then two bytes for each half word.
    parts = codes.unflatten(-1, (-1, 4, 4, 2)).movedim(-3, -1)
    halves = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=codes.device)
    for i, places in enumerate(PLACES[scheme]):
        code = parts[..., i].int()
        for bit, place in enumerate(places):
            halves |= ((code >> bit) & 1) << place
    halves = torch.stack((halves & 0xFF, halves >> 8), dim=-1).to(torch.uint8)
    return halves.flatten(-4)


def unpack_words(packed: torch.Tensor, scheme: str) -> torch.Tensor:
    """The reverse of `pack_words`: uint8 [..., K / 2] → [..., K].

    Raises:
        ValueError: another dtype, bytes that are no whole groups, or a scheme that is none of 4 bits.
    """
    check_bytes("packed", packed, GROUP // 2)
    _check_scheme(scheme)
    low, high = packed.unflatten(-1, (-1, 4, 2, 2)).int().unbind(-1)
    halves = low | (high << 8)  # [..., group, t, e]
    codes = [sum(((halves >> place) & 1) << bit for bit, place in enumerate(places)) for places in PLACES[scheme]]
    return torch.stack(codes, dim=-3).to(torch.uint8).flatten(-4)  # [..., group, i, t, e]
