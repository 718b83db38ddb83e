"""Streams of a CPU and of a GPU."""

import threading

import pytest
import torch

from eplb.streams import CudaStreams, HostStreams, streams_of


def test_a_cpu_has_one_stream_on_which_work_is_done_at_once():
    streams = streams_of(torch.device("cpu"))
    assert isinstance(streams, HostStreams) and streams.device == torch.device("cpu")
    assert streams.current() is streams.side
    done = []
    streams.run(streams.side, lambda: done.append(1))
    assert done == [1]
    event = streams.side.record_event()
    assert event.query()
    streams.current().wait_event(event)
    assert not streams.is_capturing()
    streams.adopt_thread()


def test_all_layers_of_a_device_share_its_streams_and_gate():
    assert streams_of(torch.device("cpu")) is streams_of(torch.device("cpu", 0))
    assert streams_of(torch.device("cpu")).gate is not streams_of(torch.device("meta")).gate


def test_on_meta_nothing_runs_and_nothing_waits():
    streams = streams_of(torch.device("meta"))
    value = torch.zeros(3, device="meta")
    streams.run(streams.side, lambda: value.fill_(1))
    assert streams.device == value.device and streams.current().record_event().query() and not streams.is_capturing()


def test_errors_of_work_on_a_cpu_are_the_callers():
    streams = streams_of(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        streams.run(streams.side, lambda: 1 / 0)


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_other_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"device must be a CPU or a CUDA device, got {device}"):
        streams_of(torch.device(device))


@pytest.mark.gpu
def test_a_gpu_has_a_side_stream_beside_the_current_one():
    streams = streams_of(torch.device("cuda", 0))
    assert isinstance(streams, CudaStreams)
    assert streams.current() == torch.cuda.current_stream(0) != streams.side
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        assert streams.current() == other  # looked up at the call, not kept
    value = torch.zeros(1, device="cuda")
    streams.run(streams.side, lambda: (torch.cuda._sleep(1), value.fill_(0)))  # loading a kernel may wait for others
    torch.cuda.synchronize()
    streams.run(streams.side, lambda: (torch.cuda._sleep(100_000_000), value.fill_(3)))
    event = streams.side.record_event()
    assert not event.query(), "the host waited"
    assert torch.cuda.current_stream() != streams.side
    streams.current().wait_event(event)
    assert value.item() == 3 and event.query()


@pytest.mark.gpu
def test_capturing_is_seen_by_the_capturing_thread_alone():
    streams = streams_of(torch.device("cuda", 0))
    assert not streams.is_capturing()
    seen = []
    graph, value = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        value.add_(1)
        seen.append(streams.is_capturing())
        thread = threading.Thread(target=lambda: (streams.adopt_thread(), seen.append(streams.is_capturing())))
        thread.start()
        thread.join()
    assert seen == [True, False]


@pytest.mark.gpu
def test_an_adopted_thread_polls_and_gets_memory_while_another_captures():
    streams = streams_of(torch.device("cuda", 0))
    errors, polled = [], []
    prepared, capturing, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        try:
            streams.adopt_thread()
            source, target = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
            torch.cuda.current_stream().synchronize()
            prepared.set()
            capturing.wait(30)
            for number in range(20):
                streams.run(streams.side, lambda: target.copy_(source, non_blocking=True))
                event = streams.side.record_event()
                while not event.query():
                    pass
                torch.empty((number + 1) << 22, device="cuda")  # beyond what is cached: cudaMalloc
                torch.empty((number + 1) << 12, pin_memory=True)
                polled.append(number)
        except Exception as error:
            errors.append(error)
        finally:
            prepared.set()
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert prepared.wait(30)
    value = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturing.set()
        value.add_(1)
        assert done.wait(60)
    thread.join()
    graph.replay()
    assert not errors and len(polled) == 20
    assert value.item() == 1
