import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb.planning.balance import max_over_mean, rank_loads
from eplb.planning.layer_work import LayerWork
from eplb.planning.make_plan import make_plan
from eplb.planning.placement import EMPTY, Placement
from eplb.planning.plan import Plan
from eplb.planning.policy import Proposal, Topology, make_policy
from eplb.planning.shares import balanced_shares, equal_shares, equal_shares_of
from eplb.planning.waves import schedule_waves
from eplb.simulate.traces import base_load


def with_lanes(physical_LWP, num_experts, empty):
    """Placements with `empty` empty lanes on each rank, not all at the end."""
    layers, ranks, per_rank = physical_LWP.shape
    lanes = np.full((layers, ranks, per_rank + empty), EMPTY)
    for rank in range(ranks):
        at = (np.arange(per_rank) + rank) % (per_rank + empty)
        lanes[:, rank, at] = physical_LWP[:, rank]
    return [Placement(one, num_experts) for one in lanes]


def plan_for(current, goal_LWP, load_LE, free=1, pools=None, limit=None, nbytes=10, topology=None, **options):
    ranks = current[0].num_ranks
    pools = [0] * len(current) if pools is None else pools
    free = np.full((max(pools) + 1, ranks), free) if np.isscalar(free) else np.asarray(free)
    return make_plan(
        current,
        Proposal(goal_LWP, balanced_shares(load_LE, goal_LWP)),
        load_LE,
        free_slots_GW=free,
        pool_of_layer=pools,
        bytes_per_expert=[nbytes] * len(current),
        max_bytes_in_flight=limit,
        topology=topology or Topology(ranks),
        **options,
    )


def check_plan(plan, current, goal_LWP, load_LE, free_GW, pools, limit=None, nbytes=10):
    """Runs the plan and checks every rule of a wave."""
    live = list(current)
    last_shares = {}
    for wave in plan.waves:
        assert wave.updates
        assert len({u.layer for u in wave.updates}) == len(wave.updates)
        room = np.array(free_GW)
        sent = 0
        for update in wave.updates:
            before, after = live[update.layer], update.placement
            after.validate()  # I2
            np.testing.assert_array_equal((after.lanes_WS != EMPTY).sum(axis=1), (before.lanes_WS != EMPTY).sum(axis=1))
            filled = np.zeros(before.lanes_WS.shape, dtype=bool)
            for move in update.moves:
                assert before.lanes_WS[move.src_rank, move.src_lane] == move.expert
                assert before.lanes_WS[move.dst_rank, move.dst_lane] == EMPTY
                assert after.lanes_WS[move.dst_rank, move.dst_lane] == move.expert
                assert not filled[move.dst_rank, move.dst_lane]
                filled[move.dst_rank, move.dst_lane] = True
                room[pools[update.layer], move.dst_rank] -= 1
                sent += nbytes
            kept = ~filled & (after.lanes_WS != EMPTY)
            np.testing.assert_array_equal(after.lanes_WS[kept], before.lanes_WS[kept])
            assert (update.shares_WS[after.lanes_WS == EMPTY] == 0).all()
            held = after.lanes_WS != EMPTY
            sums = np.bincount(after.lanes_WS[held], weights=update.shares_WS[held], minlength=after.num_experts)
            np.testing.assert_allclose(sums, 1, atol=1e-9)
            live[update.layer] = after
            last_shares[update.layer] = update.shares_WS
        assert (room >= 0).all()
        if limit is not None and sent > limit:  # one move, or one exchange that cannot be split
            assert len(wave.updates) == 1 and len({m.dst_rank for m in wave.updates[0].moves}) * nbytes == sent
    for layer, placement in enumerate(live):
        if layer not in plan.summary.degraded:
            np.testing.assert_array_equal(placement.compact(), np.sort(goal_LWP[layer], axis=1))
        if layer in last_shares and layer not in plan.summary.degraded:
            loads = rank_loads(load_LE[layer][None], placement.lanes_WS[None], last_shares[layer][None])
            goal = rank_loads(
                load_LE[layer][None], goal_LWP[layer][None], balanced_shares(load_LE, goal_LWP)[layer][None]
            )
            np.testing.assert_allclose(loads, goal, rtol=1e-9)


@st.composite
def relocations(draw, layers=3):
    ranks, per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = ranks * per_rank
    experts = draw(st.integers(1, size))
    layers = draw(st.integers(1, layers))

    def placements():
        out = []
        for _ in range(layers):
            extra = draw(st.lists(st.integers(0, experts - 1), min_size=size - experts, max_size=size - experts))
            out.append(draw(st.permutations(list(range(experts)) + extra)))
        return np.array(out).reshape(layers, ranks, per_rank)

    load = np.array([[draw(st.integers(0, 20)) for _ in range(experts)] for _ in range(layers)], dtype=float)
    return placements(), placements(), load, draw(st.integers(1, 3)), draw(st.integers(1, 2))


