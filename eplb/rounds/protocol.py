"""Rebalance, between ranks: what they have agreed on, and how a round of records changes it. Pure: equal on all ranks.

    IDLE → LOAD → PLANNING → PLAN → PREPARE → FILL → GRACE ┬→ PREPARE (the plan's next wave)
      ↑ an error before publication, nothing to do, a hold │
      └────────────────────────────────────────────────────┘→ IDLE
                                  any rank left → LEFT, for good

Each worker feeds the rounds' results to `advance()` and then does what the state asks of it. As every rank sees the same
rounds, every rank is in the same state after the same number of them, whatever its own timing (I7).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Phase(IntEnum):
    IDLE = 0
    LOAD = 1  # the next round carries the load windows
    PLANNING = 2  # rank 0 plans
    PLAN = 3  # the next round is rank 0's broadcast of its plan
    PREPARE = 4  # every rank checks the wave and takes slots and buffers for it
    FILL = 5  # transfers run; nobody's table names their targets
    GRACE = 6  # the new version is published; the old one may still be read
    LEFT = 7  # a rank closed its controller: no more rounds


class Work(IntEnum):
    """What a round of loads is gathered for."""

    NONE = 0
    REBALANCE = 1
    REPORT = 2  # log the balancedness, plan nothing


class Record(NamedTuple):
    """What one rank says in a round. All integers, so that a round is one small all-gather.

    Attributes:
        proposal: rank 0's number of the work that it wants started, or started last. Others say 0.
        work: what rank 0 wants (`Work`).
        plan_words: length of rank 0's encoded plan; 0 while it is planning, -1 if there is nothing to do.
        plan_hash: of the plan that this rank holds.
        prepared, filled, graced: the highest version of which this rank says so.
        error: 1 if something failed on this rank since its last record.
        hold: 1 while this rank wants no new wave (it loads weights).
        holds_completed: how many holds it has completed. While the ranks' differ, some have loaded what others have not yet.
        left: 1 in a rank's last record.
        models: hash of what this rank registered and how it records load; nothing begins while the ranks' differ.
    """

    proposal: int = 0
    work: int = 0
    plan_words: int = 0
    plan_hash: int = 0
    prepared: int = 0
    filled: int = 0
    graced: int = 0
    error: int = 0
    hold: int = 0
    holds_completed: int = 0
    left: int = 0
    models: int = 0

    def encode(self) -> np.ndarray:
        return np.array(self, dtype=np.int64)

    @staticmethod
    def decode(words: np.ndarray) -> "Record":
        return Record._make(words[:RECORD_WORDS].tolist())


RECORD_WORDS = len(Record._fields)


@dataclass(frozen=True)
class Agreed:
    """The state that all ranks share after `round` rounds.

    Attributes:
        round: how many rounds have been heard.
        phase: what is under way.
        work: what the loads of the proposal under way are for.
        proposal: the number of the last proposal that was accepted.
        plan_words: length of the plan to broadcast.
        num_waves: of the plan under way; known from PREPARE on.
        wave: index of the wave under way.
        version: the highest published version; wave by wave one more, over all plans.
        abandoned: proposals given up after an error.
        drop_rest: whether the waves behind the one in GRACE will not be started.
        departed: the ranks that left.
    """

    round: int = 0
    phase: Phase = Phase.IDLE
    work: Work = Work.NONE
    proposal: int = 0
    plan_words: int = 0
    num_waves: int = 0
    wave: int = 0
    version: int = 0
    abandoned: int = 0
    drop_rest: bool = False
    departed: tuple[int, ...] = ()


def advance(agreed: Agreed, records: Sequence[Record]) -> Agreed:
    """The state after a round of records (all phases but PLAN, whose round is `heard_plan()`)."""
    agreed = replace(agreed, round=agreed.round + 1)
    departed = tuple(rank for rank, record in enumerate(records) if record.left)
    failed = any(record.error for record in records)
    held = is_held(records)
    next_version = agreed.version + 1
    if departed:
        return replace(agreed, phase=Phase.LEFT, departed=departed)
    match agreed.phase:
        case Phase.IDLE:
            root = records[0]
            if root.proposal > agreed.proposal and not held and not models_differ(records):
                return replace(agreed, phase=Phase.LOAD, proposal=root.proposal, work=Work(root.work))
        case Phase.LOAD | Phase.PLANNING | Phase.PREPARE | Phase.FILL if failed:
            return replace(agreed, phase=Phase.IDLE, abandoned=agreed.abandoned + 1)
        case Phase.LOAD:
            return replace(agreed, phase=Phase.PLANNING if agreed.work is Work.REBALANCE else Phase.IDLE)
        case Phase.PLANNING:
            words = records[0].plan_words
            if words < 0 or (words > 0 and held):
                return replace(agreed, phase=Phase.IDLE)
            if words > 0:
                return replace(agreed, phase=Phase.PLAN, plan_words=words)
        case Phase.PREPARE:
            if any(record.plan_hash != records[0].plan_hash for record in records if record.prepared == next_version):
                return replace(agreed, phase=Phase.IDLE, abandoned=agreed.abandoned + 1)
            if all(record.prepared == next_version for record in records):
                return replace(agreed, phase=Phase.FILL)
        case Phase.FILL:
            if all(record.filled == next_version for record in records):
                return replace(agreed, phase=Phase.GRACE, version=next_version, drop_rest=held)
        case Phase.GRACE if models_differ(records):
            # Of what they found: the versions may differ too, and then none would ever be graced by all.
            return replace(agreed, phase=Phase.IDLE)
        case Phase.GRACE:
            drop_rest = agreed.drop_rest or held or failed
            if not all(record.graced == agreed.version for record in records):
                return replace(agreed, drop_rest=drop_rest)
            if drop_rest or agreed.wave + 1 == agreed.num_waves:
                return replace(agreed, phase=Phase.IDLE, drop_rest=False)
            return replace(agreed, phase=Phase.PREPARE, wave=agreed.wave + 1)
    return agreed


def is_through(agreed: Agreed, record: Record, rank: int) -> bool:
    """Whether a rank that says `record` has done its part of the phase: only other ranks can end it."""
    match agreed.phase:
        case Phase.PLANNING:
            return rank != 0
        case Phase.PREPARE:
            return record.prepared == agreed.version + 1
        case Phase.FILL:
            return record.filled == agreed.version + 1
        case Phase.GRACE:
            return record.graced == agreed.version
    return False


def is_held(records: Sequence[Record]) -> bool:
    """Whether a rank wants no new wave, or has completed a hold that another has not."""
    return any(record.hold or record.holds_completed != records[0].holds_completed for record in records)


def models_differ(records: Sequence[Record]) -> bool:
    return any(record.models != records[0].models for record in records)


def heard_plan(agreed: Agreed, num_waves: int) -> Agreed:
    """The state after rank 0's plan was broadcast. A plan that cannot be read counts as one wave that never prepares."""
    return replace(agreed, round=agreed.round + 1, phase=Phase.PREPARE, num_waves=num_waves, wave=0)
