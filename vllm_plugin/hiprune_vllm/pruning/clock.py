"""How long encoding, scoring and selecting take, on whatever device they run."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch


class Stopwatch:
    """Adds up the time of blocks; one for a process, which encodes one batch at a time.

    On an accelerator the blocks are only enqueued when they end here, so their time is taken by
    events that are read once they have passed: nothing ever waits for the device.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._pending: deque[tuple[float, list[tuple[Any, Any]]]] = deque()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Takes the time of a block of work on `device`."""
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        began = perf_counter()
        yield
        self._seconds += perf_counter() - began

    def lap(self) -> list[float]:
        """Ends a batch.

        Returns:
            Seconds of the batches that are known by now, one number a batch that took any.
        """
        if self._seconds or self._events:
            self._pending.append((self._seconds, self._events))
            self._seconds, self._events = 0.0, []
        known = []
        while self._pending and all(end.query() for _, end in self._pending[0][1]):
            seconds, events = self._pending.popleft()
            known.append(seconds + sum(a.elapsed_time(b) for a, b in events) / 1000)
        return known


SELECTION = Stopwatch()
"""Scoring of two layers and selection, in this process."""
ENCODER = Stopwatch()
"""The whole vision encoder, selection and projector included, in this process."""
