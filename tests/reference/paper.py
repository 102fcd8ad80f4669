"""HiPrune written down as slowly and plainly as the paper states it (section 3.2, Eq. 2-8).

Python lists and loops, nothing shared with the implementation: the oracle of the tests.
"""

from collections.abc import Sequence

import torch

PER_ANCHOR = {"none": 0, "row": 2, "cross": 4, "square": 8}


def attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) of one image, (H, T, D) -> (H, T, T), in float64."""
    query, key = query.double(), key.double()
    return torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)


def scores(attention: torch.Tensor, *, has_cls: bool, cls_only: bool = False) -> list[float]:
    """a_j of Eq. 2-3 from the full (H, T, T) attention of one image."""
    attending = attention[:, :1] if cls_only else attention
    received: list[float] = (attending.double().sum(dim=1).sum(dim=0) / len(attention)).tolist()
    return received[1:] if has_cls else received


def neighbours(index: int, columns: int, count: int, scheme: str) -> list[int]:
    row = [index - 1, index + 1]
    cross = [*row, index - columns, index + columns]
    square = [
        *cross,
        index - columns - 1,
        index - columns + 1,
        index + columns - 1,
        index + columns + 1,
    ]
    found = {"none": [], "row": row, "cross": cross, "square": square}[scheme]
    return [i for i in found if 0 <= i < count]


def best(candidates: Sequence[int], scores: Sequence[float], how_many: int) -> list[int]:
    return sorted(candidates, key=lambda i: (-scores[i], i))[:how_many]


def select(
    object_scores: Sequence[float],
    output_scores: Sequence[float],
    *,
    keep: int,
    alpha: float,
    columns: int,
    buffer: str,
    allowed: Sequence[int] | None = None,
) -> list[int]:
    """`allowed`: tokens that may be kept (section 4: none of the anyres grid's padding)."""
    count = len(output_scores)
    candidates = list(range(count)) if allowed is None else list(allowed)
    wanted = round(alpha * keep / (1 + PER_ANCHOR[buffer]))
    anchors = best(candidates, object_scores, wanted)
    around = {j for i in anchors for j in neighbours(i, columns, count, buffer)} - set(anchors)
    buffers = best(sorted(around & set(candidates)), object_scores, keep - len(anchors))
    chosen = set(anchors) | set(buffers)
    rest = [i for i in candidates if i not in chosen]
    registers = best(rest, output_scores, keep - len(chosen))
    return sorted(chosen | set(registers))
