"""The demo refuses sizes that make no run; `make demo` runs the rest."""

import sys

import pytest

from moe_layer.demo.__main__ import _parse, _setup


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 1", "--ranks must be at least 2, got 1"),
        ("--step-interval 0", "--step-interval must be an integer of at least 1, got 0"),
        ("--num-redundant-experts -1", "--num-redundant-experts must be an integer of at least 0, got -1"),
        ("--steps 1", "--steps must be at least twice --step-interval=20, got 1"),
    ],
)
def test_refuses(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["demo", "--device", "cpu", *arguments.split()])
    with pytest.raises(SystemExit, match=message):
        _setup(_parse())


def test_what_is_given_goes_before_a_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo", "--device", "cpu", "--num-redundant-experts", "0", "--top-k", "1"])
    setup = _setup(_parse())
    assert (setup.ranks, setup.num_redundant_experts, setup.top_k) == (4, 0, 1)
