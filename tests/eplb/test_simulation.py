"""The invariants of docs/design.md over the real worker, controller, pool and table code, in seeded interleavings of 2–4 ranks.

A failure prints its seed; ``World(seed, …)`` repeats it exactly. `EPLB_SEEDS` sets how many seeds each test runs.
"""

import logging
import os
import re

import pytest

from eplb.planning.policy import Proposal, make_policy
from eplb.relocation.pool import SlotState
from tests.eplb.simulation import World

SEEDS = int(os.environ.get("EPLB_SEEDS", "200"))
ACTIONS = 2500


def run(seed, *, fault_probability=0.0, actions=ACTIONS, policy=None):
    """A world after `actions` random actions with faults, and as many again without."""
    world = World(seed, policy or (lambda: make_policy("deepseek")))
    for rank in world.ranks:
        world.forward_and_step(rank)
    world.faults.probability = fault_probability
    for _ in range(actions):
        world.act()
    world.faults.probability = 0.0
    return world


@pytest.mark.parametrize("seed", range(SEEDS))
def test_i1_i2_i3_rows_find_their_experts_while_experts_move(seed):
    """`deepseek` forgets what is there, so nearly every slot moves every few steps: the hardest traffic there is."""
    world = run(seed)
    world.settle()
    world.check_at_rest()
    metrics = world.ranks[0].controller.metrics()
    assert metrics.failures == 0 and metrics.abandoned == 0
    assert world.checked_rows > 0


def test_the_traffic_of_the_seeds_is_not_empty():
    worlds = [run(seed) for seed in range(5)]
    assert sum(world.ranks[0].controller.metrics().moved_experts for world in worlds) > 20
    assert max(world.ranks[0].controller.metrics().waves for world in worlds) > 5


def test_a_plan_says_what_it_moves_before_it_does(caplog):
    with caplog.at_level(logging.INFO, logger="eplb"):
        world = run(3)
        world.settle()
    plans = [re.fullmatch(r"plan: (\d+) experts move \(.* MB\) in (\d+) waves, .*", line) for line in caplog.messages]
    metrics = world.ranks[0].controller.metrics()
    assert len(plans) == metrics.plans > 0
    assert sum(int(plan[1]) for plan in plans) == metrics.moved_experts > 0
    assert sum(int(plan[2]) for plan in plans) == metrics.waves


@pytest.mark.parametrize("seed", range(10_000, 10_000 + SEEDS))
def test_i6_an_exception_at_any_point_leaves_the_last_table_in_force(seed):
    world = run(seed, fault_probability=0.01)
    before = world.ranks[0].controller.metrics()
    world.settle()
    world.check_at_rest()
    # It starts again on its own, and no rank missed what another one reported.
    for _ in range(10 * ACTIONS):
        world.act()
        if world.ranks[0].controller.metrics().waves > before.waves + 1:
            break
    assert world.ranks[0].controller.metrics().waves > before.waves + 1
    world.settle()
    world.check_at_rest()
    assert len({rank.controller.metrics().abandoned for rank in world.ranks}) == 1
    for rank in world.ranks:
        assert (rank.controller.health().last_error is None) <= (rank.controller.metrics().failures == 0)


def test_the_faults_of_the_seeds_strike_everywhere():
    points: dict[str, int] = {}
    for seed in range(10_000, 10_024):
        for point, count in run(seed, fault_probability=0.03).faults.thrown.items():
            points[point] = points.get(point, 0) + count
    assert set(points) >= {
        "agreement.all_gather",
        "agreement.broadcast",
        "batch.poll",
        "batch.start",
        "communicator.prepare",
        "policy.propose",
        "streams.run",
    }


