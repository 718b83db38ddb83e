"""The demo's command line; `make demo` runs the rest."""

import sys

import pytest

from moe_layer.demo.__main__ import CPU, _parse, _setup


def setup_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo", "--device", "cpu", *arguments])
    return _setup(_parse())


def test_defaults_and_what_is_given_in_their_place(monkeypatch):
    setup = setup_of(monkeypatch)
    assert (setup.ranks, setup.num_redundant_experts, setup.step_interval) == (4, 8, 20)
    assert {name: getattr(setup, name) for name in CPU} == CPU
    setup = setup_of(monkeypatch, "--ranks", "2", "--num-redundant-experts", "0", "--top-k", "1")
    assert (setup.ranks, setup.num_redundant_experts, setup.top_k) == (2, 0, 1)


@pytest.mark.parametrize("name", [name.replace("_", "-") for name in ("step_interval", *CPU)])
def test_zero_is_no_default(name, monkeypatch):
    for value in ("0", "-3"):
        with pytest.raises(SystemExit, match=f"--{name} must be an integer of at least 1, got {value}"):
            setup_of(monkeypatch, f"--{name}", value)


def test_ranks_and_what_they_hold(monkeypatch):
    for value in ("0", "1", "-2"):
        with pytest.raises(SystemExit, match=f"--ranks must be at least 2, got {value}"):
            setup_of(monkeypatch, "--ranks", value)
    with pytest.raises(SystemExit, match="--num-redundant-experts must be an integer of at least 0, got -1"):
        setup_of(monkeypatch, "--num-redundant-experts", "-1")
    with pytest.raises(SystemExit, match="--steps must be at least twice --step-interval=20, got 0"):
        setup_of(monkeypatch, "--steps", "0")
