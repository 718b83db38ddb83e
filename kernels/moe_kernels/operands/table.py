"""Step 2 of a forward: the table, from an expert's id to its replicas' lanes and slots.

E logical experts, P replicas of all experts together (entries of the table), L lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_kernels.base.checks import check_tensor


@dataclass(frozen=True)
class ReplicaTable:
    """The indirection table of a layer; all on the device, read there.

    Attributes:
        lanes_P: [P] int32; the lane of each entry, each in one entry only. Lanes out of range are undefined behaviour.
        lane_to_slot_L: [L] int32; the slot of each lane of this rank. Entries of lanes without rows are not used.
        offsets_E1: [E + 1] int32; the replicas of expert e are the entries offsets[e] to offsets[e + 1]. None, with
            `cumulative_P`: each expert has one replica, entry e is that of e.
        cumulative_P: [P] int32; the running sum of an expert's shares in units of 2**-30. Its last is 2**30.
    """

    lanes_P: torch.Tensor
    lane_to_slot_L: torch.Tensor
    offsets_E1: torch.Tensor | None = None
    cumulative_P: torch.Tensor | None = None

    def check(self, num_experts: int, device: torch.device) -> None:
        """Raises ValueError if the replicas have wrong shapes, dtypes or devices for so many experts."""
        if self.offsets_E1 is None or self.cumulative_P is None:
            if self.offsets_E1 is not self.cumulative_P:
                raise ValueError("table.offsets_E1 and table.cumulative_P: must both be None, or neither")
            check_tensor("table.lanes_P", self.lanes_P, (num_experts,), torch.int32, device)
        else:
            check_tensor("table.offsets_E1", self.offsets_E1, (num_experts + 1,), torch.int32, device)
            check_tensor("table.lanes_P", self.lanes_P, (None,), torch.int32, device)
            check_tensor("table.cumulative_P", self.cumulative_P, (self.lanes_P.shape[0],), torch.int32, device)

    def check_local(self, num_experts: int, device: torch.device) -> None:
        """`check`, and the lanes have slots, and each expert has one replica."""
        if self.offsets_E1 is not None or self.cumulative_P is not None:
            raise ValueError(
                "table.offsets_E1 and table.cumulative_P: must be None where all experts are on this device"
            )
        self.check(num_experts, device)
        check_tensor("table.lane_to_slot_L", self.lane_to_slot_L, (None,), torch.int32, device)
        if self.lane_to_slot_L.shape[0] < num_experts:
            raise ValueError(
                f"table.lane_to_slot_L has {self.lane_to_slot_L.shape[0]} lanes: must have at least num_experts={num_experts}, "
                "as each expert has a lane of its own"
            )
