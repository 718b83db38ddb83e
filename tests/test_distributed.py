"""Ranks of `tests.distributed`: they have what their test has, and a failure says which rank and why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

import eplb
import moe_kernels
import moe_layer
from tests.distributed import distributed

ROOT = Path(__file__).parents[1]


@distributed(1)
def test_packages_come_from_this_checkout(rank, num_ranks, group, device):
    for package in (eplb, moe_kernels, moe_layer):
        assert Path(package.__file__).is_relative_to(ROOT), package.__file__


@distributed(1)
def same_environment(rank, num_ranks, group, device, expected):
    assert dict(os.environ) == expected


def test_the_environment_is_the_tests(tmp_path, monkeypatch):
    """Also after the process from which ranks are forked has started with another one."""
    for number, change in enumerate(
        (lambda: None, lambda: monkeypatch.setenv("NEW", "1"), lambda: monkeypatch.delenv("PATH"))
    ):
        change()
        folder = tmp_path / str(number)
        folder.mkdir()
        same_environment(tmp_path=folder, device_type="cpu", expected=dict(os.environ))


@distributed(2)
def rank_1_fails(rank, num_ranks, group, device):
    if rank == 1:
        raise ValueError("of all ranks this one")
    dist.barrier(group)


def test_the_rank_that_failed_is_told(tmp_path):
    with pytest.raises(pytest.fail.Exception) as failure:
        rank_1_fails(tmp_path=tmp_path, device_type="cpu")
    first, *rest = str(failure.value).splitlines()
    assert first == "rank_1_fails: exit codes by rank [1, 1]"
    assert rest[0] == "---- rank1" and "ValueError: of all ranks this one" in rest
    assert any(line.startswith("---- rank0 (later): ") for line in rest)
