"""Time of scoring and selection."""

import time

import pytest
import torch

from hiprune_vllm.pruning.clock import Stopwatch

CPU = torch.device("cpu")


def test_blocks_add_up_to_one_lap_each():
    clock = Stopwatch()
    assert clock.lap() == []
    for _ in range(2):
        for _ in range(2):
            with clock.running(CPU):
                time.sleep(0.02)
        (seconds,) = clock.lap()
        assert 0.04 <= seconds < 1
    assert clock.lap() == []


class Event:
    """A device's event that has passed once somebody says so."""

    passed = False

    def query(self):
        return Event.passed

    def elapsed_time(self, other):
        return 5.0  # ms


def test_a_device_is_never_waited_for():
    clock = Stopwatch()
    clock._events = [(Event(), Event())] * 2
    assert clock.lap() == []
    Event.passed = True
    assert clock.lap() == [pytest.approx(0.01)]


def test_a_devices_blocks_are_timed_by_its_events(monkeypatch):
    class Recorded(Event):
        def __init__(self, *, enable_timing):
            self.recorded = not enable_timing

        def record(self):
            self.recorded = True

        def elapsed_time(self, other):
            assert self.recorded
            assert other.recorded
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    Event.passed = False
    clock = Stopwatch()
    with clock.running(torch.device("cuda")):
        pass
    assert clock.lap() == []
    Event.passed = True
    assert clock.lap() == [pytest.approx(0.003)]
