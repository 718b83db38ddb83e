"""`examples/finetune.py` as a user runs it."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers")

from moe_layer.hf import implementation
from tests.examples import load_example

SMALL = ["--batch", "4", "--length", "32", "--hidden-size", "32"]


@pytest.fixture
def example():
    return load_example("finetune")


def test_it_learns_as_its_twin_does(example, capsys):
    assert example.main([*SMALL, "--steps", "20"]) == 0
    said = capsys.readouterr().out
    steps = re.findall(r"^ +\d+ +(\d+\.\d+) +(\d+\.\d+) ", said, re.MULTILINE)
    assert len(steps) == 20
    losses = [float(one) for one, _ in steps]
    assert losses == pytest.approx([float(other) for _, other in steps], rel=1e-4)
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert re.search(r"largest relative difference of the losses \d\.\de-\d", said)


def test_it_says_when_the_losses_differ(example, monkeypatch):
    """Experts that say nothing: the losses of such small ones differ by 1 to 2 %."""
    right = implementation.moe_experts
    monkeypatch.setattr(implementation, "moe_experts", lambda *args, **options: 0 * right(*args, **options))
    assert example.main([*SMALL, "--steps", "3"]) == 1
