"""The tables made of one run's results."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import table
from bench.table import main

HEAD = "# measured somewhere\ncase,provider,median_us,floor_us,rel_err,mode,dtype,experts_hit,device\n"
ROWS = """qwen3/T1,moe_layer,20,10,0.002,graph,bf16,8,a GPU
qwen3/T1,moe_layer,99,10,0.002,eager,bf16,8,a GPU
qwen3/T1,A,50,10,0.002,graph,bf16,8,a GPU
qwen3/T1,B,40,10,,graph,bf16,8,a GPU
qwen3/T16384,moe_layer,50,100,0.002,graph,bf16,8,a GPU
qwen3/T16384,A,45,100,0.002,graph,bf16,8,a GPU
"""


def write(tmp_path, rows):
    path = tmp_path / "results.csv"
    path.write_text(HEAD + rows)
    return str(path)


def test_table(tmp_path, capsys):
    assert main([write(tmp_path, ROWS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| case | experts hit | floor µs | moe_layer µs | × floor | A | B |")
    assert lines[2:4] == [
        "| qwen3/T1 | 8 | 10 | 20 | 2.00 | 50 | 40 | 2.000 |",
        "| qwen3/T16384 | 8 | 100 | 50 | 0.50 | 45 | – | 0.900 |",
    ]
    assert "over 2 cases: moe_layer 1.000 × floor" in lines[5]
    assert lines[7].split() == ["up", "to", "256", "2.000", "(1", "cases,", "worst", "2.000)"]
    assert lines[8].split() == ["16,384", "0.900", "(1", "cases,", "worst", "0.900)"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("20,10,0.002", "20,10,nan"),
        ("50,10,0.002", "50,10,0.1"),  # a peer's
        ("45,100,0.002,graph,bf16", "45,100,0.002,graph,fp32"),
        ("qwen3/T16384,A,", "qwen3/T64,A,"),  # no peer in the same case
    ],
)
def test_results_that_make_no_table(tmp_path, before, after):
    assert before in ROWS
    with pytest.raises(SystemExit) as refusal:
        main([write(tmp_path, ROWS.replace(before, after))])
    assert refusal.value.code == 2


def test_the_kept_run_has_all_peers_in_all_cases():
    rows = table.read(Path(table.__file__).parent / "results/h200/forward_with_peers.csv")
    assert len(rows) == 39 * 6
