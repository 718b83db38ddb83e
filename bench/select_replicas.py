"""``python -m bench.select_replicas``: expert ids to lanes by the table, with and without recording the load.

Recording is part of the op; the difference of the two is its cost. The peer does as engines do: replica by
position modulo the number of replicas, load by `scatter_add_`.
"""

import sys

import torch

from bench.kernel import Inputs, Work, main
from eplb.planning.placement import Placement
from eplb.planning.shares import equal_shares
from eplb.relocation.table import ExpertTable
from eplb.streams import streams_of
from moe_kernels import LoadCounter, ReplicaTable, select_replicas, select_replicas_torch

REDUNDANT = 8


def make_work(inputs: Inputs) -> Work:
    num_experts, ids_TK, device = inputs.shape.num_experts, inputs.ids_TK, inputs.device
    num_lanes = num_experts + REDUNDANT
    placement = Placement.initial(num_experts, REDUNDANT, 1, num_lanes=num_lanes)
    table = ExpertTable(placement, equal_shares(placement), streams_of(device))
    arrays = table.offsets_E1, table.lanes_P, table.cumulative_P
    replicas = ReplicaTable(table.lanes_P, table.lane_to_slot_S, table.offsets_E1, table.cumulative_P)
    increment_1 = torch.ones(1, dtype=torch.int64, device=device)
    # Each run has a counter of its own, as recording changes what the next call chooses.
    load_E, other_load_E, peer_load_E = torch.zeros(3, num_experts, dtype=torch.int64, device=device)
    ones_N = torch.ones(inputs.num_rows, dtype=torch.int64, device=device)
    position_TK = torch.arange(inputs.num_rows, device=device).view(ids_TK.shape)

    def modulo() -> torch.Tensor:
        ids = ids_TK.long()
        first_TK = table.offsets_E1[ids]
        peer_load_E.scatter_add_(0, ids.flatten(), ones_N)
        return table.lanes_P[first_TK + position_TK % (table.offsets_E1[ids + 1] - first_TK)]

    return Work(
        runs={
            "select_replicas": lambda: select_replicas(
                ids_TK, replicas, LoadCounter(load_E, increment_1), 0, num_lanes=num_lanes
            ),
            "without recording": lambda: select_replicas(
                ids_TK, replicas, LoadCounter(other_load_E), 0, num_lanes=num_lanes
            ),
            "torch modulo, scatter_add_": modulo,
        },
        expected=lambda: select_replicas_torch(
            ids_TK, replicas, LoadCounter(torch.zeros_like(load_E)), 0, num_lanes=num_lanes
        ),
        num_bytes=2 * ids_TK.nbytes + sum(array.nbytes for array in arrays) + 2 * load_E.nbytes + 4 * num_lanes,
        unchecked=frozenset({"torch modulo, scatter_add_"}),
    )


if __name__ == "__main__":
    sys.exit(main("select_replicas", __doc__, make_work))
