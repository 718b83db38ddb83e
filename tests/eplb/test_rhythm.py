"""`Rhythm`: the worker keeps out of the way shortly before the next step, and at no other time."""

import pytest

from eplb import rhythm
from eplb.rhythm import Rhythm


class Loop:
    """A clock, and a main thread that steps every 4 ms of it, or has stopped."""

    def __init__(self) -> None:
        self.now = 100.0
        self.steps = True
        self.slept: list[float] = []
        self.rhythm = Rhythm(lambda: self.now, self.sleep)
        self.step()
        self.rhythm.wait()
        for _ in range(3):
            self.sleep(0.004)
        self.rhythm.wait()
        self.slept.clear()

    def step(self) -> None:
        self.rhythm.last = self.rhythm.last[0] + 1, self.now
        self.next = self.now + 0.004

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        end = self.now + seconds
        while self.steps and self.next <= end:
            self.now = self.next
            self.step()
        self.now = max(self.now, end)


def test_nobody_waits_who_has_time_before_the_next_step():
    loop = Loop()
    loop.now += 0.0029
    loop.rhythm.wait()
    assert loop.slept == []


@pytest.mark.parametrize("since", [0.0031, 0.0039])
def test_shortly_before_the_next_step_a_worker_waits_until_it_is_over(since):
    loop = Loop()
    loop.now += since
    steps, _ = loop.rhythm.last
    loop.rhythm.wait()
    assert loop.rhythm.last[0] == steps + 1 and loop.slept
    assert loop.now - loop.rhythm.last[1] <= rhythm._POLL


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


def test_long_steps_and_a_loop_that_has_not_begun_are_no_reason_to_wait():
    seen: list[float] = []
    one = Rhythm(lambda: 5.0, seen.append)
    one.wait()
    one.last = 1, 4.92
    one.wait()
    one.last = 2, 4.98  # 60 ms a step
    one.wait()
    assert seen == []
