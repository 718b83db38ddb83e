"""Formats of 4-bit experts: how a slot's record holds the codes of weights, so that a kernel unpacks two by one instruction.

A group of 32 columns is four words of 32 bits. Word t holds the columns 8i + 2t + e, for i of 0 to 3 and e of 0 and 1: what a
thread of a tensor core's operand needs of the group (PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16"). `PLACES` says
where the four bits of each i are for e = 0; those of e = 1 are 16 places further, going round.

- int4: one nibble after the other, lowest first.
- mxfp4: rotated right by 0, 4 and 26 places, those of i = 0, 1 and 2 are where a bfloat16 has its sign, the last two bits of
  its exponent and the first bit of its mantissa. So are those of i = 3 rotated by 6, but for the mantissa, which takes 30.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_kernels.base.checks import check_kind

WORD = 8
"""Weights in a word."""
GROUP = 32
"""Columns whose words lie together."""

# For each i: the places of a code's bits where e is 0, lowest first. An e2m1 code is, from there, mantissa, exponent, sign.
PLACES = {
    "int4": ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)),
    "mxfp4": ((6, 7, 8, 15), (10, 11, 12, 19), (0, 1, 2, 9), (4, 13, 14, 21)),
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


def _bits(scheme: str) -> Iterator[tuple[int, int, int, int]]:
    """Of each bit of a word: the i and e of its code, its number there, and its place."""
    for i, places in enumerate(PLACES[scheme]):
        for bit, place in enumerate(places):
            for e in (0, 1):
                yield i, e, bit, (place + 16 * e) % 32


def pack_words(codes: torch.Tensor, scheme: str) -> torch.Tensor:
    """Codes of 0 to 15, uint8 [..., K] (K divisible by 32) → the bytes of a record, uint8 [..., K / 2].

    Raises:
        ValueError: another dtype, columns that do not divide into groups, or a scheme that is none of 4 bits.
    """
    check_bytes("codes", codes, GROUP)
    _check_scheme(scheme)
    parts = codes.unflatten(-1, (-1, 4, 4, 2))  # [..., group, i, t, e]
    words = torch.zeros(parts[..., 0, :, 0].shape, dtype=torch.int32, device=codes.device)
    for i, e, bit, place in _bits(scheme):
        words |= ((parts[..., i, :, e].int() >> bit) & 1) << place
    return torch.stack([(words >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1).to(torch.uint8).flatten(-3)


def unpack_words(packed: torch.Tensor, scheme: str) -> torch.Tensor:
    """The reverse of `pack_words`: uint8 [..., K / 2] → [..., K].

    Raises:
        ValueError: another dtype, bytes that are no whole groups, or a scheme that is none of 4 bits.
    """
    check_bytes("packed", packed, GROUP // 2)
    _check_scheme(scheme)
    parts = packed.unflatten(-1, (-1, 4, 4))  # [..., group, t, byte]
    codes = packed.new_zeros((*parts.shape[:-2], 4, 4, 2))  # [..., group, i, t, e]
    for i, e, bit, place in _bits(scheme):
        codes[..., i, :, e] |= ((parts[..., place // 8] >> (place % 8)) & 1) << bit
    return codes.flatten(-4)
