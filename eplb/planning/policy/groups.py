"""Policy "adaptive", node-limited routing: the experts of a group live in one node, so a token reaches few nodes.

Each node is then a problem of its own. Shape letters: L layers, N sub-windows, E experts, W ranks, P physical experts per rank,
D nodes, X = L · D problems of E / D experts and W / D ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb.planning.balance import max_over_mean
from eplb.planning.policy.base import Topology
from eplb.planning.policy.deepseek import deepseek_placement, pack_evenly


@dataclass
class ByNode:
    """Nodes as if they were layers.

    Attributes:
        load_LNE: float64 [X, N, E / D].
        physical_LWP: int64 [X, W / D, P], ids inside the node.
        expert_XE: int64 [X, E / D], the expert that each id stands for, ascending.
        num_nodes: D.
    """

    load_LNE: np.ndarray
    physical_LWP: np.ndarray
    expert_XE: np.ndarray
    num_nodes: int

    def join(self, physical_XWP: np.ndarray) -> np.ndarray:
        """Placements of the nodes back to one per layer: [X, W / D, P] → [L, W, P]."""
        num_problems, ranks, per_rank = physical_XWP.shape
        flat = np.take_along_axis(self.expert_XE, physical_XWP.reshape(num_problems, -1), axis=1)
        return flat.reshape(num_problems // self.num_nodes, self.num_nodes * ranks, per_rank)


def split_by_node(load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> ByNode:
    """One problem per layer and node; every group must live in one node (`regroup`)."""
    num_layers, num_windows, num_experts = load_LNE.shape
    num_nodes = topology.num_nodes
    node_LE = _node_of_expert(physical_LWP, num_experts, num_nodes)
    expert_XE = np.argsort(node_LE, axis=1, kind="stable").reshape(num_layers * num_nodes, -1)
    load_XNE = np.take_along_axis(np.repeat(load_LNE, num_nodes, axis=0), expert_XE[:, None], axis=2)
    physical_XQ = physical_LWP.reshape(num_layers * num_nodes, -1)
    id_XE = np.zeros((len(expert_XE), num_experts), dtype=np.int64)
    np.put_along_axis(id_XE, expert_XE, np.arange(expert_XE.shape[1])[None], axis=1)
    physical_XQ = np.take_along_axis(id_XE, physical_XQ, axis=1)
    shape = (num_layers * num_nodes, physical_LWP.shape[1] // num_nodes, physical_LWP.shape[2])
    assert load_XNE.shape[1] == num_windows
    return ByNode(load_XNE, physical_XQ.reshape(shape), expert_XE, num_nodes)


def regroup(load_LE: np.ndarray, physical_LWP: np.ndarray, topology: Topology, min_gain: float) -> np.ndarray:
    """The live placement where its groups are at home in nodes and the nodes are balanced; else a new one.

    A layer gets a new one (DeepSeek's hierarchical, its nodes ordered so that most groups stay) if a group is spread over
    nodes, or if packing the groups anew takes more than `min_gain` and a tenth off the nodes' max/mean: it moves most of the
    layer.
    """
    num_layers, num_ranks, per_rank = physical_LWP.shape
    num_experts = load_LE.shape[1]
    num_nodes, num_groups = topology.num_nodes, topology.num_groups
    node_LE = _node_of_expert(physical_LWP, num_experts, num_nodes)
    node_LGe = node_LE.reshape(num_layers, num_groups, -1)
    # -1 marks an expert in several nodes.
    home_L = (node_LGe == node_LGe[:, :, :1]).all(axis=(1, 2)) & (node_LE >= 0).all(axis=1)
    groups_of_node = np.stack([(node_LGe[:, :, 0] == node).sum(axis=1) for node in range(num_nodes)], axis=1)
    home_L &= (groups_of_node == num_groups // num_nodes).all(axis=1)

    group_load_LG = load_LE.reshape(num_layers, num_groups, -1).sum(axis=2)

    def imbalance(node_LG: np.ndarray) -> np.ndarray:
        node_load = np.stack([(group_load_LG * (node_LG == node)).sum(axis=1) for node in range(num_nodes)], axis=1)
        return max_over_mean(node_load)

    packed_LG, _ = pack_evenly(group_load_LG.astype(np.float32), num_nodes)
    gain_L = imbalance(node_LGe[:, :, 0]) - imbalance(packed_LG)
    fresh = np.flatnonzero(~home_L | (gain_L > max(min_gain, 0.1)))
    if not fresh.size:
        return physical_LWP
    made = deepseek_placement(load_LE[fresh], num_ranks * per_rank, num_groups, num_nodes, num_ranks)
    made = made.reshape(fresh.size, num_nodes, -1)
    result_LWP = physical_LWP.copy()
    for layer, made_DQ in zip(fresh.tolist(), made, strict=True):
        live_DQ = physical_LWP[layer].reshape(num_nodes, -1)
        common = np.array([[np.intersect1d(new, old).size for old in live_DQ] for new in made_DQ])
        for _ in range(num_nodes):  # the pair of nodes with most in common first
            new, old = np.unravel_index(common.argmax(), common.shape)
            result_LWP[layer].reshape(num_nodes, -1)[old] = made_DQ[new]
            common[new, :], common[:, old] = -1, -1
    return result_LWP


def _node_of_expert(physical_LWP: np.ndarray, num_experts: int, num_nodes: int) -> np.ndarray:
    """int64 [L, E]: the node of each expert, -1 for one in several nodes."""
    num_layers = len(physical_LWP)
    physical_LDQ = physical_LWP.reshape(num_layers, num_nodes, -1)
    held_LDE = np.zeros((num_layers, num_nodes, num_experts), dtype=bool)
    np.put_along_axis(held_LDE, physical_LDQ, True, axis=2)
    return np.where(held_LDE.sum(axis=1) == 1, held_LDE.argmax(axis=1), -1)
