"""`step_eplb_after` behind the methods of a runner."""

from __future__ import annotations

import pytest

from eplb import step_eplb_after


class Steps:
    """In place of a controller."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def step(self) -> None:
        self.calls.append("step")


class Runner:
    def __init__(self, steps: bool = True) -> None:
        self.calls: list[str] = []
        self.eplb = self.balancer = Steps(self.calls) if steps else None

    @step_eplb_after
    def run(self, x, *, scale=1):
        """Runs."""
        self.calls.append("run")
        if x < 0:
            raise ValueError("no")
        return x * scale


class OtherRunner(Runner):
    def __init__(self, steps: bool = True) -> None:
        super().__init__(steps)
        del self.eplb

    @step_eplb_after(attribute="balancer")
    def run(self, x, *, scale=1):
        """Runs too."""
        self.calls.append("run")
        return x * scale


@pytest.mark.parametrize("kind", [Runner, OtherRunner])
def test_decorator_steps_after_the_method(kind):
    runner = kind()
    assert runner.run(3, scale=2) == 6
    assert runner.run(4) == 4
    assert runner.calls == ["run", "step", "run", "step"]


@pytest.mark.parametrize("kind", [Runner, OtherRunner])
def test_decorator_without_a_controller(kind):
    runner = kind(steps=False)
    assert runner.run(3, scale=2) == 6
    assert runner.calls == ["run"]


def test_decorator_does_not_step_after_a_failure():
    runner = Runner()
    with pytest.raises(ValueError, match="no"):
        runner.run(-1)
    assert runner.calls == ["run"]


def test_decorator_keeps_name_and_docstring():
    assert (Runner.run.__name__, Runner.run.__doc__) == ("run", "Runs.")
    assert (OtherRunner.run.__name__, OtherRunner.run.__doc__) == ("run", "Runs too.")


def test_what_is_no_method_or_no_name_is_refused():
    with pytest.raises(ValueError, match=r"method must be a method, got 'balancer': give the name .* as attribute="):
        step_eplb_after("balancer")
    with pytest.raises(ValueError, match="attribute must be the name of an attribute, got None"):
        step_eplb_after(attribute=None)
