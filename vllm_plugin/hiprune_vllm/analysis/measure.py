"""Numbers about layers, from their scores: pure numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOP = 0.1
"""Share of tokens that count as highly attended (Table 1 takes the top 10 %)."""
COVERED = 0.12
"""A token lies on an object where at least this share of its area does."""
_CLEAR = 1.5
"""A layer looks at objects where its top tokens hit them this much more often than chance."""
_DIP = 0.95
"""Dispersion counts as low below this share of the median layer's."""


def ranks(scores: np.ndarray) -> np.ndarray:
    """(layers, tokens) rank of every token in its layer, 0 for the least attended."""
    flat = scores.reshape(len(scores), -1)
    return np.argsort(np.argsort(flat, axis=1, kind="stable"), axis=1, kind="stable")


def rank_similarity(scores: np.ndarray) -> np.ndarray:
    """(layers, layers) Spearman correlation of one picture's scores (Figure 3)."""
    found: np.ndarray = np.corrcoef(ranks(scores))
    return np.atleast_2d(found)


def top_tokens(scores: np.ndarray, share: float = TOP) -> np.ndarray:
    """(layers, count) flat indices of the most attended tokens, at least two."""
    flat = scores.reshape(len(scores), -1)
    count = max(2, round(share * flat.shape[1]))
    return np.argsort(-flat, axis=1, kind="stable")[:, :count]


def dispersion(scores: np.ndarray, share: float = TOP) -> np.ndarray:
    """(layers,) mean distance between the top tokens of one picture (Figure 4).

    In units of the mean distance between all tokens of the grid, so that grids compare: 1 means
    scattered as if drawn at random.
    """
    _, rows, columns = scores.shape
    every = np.stack(np.divmod(np.arange(rows * columns), columns), 1).astype(float)
    return np.array(
        [_mean_distance(every[top]) for top in top_tokens(scores, share)]
    ) / _mean_distance(every)


def _mean_distance(points: np.ndarray) -> float:
    """Mean distance over all pairs of (n, 2) points."""
    total = sum(float(np.linalg.norm(points - point, axis=1).sum()) for point in points)
    return total / (len(points) * (len(points) - 1))


def overlap(scores: np.ndarray, coverage: np.ndarray, share: float = TOP) -> np.ndarray:
    """(layers,) share of the top tokens that lie on an object (Table 1)."""
    on_object = (coverage >= COVERED).flatten()
    found: np.ndarray = on_object[top_tokens(scores, share)].mean(1)
    return found


@dataclass(frozen=True)
class Proposal:
    """An object layer and why.

    Attributes:
        layer: 1-based.
        reason: in words, with the numbers.
        sure: whether the numbers single it out.
    """

    layer: int
    reason: str
    sure: bool


def propose_by_overlap(overlaps: np.ndarray, chance: np.ndarray, default: int) -> Proposal:
    """The layer below the output layer whose top tokens hit objects most often.

    Args:
        overlaps: (pictures, layers), the last layer is the output layer.
        chance: (pictures,) share of tokens on objects.
        default: 1-based, taken among layers that cannot be told from the best.
    """
    lift = overlaps.mean(0)[:-1] / max(float(chance.mean()), 1e-9)
    best = int(lift.argmax())
    behind = overlaps[:, best : best + 1] - overlaps[:, :-1]
    error = behind.std(0, ddof=1) / len(overlaps) ** 0.5 if len(overlaps) > 1 else np.inf
    near = np.nonzero(behind.mean(0) <= 2 * error)[0] if len(overlaps) > 1 else np.array([best])
    chosen = int(min(near, key=lambda i: (abs(i + 1 - default), i)))
    clear = bool(lift[chosen] >= _CLEAR)
    others = [int(i) + 1 for i in near if i != chosen]
    told = (
        f"its most attended tokens lie on objects {lift[chosen]:.1f} times as often as chance "
        f"(best: layer {best + 1} with {lift[best]:.1f}; default: layer {default})"
    )
    if others:
        told += f"; layers {', '.join(map(str, others))} cannot be told from the best"
    if not clear:
        told += "; that is hardly more than chance, so no layer looks at objects"
    return Proposal(chosen + 1, told, clear)


def propose_by_dispersion(dispersions: np.ndarray, default: int) -> Proposal:
    """Without masks: where the top tokens lie closest together, in the middle of the encoder.

    The paper finds objects in the middle section, before dispersion jumps up in the deep one
    (section 4.1, Figure 4). Attention that is gathered need not be on objects, so this is a hint.

    Args:
        dispersions: (pictures, layers), the last layer is the output layer.
        default: 1-based, at the same depth as the paper's choice; the search is around it.
    """
    mean = dispersions.mean(0)
    first = max(1, default // 2)
    last = max(first, min(len(mean) - 1, round(default * 1.75)))
    middle = range(first, last + 1)
    chosen = min(middle, key=lambda layer: (mean[layer - 1], abs(layer - default)))
    median = float(np.median(mean))
    clear = bool(mean[chosen - 1] < _DIP * median)
    told = (
        f"its most attended tokens lie closest together of layers {first} to {last}: dispersion "
        f"{mean[chosen - 1]:.2f} (1 is random), median of all layers {median:.2f}, default layer "
        f"{default} has {mean[default - 1]:.2f}"
    )
    told += (
        "; gathered attention need not be on objects, so check with masks"
        if clear
        else "; no layer stands out, so the default is as good"
    )
    return Proposal(chosen if clear else default, told, clear)


def sections(dispersions: Sequence[float]) -> int:
    """1-based layer at which the deep section begins: after the largest rise of dispersion."""
    rises = np.diff(np.asarray(dispersions))
    return int(rises.argmax()) + 2 if len(rises) else 1
