"""Real ranks that come late, never, pause, stop or go: every wait has a deadline, and nothing stays behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch.distributed as dist

from eplb import EplbConfig, EplbController, HealthState
from eplb.planning.policy import Proposal
from tests.distributed import distributed
from tests.eplb.stub import StubLayer

QUICK = {"step_interval": 2, "round_interval": 1e-3, "heartbeat_interval": 5e-3}
RANKS = (0, 1)


class Rotating:
    """Every expert moves on by one place, each time."""

    def propose(self, load_LNE, physical_LWP, topology):
        rotated = np.roll(physical_LWP.reshape(len(physical_LWP), -1), 1, axis=1)
        return Proposal(rotated.reshape(physical_LWP.shape), np.ones(physical_LWP.shape))


def controller_of(rank: int, layer: StubLayer | None = None, **options) -> EplbController:
    config = EplbConfig(**{**QUICK, "policy": Rotating(), **options})
    controller = EplbController(config, dist.group.WORLD)
    controller.register(layer or StubLayer(expert_ranks=RANKS, rank=rank))
    return controller


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.002)


@distributed(num_ranks=2)
def test_ranks_that_come_late_or_pause(rank, num_ranks, group, device):
    check_a_rank_that_comes_late(rank)
    check_a_rank_that_comes_late_inside_step(rank)
    check_a_controller_that_is_closed_before_the_other_rank_comes(rank)
    check_nothing_stays_behind(rank)
    check_a_pause_inside_step(rank)


def check_a_rank_that_comes_late(rank: int) -> None:
    controller = controller_of(rank, connect_timeout=0.3)
    if rank == 0:
        began = time.monotonic()
        controller.step()
        assert time.monotonic() - began < 0.2, "step() waits for the other rank"
        health = controller.health()
        assert (health.state, health.missing) == (HealthState.CONNECTING, (1,))
        eventually(lambda: controller.health().state is HealthState.PEER_UNREACHABLE, "the missing rank is shown")
        eventually(lambda: controller.health().last_error is not None, "a tick later at the latest it is an error, too")
        health = controller.health()
        assert "ranks [1] have not come to their first step()" in health.reason
        assert "connect_timeout=0.3 s: ranks [1] have not come" in health.last_error
        assert health.seconds_waiting > 0.3 and controller.metrics().failures == 1
        for _ in range(4):
            controller.step()  # serving goes on
        layer = controller._layers[0].resident
        with layer.quiesced():  # so does loading weights, as nothing can move before the ranks are connected
            pass
    dist.barrier()
    controller.step()
    if rank == 1:
        with controller._layers[0].resident.quiesced():  # until it has loaded too, nothing moves
            pass
    welcome = (HealthState.IDLE, HealthState.REBALANCING, HealthState.HELD)
    eventually(lambda: controller.health().state in welcome, "the late rank is welcome")
    assert controller.health().missing == () and controller.health().last_tick_seconds < 1.0
    until_all(lambda: controller.step() or controller.metrics().waves > 0)
    controller.close()


def check_a_rank_that_comes_late_inside_step(rank: int) -> None:
    controller = controller_of(rank, use_async=False, connect_timeout=0.3, peer_timeout=0.5)
    if rank == 0:
        began = time.monotonic()
        controller.step()
        assert 0.2 < time.monotonic() - began < 2.0
        assert controller.health().state is HealthState.PEER_UNREACHABLE and controller.health().missing == (1,)
    dist.barrier()
    if rank == 1:
        controller.step()  # the first here too
    for _ in range(5):
        dist.barrier()  # a forward
        controller.step()
    assert controller.metrics().waves > 0 and controller.health().state is HealthState.IDLE
    controller.close()


def check_a_controller_that_is_closed_before_the_other_rank_comes(rank: int) -> None:
    controller = controller_of(rank, close_timeout=0.2, connect_timeout=0.3)
    if rank == 0:
        controller.step()
        began = time.monotonic()
        controller.close()
        assert time.monotonic() - began < 1.0
        eventually(lambda: not threads("eplb-"), "the connecting thread ends")
    dist.barrier()
    if rank == 1:
        controller.step()
        eventually(lambda: controller.health().state is HealthState.PEER_UNREACHABLE, "rank 0 is missing")
        assert controller.health().missing == (0,)
        controller.close()
    eventually(lambda: not threads("eplb-"), "the connecting threads end")
    dist.barrier()


def open_things() -> tuple[int, int, int]:
    """How many descriptors, threads and process groups there are."""
    groups = len(dist.distributed_c10d._world.pg_map)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), groups


def check_nothing_stays_behind(rank: int) -> None:
    layer, first = StubLayer(expert_ranks=RANKS, rank=rank), []

    def is_clean() -> bool:
        return all(now <= then for now, then in zip(open_things(), first, strict=True))

    for cycle in range(5):
        with controller_of(rank, layer, use_async=cycle < 3) as controller:
            until_all(lambda: controller.step() or controller.metrics().waves > 0)
        dist.barrier()
        first[:] = first or open_things()
        # Threads of others take a moment to end, and one from before may end meanwhile.
        eventually(is_clean, f"no more than after the first cycle, {first}")
    assert not threads("eplb-")


def check_a_pause_inside_step(rank: int) -> None:
    """Rank 1 pauses for longer than rank 0 waits, as for a breakpoint; forwards keep the ranks in step otherwise."""
    controller = controller_of(rank, use_async=False, peer_timeout=0.5, connect_timeout=0.6)
    long_steps = 0
    for step in range(16):
        dist.barrier()  # a forward
        if (rank, step) == (1, 5):
            time.sleep(1.2)
        began = time.monotonic()
        controller.step()
        long_steps += time.monotonic() - began > 0.2
    dist.barrier()
    assert long_steps <= 2, "the ranks wait for each other in turns"
    assert controller.metrics().waves > 0 and controller.health().state is HealthState.IDLE
    controller.close()


def until_all(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Ask for `condition` time and again until it holds on all ranks. Collective."""
    deadline, answers = time.monotonic() + seconds, [False] * len(RANKS)
    while not all(answers):
        assert time.monotonic() < deadline
        dist.all_gather_object(answers, bool(condition()))


