"""What the bytes of quantised weights mean, by hand, and how floats become such bytes."""

from __future__ import annotations

import pytest
import torch

from moe_kernels import (
    dequantise,
    pack_nibbles,
    pack_words,
    quantise_rows,
    quantise_weights,
    unpack_nibbles,
    unpack_words,
)
from moe_kernels.operands.quantised_weights import exponents


def test_nibbles_by_hand(device):
    packed = pack_nibbles(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8, device=device))
    assert packed.tolist() == [[0x21, 0x0F]]
    assert unpack_nibbles(packed).tolist() == [[1, 2, 15, 0]]


def test_words_by_hand(device):
    """The columns 0, 1, 2, 8 and 31 are in the word 0 (halves 0 and 1), the word 1, and the words 0 and 3."""
    codes = torch.zeros(1, 32, dtype=torch.uint8, device=device)
    codes[0, [0, 1, 2, 8, 31]] = torch.tensor([1, 2, 15, 4, 9], dtype=torch.uint8, device=device)
    words = pack_words(codes, "int4").view(torch.int32)
    assert words.tolist() == [[0x00020041, 0x0000000F, 0, 0x90000000 - 2**32]]
    # Mantissa, exponent and sign of the code 9 (-0.5) at i = 3, e = 1: the places 20, 29, 30, and going round 5. That of the
    # code 4 (2.0) at i = 1 has its exponent at 11 and 12.
    words = pack_words(codes, "mxfp4").view(torch.int32)
    assert words.tolist() == [[0x0080_0040 | 0x1000, 0x81C0, 0, 0x0010_0020]]


