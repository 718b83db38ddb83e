"""Formats of quantised experts: what the bytes of a weight mean, and how a float weight becomes such bytes.

A scheme says how the weights of all experts are stored:

| scheme | weights [N, K] | scale | zero |
|---|---|---|---|
| plain | floats | - | - |
| fp8_block | e4m3 [N, K] | float32, of blocks of 128 × 128; multiplies | - |
| mxfp4 | uint8 [N, K / 2], e2m1 codes | uint8 [K / 32, N], 2 ** (v - 127); 255 is NaN | - |
| int4 | uint8 [N, K / 2], codes q of 0 to 15 | bfloat16 [K / group, N], group 32 or 128 | none: (q - 8) · scale |
| | | | uint8 [K / group, N]: (q - zero) · scale |

Where a row's 4-bit codes lie in its bytes, `words` says. Their scales lie row beside row, as a kernel loads those of many rows
and of a few groups at once. In front of the last two dimensions may be others: slots, experts. N rows, K columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_kernels.base.checks import FLOATS, check_integer, check_kind
from moe_kernels.base.integers import cdiv
from moe_kernels.operands.schemes import BLOCK, INT4_GROUPS, MXFP4_GROUP, check_scheme
from moe_kernels.operands.words import check_bytes, pack_words, unpack_words

E4M3_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The value of the codes 0 to 7 of mxfp4; codes from 8 on are their negatives."""


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 0 to 15, uint8 [..., K] (K even) → bytes [..., K / 2]: [1, 2, 15, 0] → [0x21, 0x0F]."""
    check_bytes("codes", codes, 2)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `pack_nibbles`: uint8 [..., K / 2] → [..., K]."""
    check_bytes("packed", packed, 1)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantise(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    scheme: str,
    columns: int | None = None,
    blocks_of: int | None = None,
) -> torch.Tensor:
    """The float32 weights that quantised ones mean, [..., N, K]: exactly for all 4-bit schemes, else rounded once.

    Args:
        weight, scale, zero: of one slot or many, as the table above has them.
        columns: K, if the last columns are padding; None: there is none.
        blocks_of: fp8_block: after so many rows blocks begin anew, as up rows do behind gate rows: I for the gate and up
            projection of gated experts. None: N.

    Raises:
        ValueError: shapes or dtypes that don't fit the scheme, or blocks that don't divide the rows.
    """
    check_scheme(scheme)
    _check_stored(weight, scale, zero, scheme)
    if scheme == "plain":
        values = weight.float()
    elif scheme == "fp8_block":
        values = weight.float() * _of_blocks(scale, weight.shape[-2:], blocks_of)
    else:
        codes = unpack_words(weight, scheme)
        group = group_of(weight, scale, scheme)
        assert scale is not None
        if scheme == "mxfp4":
            units, factor = _of_codes(codes), exponents(scale)
        else:
            middle = torch.tensor(8.0, device=weight.device)
            if zero is not None:
                middle = _of_groups(zero.float(), group)
            units, factor = codes.float() - middle, scale.float()
        values = units * _of_groups(factor, group)
    if columns is not None:
        check_integer("columns", columns)
    if columns is not None and not 0 < columns <= values.shape[-1]:
        raise ValueError(f"columns={columns}: must be in [1, {values.shape[-1]}]")
    return values if columns is None else values[..., :columns]


