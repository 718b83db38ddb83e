import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from eplb.planning.balance import rank_loads
from eplb.planning.levelling import level_loads
from eplb.planning.placement import Placement
from eplb.planning.policy.adaptive import without_twins
from eplb.planning.policy.deepseek import deepseek_placement
from eplb.planning.shares import SHARE_BITS, balanced_shares, cumulative_shares, equal_shares, equal_shares_of
from eplb.simulate.traces import base_load, change_load


def least_maximum(load_E, physical_WP):
    """The linear program: least B such that the loads can be split with no rank above B."""
    ranks, per_rank = physical_WP.shape
    experts = physical_WP.ravel()
    size = experts.size
    rows_eq = np.zeros((load_E.size, size + 1))
    rows_eq[experts, np.arange(size)] = 1
    held = np.unique(experts)
    rows_ub = np.zeros((ranks, size + 1))
    rows_ub[np.arange(size) // per_rank, np.arange(size)] = 1
    rows_ub[:, -1] = -1
    cost = np.zeros(size + 1)
    cost[-1] = 1
    found = linprog(cost, A_ub=rows_ub, b_ub=np.zeros(ranks), A_eq=rows_eq[held], b_eq=load_E[held], method="highs")
    assert found.status == 0
    return found.fun


def check_exact(load_LE, physical_LWP, tolerance=1.1e-5):
    shares = balanced_shares(load_LE, physical_LWP)
    assert (shares >= 0).all()
    loads = rank_loads(load_LE, physical_LWP, shares)
    for layer in range(len(load_LE)):
        for expert in np.unique(physical_LWP[layer]):
            assert shares[layer][physical_LWP[layer] == expert].sum() == pytest.approx(1, abs=1e-9)
        best = least_maximum(load_LE[layer], physical_LWP[layer])
        assert loads[layer].max() <= best * (1 + tolerance) + 1e-9


def test_example_of_the_docstring():
    shares = balanced_shares(np.array([[6, 2, 4]]), np.array([[[0, 1], [0, 2]]]))
    np.testing.assert_allclose(shares, [[[2 / 3, 1], [1 / 3, 1]]])


@st.composite
def problems(draw):
    ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    size = ranks * per_rank
    experts = draw(st.integers(1, size))
    layers = []
    loads = []
    for _ in range(draw(st.integers(1, 3))):
        extra = draw(st.lists(st.integers(0, experts - 1), min_size=size - experts, max_size=size - experts))
        order = draw(st.permutations(list(range(experts)) + extra))
        layers.append(np.array(order).reshape(ranks, per_rank))
        loads.append(
            draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 50, 1000, 1e6]), min_size=experts, max_size=experts))
        )
    return np.array(loads, dtype=float), np.array(layers)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_matches_the_linear_program_on_anything(problem):
    check_exact(*problem)


@pytest.mark.parametrize(("experts", "physical", "ranks"), [(256, 288, 32), (128, 144, 8), (64, 72, 4)])
@pytest.mark.parametrize("kind", ["lognormal:0.8", "lognormal:1.0", "zipf:0.8", "zipf:1.2"])
def test_matches_the_linear_program_at_real_sizes(experts, physical, ranks, kind):
    rng = np.random.default_rng(7)
    load = base_load(kind, 3, experts, rng)
    made = deepseek_placement(load, physical, 1, 1, ranks).reshape(3, ranks, -1)
    for change in ("noise:0.2", "hotset"):
        after = change_load(load, change, kind, rng)
        check_exact(after, without_twins(load, made))
        check_exact(after, made)  # with two replicas of an expert on one rank


def test_layers_do_not_influence_each_other():
    rng = np.random.default_rng(1)
    load = rng.lognormal(0, 1, (5, 32))
    physical = np.stack([rng.permutation(np.r_[np.arange(32), rng.integers(0, 32, 8)]) for _ in range(5)]).reshape(
        5, 8, 5
    )
    together = rank_loads(load, physical, balanced_shares(load, physical))
    for layer in range(5):
        at = slice(layer, layer + 1)
        alone = rank_loads(load[at], physical[at], balanced_shares(load[at], physical[at]))
        np.testing.assert_allclose(together[at].max(), alone.max(), rtol=1e-5)


def test_no_load_goes_from_a_rank_to_a_less_loaded_one():
    load = np.array([[8.0, 1, 1, 1, 4, 1]])
    physical = np.array([[[0, 1], [0, 2], [3, 4], [4, 5]]])
    loads = rank_loads(load, physical, balanced_shares(load, physical))
    np.testing.assert_allclose(loads, [[5, 5, 3, 3]])


def highest_step_down(load_LE, physical_LWP):
    """[L], in units of the mean rank load: the most by which a rank that carries part of an expert is above another of it."""
    shares = balanced_shares(load_LE, physical_LWP)
    mean_L = np.maximum(load_LE.sum(axis=1) / physical_LWP.shape[1], 1e-300)
    level = rank_loads(load_LE, physical_LWP, shares) / mean_L[:, None]
    worst = np.zeros(len(load_LE))
    for layer, expert in np.ndindex(load_LE.shape):
        rank, lane = np.nonzero(physical_LWP[layer] == expert)
        carried = shares[layer, rank, lane] * load_LE[layer, expert] / mean_L[layer] > 1e-6
        if carried.any():
            worst[layer] = max(worst[layer], level[layer, rank[carried]].max() - level[layer, rank].min())
    return worst


@settings(max_examples=100, deadline=None)
@given(problems())
def test_levels_below_the_maximum_on_anything(problem):
    assert highest_step_down(*problem).max(initial=0) <= 1e-5