@settings(max_examples=200, deadline=None)
@given(relocations(), st.sampled_from([None, 1, 10, 25, 60]), st.booleans())
def test_any_start_reaches_any_goal(relocation, limit, shared):
    start, goal, load, empty, free = relocation
    current = with_lanes(start, load.shape[1], empty)
    pools = [0] * len(current) if shared else list(range(len(current)))
    free_GW = np.full((max(pools) + 1, start.shape[1]), free)
    plan = plan_for(current, goal, load, free=free_GW, pools=pools, limit=limit)
    assert plan.summary.degraded == ()
    check_plan(plan, current, goal, load, free_GW, pools, limit)
    assert plan.summary.num_moves == sum(len(u.moves) for w in plan.waves for u in w.updates)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    again = plan_for(current, goal, load, free=free_GW, pools=pools, limit=limit)
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("ranks", "per_rank", "experts"), [(3, 1, 3), (4, 1, 4), (4, 1, 2), (2, 2, 3), (2, 2, 4), (3, 2, 6), (2, 3, 5)]
)
def test_exhaustively_with_one_free_slot_per_rank(ranks, per_rank, experts):
    """Every placement to every other one (the order inside a rank has no meaning)."""
    rows = list(itertools.combinations_with_replacement(range(experts), per_rank))
    valid = [p for p in itertools.product(rows, repeat=ranks) if len(set(itertools.chain(*p))) == experts]
    pairs = list(itertools.product(valid, repeat=2))
    if len(pairs) > 9000:
        pairs = pairs[:: len(pairs) // 9000 + 1]
    for first in range(0, len(pairs), 1500):  # a pool for each, so that they do not wait for each other
        part = pairs[first : first + 1500]
        start, goal = (np.array([pair[i] for pair in part]).reshape(-1, ranks, per_rank) for i in range(2))
        load = np.ones((len(part), experts))
        current = with_lanes(start, experts, 1)
        pools = list(range(len(part)))
        plan = plan_for(current, goal, load, pools=pools)
        live = [placement.lanes_WS for placement in current]
        for wave in plan.waves:
            for update in wave.updates:
                assert len({m.dst_rank for m in update.moves}) == len(update.moves)
                update.placement.validate()
                live[update.layer] = update.placement.lanes_WS
        reached = np.sort(np.stack(live), axis=2)[:, :, 1:]
        np.testing.assert_array_equal(reached, goal)


def test_an_exchange_of_last_copies_is_one_wave():
    current = with_lanes(np.array([[[0], [1], [2]]]), 3, 1)
    plan = plan_for(current, np.array([[[2], [0], [1]]]), np.ones((1, 3)), limit=1)
    assert len(plan.waves) == 1 and len(plan.waves[0].updates[0].moves) == 3


def test_nothing_to_do_is_no_wave():
    start = np.array([[[0, 1], [0, 2]]])
    load = np.array([[6.0, 2, 4]])
    current = with_lanes(start, 3, 1)
    shares = [plan_for(current, start, load).waves[0].updates[0].shares_WS]
    assert plan_for(current, start, load, live_shares=shares).waves == ()
    assert Plan(()).summary.num_moves == 0


def test_new_shares_alone_go_into_the_first_wave():
    start = np.array([[[0, 1], [0, 2]], [[0, 1], [0, 2]]])
    goal = np.array([[[0, 1], [0, 2]], [[2, 1], [0, 2]]])
    load = np.array([[6.0, 2, 4], [6, 2, 4]])
    plan = plan_for(with_lanes(start, 3, 1), goal, load)
    first = {u.layer: u for u in plan.waves[0].updates}
    assert first[0].moves == () and len(first[1].moves) == 1
    np.testing.assert_allclose(first[0].shares_WS[first[0].placement.lanes_WS == 0], [2 / 3, 1 / 3])


@pytest.mark.parametrize("free", [[[1, 0]], None])
def test_without_a_free_slot_or_lane_only_shares_change(free):
    start, goal = np.array([[[0, 1], [0, 2]]]), np.array([[[2, 1], [0, 2]]])
    load = np.array([[6.0, 2, 4]])
    current = with_lanes(start, 3, 1 if free else 0)
    plan = plan_for(current, goal, load, free=free or [[1, 1]])
    assert plan.summary.degraded == (0,) and plan.summary.num_moves == 0
    (update,) = plan.waves[0].updates
    assert update.placement == current[0] and update.moves == ()
    loads = rank_loads(load, current[0].lanes_WS[None], update.shares_WS[None])
    np.testing.assert_allclose(loads, [[6, 6]])


def test_a_whole_model_in_the_fewest_waves_with_spread_sources():
    rng = np.random.default_rng(0)
    layers, experts, ranks = 16, 64, 16
    load = base_load("lognormal:1.0", layers, experts, rng)
    start = np.tile(Placement.initial(experts, 16, ranks, 5).lanes_WS, (layers, 1, 1))
    goal = make_policy("adaptive").propose(load[:, None], start, Topology(ranks)).physical_LWP
    current = with_lanes(start, experts, 1)
    plan = plan_for(current, goal, load)
    check_plan(plan, current, goal, load, np.ones((1, ranks), dtype=int), [0] * layers)
    summary = plan.summary
    assert len(plan.waves) == summary.fewest_waves
    sends = [np.bincount([m.src_rank for u in w.updates for m in u.moves], minlength=ranks).max() for w in plan.waves]
    assert np.mean(sends) <= 3
    assert len(summary.max_over_mean_after) == len(plan.waves)
    assert summary.max_over_mean_now > summary.max_over_mean_after[-1] >= summary.bound
    assert summary.max_over_mean_after[-1] <= 1.003 * summary.bound * (1 + 1e-5)
    assert summary.num_bytes == 10 * summary.num_moves
    now = max_over_mean(rank_loads(load, start, equal_shares_of(start, experts))).mean()
    assert summary.max_over_mean_now == pytest.approx(now)
    assert summary.gain_per_move == pytest.approx((now - summary.max_over_mean_after[-1]) / summary.num_moves)


def test_more_free_slots_take_fewer_waves():
    rng = np.random.default_rng(0)
    load = base_load("zipf:1.0", 4, 32, rng)
    start = np.tile(Placement.initial(32, 8, 4, 10).lanes_WS, (4, 1, 1))
    goal = make_policy("deepseek").propose(load[:, None], start, Topology(4)).physical_LWP
    waves = [len(plan_for(with_lanes(start, 32, 4), goal, load, free=free).waves) for free in (1, 2, 4)]
    assert waves[0] > waves[1] > waves[2]


def test_bytes_in_flight_bound_each_wave():
    rng = np.random.default_rng(1)
    load = base_load("lognormal:1.0", 3, 24, rng)
    start = np.tile(Placement.initial(24, 8, 8, 4).lanes_WS, (3, 1, 1))
    goal = make_policy("adaptive").propose(load[:, None], start, Topology(8)).physical_LWP
    plan = plan_for(with_lanes(start, 24, 1), goal, load, limit=30)
    assert max(sum(len(u.moves) for u in w.updates) for w in plan.waves) <= 3


def test_sources_in_the_node_are_preferred():
    # Expert 0 is on ranks 0 and 2 of nodes {0, 1} and {2, 3}; rank 3 wants it.
    start, goal = np.array([[[0, 1], [1, 2], [0, 3], [3, 4]]]), np.array([[[0, 1], [1, 2], [0, 3], [0, 4]]])
    plan = plan_for(with_lanes(start, 5, 1), goal, np.ones((1, 5)), topology=Topology(4, 2))
    (move,) = plan.waves[0].updates[0].moves
    assert (move.expert, move.src_rank, move.dst_rank) == (0, 2, 3)


def test_bad_input_is_refused():
    start = np.array([[[0, 1], [0, 2]]])
    load, current = np.ones((1, 3)), with_lanes(start, 3, 1)
    options: dict[str, Any] = {
        "free_slots_GW": np.ones((1, 2)),
        "pool_of_layer": [0],
        "bytes_per_expert": [1],
        "max_bytes_in_flight": None,
    }
    with pytest.raises(ValueError, match="load_LE has 2"):
        make_plan(current, Proposal(start, np.ones(start.shape)), np.ones((2, 3)), **options, topology=Topology(2))
    with pytest.raises(ValueError, match="max_bytes_in_flight=0"):
        plan_for(current, start, load, limit=0)
    with pytest.raises(ValueError, match="free_slots_GW"):
        plan_for(current, start, load, free=[[1]])
    with pytest.raises(ValueError, match=r"pool_of_layer\[0\]=1"):
        plan_for(current, start, load, pools=[1], free=[[1, 1]])
    with pytest.raises(ValueError, match="no replica"):
        plan_for(current, np.array([[[0, 1], [0, 1]]]), load)
    with pytest.raises(ValueError, match="no plan"):
        Plan.from_json("{}")
    with pytest.raises(ValueError, match="no plan"):
        Plan.from_json("nonsense")
    text = plan_for(current, start, load).to_json()
    with pytest.raises(ValueError, match="no plan"):
        Plan.from_json(text.replace('"shares":"', '"shares":"!'))
    assert equal_shares(current[0]).shape == (2, 3)


def test_waves_without_room_end_in_an_error_and_not_in_an_endless_loop():
    """Also under ``python -O``, which drops assertions."""
    before, after = Placement(np.array([[0, 1, -1]]), 3), np.array([[1, 0, 1]])
    work = LayerWork.of(0, 0, 8, before, after, np.ones(3))
    with pytest.raises(RuntimeError, match=r"a wave without a move, although layers \[0\] have something to move"):
        schedule_waves([work], np.zeros((1, 1), dtype=np.int64), None, np.zeros(1, dtype=np.int64))
