"""The examples with transformers models, as a user runs them."""

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tests.examples import load_example, run_on_two_ranks


def test_swap_qwen3(capsys):
    example = load_example("swap_qwen3")
    assert example.main() == 0
    said = capsys.readouterr().out
    assert "swapped 3 of 3 blocks of experts" in said and "the same tokens" in said


def test_serve_swapped():
    said = run_on_two_ranks("serve_swapped", timeout=180)
    assert len(re.findall(r"rank \d: 3 layers registered", said)) == 2, said
    found = re.findall(r"rank \d: \d+ flips, (\d+) experts moved; a fixed prompt was answered alike throughout", said)
    assert len(found) == 2 and all(int(moved) > 0 for moved in found), said
