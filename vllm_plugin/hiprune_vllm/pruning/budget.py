"""How many tokens stay: integers only, decided before any pixel is encoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

NEIGHBOURS_PER_ANCHOR: Final = {"none": 0, "row": 2, "cross": 4, "square": 8}
"""Buffer scheme -> buffers per anchor, the `b` of `N_a = round(alpha * N' / (1 + b))` (Table 5)."""

BUFFERS: Final = tuple(NEIGHBOURS_PER_ANCHOR)
SCORES: Final = ("global", "cls")
METHODS: Final = ("hiprune", "attention", "random", "stride")

_FULL: Final = "full"
_METHOD_CODES: Final = (*METHODS, _FULL)


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


@dataclass(frozen=True, slots=True)
class ImageBudget:
    """Everything the worker has to know about one image: plain integers and names.

    Two requests that keep the same tokens for the same reason have equal budgets, whichever
    spelling asked for it, so that they share cache entries. Build one with `ImageBudget.of`.

    Attributes:
        keep: N', tokens that stay.
        anchors: N_a, anchors among them; 0 where the object layer plays no part.
        buffer: buffer scheme; `none` without anchors.
        object_layer: 1-based layer that anchors and buffers are scored on; 0 without anchors.
        score: `global` or `cls`; `global` where no attention is used.
        method: `hiprune`, `attention`, `random`, `stride`, or `full` for an unpruned image.
        seed: seeds `random`, in [0, 2**63); 0 otherwise.
    """

    keep: int
    anchors: int
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
            return cls(full, 0, "none", 0, "global", _FULL)
        if method in ("random", "stride"):
            return cls(keep, 0, "none", 0, "global", method, seed if method == "random" else 0)
        anchors = anchor_count(keep, alpha, buffer) if method == "hiprune" else 0
        if anchors == 0:  # registers only: the very same computation as `attention`
            return cls(keep, 0, "none", 0, score, "attention")
        return cls(keep, anchors, buffer, object_layer, score, "hiprune")

    @property
    def is_full(self) -> bool:
        return self.method == _FULL

    @property
    def needs_attention(self) -> bool:
        """Whether the output layer has to be scored for this image."""
        return self.method in ("hiprune", "attention")

    def to_ints(self) -> tuple[int, ...]:
        """The budget as seven integers below 2**63, the row that travels to the worker."""
        return (
            self.keep,
            self.anchors,
            BUFFERS.index(self.buffer),
            self.object_layer,
            SCORES.index(self.score),
            _METHOD_CODES.index(self.method),
            self.seed,
        )

    @classmethod
    def from_ints(cls, row: Sequence[int]) -> "ImageBudget":
        """Inverse of `to_ints`."""
        keep, anchors, buffer, object_layer, score, method, seed = row
        return cls(
            keep,
            anchors,
            BUFFERS[buffer],
            object_layer,
            SCORES[score],
            _METHOD_CODES[method],
            seed,
        )
