"""`bench.formats` from end to end, on a tiny shape."""

from __future__ import annotations

import csv
from dataclasses import replace

from bench import formats

TINY = ["--shapes", "8:2:64:32", "--tokens", "1,5", "--seconds", "0.002", "--device", "cpu"]


def test_formats(tmp_path, capsys):
    path = tmp_path / "out.csv"
    assert formats.main([*TINY, "--dtype", "fp32", "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"][-2:], row["provider"]) for row in rows] == [
        (case, name) for case in ("T1", "T5") for name in ("plain", "bias", "clamp", "gpt_oss")
    ]
    assert all(float(row["rel_err"]) < 1e-5 and float(row["over_plain"]) > 0 for row in rows)
    assert all(float(row["over_plain"]) == 1 for row in rows if row["provider"] == "plain")
    assert "gpt_oss: " in capsys.readouterr().out


def test_a_wrong_format_is_named(monkeypatch, capsys):
    """Kernels that forget a bias; one that raises."""
    right = formats.fused_forward

    def forgetful(x_TH, logits_TE, top_k, matrices):
        if matrices.activation != "silu" and matrices.down_bias_SH is not None:
            raise RuntimeError("no such kernel")
        return right(x_TH, logits_TE, top_k, replace(matrices, gate_up_bias_SN=None))

    monkeypatch.setattr(formats, "fused_forward", forgetful)
    assert formats.main([*TINY, "--dtype", "bf16"]) == 1
    said = capsys.readouterr().err
    for case in ("T1", "T5"):
        assert f"FAILED bias, 8:2:64:32/{case}: error" in said
        assert f"FAILED gpt_oss, 8:2:64:32/{case}: RuntimeError: no such kernel" in said
    assert "plain," not in said and "clamp," not in said
