"""Load windows: exactly the load of their steps, however late the device or the worker is."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb.load_window import LoadWindowRecorder
from eplb.streams import HostStreams
from tests.eplb.simulated import Faults, SimStream, SimStreams


class Layer:
    """What the recorder sees of one: counters, which a forward adds to on the compute stream."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.load_E = torch.zeros(num_experts, dtype=torch.int64)


class LateStreams(SimStreams):
    """What is enqueued runs when the test says so, in order."""

    def __init__(self) -> None:
        super().__init__(Faults(Random(0)))

    def run_some(self, stream: SimStream, count: int = 10**9) -> None:
        while count and stream.advance():
            count -= 1


def loads_of(num_steps: int, num_columns: int) -> np.ndarray:
    """int64 [steps, A]: what each step adds; every sum of some of them is different from every other one."""
    return np.random.default_rng(0).integers(0, 1000, (num_steps, num_columns))


def window_of(loads_SA: np.ndarray, index: int, interval: int, window_size: int, num_samples: int) -> np.ndarray:
    """The `index`-th window by its definition."""
    end = (index + 1) * interval
    cuts = [end - window_size + window_size * sample // num_samples for sample in range(num_samples + 1)]
    return np.stack([loads_SA[first:last].sum(axis=0) for first, last in pairwise(cuts)])


def test_example():
    """Interval 5, window 3 in 2 sub-windows: steps 3 | 4, 5."""
    layer = Layer(2)
    recorder = LoadWindowRecorder([layer], HostStreams(), interval=5, window_size=3, num_samples=2)
    assert recorder.message_words == 4
    for step in range(1, 11):
        layer.load_E += torch.tensor([step, 100 * step])
        assert recorder.step(step) == (step in (5, 10))
        window = recorder.poll()
        if step == 5:
            assert window.tolist() == [[3, 300], [9, 900]] and window.dtype == np.int64
        elif step == 10:
            assert window.tolist() == [[8, 800], [19, 1900]]
        else:
            assert window is None


@given(st.integers(1, 9).flatmap(lambda i: st.tuples(st.just(i), st.integers(1, i))), st.integers(1, 9))
def test_windows_are_exact_for_any_sizes(sizes, samples):
    interval, window_size = sizes
    num_samples = min(samples, window_size)
    layers = [Layer(3), Layer(1), Layer(2)]
    loads_SA = loads_of(4 * interval, 6)
    recorder = LoadWindowRecorder(
        layers, HostStreams(), interval=interval, window_size=window_size, num_samples=num_samples
    )
    polled = []
    for step, load_A in enumerate(torch.from_numpy(loads_SA), start=1):
        for layer, part in zip(layers, load_A.split([3, 1, 2]), strict=True):
            layer.load_E += part
        recorder.step(step)
        window_NA = recorder.poll()
        if window_NA is not None:
            polled.append(window_NA)
    assert len(polled) == 4
    for index, window_NA in enumerate(polled):
        assert np.array_equal(window_NA, window_of(loads_SA, index, interval, window_size, num_samples))


def test_a_window_as_long_as_the_interval_leaves_no_step_out():
    layer = Layer(3)
    loads_SA = loads_of(20, 3)
    recorder = LoadWindowRecorder([layer], HostStreams(), interval=4, window_size=4, num_samples=4)
    total = np.zeros(3, dtype=np.int64)
    for step, load_A in enumerate(torch.from_numpy(loads_SA), start=1):
        layer.load_E += load_A
        if recorder.step(step):
            total += recorder.poll().sum(axis=0)
    assert np.array_equal(total, loads_SA.sum(axis=0))


def test_what_was_counted_before_the_first_step_is_in_no_window():
    layer = Layer(1)
    layer.load_E += 500
    recorder = LoadWindowRecorder([layer], HostStreams(), interval=1, window_size=1, num_samples=1)
    layer.load_E += 3
    recorder.step(1)
    assert recorder.poll().tolist() == [[3]]


@given(
    st.integers(1, 4).flatmap(lambda i: st.tuples(st.just(i), st.integers(1, i))),
    st.lists(st.sampled_from(["step", "step", "poll", "compute", "side"]), min_size=20, max_size=120),
)
def test_windows_are_exact_with_a_late_device_and_a_late_worker(sizes, actions):
    """Whatever the interleaving: a window that arrives is a true one, they come in order, and those announced arrive."""
    interval, window_size = sizes
    streams, layer = LateStreams(), Layer(2)
    loads_SA = loads_of(200, 2)
    recorder = LoadWindowRecorder([layer], streams, interval=interval, window_size=window_size, num_samples=1)
    announced, arrived, step = [], [], 0

    def take(window_NA: np.ndarray | None) -> None:
        if window_NA is not None:
            arrived.append(window_NA)

    for action in actions:
        if action == "step":
            load_A = torch.from_numpy(loads_SA[step])
            streams.current().enqueue(lambda load_A=load_A: layer.load_E.add_(load_A))
            step += 1
            if recorder.step(step):
                announced.append(step // interval - 1)
        elif action == "poll":
            take(recorder.poll())
        else:
            streams.run_some(streams.side if action == "side" else streams.current(), 2)
    for _ in range(4):
        streams.run_some(streams.current())
        take(recorder.poll())
        streams.run_some(streams.side)
        take(recorder.poll())
    assert len(arrived) == len(announced)
    for index, window_NA in zip(announced, arrived, strict=True):
        assert np.array_equal(window_NA, window_of(loads_SA, index, interval, window_size, 1))


def test_i3_a_window_counts_the_forwards_of_every_stream():
    """A snapshot is behind all streams that ran forwards, not only behind that of `step()`."""
    streams, layer = LateStreams(), Layer(1)
    recorder = LoadWindowRecorder([layer], streams, interval=1, window_size=1, num_samples=1)
    for stream, load in ((1, 7), (2, 5), (0, 3)):
        streams.now = stream
        with streams.gate.lock:
            streams.gate.note(stream)
        streams.current().enqueue(lambda load=load: layer.load_E.add_(load))
    assert recorder.step(1)
    streams.run_some(streams.computes[0])
    assert recorder.poll() is None and layer.load_E.item() == 3, "the snapshot did not wait for the other streams"
    streams.drain()
    assert recorder.poll() is None
    streams.drain()
    assert recorder.poll().tolist() == [[15]]


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_host_buffers_are_on_the_host_whatever_the_default_device(default):
    layer = Layer(1)
    with torch.device(default):
        recorder = LoadWindowRecorder([layer], HostStreams(), interval=1, window_size=1, num_samples=1)
        layer.load_E += 3
        recorder.step(1)
        assert recorder.poll().tolist() == [[3]]


def test_a_worker_that_comes_late_gets_windows_again():
    """It finds one that was not overwritten half-way, and the next ones are whole."""
    layer, loads_SA = Layer(2), loads_of(40, 2)
    recorder = LoadWindowRecorder([layer], HostStreams(), interval=2, window_size=2, num_samples=1)
    arrived = []
    for step, load_A in enumerate(torch.from_numpy(loads_SA), start=1):
        layer.load_E += load_A
        recorder.step(step)
        if step > 21:
            window_NA = recorder.poll()
            if window_NA is not None:
                arrived.append(window_NA)
    true = [window_of(loads_SA, index, 2, 2, 1).tolist() for index in range(20)]
    indices = [true.index(window_NA.tolist()) for window_NA in arrived]
    assert indices == sorted(set(indices)) and indices[-1] == 19
    assert indices[-6:] == list(range(14, 20)), "after a worker was late windows go missing"


def test_a_snapshot_that_fails_costs_its_window_and_no_other():
    class Failing(HostStreams):
        fails = False

        def run(self, stream, work):
            if self.fails:
                raise OSError("no snapshot")
            work()

    streams, layer, loads_SA = Failing(), Layer(2), loads_of(12, 2)
    recorder = LoadWindowRecorder([layer], streams, interval=3, window_size=2, num_samples=2)
    arrived = []
    for step, load_A in enumerate(torch.from_numpy(loads_SA), start=1):
        layer.load_E += load_A
        streams.fails = step == 5  # in the middle of the second window
        if streams.fails:
            with pytest.raises(OSError, match="no snapshot"):
                recorder.step(step)
        else:
            recorder.step(step)
        window_NA = recorder.poll()
        if window_NA is not None:
            arrived.append(window_NA.tolist())
    assert arrived == [window_of(loads_SA, index, 3, 2, 2).tolist() for index in (0, 2, 3)]


def test_a_download_that_fails_costs_its_window_and_no_other():
    layer, loads_SA = Layer(2), loads_of(8, 2)
    recorder = LoadWindowRecorder([layer], HostStreams(), interval=2, window_size=2, num_samples=1)
    download, arrived = recorder._download, []
    for step, load_A in enumerate(torch.from_numpy(loads_SA), start=1):
        layer.load_E += load_A
        recorder.step(step)
        if step == 4:

            def failing(*_):
                raise OSError("no download")

            recorder._download = failing
            with pytest.raises(OSError, match="no download"):
                recorder.poll()
            recorder._download = download
        window_NA = recorder.poll()
        if window_NA is not None:
            arrived.append(window_NA.tolist())
    assert arrived == [window_of(loads_SA, index, 2, 2, 1).tolist() for index in (0, 2, 3)]


@pytest.mark.parametrize(
    ("window_size", "num_samples", "expected"),
    [(10, 1, [10, 20]), (10, 2, [5, 10, 15, 20]), (4, 2, [6, 8, 10, 16, 18, 20])],
)
def test_the_steps_in_which_there_is_something_to_do(window_size, num_samples, expected):
    recorder = LoadWindowRecorder(
        [Layer(3)], HostStreams(), interval=10, window_size=window_size, num_samples=num_samples
    )
    found = [0]
    while found[-1] < 20:
        found.append(recorder.next_due(found[-1]))
    assert found[1:] == expected
    assert all(recorder.next_due(step) == min(due for due in expected if due > step) for step in range(20))
