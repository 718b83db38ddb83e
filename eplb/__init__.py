"""Expert-parallel load balancing: experts move between ranks while the layers that own them serve."""

from eplb.config import EplbConfig
from eplb.controller import EplbController, RelocatableLayer
from eplb.decorator import step_eplb_after
from eplb.events import CpuGpuEvent
from eplb.placement import Placement
from eplb.pool import SlotPool, TensorSpec
from eplb.status import Health, Metrics

__all__ = [
    "CpuGpuEvent",
    "EplbConfig",
    "EplbController",
    "Health",
    "Metrics",
    "Placement",
    "RelocatableLayer",
    "SlotPool",
    "TensorSpec",
    "step_eplb_after",
]
