"""The ranks' agreement as a pure function: every phase, with errors, holds and departures."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.rounds.protocol import RECORD_WORDS, Agreed, Phase, Record, Work, advance, heard_plan, is_held

NOTHING = Record()


def at(phase: Phase, **more) -> Agreed:
    """In the second wave of three of proposal 5, after version 7."""
    state = {"round": 9, "work": Work.REBALANCE, "proposal": 5, "num_waves": 3, "wave": 1, "version": 7, "abandoned": 2}
    return Agreed(phase=phase, **{**state, **more})


def both(**said) -> list[Record]:
    return [Record(**said), Record(**said)]


# (state, what two ranks say, what changes beside the round); "=": nothing else.
TRANSITIONS = {
    # IDLE: only rank 0 proposes, and only a number that is new.
    "nothing proposed": (at(Phase.IDLE), both(proposal=5), {}),
    "an old proposal": (at(Phase.IDLE), [Record(proposal=4, work=1), NOTHING], {}),
    "a proposal": (at(Phase.IDLE), [Record(proposal=6, work=1), NOTHING], {"phase": Phase.LOAD, "proposal": 6}),
    "a proposal to report": (
        at(Phase.IDLE),
        [Record(proposal=6, work=2), NOTHING],
        {"phase": Phase.LOAD, "proposal": 6, "work": Work.REPORT},
    ),
    "not rank 0's": (at(Phase.IDLE), [Record(proposal=5), Record(proposal=6, work=1)], {}),
    "held by rank 0": (at(Phase.IDLE), [Record(proposal=6, work=1, hold=1), NOTHING], {}),
    "held by another": (at(Phase.IDLE), [Record(proposal=6, work=1), Record(hold=1)], {}),
    "one has ended a hold": (at(Phase.IDLE), [Record(proposal=6, work=1), Record(holds_completed=1)], {}),
    "both have": (
        at(Phase.IDLE),
        [Record(proposal=6, work=1, holds_completed=1), Record(holds_completed=1)],
        {"phase": Phase.LOAD, "proposal": 6},
    ),
    "an error while idle": (
        at(Phase.IDLE),
        [Record(proposal=6, work=1), Record(error=1)],
        {"phase": Phase.LOAD, "proposal": 6},
    ),
    # LOAD: one round, whatever it is for.
    "loads to plan with": (at(Phase.LOAD), both(proposal=5), {"phase": Phase.PLANNING}),
    "loads to report": (at(Phase.LOAD, work=Work.REPORT), both(proposal=5), {"phase": Phase.IDLE}),
    "an error with the loads": (
        at(Phase.LOAD),
        [NOTHING, Record(error=1)],
        {"phase": Phase.IDLE, "abandoned": 3},
    ),
    "a hold with the loads": (at(Phase.LOAD), both(hold=1), {"phase": Phase.PLANNING}),
    # PLANNING: until rank 0 has a plan or knows that there is nothing to do.
    "still planning": (at(Phase.PLANNING), both(), {}),
    "a plan": (
        at(Phase.PLANNING),
        [Record(plan_words=40), NOTHING],
        {"phase": Phase.PLAN, "plan_words": 40},
    ),
    "not rank 0's plan": (at(Phase.PLANNING), [NOTHING, Record(plan_words=40)], {}),
    "nothing to do": (at(Phase.PLANNING), [Record(plan_words=-1), NOTHING], {"phase": Phase.IDLE}),
    "a plan, but held": (at(Phase.PLANNING), [Record(plan_words=40), Record(hold=1)], {"phase": Phase.IDLE}),
    "a plan, but one has ended a hold": (
        at(Phase.PLANNING),
        [Record(plan_words=40, holds_completed=1), NOTHING],
        {"phase": Phase.IDLE},
    ),
    "held, still planning": (at(Phase.PLANNING), [NOTHING, Record(hold=1)], {}),
    "the policy failed": (
        at(Phase.PLANNING),
        [Record(error=1), NOTHING],
        {"phase": Phase.IDLE, "abandoned": 3},
    ),
    # PREPARE: all, with one plan.
    "nobody prepared": (at(Phase.PREPARE), both(), {}),
    "one prepared": (at(Phase.PREPARE), [Record(prepared=8, plan_hash=3), NOTHING], {}),
    "prepared for another version": (at(Phase.PREPARE), both(prepared=7, plan_hash=3), {}),
    "all prepared": (at(Phase.PREPARE), both(prepared=8, plan_hash=3), {"phase": Phase.FILL}),
    "another plan": (
        at(Phase.PREPARE),
        [Record(prepared=8, plan_hash=3), Record(prepared=8, plan_hash=4)],
        {"phase": Phase.IDLE, "abandoned": 3},
    ),
    "no slot on one rank": (
        at(Phase.PREPARE),
        [Record(prepared=8, plan_hash=3), Record(error=1)],
        {"phase": Phase.IDLE, "abandoned": 3},
    ),
    "held, but prepared": (at(Phase.PREPARE), both(prepared=8, plan_hash=3, hold=1), {"phase": Phase.FILL}),
    # FILL: all; then it is published, and no error takes it back.
    "nobody filled": (at(Phase.FILL), both(prepared=8), {}),
    "one filled": (at(Phase.FILL), [Record(filled=8), Record(prepared=8)], {}),
    "filled for an older version": (at(Phase.FILL), both(filled=7), {}),
    "all filled": (at(Phase.FILL), both(filled=8), {"phase": Phase.GRACE, "version": 8}),
    "all filled, and held": (
        at(Phase.FILL),
        [Record(filled=8), Record(filled=8, hold=1)],
        {"phase": Phase.GRACE, "version": 8, "drop_rest": True},
    ),
    "a transfer failed": (
        at(Phase.FILL),
        [Record(filled=8), Record(error=1)],
        {"phase": Phase.IDLE, "abandoned": 3},
    ),
    "filled, and an error": (
        at(Phase.FILL),
        [Record(filled=8), Record(filled=8, error=1)],
        {"phase": Phase.IDLE, "abandoned": 3},
    ),
    # GRACE: until all have it; then the next wave, or the end.
    "nobody graced": (at(Phase.GRACE), both(), {}),
    "one graced": (at(Phase.GRACE), [Record(graced=7), Record(graced=6)], {}),
    "all graced": (at(Phase.GRACE), both(graced=7), {"phase": Phase.PREPARE, "wave": 2}),
    "the last wave": (at(Phase.GRACE, wave=2), both(graced=7), {"phase": Phase.IDLE}),
    "held in grace": (at(Phase.GRACE), [Record(graced=7), Record(graced=6, hold=1)], {"drop_rest": True}),
    "all graced, and held": (at(Phase.GRACE), [Record(graced=7), Record(graced=7, hold=1)], {"phase": Phase.IDLE}),
    "held before": (at(Phase.GRACE, drop_rest=True), both(graced=7), {"phase": Phase.IDLE, "drop_rest": False}),
    "an error in grace": (at(Phase.GRACE), [Record(graced=6, error=1), Record(graced=7)], {"drop_rest": True}),
    "all graced, and an error": (at(Phase.GRACE), both(graced=7, error=1), {"phase": Phase.IDLE}),
}


@pytest.mark.parametrize("case", TRANSITIONS)
def test_transitions(case):
    state, records, changes = TRANSITIONS[case]
    assert advance(state, records) == replace(state, round=10, **changes)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.PLAN])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_whoever_leaves_ends_it_in_every_phase(rank, phase):
    records = [Record(proposal=6, work=1, prepared=8, filled=8, graced=7, plan_words=3)] * 3
    records[rank] = records[rank]._replace(left=1, error=1, hold=1)
    assert advance(at(phase), records) == replace(at(phase), round=10, phase=Phase.LEFT, departed=(rank,))


def test_several_may_leave_at_once():
    assert advance(at(Phase.FILL), [Record(left=1), NOTHING, Record(left=1)]).departed == (0, 2)


def test_a_plan_is_heard():
    state = at(Phase.PLAN, plan_words=12, wave=2, num_waves=9)
    assert heard_plan(state, 4) == replace(state, round=10, phase=Phase.PREPARE, num_waves=4, wave=0)


def test_a_whole_rebalance_of_two_waves():
    state, phases = Agreed(), []
    script = [
        [Record(proposal=1, work=1), NOTHING],
        [Record(proposal=1, work=1), NOTHING],
        [Record(proposal=1, plan_words=20), NOTHING],
        None,
        both(prepared=1),
        both(filled=1),
        both(graced=1),
        both(graced=1, prepared=2),
        both(graced=1, filled=2),
        both(graced=2),
    ]
    for records in script:
        state = heard_plan(state, 2) if records is None else advance(state, records)
        phases.append(state.phase.name)
    assert phases == ["LOAD", "PLANNING", "PLAN", "PREPARE", "FILL", "GRACE", "PREPARE", "FILL", "GRACE", "IDLE"]
    assert (state.version, state.wave, state.round, state.abandoned, state.proposal) == (2, 1, 10, 0, 1)


records = st.builds(
    Record,
    proposal=st.integers(4, 7),
    work=st.integers(1, 2),
    plan_words=st.integers(-1, 3),
    plan_hash=st.integers(0, 1),
    prepared=st.integers(6, 9),
    filled=st.integers(6, 9),
    graced=st.integers(5, 8),
    error=st.integers(0, 1),
    hold=st.integers(0, 1),
    holds_completed=st.integers(0, 1),
    left=st.just(0),
    models=st.just(0),
)
states = st.builds(
    lambda phase, wave, drop: at(phase, wave=wave, drop_rest=drop),
    st.sampled_from([phase for phase in Phase if phase not in (Phase.PLAN, Phase.LEFT)]),
    st.integers(0, 2),
    st.booleans(),
)


@given(states, st.lists(records, min_size=1, max_size=4))
def test_what_holds_for_anything_that_is_said(state, said):
    new = advance(state, said)
    assert new.round == state.round + 1
    # A version is published only when all have filled it and nobody failed; one at a time; never back.
    assert new.version in (state.version, state.version + 1)
    if new.version > state.version:
        assert state.phase is Phase.FILL and all(record.filled == new.version for record in said)
        assert not any(record.error for record in said)
    # Nothing is filled unless everybody prepared it, of one plan.
    if new.phase is Phase.FILL and state.phase is not Phase.FILL:
        assert len({record.plan_hash for record in said}) == 1 and all(record.prepared == 8 for record in said)
    # Grace is left only when everybody has it: until then the old slots are not free (I1).
    if state.phase is Phase.GRACE and new.phase is not Phase.GRACE:
        assert all(record.graced == state.version for record in said)
    # A hold begins no proposal.
    if is_held(said):
        assert not (state.phase is Phase.IDLE and new.phase is Phase.LOAD)
    assert new.proposal >= state.proposal and new.abandoned - state.abandoned in (0, 1)
    if new.abandoned > state.abandoned:
        assert new.phase is Phase.IDLE and new.version == state.version


def test_nothing_begins_while_the_ranks_registered_different_models():
    said = [Record(proposal=6, work=1, models=1), Record(models=2)]
    assert advance(at(Phase.IDLE), said).phase is Phase.IDLE
    assert advance(at(Phase.IDLE), [said[0], Record(models=1)]).phase is Phase.LOAD
    assert advance(at(Phase.GRACE), said).phase is Phase.IDLE, "ranks with other versions would wait for ever"


# ---- records


def test_a_record_is_twelve_integers_and_back():
    record = Record(*range(1, RECORD_WORDS + 1))
    words = record.encode()
    assert words.dtype == np.int64 and words.tolist() == list(record) == list(range(1, 13))
    assert Record.decode(words) == record
    assert Record.decode(np.concatenate([words, np.array([99, 98])])) == record  # what follows are loads
    assert len(Record._fields) == RECORD_WORDS == 12
