"""In place of an MoE layer, what a controller knows of one; and a controller of it that acts quickly."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from eplb import EplbConfig, EplbController, SlotPool, TensorSpec
from eplb.planning.policy import Proposal
from eplb.relocation.resident import ResidentExperts
from eplb.streams import DeviceStreams, HostStreams

QUICK = {"step_interval": 2, "window_size": 2, "window_samples": 1, "round_interval": 1e-3, "heartbeat_interval": 2e-3}


class StubLayer(nn.Module):
    """Four experts of 16 bytes, each as often as the redundant ones allow."""

    dispatch_backend = "local"

    def __init__(
        self,
        num_shadow_slots: int = 1,
        pool: SlotPool | None = None,
        expert_ranks: tuple[int, ...] = (),
        num_redundant: int = 0,
        rank: int = 0,
        streams: DeviceStreams | None = None,
    ) -> None:
        super().__init__()
        num_ranks = max(1, len(expert_ranks))
        self.expert_ranks = expert_ranks
        self.resident = ResidentExperts(
            num_experts=4,
            num_redundant_experts=num_redundant,
            num_shadow_slots=num_shadow_slots,
            rank=rank,
            num_ranks=num_ranks,
            pool=pool or self.make_pool((4 + num_redundant) // num_ranks + num_shadow_slots),
            streams=streams or HostStreams(),
        )

    @staticmethod
    def make_pool(num_slots: int) -> SlotPool:
        return SlotPool([TensorSpec("w", (16,), torch.uint8)], num_slots)

    def why_not_relocatable(self) -> str | None:
        return None

    def dispatch_failure(self) -> str | None:
        return None


def controller_of(layer: nn.Module | None = None, **options) -> EplbController:
    controller = EplbController(EplbConfig(**{**QUICK, **options}))
    controller.register(layer or StubLayer())
    return controller


class Recording:
    """A policy that keeps the placement and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[np.ndarray] = []

    def propose(self, load_LNE, physical_LWP, topology):
        self.asked.append(load_LNE.copy())
        return Proposal(physical_LWP, np.ones(physical_LWP.shape))