@pytest.mark.parametrize("seed", range(20_000, 20_000 + SEEDS // 3))
def test_i6_ranks_that_lose_each_other_write_no_slot_any_more_and_serve_on(seed):
    world = run(seed, actions=ACTIONS // 2)
    lost = world.rng.sample(range(world.num_ranks), world.rng.randint(1, world.num_ranks))
    world.cut_off(lost)
    for _ in range(ACTIONS // 2):
        world.act()
    begun = len(world.bus.batches)
    for _ in range(ACTIONS // 2):
        world.act()
    assert len(world.bus.batches) <= begun + 1  # at most the wave that all had agreed on before
    for rank in lost:
        health = world.ranks[rank].controller.health()
        assert health.state == "lost" and "connection closed" in (health.last_error or "")
    for rank in world.ranks:
        for index in range(world.shape.num_layers):
            world.check_layer(rank, index)


@pytest.mark.parametrize("seed", range(30_000, 30_000 + SEEDS // 3))
def test_i6_a_rank_that_leaves_is_told_of_and_the_others_serve_on(seed):
    world = run(seed, actions=ACTIONS // 2)
    leaver = world.rng.choice(world.ranks)
    leaver.controller.worker.leave()
    for _ in range(ACTIONS):
        world.act()
    world.settle(50)
    for rank in world.ranks:
        health = rank.controller.health()
        assert health.state == ("closed" if rank is leaver else "peer_left")
        assert health.departed == (leaver.rank,)
        assert not any(rank.pool.count(state) for state in (SlotState.FILLING, SlotState.QUARANTINED)), "slots are lost"
        for index in range(world.shape.num_layers):
            world.check_layer(rank, index)


@pytest.mark.parametrize("seed", range(40_000, 40_000 + SEEDS // 5))
def test_a_main_thread_that_does_not_step_stalls_grace_and_frees_nothing(seed):
    world = run(seed, actions=ACTIONS // 2)
    stalled = world.rng.choice(world.ranks[1:])  # without rank 0's steps no load window ends, and nothing begins
    step, stalled.controller.step = stalled.controller.step, lambda: None
    for _ in range(ACTIONS):
        world.act()
    world.settle(50, stalled)
    assert {rank.controller.health().phase for rank in world.ranks} == {"GRACE"}
    slots = [[rank.pool.state(slot) for slot in range(rank.pool.num_slots)] for rank in world.ranks]
    world.now += 100.0
    world.settle(50, stalled)
    assert {rank.controller.health().state for rank in world.ranks} == {"grace_stalled"}
    assert slots == [[rank.pool.state(slot) for slot in range(rank.pool.num_slots)] for rank in world.ranks]
    stalled.controller.step = step
    waves = world.ranks[0].controller.metrics().waves
    for _ in range(ACTIONS):
        world.act()
    world.settle()
    world.check_at_rest()
    assert world.ranks[0].controller.metrics().waves > waves


@pytest.mark.parametrize("seed", range(70_000, 70_000 + SEEDS // 3))
def test_new_controllers_take_over_what_others_left_in_the_middle_of_a_wave(seed):
    world = run(seed, actions=ACTIONS // 2)
    for _ in range(3):
        for _ in range(world.rng.randrange(ACTIONS // 4)):
            world.act()
        world.replace_controllers()
    for _ in range(10 * ACTIONS):
        world.act()
        if world.ranks[0].controller.metrics().waves > 1:
            break
    assert world.ranks[0].controller.metrics().waves > 1
    world.settle()
    world.check_at_rest()


@pytest.mark.parametrize("seed", range(60_000, 60_000 + SEEDS // 5))
def test_nothing_begins_before_all_ranks_have_ended_as_many_holds(seed):
    """As where weights are loaded: what one has loaded, no other may copy over with what it has yet to load."""
    world = run(seed, actions=ACTIONS // 2)
    first = world.rng.choice(world.ranks)
    first.controller.worker.hold()
    for _ in range(1000):
        world.settle(1)
        if first.controller.worker.is_held:
            break
    assert first.controller.worker.is_held
    first.controller.worker.end_hold()
    waves = world.ranks[0].controller.metrics().waves
    for _ in range(ACTIONS):
        world.act()
    assert {rank.controller.health().state for rank in world.ranks} == {"held"}
    assert world.ranks[0].controller.metrics().waves == waves
    for rank in world.ranks:
        if rank is not first:
            rank.controller.worker.hold()
            rank.controller.worker.end_hold()
    for _ in range(10 * ACTIONS):
        world.act()
        if world.ranks[0].controller.metrics().waves > waves:
            break
    assert world.ranks[0].controller.metrics().waves > waves
    world.settle()
    world.check_at_rest()


class _Disagreeing:
    """Two ranks would plan differently: a policy with a state of its own."""

    calls = 0

    def propose(self, load_LNE, physical_LWP, topology):
        _Disagreeing.calls += 1
        shifted = (physical_LWP + _Disagreeing.calls) % load_LNE.shape[-1]
        return Proposal(shifted, make_policy("static").propose(load_LNE, shifted, topology).shares_LWP)


@pytest.mark.parametrize("seed", range(50_000, 50_000 + SEEDS // 5))
def test_i7_a_policy_that_answers_differently_on_each_call_cannot_part_the_ranks(seed):
    world = run(seed, policy=_Disagreeing)
    world.settle()
    world.check_at_rest()
    has_all = world.ranks[0].layers[0].num_physical_per_rank == world.shape.num_experts
    assert has_all or world.ranks[0].controller.metrics().moved_experts > 0
