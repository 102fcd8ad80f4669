"""An image while it is encoded: what is to be kept of it, what was, and how it was chosen."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.select import Region


def frames_of(video: object) -> Any:
    """Frames of a video as vLLM's parser has it, with what is known of it or without.

    `VideoProcessorItems` does not look behind that pair when it counts.
    """
    return video[0] if isinstance(video, tuple) else video


class TracedPart(NamedTuple):
    """How the tokens of one part (tile) of an image were chosen.

    Attributes:
        number: of the tile, 0 for an image in one part.
        budget: of this part.
        columns: tokens in a row of the grid.
        region: the part of the grid that may be kept; None for all of it.
        object_scores, output_scores: (N,) fp32.
        kept: (budget.keep,) int64, ascending.
    """

    number: int
    budget: ImageBudget
    columns: int
    region: Region | None
    object_scores: torch.Tensor
    output_scores: torch.Tensor
    kept: torch.Tensor


@dataclass
class Trace:
    """Notes how an image is pruned while that happens.

    Attributes:
        layer: object layer, 1-based, whose scores are wanted whatever the budget needs.
        score: kind of score.
        parts: filled in; parts that keep nothing are left out.
    """

    layer: int
    score: str
    parts: list[TracedPart] = field(default_factory=list)


class Part(NamedTuple):
    """What is to be chosen from one part (tile) of an image.

    Attributes:
        number: of the tile, 0 for an image in one part.
        full: tokens that it has.
        region: where in its grid tokens may be kept.
        keep: how many are kept.
    """

    number: int
    full: int
    region: Region
    keep: int


@dataclass(frozen=True)
class Selection:
    """What was kept of an image.

    Attributes:
        parts: that it was chosen from, those that keep something.
        kept: indices in each of them, (keep,) int64.
    """

    parts: tuple[Part, ...]
    kept: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Image:
    """One image to encode.

    Attributes:
        budget: what to keep.
        known: what was kept before of the image that is believed to be this one; None for one that
            is new.
        trace: notes how, where somebody asks.
    """

    budget: ImageBudget
    known: Selection | None = None
    trace: Trace | None = None

    def known_of(self, parts: tuple[Part, ...]) -> tuple[torch.Tensor, ...] | None:
        """Indices kept before, one tensor for each of `parts`; None where there are none.

        A selection from other parts is none, whoever remembered it: another picture under the same
        `uuid` may have other tiles, and rows that do not fit the prompt would end the engine. The
        plans are compared and not the indices, which are on the device.
        """
        known = self.known
        return known.kept if known is not None and known.parts == parts else None


@dataclass(frozen=True)
class Encoded:
    """One encoded image.

    Attributes:
        embeddings: (budget.keep, width), what the language model sees.
        selection: to be remembered; None for an unpruned image.
    """

    embeddings: torch.Tensor
    selection: Selection | None
