"""Spare replicas go to the hottest experts, where that costs no balance: less of the noise that is to come is felt."""

import numpy as np
import pytest

from eplb.planning.balance import free_placement_bound, max_over_mean, rank_loads
from eplb.planning.placement import Placement, count_experts
from eplb.planning.policy import Topology, make_policy
from eplb.planning.policy.adaptive import num_moves
from eplb.planning.policy.spread import spread
from eplb.planning.shares import balanced_shares
from eplb.simulate.traces import base_load


def best_balance(load_LE, physical_LWP):
    return max_over_mean(rank_loads(load_LE, physical_LWP, balanced_shares(load_LE, physical_LWP)))


def settled(kind, layers, experts, physical, ranks, seed=0):
    load = base_load(kind, layers, experts, np.random.default_rng(seed))
    start = Placement.initial(experts, physical - experts, ranks, physical // ranks)
    live = np.tile(start.lanes_WS, (layers, 1, 1))
    live = make_policy("adaptive", spread=0).propose(load[:, None], live, Topology(ranks)).physical_LWP
    bound = free_placement_bound(load, ranks, physical) / (load.sum(axis=1) / ranks)
    return load, live, bound


def test_the_hottest_expert_ends_on_every_rank():
    """One expert has half of the load. At first ranks 0 and 1 alone feel what it does."""
    load = np.array([[70.0] + [10] * 7])
    live = np.array([[[0, 1, 2, 3], [0, 4, 5, 6], [7, 1, 2, 3], [4, 5, 6, 7]]])
    before = best_balance(load, live)
    for _ in range(4):
        found = spread(load, live, np.full(1, 1.0025), 9)
        assert num_moves(live, found, 8) <= 1
        live = found
    assert (live == 0).any(axis=2).all() and best_balance(load, live) <= max(before, 1.0025)
    np.testing.assert_array_equal(spread(load, live, np.full(1, 1.0025), 9), live)  # and that is the end of it


def test_a_rank_without_a_replica_to_give_up_hands_on_a_lone_expert():
    """Rank 1 lacks expert 0, and has none that is elsewhere too: what makes room for it moves to another rank."""
    load = np.array([[100.0, 10, 10, 10, 15, 15, 15, 12, 20, 20, 20]])
    start = np.array([[[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 8], [0, 9, 10, 3]]])
    live, limit, moves = start, np.full(1, 9.0), []
    for _ in range(4):
        found = spread(load, live, limit, 9)
        moves.append(num_moves(live, found, 11).item())
        live = found
    assert 2 in moves and (live == 0).any(axis=2).all() and len(np.unique(live)) == 11
    for most in ({"max_moves": 1}, {"max_moves": 9, "max_moves_L": np.ones(1)}):  # both moves or neither
        assert num_moves(start, spread(load, start, limit, **most), 11) <= 1


@pytest.mark.parametrize(
    ("kind", "sizes", "part"),
    [
        ("r1", (6, 64, 72, 4), 0.75),
        ("zipf:1.2", (6, 64, 72, 4), 0.65),
        ("zipf:1.2", (6, 64, 80, 4), 0.5),
        ("zipf:1.2", (4, 128, 144, 8), 0.8),
        ("r1", (4, 128, 144, 8), 0.9),
    ],
)
def test_noise_is_felt_less_and_balance_stays(kind, sizes, part):
    load, live, bound = settled(kind, *sizes)
    limit = bound * 1.0025
    rng = np.random.default_rng(1)
    after = load * rng.lognormal(0, 0.2, (40, *load.shape))

    def felt(physical):
        shares = balanced_shares(load, physical)
        return np.mean([max_over_mean(rank_loads(noisy, physical, shares)) for noisy in after])

    found, moves = live, 0
    for _ in range(20):
        step = spread(load, found, limit, 100)
        moves_L = num_moves(found, step, load.shape[1])
        assert moves_L.max() <= 2  # one change in a layer
        assert (best_balance(load, step) <= np.maximum(limit, best_balance(load, found)) + 1e-3).all()
        assert (count_experts(step.reshape(len(step), -1), load.shape[1]) > 0).all()
        assert count_experts(step, load.shape[1]).max() == 1  # no twins
        found, moves = step, moves + moves_L.sum()
    assert moves > 0 and felt(found) - 1 < part * (felt(live) - 1)


def test_what_has_nothing_to_gain_stays():
    equal = np.ones((2, 12))
    live = np.tile(Placement.initial(12, 8, 4, 5).lanes_WS, (2, 1, 1))
    np.testing.assert_array_equal(spread(equal, live, np.full(2, 2.0), 9), live)
    load, live, bound = settled("zipf:1.2", 2, 64, 68, 4)  # no more replicas than levelling needs
    np.testing.assert_array_equal(spread(load, live, bound * 1.0025, 9), live)
    load, live, bound = settled("r1", 6, 64, 72, 4)
    np.testing.assert_array_equal(spread(load, live, bound * 1.0025, 0), live)
    assert num_moves(live, spread(load, live, bound * 1.0025, 2), 64).sum() in (
        1,
        2,
    )  # a pair of moves is not torn apart


def test_a_plan_spreads_a_little_and_comes_to_rest():
    load, live, _ = settled("r1", 6, 64, 72, 4)
    for options, most, most_L in [
        ({"spread": 0.0}, 0, 0),
        ({}, 4, 2),
        ({"max_moves": 2}, 2, 2),
        ({"max_moves_per_layer": 1}, 4, 1),
        ({"max_moves_per_layer": 0}, 0, 0),
    ]:
        proposal = make_policy("adaptive", **options).propose(load[:, None], live, Topology(4))
        moves_L = num_moves(live, proposal.physical_LWP, 64)
        assert (most > 0) <= moves_L.sum() <= most and moves_L.max() <= most_L, options
    policy, total = make_policy("adaptive"), 0
    for _ in range(60):
        found = policy.propose(load[:, None], live, Topology(4)).physical_LWP
        moves, live = num_moves(live, found, 64).sum(), found
        total += moves
    assert moves == 0 and total > 6
    decode = make_policy("adaptive", objective="decode", batch_assignments=64)
    assert decode.spread == 0


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_part_of_the_slots_is_a_part(value):
    with pytest.raises(ValueError, match="spread="):
        make_policy("adaptive", spread=value)


def test_balance_comes_first():
    """Without a limit some of these moves make a layer uneven; with it none does."""
    load, live, bound = settled("zipf:0.8", 8, 24, 40, 8)
    uneven = {"loose": 0, "limited": 0}
    for _ in range(10):
        most = np.maximum(bound * 1.0025, best_balance(load, live)) + 1e-3
        limited = spread(load, live, bound * 1.0025, 100)
        uneven["loose"] += (best_balance(load, spread(load, live, bound * 9, 100)) > most).sum()
        uneven["limited"] += (best_balance(load, limited) > most).sum()
        live = limited
    assert uneven["loose"] > 0 and uneven["limited"] == 0
