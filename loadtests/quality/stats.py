"""Accuracy and its uncertainty where several questions belong to one picture.

Answers about one picture are not independent, so pictures, not questions, are drawn again: a
cluster bootstrap with a fixed seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95
_SEED = 12345

Marks = Mapping[int, tuple[float, int]]
"""Picture -> (answers that were right, questions asked)."""


@dataclass(frozen=True)
class Estimate:
    """A share or a difference of shares in [-1, 1] with its interval at LEVEL."""

    value: float
    low: float
    high: float
    questions: int
    pictures: int


def accuracy(marks: Marks) -> Estimate:
    """Share of right answers.

    Raises:
        ValueError: there are no answers.
    """
    right, asked = _columns(marks, sorted(marks))
    draws = _draws(len(marks))
    low, high = _interval((draws @ right) / (draws @ asked))
    return Estimate(right.sum() / asked.sum(), low, high, int(asked.sum()), len(marks))


def difference(first: Marks, second: Marks) -> Estimate:
    """Accuracy of `first` minus that of `second` on the pictures that both have answered.

    The same pictures are drawn for both, so what makes a picture hard for both falls out.

    Raises:
        ValueError: no picture is in both.
    """
    both = sorted(set(first) & set(second))
    right_first, asked_first = _columns(first, both)
    right_second, asked_second = _columns(second, both)
    draws = _draws(len(both))
    spread = (draws @ right_first) / (draws @ asked_first) - (draws @ right_second) / (
        draws @ asked_second
    )
    low, high = _interval(spread)
    value = right_first.sum() / asked_first.sum() - right_second.sum() / asked_second.sum()
    return Estimate(value, low, high, int(asked_first.sum()), len(both))


def verdict(estimate: Estimate) -> str:
    """What a difference's interval says."""
    if estimate.low > 0:
        return "better"
    return "worse" if estimate.high < 0 else "no difference shown"


def pooled(several: Sequence[Marks]) -> dict[int, tuple[float, int]]:
    """Marks of several draws together: a picture's questions stay one cluster."""
    sums: dict[int, tuple[float, int]] = {}
    for marks in several:
        for picture, (right, asked) in marks.items():
            before = sums.get(picture, (0.0, 0))
            sums[picture] = (before[0] + right, before[1] + asked)
    return sums


def _columns(marks: Marks, pictures: list[int]) -> tuple[np.ndarray, np.ndarray]:
    if not pictures:
        raise ValueError("no answers to count")
    table = np.array([marks[picture] for picture in pictures], dtype=float)
    return table[:, 0], table[:, 1]


def _draws(pictures: int) -> np.ndarray:
    """(DRAWS, pictures) how often each picture is drawn."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=DRAWS)


def _interval(values: np.ndarray) -> tuple[float, float]:
    edge = (1 - LEVEL) / 2
    low, high = np.quantile(values, (edge, 1 - edge))
    return float(low), float(high)
