"""What changed since an earlier sweep, and what of that is more than noise.

Neighbouring requests share their queue, so not single requests but blocks of them, in the order
in which they ended, are drawn again (a block bootstrap with a fixed seed).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

DRAWS = 2000
LEVEL = 0.99
"""Many cells are compared at once: at 95 % one in twenty would seem to have changed."""
_SEED = 12345
_BINS = 20
_FEWEST = 100
"""Requests below which a 99th percentile is one or two requests, and is not compared."""
_TOO_FEW = 20
"""Requests below which drawing them again shows less spread than there is."""

COMPARED: Final = (
    ("ttft", 50), ("ttft", 99), ("prefill", 50), ("itl", 50), ("e2e", 50),
)  # fmt: skip
TOO_FEW: Final = "too few requests to tell"
NAMES: Final = {
    "ttft": "time to first token",
    "itl": "between tokens",
    "e2e": "whole request",
    "prefill": "prefill",
    "rps": "requests/s",
}


def read(path: Path) -> dict[str, Any]:
    """An earlier sweep's `results.json`.

    Raises:
        ValueError: it is not there, or not that.
    """
    try:
        told = json.loads(path.read_text())
        assert isinstance(told["facts"], dict)
        for row in told["cells"]:
            assert {"budget", "load"} <= row.keys()
            assert len(row["samples"]) == len(row["windows"])
            for kept in row["samples"]:
                assert {"ended", *(metric for metric, _ in COMPARED)} <= kept.keys()
    except OSError as error:
        raise ValueError(f"must be an earlier results.json, {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise ValueError(f"must be an earlier results.json, {path} is something else") from None
    return dict(told)


def compare(
    earlier: Mapping[str, Any], now: Mapping[str, Any], noise: float
) -> list[dict[str, Any]]:
    """One line for every metric of every cell that both sweeps have.

    Args:
        earlier, now: contents of two JSON reports.
        noise: change that two runs of the same may show, as a share.

    Returns:
        `change` (0.1 is 10 % more), its interval, `noise` as it was taken for this line (that of
        the rounds where it is larger) and the `verdict`.
    """
    before = {(row["budget"], row["load"]): row for row in earlier["cells"]}
    found = []
    for row in now["cells"]:
        old = before.get((row["budget"], row["load"]))
        if old is None:
            continue
        where = {"budget": row["budget"], "load": row["load"]}
        for metric, which in COMPARED:
            pair = [[rounds[metric] for rounds in one["samples"]] for one in (old, row)]
            sizes = [sum(map(len, rounds)) for rounds in pair]
            if min(sizes) == 0 or (which == 99 and min(sizes) < _FEWEST):
                continue
            draws = [_percentiles(rounds, which, seed) for seed, rounds in enumerate(pair)]
            floor = max(noise, *(_spread(rounds, which) for rounds in pair))
            found.append(where | _line(metric, f"p{which}", draws, floor, sizes))
        rates = [_rates(one, seed) for seed, one in enumerate((old, row))]
        if all(len(rate) for rate in rates):
            sizes = [sum(len(rounds["ended"]) for rounds in one["samples"]) for one in (old, row)]
            floor = max(noise, *(_rate_spread(one) for one in (old, row)))
            found.append(where | _line("rps", "", rates, floor, sizes))
    return found


def _line(
    metric: str, which: str, draws: Sequence[np.ndarray], noise: float, sizes: Sequence[int]
) -> dict[str, Any]:
    """The first of the draws are the numbers as they were measured."""
    old, new = draws
    change = float(new[0] / old[0] - 1)
    edge = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(new[1:] / old[1:] - 1, (edge, 100 - edge))
    return {
        "metric": f"{NAMES[metric]} {which}".strip(),
        "before": float(old[0]),
        "now": float(new[0]),
        "change": change,
        "low": float(low),
        "high": float(high),
        "noise": noise,
        "requests": list(sizes),
        "verdict": TOO_FEW
        if min(sizes) < _TOO_FEW
        else verdict(float(low), float(high), noise, more_is_better=metric == "rps"),
    }


def verdict(low: float, high: float, noise: float, *, more_is_better: bool) -> str:
    """What a change's interval says where changes up to `noise` are none."""
    if low > noise:
        return "better" if more_is_better else "worse"
    if high < -noise:
        return "worse" if more_is_better else "better"
    return "no change shown"


def _percentiles(rounds: Sequence[Sequence[float]], which: float, seed: int) -> np.ndarray:
    """The percentile as measured, then that of each draw."""
    blocks: list[np.ndarray] = []
    for numbers in rounds:
        if numbers:
            count = max(1, round(len(numbers) ** 0.5))
            blocks += np.array_split(np.array(numbers), count)
    rng = np.random.default_rng((_SEED, seed))
    drawn = [np.percentile(np.concatenate(blocks), which)]
    for _ in range(DRAWS):
        chosen = rng.integers(len(blocks), size=len(blocks))
        drawn.append(np.percentile(np.concatenate([blocks[i] for i in chosen]), which))
    return np.array(drawn)


def _rates(row: Mapping[str, Any], seed: int) -> np.ndarray:
    """Requests a second as measured, then of each draw of parts of the window."""
    parts: list[float] = []
    for rounds, seconds in _measured(row):
        counts, _ = np.histogram(rounds["ended"], bins=_BINS, range=(0, seconds))
        parts += list(counts * _BINS / seconds)
    if not sum(parts):
        return np.array([])
    rng = np.random.default_rng((_SEED, seed))
    drawn = rng.choice(parts, size=(DRAWS, len(parts))).mean(axis=1)
    rates = np.concatenate([[np.mean(parts)], drawn])
    return np.asarray(np.maximum(rates, 1e-9))  # a draw may be of empty parts alone


def _spread(rounds: Sequence[Sequence[float]], which: float) -> float:
    """How far the rounds of one sweep lie apart, as a share of their mean."""
    found = [float(np.percentile(numbers, which)) for numbers in rounds if numbers]
    return (max(found) - min(found)) / float(np.mean(found)) if len(found) > 1 else 0.0


def _measured(row: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float]]:
    """(samples, seconds) of the rounds that were measured at all."""
    pairs = zip(row["samples"], row["windows"], strict=True)
    return [(rounds, seconds) for rounds, seconds in pairs if seconds > 0]


def _rate_spread(row: Mapping[str, Any]) -> float:
    rates = [len(rounds["ended"]) / seconds for rounds, seconds in _measured(row)]
    return (max(rates) - min(rates)) / float(np.mean(rates)) if len(rates) > 1 else 0.0


def differences(earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Facts in which two sweeps differ, other than when and how they were run."""
    free = ("date", "command", "took")
    names = [name for name in {**earlier, **now} if name not in free]
    return [
        f"{name}: {earlier.get(name, 'not told')} then, {now.get(name, 'not told')} now"
        for name in names
        if earlier.get(name) != now.get(name)
    ]
