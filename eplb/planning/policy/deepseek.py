"""Policy "deepseek": the algorithm that DeepSeek published (github.com/deepseek-ai/EPLB, revision d52c72d).

It forgets what is live: equal loads give equal placements, and slightly different loads quite different ones. It is here
to compare with, and for those who want exactly it. Placement, order inside ranks and ties are those of the original
(float32 sums; first of equals), written anew over all layers at once.

Shape letters: X independent problems (layers, or layers × nodes), n items, E logical experts, P physical experts.
"""

from __future__ import annotations

import numpy as np

from eplb.planning.policy.base import Proposal, Topology, check_input, register_policy
from eplb.planning.shares import equal_shares_of


def pack_evenly(weight_Xn: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Items into packs of n / num_packs each: heaviest item first, always to the lightest pack that has room.

    Args:
        weight_Xn: float32 [X, n].
        num_packs: divides n.

    Returns:
        pack_Xn, position_Xn: int64 [X, n], the pack of each item and its place inside it (order of arrival).
    """
    num_problems, num_items = weight_Xn.shape
    per_pack = num_items // num_packs
    if per_pack == 1:  # the original does not sort here, and callers see the difference
        return np.tile(np.arange(num_items), (num_problems, 1)), np.zeros((num_problems, num_items), dtype=np.int64)
    order_nX = np.argsort(-weight_Xn, axis=1, kind="stable").T
    rows = np.arange(num_problems)
    load_XG = np.zeros((num_problems, num_packs), dtype=np.float32)  # float32: the sums decide ties
    full_XG = np.zeros((num_problems, num_packs), dtype=np.float32)  # inf once a pack is full
    items_XG = np.zeros((num_problems, num_packs), dtype=np.int64)
    pack_Xn = np.empty((num_problems, num_items), dtype=np.int64)
    position_Xn = np.empty((num_problems, num_items), dtype=np.int64)
    for item_X in order_nX:
        pack_X = (load_XG + full_XG).argmin(axis=1)
        position_X = items_XG[rows, pack_X]
        pack_Xn[rows, item_X] = pack_X
        position_Xn[rows, item_X] = position_X
        load_XG[rows, pack_X] += weight_Xn[rows, item_X]
        items_XG[rows, pack_X] = position_X + 1
        full_XG[rows, pack_X] = np.where(position_X + 1 == per_pack, np.float32(np.inf), np.float32(0))
    return pack_Xn, position_Xn


def replicate(weight_Xn: np.ndarray, num_physical: int) -> tuple[np.ndarray, np.ndarray]:
    """One replica of every expert, then one more at a time for the expert with the largest load per replica.

    Returns:
        physical_XP: int64 [X, num_physical], the expert of each replica: 0..n-1, then the added ones in order.
        counts_Xn: int64 [X, n], replicas of each expert.
    """
    num_problems, num_experts = weight_Xn.shape
    rows = np.arange(num_problems)
    physical_XP = np.tile(np.arange(num_physical), (num_problems, 1))
    counts_Xn = np.ones((num_problems, num_experts), dtype=np.int64)
    per_replica_Xn = weight_Xn.copy()
    for i in range(num_experts, num_physical):
        expert_X = per_replica_Xn.argmax(axis=1)
        physical_XP[:, i] = expert_X
        counts_Xn[rows, expert_X] += 1
        per_replica_Xn[rows, expert_X] = weight_Xn[rows, expert_X] / counts_Xn[rows, expert_X].astype(np.float32)
    return physical_XP, counts_Xn


def _inverse(permutation_Xn: np.ndarray) -> np.ndarray:
    return np.argsort(permutation_Xn, axis=1, kind="stable")


def deepseek_placement(
    load_LE: np.ndarray, num_physical: int, num_groups: int, num_nodes: int, num_ranks: int
) -> np.ndarray:
    """The published placement: groups to nodes, replicas inside nodes, replicas to ranks.

    When the groups are not divisible by the nodes, it is global: as if there were one group and one node.

    Args:
        load_LE: [L, E], tokens per expert; taken as float32, as in the original.
        num_physical: physical experts of a layer; divisible by `num_ranks`.
        num_groups: groups of experts; divides E.
        num_nodes: divides `num_ranks`.
        num_ranks: W.

    Returns:
        int64 [L, num_physical], rank after rank.

    Raises:
        ValueError: one of these divisibility rules is broken.

    Example: DeepSeek's README, loads `[[90,132,40,61,104,165,39,4,73,56,183,86], …]`, 16 replicas, 4 groups, 2 nodes and
    8 ranks, gives `[[5,6, 5,7, 8,4, 3,4, 10,9, 10,2, 0,1, 11,1], …]`.
    """
    weight_LE = np.asarray(load_LE).astype(np.float32)
    num_layers, num_experts = weight_LE.shape
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups}: must divide the {num_experts} experts")
    if num_nodes < 1 or num_ranks % num_nodes:
        raise ValueError(f"num_nodes={num_nodes}: must divide num_ranks={num_ranks}")
    if num_physical % num_ranks or num_physical < num_experts:
        raise ValueError(
            f"num_physical={num_physical}: must be divisible by num_ranks={num_ranks} and at least the {num_experts} experts"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    group_size = num_experts // num_groups
    groups_per_node = num_groups // num_nodes
    experts_per_node = num_experts // num_nodes
    per_node, per_rank = num_physical // num_nodes, num_physical // num_ranks

    # Step 1: groups to nodes. `by_node` lists the experts node after node.
    group_load_LG = weight_LE.reshape(num_layers, num_groups, group_size).sum(axis=2, dtype=np.float32)
    node_LG, position_LG = pack_evenly(group_load_LG, num_nodes)
    first_LG = (node_LG * groups_per_node + position_LG) * group_size
    by_node_LE = _inverse((first_LG[:, :, None] + np.arange(group_size)).reshape(num_layers, num_experts))

    # Step 2: replicas inside each node; X = layers × nodes.
    weight_Xe = np.take_along_axis(weight_LE, by_node_LE, axis=1).reshape(-1, experts_per_node)
    physical_Xp, counts_Xe = replicate(weight_Xe, per_node)

    # Step 3: replicas to the ranks of the node.
    load_Xp = np.take_along_axis(weight_Xe / counts_Xe.astype(np.float32), physical_Xp, axis=1)
    rank_Xp, position_Xp = pack_evenly(load_Xp, num_ranks // num_nodes)
    ordered_Xp = np.take_along_axis(physical_Xp, _inverse(rank_Xp * per_rank + position_Xp), axis=1)
    ordered_LNp = ordered_Xp.reshape(num_layers, num_nodes, per_node)
    ordered_LNp = ordered_LNp + (np.arange(num_nodes) * experts_per_node)[:, None]
    return np.take_along_axis(by_node_LE, ordered_LNp.reshape(num_layers, num_physical), axis=1)


@register_policy("deepseek")
class DeepSeekPolicy:
    """DeepSeek's published algorithm over the mean of the window; hierarchical if the nodes divide the groups, else global.

    Shares are equal, as there. It knows nothing of the live placement; which replica stays where it is, the plan finds.
    """

    def propose(self, load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> Proposal:
        """See `eplb.planning.policy.Policy.propose`."""
        load_LNE, physical_LWP = check_input(load_LNE, physical_LWP, topology)
        num_layers, num_ranks, per_rank = physical_LWP.shape
        new_LWP = deepseek_placement(
            load_LNE.mean(axis=1), num_ranks * per_rank, topology.num_groups, topology.num_nodes, num_ranks
        ).reshape(num_layers, num_ranks, per_rank)
        return Proposal(new_LWP, equal_shares_of(new_LWP, load_LNE.shape[2]))
