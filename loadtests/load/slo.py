"""Limits that a sweep must keep, as a pipeline asks for them."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loadtests.load.cells import seconds, share
from loadtests.load.summary import PERCENTILES

LATENCIES: Final = ("ttft", "itl", "e2e", "prefill")
_PREFIX = "slo_"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--slo-ttft-p99 500ms` for every latency and percentile, and `--slo-error-rate 1%`."""
    group = parser.add_argument_group("SLOs", "exit code 1 where a cell misses one")
    for metric in LATENCIES:
        for which in PERCENTILES:
            group.add_argument(
                f"--slo-{metric}-p{which}", type=checked(seconds), metavar="TIME",
                help=f"percentile {which} of {metric} at most, e.g. 500ms",
            )  # fmt: skip
    group.add_argument(
        "--slo-error-rate", type=checked(share), metavar="SHARE",
        help="failed requests at most, e.g. 1%%",
    )  # fmt: skip


def checked(parse: Any) -> Any:
    """`parse` as argparse wants it: its message is shown."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def given(arguments: argparse.Namespace) -> dict[str, float]:
    """Name of each limit that was given (`ttft_p99`, `error_rate`) -> its value."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in vars(arguments).items()
        if name.startswith(_PREFIX) and value is not None
    }


def per_request(limits: Mapping[str, float]) -> dict[str, float]:
    """Metric -> what a single request must stay within to be good: the widest limit on it."""
    widest: dict[str, float] = {}
    for name, limit in limits.items():
        metric, _, which = name.rpartition("_p")
        if which.isdigit():
            widest[metric] = max(limit, widest.get(metric, 0.0))
    return widest


def missed(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> list[str]:
    """A line for each limit that a cell misses; what was not measured is missed too."""
    lines = []
    for row in rows:
        for name, limit in limits.items():
            value = row[name]
            where = f"{row['budget']} @ {row['load']}"
            if value is None:
                lines.append(f"{where}: must be at most {told(name, limit)}, was not measured")
            elif value > limit:
                lines.append(
                    f"{where}: must be at most {told(name, limit)}, was {told(name, value)}"
                )
    return lines


def told(name: str, value: float) -> str:
    """`ttft p99 500 ms`."""
    number = f"{value:.2%}" if name == "error_rate" else f"{1000 * value:.0f} ms"
    return f"{name.replace('_', ' ')} {number}"