@pytest.mark.parametrize(("experts", "physical", "ranks"), [(256, 288, 32), (128, 144, 8), (64, 72, 4)])
@pytest.mark.parametrize("kind", ["gamma:0.5", "pareto:1.5", "zipf:1.2"])
def test_levels_below_the_maximum_at_real_sizes(experts, physical, ranks, kind):
    rng = np.random.default_rng(7)
    load = base_load(kind, 8, experts, rng)
    made = without_twins(load, deepseek_placement(load, physical, 1, 1, ranks).reshape(8, ranks, -1))
    for after in (change_load(load, "noise:0.2", kind, rng), change_load(load, "hotset", kind, rng), rng.poisson(load)):
        assert highest_step_down(after, made).max() <= 1e-5


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_levelling_ends_at_the_same_loads_wherever_it_begins(problem, seed):
    load, physical = problem
    begin = np.random.default_rng(seed).exponential(size=(len(physical), physical[0].size))
    _, _, expected = level_loads(load, physical)
    _, _, found = level_loads(load, physical, begin_LQ=begin)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_without_an_iteration_levelling_returns_what_it_began_with(problem):
    load, physical = problem
    split, flow, expected = level_loads(load, physical)
    begin = np.full((len(physical), physical[0].size), np.nan)  # lanes of experts with one replica are not looked at
    begin[split.layer_R, split.lane_R] = flow
    _, same, found = level_loads(load, physical, max_iterations=0, begin_LQ=begin)
    np.testing.assert_allclose(same, flow, atol=1e-12)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_few_iterations_suffice_from_a_solution_with_one_replica_replaced():
    """What the search of `adaptive` relies on; from equal parts three iterations leave some layers well above."""
    rng = np.random.default_rng(3)
    load = base_load("r1", 30, 256, rng)
    before = without_twins(load, deepseek_placement(load, 288, 1, 1, 32).reshape(30, 32, -1))
    split, flow, _ = level_loads(load, before)
    begin = np.zeros((30, 288))
    begin[split.layer_R, split.lane_R] = flow
    after = before.copy()
    for layer in range(30):  # the heaviest expert gets a replica in place of one of another split expert
        lanes = after[layer].ravel()
        counts = np.bincount(lanes, minlength=256)
        absent = ~(after[layer] == load[layer].argmax()).any(axis=1).repeat(9)
        lane = np.flatnonzero((counts[lanes] > 1) & absent)[0]
        lanes[lane], begin[layer, lane] = load[layer].argmax(), 0.0
    _, _, best = level_loads(load, after)
    _, _, warm = level_loads(load, after, 3, 1e-3, begin)
    _, _, cold = level_loads(load, after, 3, 1e-3)
    assert (warm.max(axis=1) / best.max(axis=1)).max() < 1.003
    assert warm.max(axis=1).sum() < cold.max(axis=1).sum()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_shares_for_the_maximum_alone(problem):
    load, physical = problem
    shares = balanced_shares(load, physical, 1e-2, below=False)
    highest = rank_loads(load, physical, shares).max(axis=1)
    for layer in range(len(load)):
        for expert in np.unique(physical[layer]):
            assert shares[layer][physical[layer] == expert].sum() == pytest.approx(1, abs=1e-9)
        assert highest[layer] <= least_maximum(load[layer], physical[layer]) * 1.0101 + 1e-9


def test_zero_load_means_equal_shares():
    physical = np.array([[[0, 1], [0, 2]]])
    np.testing.assert_array_equal(balanced_shares(np.zeros((1, 3)), physical), equal_shares_of(physical, 3))


def test_empty_lanes_get_nothing():
    shares = balanced_shares(np.array([[3.0, 1.0]]), np.array([[[0, -1], [-1, 0], [1, -1]]]))
    np.testing.assert_allclose(shares, np.array([[[0.5, 0], [0, 0.5], [1, 0]]]))
    placement = Placement(np.array([[0, -1, 0], [1, 0, -1]]), 2)
    np.testing.assert_allclose(equal_shares(placement), [[1 / 3, 0, 1 / 3], [1, 1 / 3, 0]])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="load_LE"):
        balanced_shares(np.zeros(3), np.zeros((1, 1, 3), dtype=int))
    with pytest.raises(ValueError, match="load_LE"):
        balanced_shares(np.array([[1.0, -1.0]]), np.array([[[0, 1]]]))
    placement = Placement(np.array([[0, 1], [0, -1]]), 2)
    with pytest.raises(ValueError, match="shape"):
        cumulative_shares(placement, np.ones(3))
    with pytest.raises(ValueError, match="expert 0 sum"):
        cumulative_shares(placement, np.array([[0.5, 1], [0.4, 0]]))
    with pytest.raises(ValueError, match="not negative"):
        cumulative_shares(placement, np.array([[1.5, 1], [-0.5, 0]]))


@settings(deadline=None)
@given(problems())
def test_cumulative_shares_end_at_one_and_never_fall(problem):
    load, physical = problem
    placement = Placement(physical[0], load.shape[1])
    shares = balanced_shares(load[:1], physical[:1])[0]
    units = cumulative_shares(placement, shares)
    offsets, lanes = placement.logical_to_lanes()
    assert units.dtype == np.int64
    for expert in range(placement.num_experts):
        mine = units[offsets[expert] : offsets[expert + 1]]
        assert mine[-1] == 2**SHARE_BITS and mine[0] >= 0 and (np.diff(mine) >= 0).all()
        exact = np.cumsum(shares.ravel()[lanes[offsets[expert] : offsets[expert + 1]]]) * 2**SHARE_BITS
        np.testing.assert_allclose(mine, exact, atol=mine.size)
