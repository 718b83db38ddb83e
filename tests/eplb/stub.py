"""`StubLayer`: in place of an MoE layer, what a controller knows of one."""

from __future__ import annotations

import torch
from torch import nn

from eplb import SlotPool, TensorSpec
from eplb.relocation.resident import ResidentExperts
from eplb.streams import DeviceStreams, HostStreams


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
