"""`Rhythm`: the worker keeps out of the way shortly before the next step and right behind it, and at no other time."""

import pytest

from eplb import rhythm
from eplb.rhythm import Rhythm


class Loop:
    """A clock, and a main thread that steps again and again, or has stopped."""

    def __init__(self, period: float = 0.004) -> None:
        self.period = period
        self.late = 0.0  # what a sleep takes longer than asked for
        self.now = 100.0
        self.steps = True
        self.slept: list[float] = []
        self.rhythm = Rhythm(lambda: self.now, self.sleep)
        self.step()
        self.rhythm.wait()
        for _ in range(3):
            self.sleep(period)
        self.rhythm.wait()
        self.now = self.rhythm.last[1]
        self.slept.clear()

    def step(self) -> None:
        self.rhythm.last = self.rhythm.last[0] + 1, self.now
        self.next = self.now + self.period

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        assert len(self.slept) < 1000, "it waits for ever"
        end = self.now + seconds + self.late
        while self.steps and self.next <= end:
            self.now = self.next
            self.step()
        self.now = max(self.now, end)


def test_nobody_waits_who_has_time_before_the_next_step():
    loop = Loop()
    loop.now += 0.0029
    assert not loop.rhythm.wait()
    assert loop.slept == []


@pytest.mark.parametrize("since", [0.0031, 0.0039])
def test_shortly_before_the_next_step_a_worker_waits_until_it_is_over(since):
    loop = Loop()
    loop.now += since
    steps, _ = loop.rhythm.last
    loop.rhythm.wait()
    assert loop.rhythm.last[0] == steps + 1 and loop.slept
    waited = loop.now - loop.rhythm.last[1]
    assert 0.0004 - 1e-9 <= waited <= 0.0004 + 2 * rhythm._POLL + 1e-9, "and the next forward is launched"


def test_a_step_that_is_late_is_waited_for_in_small_pieces_and_not_for_long():
    loop = Loop()
    loop.steps = False
    loop.now += 0.0035
    loop.rhythm.wait()
    assert len(loop.slept) > 10 and max(loop.slept[1:]) <= rhythm._POLL * 1.001
    assert loop.now - loop.rhythm.last[1] == pytest.approx(0.006, abs=2 * rhythm._POLL)
    slept = len(loop.slept)
    loop.rhythm.wait()
    assert len(loop.slept) == slept, "nobody steps any more"


def test_the_pace_is_that_of_the_steps_since_the_last_look():
    loop = Loop()
    loop.sleep(0.04)  # ten steps that nobody looked at
    loop.now += 0.0029
    loop.slept.clear()
    loop.rhythm.wait()
    assert loop.slept == []


def test_a_loop_that_has_not_begun_is_no_reason_to_wait():
    one = Rhythm(lambda: 5.0, lambda _: pytest.fail("it waits"))
    one.wait()
    one.last = 1, 4.92
    one.wait()


@pytest.mark.parametrize(("period", "waits"), [(0.049, True), (0.06, False)])
def test_long_steps_are_no_reason_to_wait(period, waits):
    loop = Loop(period)
    loop.steps = False
    loop.now += 0.9 * period
    loop.rhythm.wait()
    assert bool(loop.slept) == waits


def test_right_behind_a_step_the_next_forward_may_be_launched():
    """In a loop that waits for the device before it steps."""
    loop = Loop()
    loop.now += 0.0001
    assert loop.rhythm.wait()
    assert 0.0004 - 1e-9 <= loop.now - loop.rhythm.last[1] <= 0.0004 + rhythm._POLL + 1e-9


def test_steps_that_follow_each_other_at_once_keep_nobody_out():
    """A sleep takes as long as a step: each look is shortly before the next one."""
    loop = Loop(0.000155)
    loop.late = 0.000055
    loop.now += 0.00013
    steps, _ = loop.rhythm.last
    loop.rhythm.wait()
    assert steps < loop.rhythm.last[0] <= steps + 2
