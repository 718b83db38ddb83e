"""What a controller's layers have been through and where their experts are, in files. Local; read while the layers serve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eplb.planning.placement_file import save_placements
from eplb.relocation.resident import ResidentExperts


def write_placements(path: str | Path, residents: Sequence[ResidentExperts]) -> None:
    """See `EplbController.save_placements()`."""
    if not residents:
        raise ValueError("placements of no layer: register() a model that has an MoE layer first")
    newest = [resident.newest for resident in residents]
    save_placements(path, [version.placement for version in newest], [version.shares_WS for version in newest])


def write_load_trace(path: str | Path, residents: Sequence[ResidentExperts], windows: Sequence[np.ndarray]) -> int:
    """See `EplbController.save_load_trace()`. `windows`: int64 [sub-windows, all layers' experts side by side] each."""
    sizes = {resident.num_experts for resident in residents}
    if len(sizes) > 1:
        raise ValueError(f"a load trace needs layers with equally many experts, got {sorted(sizes)}")
    if not windows:
        return 0
    load_BLE = np.concatenate(windows).reshape(-1, len(residents), sizes.pop())
    np.savez_compressed(path, load_BLE=load_BLE)
    return len(load_BLE)