def quantise_weights(
    weight: torch.Tensor,
    scheme: str,
    group: int = MXFP4_GROUP,
    with_zero: bool = False,
    blocks_of: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Quantised weights, scale and zero (None where the scheme has none) of float weights [..., N, K].

    fp8_block: scale = amax / 448 of a block (1 where that is 0), values rounded to nearest. mxfp4: of the two exponents at
    which the largest element of a group is in reach or just beyond it, the one with the smaller squared error. int4: scale =
    amax / 7.5 of a group, or with zeros (max - min) / 15, rounded to bfloat16; then codes to nearest. All ties go to even.
    Every device gives the same bits.

    Args:
        weight: of any float dtype; computed in float32.
        group: int4: 32 or 128. mxfp4 has 32.
        with_zero: int4: whether groups have zeros of their own.
        blocks_of: as of `dequantise`.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_scheme(scheme)
    if with_zero and scheme != "int4":
        raise ValueError(f"with_zero=True: must be False with scheme={scheme!r}")
    if scheme == "plain":
        return weight, None, None
    check_kind("weight", weight, torch.Tensor)
    if not weight.is_floating_point() or weight.dim() < 2:
        raise ValueError(f"weight has dtype {weight.dtype} and shape {tuple(weight.shape)}: must be floats [..., N, K]")
    values = weight.float()
    if scheme == "fp8_block":
        scale = divided(_block_amax(values, blocks_of), E4M3_MAX)
        scale = torch.where(scale == 0, 1.0, scale)
        return to_e4m3(values / _of_blocks(scale, values.shape[-2:], blocks_of)), scale, None
    check_group(scheme, group, values.shape[-1])
    groups = values.unflatten(-1, (-1, group))
    if scheme == "mxfp4":
        codes, exponent = _quantised_mxfp4(groups)
        return pack_words(codes.flatten(-2), scheme), _beside(exponent), None
    if not with_zero:
        scale = divided(groups.abs().amax(-1), 7.5).bfloat16()
        units = groups / torch.where(scale == 0, 1.0, scale.float())[..., None] + 8
        return pack_words(units.round().clamp(0, 15).to(torch.uint8).flatten(-2), scheme), _beside(scale), None
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = divided(high - low, 15.0).bfloat16()
    step = torch.where(scale == 0, 1.0, scale.float())
    zero = (-low / step).round().clamp(0, 15)
    units = groups / step[..., None] + zero[..., None]
    codes = units.round().clamp(0, 15).to(torch.uint8)
    return pack_words(codes.flatten(-2), scheme), _beside(scale), _beside(zero.to(torch.uint8))


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float32 → e4m3, to nearest even; what is beyond ±448 becomes that."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def divided(values: torch.Tensor, number: float) -> torch.Tensor:
    """values / number, rounded once on every device: CUDA multiplies by the reciprocal of a Python number, rounded before."""
    return values / values.new_full((), number)


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """ue8m0 → float32: 2 ** (v - 127), and NaN for 255."""
    bits = scale.int() << 23
    bits = torch.where(scale == 0, 0x400000, torch.where(scale == 255, 0x7FC00000, bits))  # 2 ** -127 is subnormal
    return bits.view(torch.float32)


def group_of(weight: torch.Tensor, scale: torch.Tensor | None, scheme: str, name: str = "scale") -> int:
    """How many columns of packed weights share a scale, which is [..., groups, N].

    Raises:
        ValueError: the shapes fit no group of the scheme.
    """
    columns = 2 * weight.shape[-1]
    num_groups = 0 if scale is None or scale.dim() < 2 else scale.shape[-2]
    if num_groups == 0 or columns % num_groups or columns // num_groups not in _groups(scheme):
        raise ValueError(
            f"{name} has shape {None if scale is None else tuple(scale.shape)}: must have {columns} columns of weights "
            f"divided by a group of {_groups(scheme)} as its last dimension but one"
        )
    return columns // num_groups


def check_group(scheme: str, group: int, columns: int) -> None:
    """Raises ValueError unless the scheme has such groups, and they divide the columns."""
    if group not in _groups(scheme):
        raise ValueError(f"group={group}: must be one of {_groups(scheme)} with scheme={scheme!r}")
    if columns % group:
        raise ValueError(f"weight has {columns} columns: scheme={scheme!r} needs a multiple of group={group}")


def num_block_rows(rows: int, blocks_of: int | None = None) -> int:
    """How many rows of blocks `rows` rows have, of which each `blocks_of` begin anew."""
    blocks_of = blocks_of or rows
    return rows // blocks_of * cdiv(blocks_of, BLOCK)


_DTYPES = {  # of weights and scales
    "fp8_block": ((torch.float8_e4m3fn,), FLOATS),
    "mxfp4": ((torch.uint8,), (torch.uint8,)),
    "int4": ((torch.uint8,), FLOATS),
}


def _check_stored(weight: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, scheme: str) -> None:
    """Raises ValueError unless these are what the scheme has, but for their shapes."""
    check_kind("weight", weight, torch.Tensor)
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: must be [..., N, K]")
    if scheme == "plain":
        return
    of_zero = (torch.uint8,) if scheme == "int4" else ()
    for name, part, dtypes in zip(
        ("weight", "scale", "zero"), (weight, scale, zero), (*_DTYPES[scheme], of_zero), strict=True
    ):
        if part is not None and getattr(part, "dtype", None) not in dtypes:
            found = getattr(part, "dtype", type(part).__name__)
            rule = " or ".join(map(str, dtypes)) or "None"
            raise ValueError(f"{name} is of {found}: must be {rule} with scheme={scheme!r}")
    if zero is not None and (scale is None or zero.shape != scale.shape):
        raise ValueError(f"zero has shape {tuple(zero.shape)}: must be that of scale")


def _check_blocks(rows: int, blocks_of: int | None) -> None:
    if blocks_of is None:
        return
    check_integer("blocks_of", blocks_of)
    if blocks_of < 1 or rows % blocks_of:
        raise ValueError(f"blocks_of={blocks_of}: must be None or divide the {rows} rows of weight")


def _groups(scheme: str) -> tuple[int, ...]:
    return (MXFP4_GROUP,) if scheme == "mxfp4" else INT4_GROUPS


def _beside(of_groups: torch.Tensor) -> torch.Tensor:
    """[..., N, groups] → [..., groups, N], and back."""
    return of_groups.transpose(-1, -2).contiguous()


def _of_groups(of_groups: torch.Tensor, group: int) -> torch.Tensor:
    """[..., groups, N] → of each weight, [..., N, K]."""
    return of_groups.transpose(-1, -2).repeat_interleave(group, dim=-1)


def _of_blocks(scale: torch.Tensor | None, shape: torch.Size, blocks_of: int | None) -> torch.Tensor:
    """The scale of each element."""
    rows, columns = shape
    _check_blocks(rows, blocks_of)
    wanted = (num_block_rows(rows, blocks_of), cdiv(columns, BLOCK))
    if scale is None or tuple(scale.shape[-2:]) != wanted:
        found = None if scale is None else tuple(scale.shape)
        raise ValueError(f"scale has shape {found}: its last dimensions must be {wanted} for weights of {tuple(shape)}")
    blocks_of = blocks_of or rows
    parts = scale.float().unflatten(-2, (rows // blocks_of, -1))
    parts = parts.repeat_interleave(BLOCK, dim=-2)[..., :blocks_of, :].flatten(-3, -2)
    return parts.repeat_interleave(BLOCK, dim=-1)[..., :columns]


def _block_amax(values: torch.Tensor, blocks_of: int | None) -> torch.Tensor:
    rows, columns = values.shape[-2:]
    _check_blocks(rows, blocks_of)
    blocks_of = blocks_of or rows
    parts = values.abs().unflatten(-2, (rows // blocks_of, blocks_of))
    parts = F.pad(parts, (0, -columns % BLOCK, 0, -blocks_of % BLOCK))
    blocks = parts.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    return blocks.amax((-3, -1)).flatten(-3, -2)


def _quantised_mxfp4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., groups, 32] and exponents [..., groups]."""
    # amax = m · 2 ** e with m in [0.5, 1): 4 · 2 ** (e - 3) <= amax < 8 · 2 ** (e - 3), and 6 is the largest code.
    _, exponent = torch.frexp(groups.abs().amax(-1))
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    least = torch.zeros(())
    for up in (0, 1):
        biased = (exponent - 3 + up + 127).clamp(0, 254).to(torch.uint8)
        factor = exponents(biased)[..., None]
        codes = _nearest_e2m1(groups / factor)
        error = _sums((_of_codes(codes) * factor - groups).square())
        if best is None:
            best, least = (codes, biased), error
        else:
            is_better = error < least
            best = torch.where(is_better[..., None], codes, best[0]), torch.where(is_better, biased, best[1])
    assert best is not None
    return best


def _sums(groups: torch.Tensor) -> torch.Tensor:
    """Over the last dimension (a power of two), in one order on all devices, which `sum` has not."""
    while groups.shape[-1] > 1:
        low, high = groups.chunk(2, dim=-1)
        groups = low + high
    return groups[..., 0]


def _of_codes(codes: torch.Tensor) -> torch.Tensor:
    """The float32 values of e2m1 codes."""
    return torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)[codes.long()]


def _nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Ties to the even code."""
    magnitude = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for code in range(7):
        middle = (E2M1[code] + E2M1[code + 1]) / 2
        codes += magnitude >= middle if code % 2 else magnitude > middle
    return codes | (torch.signbit(values).to(torch.uint8) << 3)
