"""`bench.hf_model` from end to end, on a tiny model."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from bench import hf_model, hf_variants
from bench.hf_variants import Free, Variant, twin
from bench.providers import Unavailable
from moe_layer.hf.inspect import find_experts

TINY = ["--shape", "tiny", "--layers", "1", "--batches", "3", "--prefill", "8", "--cache", "12", "--device", "cpu"]
TINY += ["--dtype", "fp32", "--seconds", "0.002", "--compile-backend", "eager"]
CASES = ("decode/B3", "prefill/T8")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_variants(tmp_path, capsys):
    """All but two of the compiled ones, as compiling takes seconds."""
    path = tmp_path / "out.csv"
    chosen = [name for name in hf_variants.VARIANTS if name == "moe_layer_compiled" or "compiled" not in name]
    assert hf_model.main([*TINY, "--providers", ",".join(chosen), "--csv", str(path)]) == 0
    rows = rows_of(path)
    names = [*chosen, hf_variants.WITHOUT, hf_variants.WITHOUT_COMPILED]
    assert {(row["case"], row["provider"], row["mode"]) for row in rows} == {
        (case, name, "eager") for case in CASES for name in names
    }
    median = {(row["case"], row["provider"]): float(row["median_ms"]) for row in rows}
    for row in rows:
        if row["provider"] in hf_variants.BASES:
            assert not row["experts_us"] and not row["rel_err"]
            continue
        assert float(row["rel_err"]) < 1e-5 and row["transformers"] and float(row["median_ms"]) > 0
        without = "without_experts" + ("_compiled" if row["provider"].endswith("compiled") else "")
        experts_ms = median[row["case"], row["provider"]] - median[row["case"], without]
        assert float(row["experts_us"]) == pytest.approx(1e3 * experts_ms, rel=0.01, abs=0.2)
    said = capsys.readouterr()
    assert "experts µs" in said.out and "swapped 1 of 1" in said.err and "swapped" not in said.out


class Raises(nn.Module):
    def forward(self, *_):
        raise RuntimeError("not this one")


def refuses(model):
    raise Unavailable("not on a Tuesday")


def test_one_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.csv"
    wrong = {
        "wrong": Variant("wrong", lambda model: twin(model, lambda _: Free())),
        "raises": Variant("raises", lambda model: twin(model, lambda _: Raises())),
        "refuses": Variant("refuses", refuses),
    }
    monkeypatch.setattr(hf_variants, "VARIANTS", hf_variants.VARIANTS | wrong)
    monkeypatch.setattr(hf_model, "VARIANTS", hf_variants.VARIANTS)
    providers = "wrong,raises,refuses,transformers_grouped_mm"
    assert hf_model.main([*TINY, "--providers", providers, "--csv", str(path), "--cases", "prefill/T8"]) == 1
    assert {row["case"] for row in rows_of(path)} == {"prefill/T8"}
    assert {row["provider"] for row in rows_of(path)} == {"without_experts", "wrong", "transformers_grouped_mm"}
    said = capsys.readouterr()
    assert "FAILED wrong, prefill/T8: error " in said.err
    assert "FAILED raises, prefill/T8: RuntimeError: not this one" in said.err
    assert "skipped refuses, making it: not on a Tuesday" in said.out and "grouped_mm," not in said.err


def test_twins_share_tensors_but_not_their_config():
    model = hf_variants.make_model(hf_variants.SHAPES["tiny"], 2, torch.float32, torch.device("cpu"))
    other = hf_variants.VARIANTS["transformers_batched_mm"].make(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert other.config._experts_implementation == "batched_mm" != model.config._experts_implementation
    swapped = hf_variants.VARIANTS["moe_layer"].make(model)
    assert swapped.lm_head.weight is model.lm_head.weight
    assert all(parameter.numel() for one in find_experts(model).values() for parameter in one.parameters())
    tokens = torch.arange(5)[None]
    bare = hf_variants.BASES["without_experts"].make(model)
    with torch.no_grad():
        expected = model(tokens).logits[0]
        assert hf_model.error_of(bare(tokens).logits[0], expected) > 5 * hf_model.WORST_ERROR
        assert hf_model.error_of(swapped(tokens).logits[0], expected) < 1e-5
        assert math.isnan(hf_model.error_of(expected * math.nan, expected))


def test_what_would_gather_too_much(monkeypatch):
    variant = hf_variants.VARIANTS["transformers_batched_mm"]
    arguments = (hf_variants.SHAPES["qwen3"], torch.bfloat16, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"total_memory": 140 << 30}))
    variant.check(64, *arguments)
    with pytest.raises(Unavailable, match="96 GiB of weights a layer"):
        variant.check(2048, *arguments)
    hf_variants.VARIANTS["transformers_grouped_mm"].check(2048, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefill", "12"], "must be less than the cache's 12 places"),
        (["--batches", "0"], "must be at least 1"),
        (["--cases", "decode/B2"], "must be among ['decode/B3', 'prefill/T8']"),
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--providers", "vllm"], "providers vllm unknown"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit):
        hf_model.main([*TINY, *arguments])
    assert message in capsys.readouterr().err
