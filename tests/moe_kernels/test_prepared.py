"""Second launches of every kernel, which go past Triton's own: on a CPU the interpreter stands in for what is compiled.

So the host code that a GPU runs (keys, values of constants, order of arguments) is run on any machine; on a GPU the same
tests launch natively.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from moe_kernels import (
    build_schedule,
    expert_down,
    expert_up,
    local_forward,
)
from moe_kernels.base import (
    backend,
    launch,
)
from moe_kernels.one_token import one_token
from tests.moe_kernels import test_chain, test_local_forward, test_variants


class Compiled:
    """A kernel as Triton compiles it; `launches`: of all kernels, their names."""

    function, packed_metadata = None, (4, 1, 0)

    def __init__(self, jit, launches):
        self.jit, self.launches = jit, launches

    def run(self, x, y, z, stream, function, packed_metadata, metadata, enter, leave, *arguments):
        values = dict(zip(self.jit.arg_names, arguments, strict=True))
        assert values.get("PDL", True) is True
        assert packed_metadata[1] == (2 if values.get("CLUSTERS") else 1)  # programs of a cluster
        grid = (x * packed_metadata[1], y, z)
        self.jit[grid](**(values | ({"PDL": False} if "PDL" in values else {})))  # the interpreter has none
        self.launches.append(self.jit.fn.__name__)


class Jit:
    """What `triton.jit` makes of a kernel where it is compiled; `compilations`: of all kernels, their names."""

    def __init__(self, interpreted, compilations, launches):
        self.interpreted, self.compilations, self.launches = interpreted, compilations, launches
        self.arg_names, self.__name__ = interpreted.arg_names, interpreted.fn.__name__
        general = interpreted.kwargs["do_not_specialize"] or ()
        self.params = [SimpleNamespace(do_not_specialize=name in general) for name in self.arg_names]

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **constants):
            assert constants.pop("launch_pdl") is True
            self.interpreted[grid](*arguments, **(constants | {"PDL": False}))
            self.compilations.append(self.__name__)
            return Compiled(self.interpreted, self.launches)

        return compile_and_launch


@pytest.fixture
def prepares(monkeypatch):
    """Names of kernels that were compiled and launched at once, and of those launched by `PreparedLaunch` alone."""
    compilations, launches = [], []
    if not backend.INTERPRETED:
        return compilations, launches
    monkeypatch.setattr(launch, "_prepares", lambda: True)
    monkeypatch.setattr(launch, "_may_have_launch_hooks", lambda: False)
    monkeypatch.setattr(launch, "has_pdl", lambda device_index: True)
    monkeypatch.setattr(one_token, "_plans", {})
    modules = [module for name, module in sys.modules.items() if name.startswith("moe_kernels.")]
    launchers = {
        id(one): one for module in modules for one in vars(module).values() if isinstance(one, launch.Launcher)
    }
    assert len(launchers) >= 15, "the scan must find all that these tests launch"
    for launcher in launchers.values():
        if not hasattr(launcher.jit, "kwargs"):
            continue  # of Gluon, which has no interpreter
        jit = Jit(launcher.jit, compilations, launches)
        monkeypatch.setattr(launcher, "jit", jit)
        monkeypatch.setattr(launcher, "_prepared", {})
        monkeypatch.setitem(vars(launcher), "_by_value", [not parameter.do_not_specialize for parameter in jit.params])
    return compilations, launches


def assert_second_launch_is_prepared(prepares, run, count):
    """`run(seed)` launches `count` kernels; with other values, none is compiled again."""
    compilations, launches = prepares
    run(0)
    assert (len(compilations), len(launches)) == ((count, 0) if backend.INTERPRETED else (0, 0))
    run(1)
    assert (len(compilations), len(launches)) == ((count, count) if backend.INTERPRETED else (0, 0))
    assert compilations == launches


@pytest.mark.parametrize(("size", "count"), [("few", 6), ("many", 10)])
def test_separate_ops(prepares, request, device, assert_close, size, count):
    if size == "many":
        request.getfixturevalue("small_chunks")

    def run(seed):
        inputs = test_chain.arguments(device, torch.bfloat16, seed=seed)
        y = test_chain.chain(**inputs, backend="triton")
        assert_close(y, test_chain.chain(**(inputs | {"count": torch.zeros_like(inputs["count"])}), backend="torch"))

    assert_second_launch_is_prepared(prepares, run, count)


@pytest.mark.parametrize(("num_tokens", "count"), [(1, 3), (5, 5)])
def test_one_op(prepares, make_experts, assert_close, num_tokens, count):
    def run(seed):
        given = test_local_forward.arguments(make_experts, 4, 2, 64, 48, torch.bfloat16, seed, num_tokens)
        y = local_forward(**given, backend="triton")
        expected, _ = test_local_forward.separate(test_local_forward.in_float32(given))
        assert_close(y, expected, scale=4)

    assert_second_launch_is_prepared(prepares, run, count)


@pytest.mark.parametrize("name", ["32 rows, swapped", "128 rows and more", "persistent"])
def test_tma(prepares, make_experts, assert_close, name):
    config = test_variants.VARIANTS[name]

    def run(seed):
        experts = make_experts(9, 2, 3, 64, 32, torch.bfloat16, seed)
        tiles = {"block_m": config.block_m, "extra_m": config.schedule_extra_m}
        schedule = build_schedule(experts.lanes_N, experts.counts_L, **tiles, backend="torch")
        rows = []
        for backend_ in ("triton", "torch"):
            common, options = (experts.lane_to_slot_L, schedule), {"config": config, "backend": backend_}
            hidden = expert_up(experts.x_RH, experts.matrices, *common, fanout=2, **options)
            rows.append(expert_down(hidden, experts.matrices, *common, experts.row_weights_N, **options))
        assert_close(*(one[experts.lanes_N >= 0] for one in rows), scale=2)

    assert_second_launch_is_prepared(prepares, run, 2)


def test_another_device_is_made_current_and_has_a_stream_of_its_own(monkeypatch):
    """What asks CUDA at a launch, without CUDA."""
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            entered.append(-1)

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for index in (-1, 0, 1):
        with launch.on_device(index):
            pass
    assert entered == [1, -1]
    assert [launch.raw_stream(index) for index in (0, 1)] == [100, 101]
