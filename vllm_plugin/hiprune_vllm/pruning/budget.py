"""How many tokens stay: integers only, decided before any pixel is encoded."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

NEIGHBOURS_PER_ANCHOR: Final = {"none": 0, "row": 2, "cross": 4, "square": 8}
"""Buffer scheme -> buffers per anchor, the `b` of `N_a = round(alpha * N' / (1 + b))` (Table 5)."""

BUFFERS: Final = tuple(NEIGHBOURS_PER_ANCHOR)
SCORES: Final = ("global", "cls")
METHODS: Final = ("hiprune", "attention", "random", "stride")

BUDGET_INTS: Final = 8
"""Length of `ImageBudget.to_ints`."""

_FULL: Final = "full"
_METHOD_CODES: Final = (*METHODS, _FULL)
_FLOAT, _FLOAT_BITS = struct.Struct("<d"), struct.Struct("<q")


def tokens_kept(full: int, *, tokens: int | None = None, ratio: float | None = None) -> int:
    """N': how many of an image's visual tokens stay.

    Args:
        full: N, visual tokens of the unpruned image, >= 1.
        tokens: absolute budget, >= 1; more than `full` means all.
        ratio: share kept in (0, 1]; `round(ratio * full)`, at least 1.

    Returns:
        An integer in [1, full]; `full` where neither budget is given.
    """
    if tokens is not None:
        return min(tokens, full)
    if ratio is not None:
        return min(max(1, round(ratio * full)), full)
    return full


def anchor_count(keep: int, alpha: float, buffer: str) -> int:
    """N_a: how many anchors fit into `alpha * keep` tokens together with their buffers.

    Python's `round` (half to even), as in Algorithm 1 and the reference code; the ceiling in the
    text of Eq. 4 is not what either computes.

    Args:
        keep: N', >= 1.
        alpha: share of anchors and buffers together, in [0, 1].
        buffer: a key of `NEIGHBOURS_PER_ANCHOR`.

    Returns:
        An integer in [0, keep].
    """
    return round(alpha * keep / (1 + NEIGHBOURS_PER_ANCHOR[buffer]))


def spread(total: int, weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Splits `total` in proportion to `weights`, never more than `caps` in one place.

    Largest remainder, ties to the lower index; what a full place cannot take goes to the others
    in the same proportion.

    Args:
        total: in [0, sum(caps)].
        weights: >= 0 each; places of weight 0 get nothing.
        caps: >= 0 each.

    Returns:
        One integer in [0, cap] a place, adding up to exactly `total`.

    Raises:
        ValueError: `total` does not fit.
    """
    if not 0 <= total <= sum(cap for cap, weight in zip(caps, weights, strict=True) if weight):
        raise ValueError(f"{total} does not fit into {list(caps)} with weights {list(weights)}")
    shares = [0] * len(weights)
    open_places = [i for i, weight in enumerate(weights) if weight]
    left = total
    while open_places:
        whole = sum(weights[i] for i in open_places)
        over = [i for i in open_places if left * weights[i] >= caps[i] * whole]
        if not over:
            break
        # Filling up the fullest ones only raises the others' quotas, so all of these stay full.
        for i in over:
            shares[i] = caps[i]
        left -= sum(caps[i] for i in over)
        open_places = [i for i in open_places if i not in over]
    if not open_places:
        return shares
    whole = sum(weights[i] for i in open_places)
    for i in open_places:
        shares[i] = left * weights[i] // whole
    rest = left - sum(shares[i] for i in open_places)
    for i in sorted(open_places, key=lambda i: (-(left * weights[i] % whole), i))[:rest]:
        shares[i] += 1
    return shares


def spread_evenly(total: int, places: int) -> list[int]:
    """Splits `total` over places in a row so that no stretch of them gets more than its share.

    Where there are more places than `total`, those that get one lie evenly among the others.

    Args:
        total: >= 0.
        places: >= 1.

    Returns:
        One integer a place, each `total / places` rounded up or down, adding up to `total`.
    """
    ends = [(2 * i * total + places) // (2 * places) for i in range(places + 1)]
    return [stop - start for start, stop in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class ImageBudget:
    """Everything the worker has to know about one image or video: plain numbers and names.

    Two requests that keep the same tokens for the same reason have equal budgets, whichever
    spelling asked for it, so that they share cache entries. Build one with `ImageBudget.of`.

    Attributes:
        full: tokens of the unpruned image.
        keep: N', tokens that stay.
        alpha: share of anchors and buffers together; 0.0 where the object layer plays no part.
        buffer: buffer scheme; `none` without anchors.
        object_layer: 1-based layer that anchors and buffers are scored on; 0 without anchors.
        score: `global` or `cls`; `global` where no attention is used.
        method: `hiprune`, `attention`, `random`, `stride`, or `full` for an unpruned image.
        seed: seeds `random`, in [0, 2**63); 0 otherwise.
    """

    full: int
    keep: int
    alpha: float
    buffer: str
    object_layer: int
    score: str
    method: str
    seed: int = 0

    @classmethod
    def of(
        cls,
        full: int,
        keep: int,
        *,
        method: str,
        alpha: float,
        buffer: str,
        object_layer: int,
        score: str,
        seed: int = 0,
    ) -> "ImageBudget":
        """Canonical budget of an image with `full` tokens of which `keep` stay."""
        if keep >= full:
            return cls(full, full, 0.0, "none", 0, "global", _FULL)
        if method == "random":
            return cls(full, keep, 0.0, "none", 0, "global", method, seed)
        if method == "stride":
            return cls(full, keep, 0.0, "none", 0, "global", method)
        if method == "attention" or anchor_count(keep, alpha, buffer) == 0:
            # Registers only. A part of the image never has more anchors than the whole.
            return cls(full, keep, 0.0, "none", 0, score, "attention")
        return cls(full, keep, alpha, buffer, object_layer, score, "hiprune")

    @property
    def is_full(self) -> bool:
        return self.method == _FULL

    @property
    def anchors(self) -> int:
        """N_a."""
        return anchor_count(self.keep, self.alpha, self.buffer)

    @property
    def needs_attention(self) -> bool:
        """Whether the output layer has to be scored for this image."""
        return self.method in ("hiprune", "attention")

    def part(self, full: int, keep: int, number: int) -> "ImageBudget":
        """Budget of the image's part `number` (a tile), which has `full` tokens of its own."""
        return ImageBudget.of(
            full,
            keep,
            method=self.method,
            alpha=self.alpha,
            buffer=self.buffer,
            object_layer=self.object_layer,
            score=self.score,
            seed=(self.seed + number) % 2**63,
        )

    def to_ints(self) -> tuple[int, ...]:
        """The budget as integers in [0, 2**63), the row that travels to the worker."""
        return (
            self.full,
            self.keep,
            _FLOAT_BITS.unpack(_FLOAT.pack(self.alpha))[0],
            BUFFERS.index(self.buffer),
            self.object_layer,
            SCORES.index(self.score),
            _METHOD_CODES.index(self.method),
            self.seed,
        )

    @classmethod
    def from_ints(cls, row: Sequence[int]) -> "ImageBudget":
        """Inverse of `to_ints`."""
        full, keep, alpha, buffer, object_layer, score, method, seed = row
        return cls(
            full,
            keep,
            _FLOAT.unpack(_FLOAT_BITS.pack(alpha))[0],
            BUFFERS[buffer],
            object_layer,
            SCORES[score],
            _METHOD_CODES[method],
            seed,
        )
