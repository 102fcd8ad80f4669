"""The benchmarks by name, each to be run in a process of its own."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from loadtests.bench import report
from loadtests.bench.measure import Run, machine

BENCHMARKS = {
    "a": ("encoders", "clip"),
    "b": ("encoders", "qwen"),
    "c": ("prefill", "floor"),
    "d": ("serving", "throughput"),
    "e": ("prefill", "table6"),
    "f": ("serving", "overhead"),
    "g": ("prefill", "tiles"),
}


def measure(name: str, how: Run) -> None:
    """Runs one benchmark and adds what it found to the report."""
    if how.clock == "cpu":
        torch.set_num_threads(1)
    module, function = BENCHMARKS[name]
    benchmark: Callable[..., list[dict[str, Any]]] = getattr(
        import_module(f"loadtests.bench.{module}"), function
    )
    rows = benchmark(how)
    clock = "wall" if module == "serving" else how.clock
    report.merge(how.folder, rows, machine(how.device) | {"dtype": how.dtype, "clock": clock})
