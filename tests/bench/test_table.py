"""The README's table."""

import csv

import pytest

from bench.table import main


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return str(path)

    row = {"experts_hit": 8, "floor_us": 10.0, "mode": "graph", "rel_err": 0.002, "dtype": "bf16", "device": "a GPU"}
    results = [
        row | {"case": "qwen3/T1", "provider": "moe_layer", "median_us": 20.0},
        row | {"case": "qwen3/T1", "provider": "moe_layer", "median_us": 99.0, "mode": "eager"},
        row | {"case": "qwen3/T1", "provider": "other", "median_us": 1.0},
        row | {"case": "qwen3/T16", "provider": "moe_layer", "median_us": 5.0},
    ]
    peers = [
        {"case": case, "provider": provider, "median_us": median}
        for case, provider, median in [
            ("qwen3/T1", "A", 50.0),
            ("qwen3/T1", "B", 40.0),
            ("qwen3/T16", "A", 10.0),
        ]
    ]
    return write("results.csv", results), write("peers.csv", peers)


def test_table(files, capsys, tmp_path):
    assert main([*files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == [
        "| qwen3/T1 | 8 | 10 | 20.0 | 2.00 | 40 | B | 2.00 |",
        "| qwen3/T16 | 8 | 10 | 5.0 | 0.50 | 10 | A | 2.00 |",
    ]
    assert lines[-1].endswith("over 2 cases: moe_layer 1.000 × floor, best peers 2.000 × floor")


def test_a_case_without_peers_is_an_error(files, tmp_path):
    results, _ = files
    peers = tmp_path / "none.csv"
    peers.write_text("case,provider,median_us\nqwen3/T1,A,1\n")
    with pytest.raises(SystemExit):
        main([results, str(peers)])


@pytest.mark.parametrize("change", [{"rel_err": "nan"}, {"rel_err": 0.1}, {"dtype": "fp32"}])
def test_wrong_results_are_not_shown(files, tmp_path, change):
    results, peers = files
    with open(results, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0] |= change
    with open(results, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(SystemExit):
        main([results, peers])
