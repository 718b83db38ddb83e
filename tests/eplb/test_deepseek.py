import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb.planning.policy import Topology, make_policy
from eplb.planning.policy.deepseek import deepseek_placement, pack_evenly, replicate
from eplb.simulate.traces import DEEPSEEK_EXAMPLE

PUBLISHED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def test_the_published_example():
    np.testing.assert_array_equal(deepseek_placement(DEEPSEEK_EXAMPLE, 16, 4, 2, 8), PUBLISHED)


def test_the_published_example_through_the_policy():
    live = np.tile((np.arange(16) % 12).reshape(8, 2), (2, 1, 1))
    topology = Topology(num_ranks=8, ranks_per_node=4, num_groups=4)
    proposal = make_policy("deepseek").propose(DEEPSEEK_EXAMPLE[:, None], live, topology)
    np.testing.assert_array_equal(proposal.physical_LWP.reshape(2, 16), PUBLISHED)
    assert proposal.shares_LWP[0, 0].tolist() == [0.5, 1.0]  # experts 5 (two replicas) and 6


def test_global_when_the_nodes_do_not_divide_the_groups():
    load = np.random.default_rng(0).lognormal(0, 1, (3, 24))
    np.testing.assert_array_equal(deepseek_placement(load, 32, 3, 2, 8), deepseek_placement(load, 32, 1, 1, 8))
    # … and the groups of a hierarchical one stay in their nodes.
    nodes = deepseek_placement(load, 32, 4, 2, 8).reshape(3, 2, 16) // 6
    for layer in nodes:
        assert not set(layer[0]) & set(layer[1])


def test_pack_evenly_by_hand():
    # Heaviest first to the lightest pack with room: 9→0, 7→1, 5→1 (7 < 9), 1→0 (only room left).
    pack, position = pack_evenly(np.array([[5, 9, 1, 7]], dtype=np.float32), 2)
    assert pack.tolist() == [[1, 0, 0, 1]] and position.tolist() == [[1, 0, 1, 0]]


def test_ties_go_to_the_first_and_one_item_per_pack_is_not_sorted():
    pack, position = pack_evenly(np.ones((1, 4), dtype=np.float32), 2)
    assert pack.tolist() == [[0, 1, 0, 1]] and position.tolist() == [[0, 0, 1, 1]]
    pack, _ = pack_evenly(np.array([[1, 3, 2]], dtype=np.float32), 3)
    assert pack.tolist() == [[0, 1, 2]]


def test_replicate_by_hand():
    # 12 alone → expert 1; then 6, 6, 10 → expert 2.
    physical, counts = replicate(np.array([[6, 12, 10]], dtype=np.float32), 5)
    assert physical.tolist() == [[0, 1, 2, 1, 2]] and counts.tolist() == [[1, 2, 2]]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.data())
def test_every_expert_is_placed_and_ranks_are_full(nodes, ranks_per_node, groups_per_node, group_size, spare, data):
    experts, ranks = nodes * groups_per_node * group_size, nodes * ranks_per_node
    physical = (-(-experts // ranks) + spare) * ranks
    load = np.array([data.draw(st.lists(st.integers(0, 5), min_size=experts, max_size=experts))])
    placed = deepseek_placement(load, physical, nodes * groups_per_node, nodes, ranks)
    assert placed.shape == (1, physical) and set(placed[0]) == set(range(experts))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((16, 5, 1, 8), "num_groups=5"),
        ((16, 4, 3, 8), "num_nodes=3"),
        ((15, 1, 1, 8), "num_physical=15"),
        ((8, 1, 1, 8), "num_physical=8"),
    ],
)
def test_bad_sizes_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        deepseek_placement(np.ones((1, 12)), *arguments)
