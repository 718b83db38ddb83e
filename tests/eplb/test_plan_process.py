"""Planning in a process of its own: what it imports, what it survives, and what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from eplb import EplbConfig, EplbController
from eplb.plan_process import PlanProcess, PlanRequest, make
from eplb.planner import plans_in_a_process
from eplb.planning.placement import Placement
from eplb.planning.policy import Topology, make_policy
from eplb.planning.rebalance import LayerFacts
from eplb.planning.shares import equal_shares
from eplb.rounds.messages import PlanReader
from tests.eplb.far_policies import HangingOnce, Raising, Rotating, Telling, Unpicklable, Unreadable
from tests.eplb.stub import controller_of

pytestmark = pytest.mark.timeout(120)


def request_of(num_layers: int = 3, num_ranks: int = 2) -> PlanRequest:
    placements = [Placement.initial(8, 0, num_ranks, 8 // num_ranks + 1) for _ in range(num_layers)]
    load = np.arange(num_layers * 8 * 2, dtype=np.int64).reshape(2, -1) ** 2
    facts = [LayerFacts(8, 8 // num_ranks, 0, 100)] * num_layers
    return PlanRequest(
        facts,
        placements,
        [equal_shares(one) for one in placements],
        load,
        np.zeros((0, load.shape[1]), dtype=np.int64),
        np.ones((1, num_ranks), dtype=np.int64),
        None,
    )


@pytest.fixture
def start():
    """Makes processes that end with the test."""
    made = []

    def make_one(policy, topology=Topology(2)):  # noqa: B008 - immutable
        made.append(PlanProcess(policy, topology))
        made[-1].start()
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def eventually(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("policy", [make_policy("adaptive"), Rotating()], ids=["adaptive", "an object"])
def test_it_makes_the_plan_that_would_be_made_here(start, policy):
    request = request_of()
    here, there = make(request, policy, Topology(2)), start(policy).plan(request)
    assert there.words.tolist() == here.words.tolist() and there.words.flags.writeable
    assert (there.num_waves, there.num_moves, there.num_bytes) == (here.num_waves, here.num_moves, here.num_bytes)
    waves = [PlanReader(there.words).wave(number) for number in range(there.num_waves)]
    moves = [move for wave in waves for update in wave.updates for move in update.moves]
    assert len(moves) == there.num_moves and there.num_bytes == 100 * len(moves) and there.seconds > 0


def test_it_is_another_process_without_pytorch_and_keeps_its_policy(start):
    process, policy = start(Telling()), Telling()
    told = []
    for _ in range(2):
        with pytest.raises(LookupError) as raised:
            process.plan(request_of())
        told.append(str(raised.value))
        assert "in the planning process" in raised.value.__notes__[0]
    assert told == [f"pid={process.pid} torch=False asked={count}" for count in (1, 2)]
    assert process.pid != os.getpid() and policy.asked == 0


@pytest.mark.parametrize(("kind", "message"), [("exit", "SystemExit: 3"), ("unsendable", "ValueError: with a lock")])
def test_whatever_a_policy_raises_comes_back_and_the_process_goes_on(start, kind, message):
    process = start(Raising(kind))
    pid = process.pid
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            process.plan(request_of())
    assert process.pid == pid


def test_a_policy_that_cannot_be_made_there_says_so(start):
    process = start(Unreadable(os.getpid()))
    with pytest.raises(RuntimeError, match="cannot be made in the planning process: no such module there"):
        process.plan(request_of())


def test_a_process_that_was_killed_is_told_and_started_again(start):
    process = start(Rotating())
    first = process.pid
    expected = process.plan(request_of()).words.tolist()
    os.kill(first, signal.SIGSTOP)  # so that the plan meets its end, and not its beginning
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {first}"])
    with pytest.raises(RuntimeError, match=f"the planning process {first} ended with status -9"):
        process.plan(request_of())
    killer.wait()
    assert process.plan(request_of()).words.tolist() == expected and process.pid not in (first, None)


def test_one_that_died_between_plans_is_started_again(start):
    process = start(Rotating())
    first = process.pid
    os.kill(first, signal.SIGKILL)
    eventually(lambda: process.pid is None, "its end is seen")
    assert process.plan(request_of()).num_waves > 0 and process.pid != first


def test_closed_is_closed(start):
    process = start(Rotating())
    pid = process.pid
    process.close()
    process.close()
    assert process.pid is None and not is_alive(pid)
    with pytest.raises(RuntimeError, match="the controller is closed"):
        process.plan(request_of())


PARENT = """
import os, time
from eplb.plan_process import PlanProcess
from eplb.planning.policy import Topology
from tests.eplb.far_policies import HangingOnce
import sys, threading
from tests.eplb.test_plan_process import request_of
process = PlanProcess(HangingOnce(sys.argv[1]), Topology(2))
threading.Thread(target=process.plan, args=(request_of(),), daemon=True).start()
if sys.argv[2] == "forked" and os.fork() == 0:
    time.sleep(12)  # holds the pipe open
    os._exit(0)
