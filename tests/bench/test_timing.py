"""The clocks."""

from __future__ import annotations

import gc
import itertools
import random
import time
import weakref

import pytest
import torch

from bench import timing
from bench.timing import FLUSHES, Timing, capture, extra_bytes, time_eager, time_graph, time_graphs

CPU = torch.device("cpu")


def test_percentiles():
    of_hundred = Timing.of([float(n) for n in range(101)])
    assert (of_hundred.median_us, of_hundred.num_samples) == (50.0, 101)
    assert (of_hundred.p20_us, of_hundred.p80_us) == pytest.approx((20.0, 80.0))


def test_eager_on_a_cpu():
    calls = []

    def work():
        calls.append(None)
        time.sleep(1e-3)

    latency, back_to_back_us = time_eager(work, CPU, seconds=0.001)
    assert latency.num_samples == 10 and len(calls) == 3 + 3 + 10 + 10
    assert 1e3 <= latency.p20_us <= latency.median_us <= latency.p80_us < 1e5
    assert 1e3 <= back_to_back_us < 1e5
    assert extra_bytes(work, CPU) is None


def test_at_most_200_repeats():
    assert time_eager(lambda: None, CPU, seconds=1.0)[0].num_samples == 200


def test_each_round_has_every_graph_once_in_changing_order(monkeypatch):
    clock, visited = itertools.count(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(clock)

        def elapsed_time(self, end):
            return end.time - self.time

    class Graph:
        def __init__(self, number):
            self.replay = lambda: visited.append(number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graphs = [Graph(number) for number in range(3)]
    samples, rounds = timing._samples(graphs, torch.zeros(1).zero_, 20, random.Random(0))
    orders = [tuple(visited[first : first + 3]) for first in range(0, 60, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in orders) and len(set(orders)) > 3
    assert samples == [[1e3] * 20] * 3 and rounds == [2e3] * 3


def test_work_comes_in_bursts_from_idle(monkeypatch):
    """Six rounds fit into a burst of 20 ms; the last burst has the rest."""
    happened, orders = [], []

    def samples_us(graphs, device, repeats, flush, order):
        happened.append(repeats)
        orders.append(order)
        return [[float(number)] * repeats for number, _ in enumerate(graphs)]

    monkeypatch.setattr(timing, "round_us", lambda *_: 3e3)
    monkeypatch.setattr(timing, "samples_us", samples_us)
    monkeypatch.setattr(time, "sleep", lambda seconds: happened.append("idle"))
    first, second = timing.time_captured([None, None], CPU, seconds=0.021)
    assert happened == ["idle", 6, "idle", 6, "idle", 2]
    assert (first.median_us, second.median_us, second.num_samples) == (0.0, 1.0, 14)
    assert len({id(order) for order in orders}) == 1  # one generator, or each burst would begin with the same order


@pytest.mark.gpu
@pytest.mark.parametrize("flush", FLUSHES)
def test_graph_time_is_the_device_time_with_a_cold_l2(flush):
    device = torch.device("cuda", torch.cuda.current_device())
    source, target = torch.zeros(2, 2**28, dtype=torch.uint8, device=device)
    little = torch.zeros(2**20, dtype=torch.uint8, device=device)
    copy, nothing = time_graphs([lambda: target.copy_(source), little.zero_], device, seconds=0.05, flush=flush)
    assert nothing.median_us < 30  # not the host's part of a launch, nor the flush
    seconds_at_8_tb = 2 * 2**28 / 8e12
    assert copy.median_us > 1e6 * seconds_at_8_tb
    assert copy.median_us > 3 * nothing.median_us


def test_a_flush_writes_or_reads_the_whole_buffer(monkeypatch):
    buffer, seen = torch.arange(1, 100, dtype=torch.int32), []
    monkeypatch.setattr(timing, "_flush_buffer", lambda device: buffer)
    monkeypatch.setattr(torch, "amax", lambda what, dim, out: seen.append(what))
    timing._flush(CPU, "read")()
    assert seen == [buffer] and buffer.all()
    timing._flush(CPU, "write")()
    assert not buffer.any()
    with pytest.raises(ValueError, match="flush='heat'"):
        timing._flush(CPU, "heat")


@pytest.mark.gpu
def test_extra_bytes_counts_the_output_and_what_is_in_between():
    device = torch.device("cuda", torch.cuda.current_device())
    size = 2**22
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    used = extra_bytes(lambda: (x + 1) + 1, device)
    assert used is not None and 2 * size <= used < 3 * size
    assert time_graph(lambda: x + 1, device, seconds=0.01).num_samples >= 20


@pytest.mark.gpu
def test_a_graph_keeps_what_it_reads():
    """Its memory would be another's, or nobody's, when it is replayed."""
    device = torch.device("cuda", torch.cuda.current_device())

    def captured():
        x = torch.zeros(2**20, device=device)
        return capture(lambda: x + 1, device), weakref.ref(x)

    graph, x = captured()
    gc.collect()
    assert x() is not None
    del graph
    gc.collect()
    assert x() is None
