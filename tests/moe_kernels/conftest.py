"""What the kernels' tests share: poisoned memory in every test, and expert weights laid out as a pool lays them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings

from moe_kernels import ExpertMatrices
from moe_kernels.base import scan

few_if_interpreted = settings(max_examples=50 if torch.cuda.is_available() else 20)
"""For kernels that take a second to interpret; machines with GPUs run all examples."""


@pytest.fixture(autouse=True)
def _poison(poison: None) -> None:
    """See `poison`."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few keys are several blocks."""
    monkeypatch.setattr(scan, "SMALLEST_BLOCK", 32)
    monkeypatch.setattr(scan, "LARGEST_BLOCK", 32)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few keys are many, in several chunks, and few bins several blocks."""
    monkeypatch.setattr(scan, "MANY_KEYS", 1)
    monkeypatch.setattr(scan, "CHUNK", 16)
    monkeypatch.setattr(scan, "SORTED_CHUNK", 16)
    monkeypatch.setattr(scan, "LARGEST_BLOCK_B", 4)
    monkeypatch.setattr(scan, "BLOCK_C", 16)


def in_slots(weights_SNK: torch.Tensor, padding: int = 24) -> torch.Tensor:
    """The same weights as a view with `padding` elements of NaN between the slots, as in a pool."""
    slots, rows, columns = weights_SNK.shape
    slab = torch.full((slots, rows * columns + padding), float("nan"), dtype=weights_SNK.dtype)
    slab = slab.to(weights_SNK.device)
    slab[:, : rows * columns] = weights_SNK.reshape(slots, -1)
    return slab[:, : rows * columns].view(slots, rows, columns)


def counts_of(lanes_N: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """How many rows each lane has: int32 [num_lanes], on the device of the lanes."""
    is_lane = (lanes_N >= 0) & (lanes_N < num_lanes)
    return torch.bincount(lanes_N[is_lane].cpu(), minlength=num_lanes).to(lanes_N.device, torch.int32)


@dataclass
class Experts:
    """Inputs of the two grouped GEMMs; weights are scaled so that results have unit scale."""

    x_RH: torch.Tensor
    gate_up_SNH: torch.Tensor
    down_SHI: torch.Tensor
    lane_to_slot_L: torch.Tensor
    lanes_N: torch.Tensor
    row_weights_N: torch.Tensor
    fanout: int

    @property
    def matrices(self) -> ExpertMatrices:
        return ExpertMatrices(self.gate_up_SNH, self.down_SHI)

    @property
    def counts_L(self) -> torch.Tensor:
        return counts_of(self.lanes_N, self.lane_to_slot_L.numel())


@pytest.fixture
def make_experts(device: str) -> Callable[..., Experts]:
    """Random experts of one more slot than lanes, in shuffled slots."""

    def make(
        num_sources: int,
        fanout: int,
        num_lanes: int,
        hidden_size: int,
        intermediate: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Experts:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random)

        slots = num_lanes + 1
        gate_up = normal(slots, 2 * intermediate, hidden_size) / hidden_size**0.5
        down = normal(slots, hidden_size, intermediate) / intermediate**0.5
        return Experts(
            x_RH=normal(num_sources, hidden_size).to(device, dtype),
            gate_up_SNH=in_slots(gate_up.to(device, dtype)),
            down_SHI=in_slots(down.to(device, dtype)),
            lane_to_slot_L=torch.randperm(slots, generator=random)[:num_lanes].to(device, torch.int32),
            lanes_N=torch.randint(-1, num_lanes, (num_sources * fanout,), generator=random).to(device, torch.int32),
            row_weights_N=torch.rand(num_sources * fanout, generator=random).to(device),
            fanout=fanout,
        )

    return make
