"""`CpuGpuEvent`: record and wait between threads, with and without streams."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from eplb import CpuGpuEvent


class Stream:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.recorded: list[object] = []
        self.waited: list[object] = []

    def record_event(self) -> object:
        event = object()
        self.recorded.append(event)
        return event

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def in_thread(action: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Starts `action`; what it returned or raised is in the list once the thread is over."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(action())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def test_wait_blocks_the_host_until_another_thread_records():
    event, log = CpuGpuEvent(), []
    thread, outcome = in_thread(lambda: (event.wait(timeout=10), log.append("waited")))
    time.sleep(0.05)
    assert thread.is_alive() and not log
    log.append("recorded")
    event.record()
    thread.join(5)
    assert not thread.is_alive() and not isinstance(outcome[0], BaseException)
    assert log == ["recorded", "waited"]


def test_a_record_before_the_wait_is_kept():
    event = CpuGpuEvent()
    assert not event.is_recorded()
    event.record()
    assert event.is_recorded()
    event.wait(timeout=0)
    assert not event.is_recorded()


def test_one_record_is_consumed_by_one_wait():
    event = CpuGpuEvent()
    event.record()
    event.wait(timeout=0)
    with pytest.raises(TimeoutError):
        event.wait(timeout=0)
    event.record()  # and may be used again
    event.wait(timeout=0)


def test_one_of_two_waiters_gets_it():
    event = CpuGpuEvent()
    waiters = [in_thread(lambda: event.wait(timeout=0.3)) for _ in range(2)]
    event.record()
    for thread, _ in waiters:
        thread.join(5)
    outcomes = [outcome[0] for _, outcome in waiters]
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, TimeoutError) for outcome in outcomes) == 1


@pytest.mark.parametrize("second", ["record", "fail"])
@pytest.mark.parametrize("first", ["record", "fail"])
def test_a_second_record_before_the_wait_is_an_error_and_overwrites_nothing(first, second):
    event, error = CpuGpuEvent(), ValueError("first")
    event.record() if first == "record" else event.fail(error)
    with pytest.raises(RuntimeError, match="recorded again before its last record was waited for"):
        event.record() if second == "record" else event.fail(KeyError("second"))
    if first == "record":
        event.wait(timeout=0)
    else:
        with pytest.raises(ValueError, match="first"):
            event.wait(timeout=0)
    assert not event.is_recorded()


def test_a_refused_record_does_not_touch_the_stream_of_the_first():
    event, stream, other = CpuGpuEvent(), Stream(), Stream()
    event.record(stream)
    with pytest.raises(RuntimeError, match="again"):
        event.record(other)
    waiting = Stream()
    event.wait(waiting, timeout=0)
    assert waiting.waited == stream.recorded
    assert other.recorded == []


def test_a_timeout_names_itself_takes_its_time_and_leaves_the_event_as_it_was():
    event = CpuGpuEvent()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not recorded within 0\.1 s"):
        event.wait(timeout=0.1)
    assert 0.09 < time.monotonic() - started < 5
    event.record()
    event.wait(timeout=0.1)


def test_a_timeout_of_zero_polls():
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        CpuGpuEvent().wait(timeout=0)
    assert time.monotonic() - started < 1


def test_an_error_is_passed_to_the_waiter():
    event = CpuGpuEvent()
    error = OSError("the transfer failed")
    thread, outcome = in_thread(lambda: event.wait(timeout=10))
    event.fail(error)
    thread.join(5)
    assert outcome == [error]
    event.record()  # the error is consumed as well
    event.wait(timeout=0)


def test_an_error_needs_no_stream():
    event = CpuGpuEvent()
    event.fail(OSError("no"))
    with pytest.raises(OSError, match="no"):
        event.wait(timeout=0)


def test_the_waiting_stream_waits_for_the_recording_stream():
    event, recording, waiting = CpuGpuEvent(), Stream(), Stream()
    event.record(recording)
    assert len(recording.recorded) == 1 and not waiting.waited
    event.wait(waiting, timeout=0)
    assert waiting.waited == recording.recorded
    assert not recording.waited


def test_a_host_record_makes_no_stream_wait():
    event, waiting = CpuGpuEvent(), Stream()
    event.record()
    event.wait(waiting, timeout=0)
    assert waiting.waited == []


def test_a_stream_record_needs_a_stream_to_wait_and_survives_the_mistake():
    event, recording, waiting = CpuGpuEvent(), Stream(), Stream()
    event.record(recording)
    with pytest.raises(RuntimeError, match=r"recorded on a stream: wait\(\) needs the stream that shall wait"):
        event.wait(timeout=0)
    assert event.is_recorded()
    event.wait(waiting, timeout=0)
    assert waiting.waited == recording.recorded


def test_a_stream_that_cannot_record_leaves_the_event_unrecorded():
    class Broken(Stream):
        def record_event(self) -> object:
            raise OSError("device lost")

    event = CpuGpuEvent()
    with pytest.raises(OSError, match="device lost"):
        event.record(Broken())
    assert not event.is_recorded()
    event.record()


def test_a_wait_that_does_not_consume_leaves_the_record_for_another_stream():
    event, recording, first, second = CpuGpuEvent(), Stream(), Stream(), Stream()
    event.record(recording)
    event.wait(first, timeout=0, consume=False)
    assert event.is_recorded()
    event.wait(second, timeout=0)
    assert first.waited == second.waited == recording.recorded and not event.is_recorded()


def test_an_error_that_is_not_consumed_is_raised_again():
    event = CpuGpuEvent()
    event.fail(OSError("lost"))
    for consume in (False, True):
        with pytest.raises(OSError, match="lost"):
            event.wait(timeout=0, consume=consume)
    assert not event.is_recorded()


def test_a_wait_that_cannot_be_enqueued_leaves_the_record():
    class Broken(Stream):
        def wait_event(self, event: object) -> None:
            raise OSError("device lost")

    event, recording, waiting = CpuGpuEvent(), Stream(), Stream()
    event.record(recording)
    with pytest.raises(OSError, match="device lost"):
        event.wait(Broken(), timeout=0)
    event.wait(waiting, timeout=0)
    assert waiting.waited == recording.recorded


def test_hand_over_hand_between_two_threads():
    """A thousand rounds of ping-pong: nothing is lost, nothing comes twice, no deadlock."""
    ping, pong, numbers = CpuGpuEvent(), CpuGpuEvent(), []

    def other() -> None:
        for number in range(1000):
            ping.wait(timeout=10)
            numbers.append(number)
            pong.record()

    thread, outcome = in_thread(other)
    for number in range(1000):
        assert len(numbers) == number
        ping.record()
        pong.wait(timeout=10)
    thread.join(5)
    assert outcome == [None] and numbers == list(range(1000))


def two_streams() -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Stream, torch.cuda.Stream]:
    """Two zeros, and two streams on which what the tests do has been done once (loading a kernel may wait for others)."""
    value, copy = torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1)
            value.fill_(0)
            copy.copy_(value)
        stream.synchronize()
    torch.cuda.synchronize()
    return value, copy, *streams


@pytest.mark.gpu
def test_work_on_the_waiting_stream_comes_after_work_on_the_recording_stream():
    """And the host waits for neither."""
    event = CpuGpuEvent()
    value, copy, first, second = two_streams()

    def produce() -> None:
        with torch.cuda.stream(first):
            torch.cuda._sleep(400_000_000)  # a fifth of a second or so
            value.fill_(7)
        event.record(first)

    thread, outcome = in_thread(produce)
    event.wait(second, timeout=10)
    with torch.cuda.stream(second):
        copy.copy_(value)
    assert not first.query(), "the host waited for the device"
    thread.join(10)
    torch.cuda.synchronize()
    assert outcome == [None] and copy.item() == 7


@pytest.mark.gpu
def test_without_the_event_the_order_is_not_there():
    """What makes the test above one that can fail."""
    value, copy, first, second = two_streams()
    with torch.cuda.stream(first):
        torch.cuda._sleep(400_000_000)
        value.fill_(7)
    with torch.cuda.stream(second):
        copy.copy_(value)
    torch.cuda.synchronize()
    assert copy.item() == 0
