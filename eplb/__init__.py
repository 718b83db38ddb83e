"""Expert-parallel load balancing: experts move between ranks while the layers that own them serve.

The way of a rebalance: load counters (`relocation.resident`) → window (`load_window`) → worker (`worker`, `rounds`) → plan
(`planner`, `planning`) → fill (`relocation.fill`) → publish → flip (`relocation.handoff`, `gate`) → grace (`relocation.pins`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eplb.config import EplbConfig
    from eplb.controller import EplbController
    from eplb.decorator import step_eplb_after
    from eplb.health import Health, HealthState, Metrics
    from eplb.planning.placement import Placement
    from eplb.planning.placement_file import SavedLayer, load_placements, save_placements
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
    "SavedLayer",
    "SlotPool",
    "TensorSpec",
    "load_placements",
    "save_placements",
    "step_eplb_after",
]

# Found when they are asked for: the planning process imports `eplb.planning`, and so this file, but no PyTorch.
_HOMES = {
    "EplbConfig": "eplb.config",
    "EplbController": "eplb.controller",
    "step_eplb_after": "eplb.decorator",
    "Health": "eplb.health",
    "HealthState": "eplb.health",
    "Metrics": "eplb.health",
    "Placement": "eplb.planning.placement",
    "SavedLayer": "eplb.planning.placement_file",
    "load_placements": "eplb.planning.placement_file",
    "save_placements": "eplb.planning.placement_file",
    "RelocatableLayer": "eplb.registration",
    "CpuGpuEvent": "eplb.relocation.events",
    "SlotPool": "eplb.relocation.pool",
    "TensorSpec": "eplb.relocation.pool",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
