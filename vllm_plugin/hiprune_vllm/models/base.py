"""What a model family has to say about itself, and what every family needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from hiprune_vllm.plan import Encoder, TokenCount
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.clock import SELECTION
from hiprune_vllm.pruning.record import SumOverRanks
from hiprune_vllm.pruning.select import Region, kept_indices

Colour = tuple[float, float, float]
"""Red, green, blue."""


class UnsupportedCheckpoint(ValueError):
    """A checkpoint of a known family whose encoder cannot be pruned; the message says why.

    It is served unpruned, and a `hiprune` object is refused with the message.
    """


class TooShallow(RuntimeError):
    """An encoder without a layer to take anchors from: the engine does not start.

    No ValueError: vLLM takes one at this point for "has no images" and starts without them.
    """

    def __init__(self, object_layer: int, output_layer: int, depth: int) -> None:
        super().__init__(
            f"hiprune-vllm needs an object layer below the output layer, but this checkpoint's "
            f"encoder of depth {depth} has object layer {object_layer} and output layer "
            f"{output_layer}. Serve a checkpoint with more layers, or leave this plugin out by "
            "naming the others in VLLM_PLUGINS."
        )


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


class View(NamedTuple):
    """Pixels that the encoder saw as one part of an image.

    Attributes:
        number: of the part, as in `TracedPart`.
        left, top: where it belongs in a picture of the whole, pixels.
        pixels: (rows, columns, 3) float, in [0, 1] where the picture is.
    """

    number: int
    left: int
    top: int
    pixels: torch.Tensor


@dataclass(frozen=True)
class Encoded:
    """One encoded image.

    Attributes:
        embeddings: (budget.keep, width), what the language model sees.
        selection: to be remembered; None for an unpruned image.
    """

    embeddings: torch.Tensor
    selection: Selection | None


class FamilyAdapter(Protocol):
    """A model family. All methods are stateless.

    Attributes:
        mrope: whether tokens have 3-D rotary positions in the language model (M-RoPE), so that the
            kept ones bring theirs along (section 4).
    """

    mrope: bool

    def encoder(self, hf_config: Any) -> Encoder:
        """Reads what the encoder allows from the checkpoint's configuration.

        Raises:
            UnsupportedCheckpoint: the encoder cannot be pruned.
        """
        ...

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        """Visual tokens of `images[index]`, by vLLM's own arithmetic in its processing `info`.

        `options` are the processor options of the request, which may change an image's size.
        """
        ...

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        """Visual tokens that one image has by what the processor made of it.

        Counted from the inputs' shapes, to be held against `tokens` once at start-up.

        Args:
            hf_config: the checkpoint's configuration.
            inputs: the model's own multimodal inputs of one image, without a batch dimension.
        """
        ...

    def embed(
        self,
        model: Any,
        images: Sequence[Image],
        sum_over_ranks: SumOverRanks | None,
        **kwargs: object,
    ) -> list[Encoded]:
        """Encodes a batch of images and projects the kept tokens only.

        Args:
            model: the vLLM model.
            images: in the order of the inputs.
            sum_over_ranks: adds per-rank scores; None where a rank holds all heads.
            kwargs: the model's own multimodal inputs of the batch.

        Returns:
            One an image, in order.
        """
        ...

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        """The picture as the encoder saw it.

        Args:
            hf_config: the checkpoint's configuration.
            inputs: the model's own multimodal inputs of one image, without a batch dimension.
            mean, std: that its pixels were normalised by.
        """
        ...


def shown(pixels: torch.Tensor, mean: Colour, std: Colour) -> torch.Tensor:
    """(3, rows, columns) pixels as (rows, columns, 3) in [0, 1].

    They are normalised, or still bytes where vLLM's model does that itself.
    """
    picture = pixels.permute(1, 2, 0)
    if picture.dtype == torch.uint8:
        return picture / 255
    return (picture.float() * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)


def choose(
    budgets: Mapping[int, ImageBudget],
    scores: Mapping[tuple[int, str, int], torch.Tensor],
    *,
    output_layer: int,
    count: int,
    columns: int,
    device: torch.device,
    regions: Mapping[int, Region | None] | None = None,
) -> dict[int, torch.Tensor]:
    """Kept indices of pictures that all have `count` tokens.

    Pictures with the same budget are selected together: one set of kernels for all of them.

    Args:
        budgets: by picture, numbered as in `scores`.
        scores: (layer, score, picture) -> (count,).
        output_layer: 1-based.
        count, columns: the grid.
        device: of the indices.
        regions: the part of each picture that may be kept; None for all of it.

    Returns:
        A (budget.keep,) int64 tensor a picture, ascending.
    """
    with SELECTION.running(device):
        groups: dict[tuple[ImageBudget, Region | None], list[int]] = {}
        for row, budget in budgets.items():
            groups.setdefault((budget, regions[row] if regions else None), []).append(row)
        chosen: dict[int, torch.Tensor] = {}
        for (budget, region), rows in groups.items():

            def stacked(
                layer: int, budget: ImageBudget = budget, rows: list[int] = rows
            ) -> torch.Tensor:
                return torch.stack([scores[layer, budget.score, row] for row in rows])

            kept = kept_indices(
                budget,
                count=count,
                columns=columns,
                batch=len(rows),
                device=device,
                object_scores=stacked(budget.object_layer) if budget.anchors else None,
                output_scores=stacked(output_layer) if budget.needs_attention else None,
                region=region,
            )
            chosen.update(zip(rows, kept, strict=True))
        return chosen