def threads(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


# ---- a peer that is stopped

EXITS = {
    "close": "controller.close()",
    "no close": "pass",
    "no close, inside step": "pass",
    "destroy": "dist.destroy_process_group()",
    "a worker that hangs": "controller._worker.tick = lambda *_: threading.Event().wait(); controller._wake.set()",
}

PROGRAM = textwrap.dedent(
    """
    import os, signal, sys, threading, time
    import torch.distributed as dist
    from eplb import EplbConfig, EplbController
    from tests.eplb.stub import StubLayer
    from tests.eplb.test_liveness import EXITS, QUICK, Rotating, eventually

    store, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", store=dist.FileStore(store, len(EXITS) + 1), rank=rank, world_size=len(EXITS) + 1)
    names, controllers = list(EXITS), []
    for number, name in enumerate(names, start=1):
        group = dist.new_group([0, number])
        if rank in (0, number):
            inside = name.endswith("inside step")
            config = EplbConfig(
                **QUICK, policy=Rotating(), use_async=not inside, close_timeout=1.0, peer_timeout=0.5
            )
            controllers.append(EplbController(config, group))
            controllers[-1].register(StubLayer(expert_ranks=(0, number), rank=min(rank, 1)))
    for step in range(8):
        for controller in controllers:
            controller.step()
        time.sleep(0.02)
    if rank == 0:
        for controller in controllers:
            eventually(lambda: controller.metrics().rounds > 0, "rounds")
        print("stops", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    (controller,) = controllers
    sys.stdin.readline()
    if not controller.config.use_async:
        controller.step(), controller.step()
    else:
        eventually(lambda: controller.health().state == "peer_unreachable", "the stopped rank is shown")
    exec(EXITS[names[rank - 1]])
    print("exits", flush=True)
    """
)


@pytest.mark.timeout(120)
def test_a_process_exits_while_a_peer_is_stopped(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "store"), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(len(EXITS) + 1)
    ]
    stopped, *others = processes
    try:
        assert stopped.stdout.readline() == "stops\n", stopped.communicate(timeout=10)
        os.waitpid(stopped.pid, os.WUNTRACED)
        outputs = {}
        for process in others:
            process.stdin.write("\n")
            process.stdin.flush()
        for name, process in zip(EXITS, others, strict=True):
            outputs[name] = process.communicate(timeout=20)[0]
        codes = dict(zip(EXITS, (process.returncode for process in others), strict=True))
        assert set(codes.values()) == {0} and all("exits\n" in output for output in outputs.values()), (codes, outputs)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
