"""Loads of few different values: nothing to follow for a search, and what hot sets and short windows look like."""

import itertools

import numpy as np
import pytest

from eplb.planning.balance import free_placement_bound, rank_loads
from eplb.planning.placement import Placement, count_experts
from eplb.planning.policy import Topology, make_policy
from eplb.planning.policy.pour import pour


def least_maximum(load_LE, num_ranks, per_rank):
    """Over all placements: the largest, over sets of ranks, of the load that cannot leave the set, per rank of it."""
    sets = [set(s) for s in itertools.combinations(range(load_LE.shape[1]), per_rank)]
    best = np.full(len(load_LE), np.inf)
    for placement in itertools.combinations_with_replacement(sets, num_ranks):
        if len(set.union(*placement)) < load_LE.shape[1]:
            continue
        highest = np.zeros(len(load_LE))
        for size in range(1, num_ranks + 1):
            for inside in itertools.combinations(range(num_ranks), size):
                elsewhere = set().union(*(placement[r] for r in range(num_ranks) if r not in inside))
                stays = [e for e in range(load_LE.shape[1]) if e not in elsewhere]
                highest = np.maximum(highest, load_LE[:, stays].sum(axis=1) / size)
        best = np.minimum(best, highest)
    return best


def random_placement(experts, ranks, per_rank, rng):
    while True:
        held = rng.permutation(np.r_[np.arange(experts), rng.integers(0, experts, ranks * per_rank - experts)])
        held = held.reshape(ranks, per_rank)
        if count_experts(held, experts).max() == 1:
            return held


@pytest.mark.parametrize(("ranks", "per_rank", "experts"), [(2, 3, 4), (2, 4, 6), (3, 2, 5), (4, 2, 5), (4, 2, 6)])
def test_small_whole_loads_reach_the_optimum(ranks, per_rank, experts):
    rng = np.random.default_rng(0)
    load = rng.integers(0, 10, (150, experts)).astype(float)
    live = np.stack([random_placement(experts, ranks, per_rank, rng) for _ in load])
    proposal = make_policy("adaptive").propose(load[:, None], live, Topology(ranks))
    highest = rank_loads(load, proposal.physical_LWP, proposal.shares_LWP).max(axis=1)
    assert (highest <= least_maximum(load, ranks, per_rank) * 1.003 * (1 + 1e-5)).all()


def test_one_move_that_the_estimate_rules_out():
    load, live = np.array([[[3.0, 6.0, 1.0]]]), np.array([[[0, 1], [2, 0]]])
    proposal = make_policy("adaptive").propose(load, live, Topology(2))
    assert rank_loads(load[:, 0], proposal.physical_LWP, proposal.shares_LWP).max() == pytest.approx(5)


@pytest.mark.parametrize(
    ("experts", "physical", "ranks"), [(256, 288, 32), (128, 160, 32), (256, 320, 64), (128, 144, 8)]
)
@pytest.mark.parametrize("kind", ["half are 1", "a tenth is 1", "0 to 3", "equal", "20 are hot"])
def test_ties_reach_the_bound(kind, experts, physical, ranks):
    rng = np.random.default_rng(1)
    shape = (5, experts)
    load = {
        "half are 1": lambda: rng.integers(0, 2, shape),
        "a tenth is 1": lambda: rng.random(shape) < 0.1,
        "0 to 3": lambda: rng.integers(0, 4, shape),
        "equal": lambda: np.ones(shape),
        "20 are hot": lambda: np.where(rng.random(shape).argsort(axis=1) < 20, rng.integers(1, 30, shape), 0),
    }[kind]().astype(float)
    live = np.tile(Placement.initial(experts, physical - experts, ranks, physical // ranks).lanes_WS, (5, 1, 1))
    proposal = make_policy("adaptive").propose(load[:, None], live, Topology(ranks))
    highest = rank_loads(load, proposal.physical_LWP, proposal.shares_LWP).max(axis=1)
    assert (highest <= 1.003 * (1 + 1e-5) * free_placement_bound(load, ranks, physical)).all()


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_poured_is_a_placement(merge):
    rng = np.random.default_rng(2)
    for _ in range(300):
        ranks, per_rank = rng.integers(1, 7), rng.integers(1, 5)
        experts = rng.integers(per_rank, ranks * per_rank + 1)
        live = random_placement(experts, ranks, per_rank, rng) if experts > 1 else np.zeros((ranks, 1), dtype=int)
        load = rng.choice([0, 0, 1, 1, 2, 9], experts) + 1e-9
        made = pour(load / load.sum() * ranks, live, 1.0025, merge)
        assert made.shape == live.shape
        assert count_experts(made, experts).max() == 1
        assert count_experts(made.reshape(1, -1), experts).min() >= 1