@pytest.mark.parametrize("scheme", ["mxfp4", "int4"])
def test_words_have_all_codes(device, scheme):
    codes = torch.randint(0, 16, (2, 3, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    packed = pack_words(codes, scheme)
    assert packed.shape == (2, 3, 48) and packed.is_contiguous()
    assert torch.equal(unpack_words(packed, scheme), codes)
    assert torch.equal(packed[1, :, 16:32], pack_words(codes[1, :, 32:64], scheme)), "groups lie apart"
    with pytest.raises(ValueError, match="divisible by 32"):
        pack_words(codes[..., :40], scheme)
    with pytest.raises(ValueError, match="divisible by 16"):
        unpack_words(packed[..., :40], scheme)


def test_mxfp4_by_hand(device):
    """Codes 1, 15, 8 and 7 are 0.5, -6, -0 and 6, at 2 ** (130 - 127)."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([1, 15, 8, 7])
    packed = pack_words(codes, "mxfp4")
    scale = torch.tensor([[130]], dtype=torch.uint8)
    values = dequantise(packed.to(device), scale.to(device), None, "mxfp4")
    assert values[0, :5].tolist() == [4.0, -48.0, -0.0, 48.0, 0.0]
    assert values.dtype == torch.float32 and values.shape == (1, 32)
    assert exponents(torch.tensor([0, 1, 127, 254], dtype=torch.uint8)).tolist() == [2.0**-127, 2.0**-126, 1, 2.0**127]
    assert exponents(torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_int4_by_hand(device):
    """(q - 8) · 0.5, or with a zero of 3 (q - 3) · 0.5."""
    packed = pack_words(torch.tensor([0, 15] * 16, dtype=torch.uint8, device=device)[None], "int4")
    scale = torch.full((1, 1), 0.5, dtype=torch.bfloat16, device=device)
    assert dequantise(packed, scale, None, "int4")[0, :2].tolist() == [-4.0, 3.5]
    zero = torch.full((1, 1), 3, dtype=torch.uint8, device=device)
    assert dequantise(packed, scale, zero, "int4", columns=3).tolist() == [[-1.5, 6.0, -1.5]]


def test_scales_of_groups_lie_row_beside_row(device):
    """Two rows and three groups: the scale of row n and group g is at [g, n]."""
    packed = pack_words(torch.full((2, 96), 9, dtype=torch.uint8, device=device), "int4")
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16, device=device)
    values = dequantise(packed, scale, None, "int4")
    assert values[:, ::32].tolist() == [[1, 3, 5], [2, 4, 6]] and values[:, 31::32].tolist() == [[1, 3, 5], [2, 4, 6]]


def test_fp8_blocks_begin_anew_with_the_up_rows(device):
    """Three gate rows and three up rows: two rows of blocks, not one; 130 columns: two, of which the second has 2."""
    weight = torch.ones(6, 130, device=device).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    values = dequantise(weight, scale, None, "fp8_block", blocks_of=3)
    assert values[:, 0].tolist() == [1, 1, 1, 3, 3, 3] and values[:, 127].tolist() == [1, 1, 1, 3, 3, 3]
    assert values[:, 128].tolist() == [2, 2, 2, 4, 4, 4]
    with pytest.raises(ValueError, match=r"scale has shape \(2, 2\): its last dimensions must be \(1, 2\)"):
        dequantise(weight, scale, None, "fp8_block")


@pytest.mark.parametrize(
    ("scheme", "options", "worst"),
    [
        ("fp8_block", {"blocks_of": 131}, 0.03),
        ("mxfp4", {}, 0.12),
        ("int4", {"group": 32}, 0.1),
        ("int4", {"group": 128}, 0.12),
        ("int4", {"group": 32, "with_zero": True}, 0.085),
    ],
)
def test_what_is_quantised_is_close_and_stays(device, scheme, options, worst):
    """Relative error in norm; the values once quantised are representable, so quantising them again changes nothing."""
    weight = torch.randn(2, 262, 256, generator=torch.Generator().manual_seed(0)).to(device)
    weight[0, :, :128] = 0
    parts = quantise_weights(weight, scheme, **options)
    blocks_of = options.get("blocks_of")
    values = dequantise(*parts, scheme, blocks_of=blocks_of)
    assert (values - weight).norm() / weight.norm() < worst
    assert not values[0, :, :128].any()
    if not options.get("with_zero") and scheme != "int4":  # whose largest element may become another
        again = dequantise(*quantise_weights(values, scheme, **options), scheme, blocks_of=blocks_of)
        assert torch.equal(again, values)
    one = quantise_weights(weight[1], scheme, **options)  # a slot's part is its own
    for part, of_one in zip(parts, one, strict=True):
        assert (part is None) == (of_one is None)
        if part is not None:
            assert torch.equal(part[1].view(torch.uint8), of_one.view(torch.uint8))


def test_mxfp4_takes_the_better_exponent(device):
    """7.9 is beyond 6 · 1; alone in its group it is better as 4 · 2, but not if all others would lose by it."""
    alone = torch.zeros(1, 32)
    alone[0, 0] = 7.9
    packed, scale, _ = quantise_weights(alone.to(device), "mxfp4")
    assert scale.tolist() == [[128]] and unpack_words(packed, "mxfp4")[0, 0] == 6
    many = torch.full((1, 32), 0.5)
    many[0, 0] = 6.9
    assert quantise_weights(many.to(device), "mxfp4")[1].tolist() == [[127]]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("scheme='fp5'", {"scheme": "fp5"}),
        ("with_zero=True", {"scheme": "mxfp4", "with_zero": True}),
        ("group=64", {"scheme": "int4", "group": 64}),
        ("multiple of group=128", {"scheme": "int4", "group": 128}),
    ],
)
def test_what_does_not_fit_is_refused(message, change):
    with pytest.raises(ValueError, match=message):
        quantise_weights(torch.zeros(2, 160), **change)


def test_rows_by_hand(device):
    """A scale of one is that of zeros; 0.5 is 224 / 448; ties go to even: 17 · 2 ** -1 lies between 8 and 9."""
    x = torch.zeros(3, 130)
    x[0, :2] = torch.tensor([224.0, -1.0])
    x[1, 127:] = torch.tensor([448.0, 448.0, 8.5])
    for backend in ("torch", "triton"):
        rows = quantise_rows(x.to(device), backend=backend)
        assert rows.scale_RG.tolist() == [[0.5, 1.0], [1.0, 1.0], [1.0, 1.0]]
        assert rows.values_RH.float()[0, :3].tolist() == [448.0, -2.0, 0.0]
        assert rows.values_RH.float()[1, 127:].tolist() == [448.0, 448.0, 8.0]
        assert rows.dtype == torch.float32 and torch.equal(rows.dequantised()[2], torch.zeros(130, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_backends_quantise_rows_to_the_same_bits(device, dtype):
    """Among them very small and very large ones, and what becomes subnormal; rows are padded."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(9, 1030, generator=random) * torch.exp(3 * torch.randn(9, 1030, generator=random))
    x = x.clamp(-6e4, 6e4)  # float16 has no more
    x[3] *= 1e-6
    x[4, :128] = 0
    padded = torch.full((9, 1040), float("nan")).to(device, dtype)
    padded[:, :1030] = x.to(device, dtype)
    rows, expected = (quantise_rows(padded[:, :1030], backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(rows.scale_RG, expected.scale_RG)
    assert torch.equal(rows.values_RH.float(), expected.values_RH.float())  # the interpreter drops the sign of a zero
    error = (expected.dequantised() - padded[:, :1030].float()).abs()
    bound = padded[:, :1030].float().abs() / 16 + expected.scale_RG.repeat_interleave(128, 1)[:, :1030] * 2**-10
    assert (error <= bound * 1.0001).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("fp8_block", {"blocks_of": 131}),
        ("mxfp4", {}),
        ("int4", {"group": 32}),
        ("int4", {"group": 128, "with_zero": True}),
    ],
)
def test_a_gpu_quantises_to_the_bits_of_a_cpu(scheme, options):
    """Where numbers are divided by 448, 7.5 or 15, and where errors are summed, an operation may round otherwise there."""
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 262, 256, generator=random) * torch.exp(torch.randn(3, 262, 1, generator=random))
    weight[0, 0, :128] = 0
    on_cpu, on_gpu = quantise_weights(weight, scheme, **options), quantise_weights(weight.cuda(), scheme, **options)
    for part, expected in zip(on_gpu, on_cpu, strict=True):
        assert (part is None) == (expected is None)
        assert part is None or torch.equal(part.cpu().view(torch.uint8), expected.view(torch.uint8))
    values = dequantise(*on_gpu, scheme, blocks_of=options.get("blocks_of")).cpu()
    assert torch.equal(values, dequantise(*on_cpu, scheme, blocks_of=options.get("blocks_of")))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gpu_quantises_rows_to_the_bits_of_a_cpu(backend):
    random = torch.Generator().manual_seed(6)
    x = torch.randn(64, 1030, generator=random) * torch.exp(3 * torch.randn(64, 1, generator=random))
    rows, expected = quantise_rows(x.cuda(), backend=backend), quantise_rows(x, backend="torch")
    assert torch.equal(rows.scale_RG.cpu(), expected.scale_RG)
    assert torch.equal(rows.values_RH.cpu().view(torch.uint8), expected.values_RH.view(torch.uint8))
