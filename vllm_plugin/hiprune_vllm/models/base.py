"""What a model family has to say about itself, and what every family needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hiprune_vllm.plan import Encoder, TokenCount
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.record import SumOverRanks
from hiprune_vllm.pruning.select import Region, kept_indices


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


@dataclass(frozen=True)
class Image:
    """One image to encode.

    Attributes:
        budget: what to keep.
        known: what was kept of it before, (kept,) indices for each of its parts (tiles); None for
            an image that is new.
    """

    budget: ImageBudget
    known: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class Encoded:
    """One encoded image.

    Attributes:
        embeddings: (budget.keep, width), what the language model sees.
        kept: indices for each of its parts, to be remembered; None for an unpruned image.
    """

    embeddings: torch.Tensor
    kept: tuple[torch.Tensor, ...] | None


class FamilyAdapter(Protocol):
    """A model family. All methods are stateless."""

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

    def embed(
        self,
        model: Any,
        images: Sequence[Image],
        sum_over_ranks: SumOverRanks | None,
        max_tokens: int,
        **kwargs: object,
    ) -> list[Encoded]:
        """Encodes a batch of images and projects the kept tokens only.

        Args:
            model: the vLLM model.
            images: in the order of the inputs.
            sum_over_ranks: adds per-rank scores; None where a rank holds all heads.
            max_tokens: unpruned visual tokens that one tower forward may hold, where one image
                fits at all.
            kwargs: the model's own multimodal inputs of the batch.

        Returns:
            One an image, in order.
        """
        ...


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
