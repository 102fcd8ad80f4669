"""The benchmarks by name, each to be run in a process of its own."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from loadtests.bench import report
from loadtests.bench.measure import Run, machine

BENCHMARKS = {
    "a": ("encoders", "clip"),
    "b": ("encoders", "qwen"),
    "c": ("prefill", "floor"),
    "d": ("serving", "throughput"),
    "e": ("prefill", "table6"),
    "f": ("serving", "overhead"),
}


def measure(name: str, how: Run) -> None:
    """Runs one benchmark and adds what it found to the report."""
    module, function = BENCHMARKS[name]
    benchmark: Callable[..., list[dict[str, Any]]] = getattr(
        import_module(f"loadtests.bench.{module}"), function
    )
    report.merge(how.folder, benchmark(how), machine(how.device) | {"dtype": how.dtype})
