"""Expert-parallel load balancing: experts move between ranks while the layers that own them serve.

The way of a rebalance: load counters (`relocation.resident`) → window (`load_window`) → worker (`worker`, `rounds`) → plan
(`planner`, `planning`) → fill (`relocation.fill`) → publish → flip (`relocation.handoff`, `gate`) → grace (`relocation.pins`).
"""

from eplb.config import EplbConfig
from eplb.controller import EplbController
from eplb.decorator import step_eplb_after
from eplb.health import Health, HealthState, Metrics
from eplb.planning.placement import Placement
from eplb.registration import RelocatableLayer
from eplb.relocation.events import CpuGpuEvent
from eplb.relocation.pool import SlotPool, TensorSpec

__all__ = [
    "CpuGpuEvent",
    "EplbConfig",
    "EplbController",
    "Health",
    "HealthState",
    "Metrics",
    "Placement",
    "RelocatableLayer",
    "SlotPool",
    "TensorSpec",
    "step_eplb_after",
]
