"""``bench.quantised`` from end to end, on a tiny shape; its floors by hand."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import quantised, quantised_providers
from bench.cases import SHAPES, make_logits
from bench.quantised_providers import FORMATS, make_matrices

TINY = ["--tokens", "1,9", "--seconds", "0.005", "--device", "cpu"]


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "mxfp4-silu", "int4"])
def test_from_end_to_end(tmp_path, capsys, form):
    path = tmp_path / "out.csv"
    assert quantised.main([*TINY, "--cases", f"8:2:128:128-{form}", "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["provider"], row["mode"]) for row in rows] == [
        (f"8:2:128:128-{form}/T{tokens}", provider, mode)
        for tokens in (1, 9)
        for provider in ("moe_layer", "moe_layer_bf16")
        for mode in ("eager", "back_to_back")
    ]
    for row in rows:
        is_rounded = form == "fp8" and row["provider"] == "moe_layer"
        assert (1e-2 if is_rounded else 0) < float(row["rel_err"]) < (6e-2 if is_rounded else 1e-2)
        assert float(row["median_us"]) > 0 and float(row["floor_us"]) > 0
        assert row["scheme"] == FORMATS[form].scheme and float(row["ceiling_fp8_tflops"]) > 0
    out = capsys.readouterr().out
    assert f"8:2:128:128-{form}/T9" in out and "moe_layer_bf16 / moe_layer:" in out


def test_a_wrong_output_fails_the_run(monkeypatch, capsys):
    class Wrong:
        name = "wrong"

        def prepare(self, problem):
            return lambda: problem.x_TH

    monkeypatch.setattr(quantised_providers, "PROVIDERS", dict(quantised_providers.PROVIDERS))
    monkeypatch.setattr(quantised, "PROVIDERS", quantised_providers.PROVIDERS)
    quantised_providers.register(Wrong())
    assert quantised.main([*TINY, "--cases", "8:2:128:128-int4", "--providers", "wrong"]) == 1
    assert "FAILED wrong, 8:2:128:128-int4/T9" in capsys.readouterr().err


def test_a_gpu_without_fp8_products_has_no_ceiling_of_them(monkeypatch, tmp_path, capsys):
    """Its floors in fp8 are by bfloat16's products, and the run says so; so does the CSV."""
    monkeypatch.setattr(quantised, "has_e4m3_products", lambda device: False)
    path = tmp_path / "out.csv"
    assert quantised.main([*TINY, "--cases", "8:2:128:128-fp8", "--csv", str(path)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("and of fp8 by bfloat16's products: this device has none in e4m3; measured now")
    with path.open(newline="") as file:
        assert {row["ceiling_fp8_tflops"] for row in csv.DictReader(file)} == {""}


def test_a_product_in_fp8_that_fails_ends_the_run(monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "_scaled_mm", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantised.main([*TINY, "--cases", "8:2:128:128-fp8"])


def test_cases_have_the_logits_of_their_shape():
    cases = quantised.chosen(["qwen3-fp8", "gptoss-mxfp4"], [16])
    assert [case.name for case, _ in cases] == ["qwen3-fp8/T16", "gptoss-mxfp4/T16"]
    assert [case.seed for case, _ in cases] == [2, 6]
    assert make_logits(cases[0][0]).shape == (16, SHAPES["qwen3"].num_experts)
    for wrong in ("qwen3", "qwen3-fp6"):
        with pytest.raises(ValueError, match="must be a shape, '-', and one of"):
            quantised.chosen([wrong], [1])


def test_bytes_by_hand():
    """Half a byte a weight and a bfloat16 for 128, or a byte for 32 and biases; a byte and a float32 for 128²."""
    shape = quantised.chosen(["2:1:256:128-int4"], [3])[0][0].shape
    weights = 3 * 256 * 128
    for form, scales, biases in (("int4", weights // 128 * 2, 0), ("mxfp4", weights // 32, 2 * 512)):
        matrices, plain = make_matrices(shape, FORMATS[form], torch.device("cpu"))
        flops, num_bytes = quantised.quantised_work((1, 256, 128), matrices, 3, 2)
        assert flops == 6 * 3 * 256 * 128
        assert num_bytes == 2 * (weights // 2 + scales + biases) + 3 * 256 * 4
        assert plain.gate_up_SNH.dtype == torch.bfloat16
    matrices, _ = make_matrices(shape, FORMATS["fp8"], torch.device("cpu"))
    assert quantised.quantised_work((1, 256, 128), matrices, 3, 2)[1] == 2 * (weights + 6 * 4) + 3 * 256 * 4
