"""`bench.compare` on made-up results."""

from __future__ import annotations

import csv

import pytest

from bench.compare import main


@pytest.fixture
def write(tmp_path):
    def write(name, rows, device="gpu A"):
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "provider", "mode", "median_us", "p20_us", "p80_us", "device"])
            writer.writerows([[*row, device] for row in rows])
        return str(path)

    return write


OLD = [("a/T1", "ours", "graph", 100, 99, 101), ("a/T1", "peer", "graph", 200, 190, 210)]


def test_same(write, capsys):
    assert main([write("old.csv", OLD), write("new.csv", OLD)]) == 0
    assert capsys.readouterr().out == "0 slower, 0 faster, 2 within noise\n"


def test_slower_beyond_noise(write, capsys):
    new = [("a/T1", "ours", "graph", 110, 109, 111), OLD[1]]
    assert main([write("old.csv", OLD), write("new.csv", new)]) == 1
    out = capsys.readouterr().out
    assert "slower" in out and "+10.0%" in out and "ours" in out and "peer" not in out


def test_faster_is_no_failure(write, capsys):
    new = [("a/T1", "ours", "graph", 50, 49, 51), OLD[1]]
    assert main([write("old.csv", OLD), write("new.csv", new)]) == 0
    assert "faster    -50.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "new",
    [
        ("a/T1", "ours", "graph", 110, 100, 120),  # intervals overlap
        ("a/T1", "ours", "graph", 101.9, 101.5, 102),  # less than 2 %
    ],
)
def test_noise(write, new):
    assert main([write("old.csv", OLD), write("new.csv", [new, OLD[1]])]) == 0


def test_rows_without_percentiles_count_as_their_median(write):
    old, new = [("a/T1", "ours", "back_to_back", 100, "", "")], [("a/T1", "ours", "back_to_back", 103, "", "")]
    assert main([write("old.csv", old), write("new.csv", new)]) == 1


def test_rows_that_come_and_go(write, capsys):
    assert main([write("old.csv", OLD), write("new.csv", [OLD[0], ("b/T1", "ours", "graph", 1, 1, 1)])]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["gone", "a/T1", "peer", "graph"] and out[1].split() == ["new", "b/T1", "ours", "graph"]


def test_candidates_of_one_case(tmp_path, capsys):
    """What `bench.tune` writes: many configurations of an op."""
    paths = []
    for name, median_us in (("old.csv", 20), ("new.csv", 30)):
        path = tmp_path / name
        path.write_text(f"case,op,config,median_us\na/T1,up,16 128,10\na/T1,up,64 128,{median_us}\n")
        paths.append(str(path))
    assert main(paths) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("slower") and out[0].endswith("up  a/T1  64 128") and "1 within noise" in out[1]


def test_another_machine_is_said(write, capsys):
    main([write("old.csv", OLD), write("new.csv", OLD, device="gpu B")])
    assert "note: device was gpu A, is gpu B" in capsys.readouterr().out


def test_refuses(write, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("case,time\na,1\n")
    for new in (str(other), str(tmp_path / "missing.csv"), write("twice.csv", [*OLD, OLD[0]])):
        with pytest.raises(SystemExit) as refusal:
            main([write("old.csv", OLD), new])
        assert refusal.value.code == 2