while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("other", ["alone", "forked"])
def test_it_dies_with_its_parent_while_a_policy_thinks(tmp_path, other):
    """Also where a process that the parent forked keeps the pipe open."""
    path = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.run([sys.executable, "-c", PARENT, str(path), other], env=environment, timeout=60)
    assert parent.returncode == -9
    pid = int(path.read_text())
    eventually(lambda: not is_alive(pid), "the child has ended", 10.0)


# ---- where a controller plans


def test_a_controller_that_could_not_start_leaves_no_process(monkeypatch):
    """Its worker would have ended it. The next step starts another."""
    started, start = [], PlanProcess.start
    monkeypatch.setattr(PlanProcess, "start", lambda process: started.append(process) or start(process))
    controller = controller_of(policy=Rotating(), planning="process")
    connect, controller._transport.connect = controller._transport.connect, None
    with pytest.raises(TypeError):
        controller.step()
    assert started == []
    controller._transport.connect = connect
    with controller:
        controller.step()
        assert [process.pid is not None for process in started] == [True], "it starts with the controller"
        pid = started[0].pid
    eventually(lambda: not is_alive(pid), "it ends with the controller")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"use_async": False}, False),
        ({"policy": Rotating()}, False),
        ({"planning": "thread"}, False),
        ({"policy": Rotating(), "planning": "process"}, True),
        ({"use_async": False, "planning": "process"}, True),
    ],
    ids=["default", "inside step", "an object", "thread", "an object in a process", "inside step in a process"],
)
def test_where_it_is_planned(options, expected):
    config = EplbConfig(**options)
    assert plans_in_a_process(config, config.make_policy()) is expected


def test_a_policy_that_cannot_be_sent_is_refused_where_a_process_is_asked_for():
    with pytest.raises(ValueError, match=r"planning='process' needs a policy that can be sent.*cannot be pickled"):
        EplbController(EplbConfig(policy=Unpicklable(), planning="process"))


def test_a_named_policy_that_cannot_be_sent_plans_on_a_thread_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(Rotating, "__module__", "__main__")
    config = EplbConfig()
    assert not plans_in_a_process(config, Rotating())
    assert "plans on a thread, beside the forwards: its class is in __main__" in caplog.text


def steps_until(controller: EplbController, condition: Callable[[], bool], what: str) -> None:
    eventually(lambda: controller.step() or condition(), what)


@pytest.mark.parametrize("use_async", [True, False])
def test_a_controller_plans_there_and_ends_it(use_async):
    with controller_of(
        use_async=use_async, policy=Telling(), planning="process", backoff=0.01, max_backoff=0.01
    ) as controller:
        steps_until(controller, lambda: controller.metrics().failures > 0, "it was asked")
        pid = controller._worker._planner.process.pid
        assert f"pid={pid} torch=False" in controller.health().last_error and pid != os.getpid()
    eventually(lambda: not is_alive(pid), "closing the controller ends it")


def test_a_policy_that_hangs_there_is_ended_and_asked_again(tmp_path):
    """Its deadline holds as on a thread; but the next proposal need not wait for it to return."""
    policy = HangingOnce(str(tmp_path / "pid"))
    options = {"planning_timeout": 2.0, "backoff": 0.01, "max_backoff": 0.02}
    with controller_of(policy=policy, planning="process", **options) as controller:
        steps_until(controller, lambda: controller.metrics().abandoned > 0, "it is given up")
        assert "did not return within 2.0 s" in controller.health().last_error
        pid = int((tmp_path / "pid").read_text())
        eventually(lambda: not is_alive(pid), "it has ended")
        steps_until(controller, lambda: controller._worker.planning.planning_seconds > 0, "another plans")
        assert controller.health().state in ("idle", "rebalancing")


def test_a_controller_whose_planning_process_is_killed_says_so_and_goes_on(tmp_path):
    policy = HangingOnce(str(tmp_path / "pid"))
    with controller_of(policy=policy, planning="process", backoff=0.01, max_backoff=0.02) as controller:
        steps_until(
            controller, lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", "it plans"
        )
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        steps_until(controller, lambda: controller.metrics().abandoned > 0, "the plan is given up")
        assert f"the planning process {pid} ended with status -9" in controller.health().last_error
        steps_until(controller, lambda: controller._worker.planning.planning_seconds > 0, "another plans")
        assert controller._worker._planner.process.pid not in (pid, None)
