"""What the suite asks of every family's oracle, over its Hugging Face half."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from tests.reference.llava_next import shares

Kept = Sequence[Sequence[int]] | None
"""Kept indices of an image, by part (tile); None for an unpruned one."""


class Oracle:
    """What the suite asks of a family's oracle; here for those whose images are one part each.

    Attributes:
        of_model: the family's Hugging Face half.
    """

    def __init__(self, of_model: Any) -> None:
        self.of_model = of_model

    def full(self, image: Image.Image) -> int:
        """Placeholder tokens of the unpruned image."""
        count: int = self.of_model.count(image)
        return count

    def allowed(self, image: Image.Image) -> list[list[int]]:
        """Of every part the tokens that may be kept."""
        return [list(range(self.full(image)))]

    def shares(self, image: Image.Image, tokens: int) -> list[int]:
        """How many tokens each part keeps."""
        return shares(tokens, [len(part) for part in self.allowed(image)])

    def keep(self, image: Image.Image, **plan: Any) -> list[list[int]]:
        """Kept indices of every part, by the transcription of the paper."""
        return [self.of_model.keep(image, **plan)]

    def logprobs(
        self, text: str, images: Sequence[Image.Image], kept: Sequence[Kept], answer: Sequence[int]
    ) -> torch.Tensor:
        """Before every token of `answer`, (len(answer), vocabulary)."""
        indices = [
            range(self.full(image)) if of_image is None else of_image[0]
            for image, of_image in zip(images, kept, strict=True)
        ]
        found: torch.Tensor = self.of_model.logprobs(text, images, indices, answer)
        return found


class OracleOfParts(Oracle):
    """For a Hugging Face half that knows of parts by itself."""

    def allowed(self, image: Image.Image) -> list[list[int]]:
        allowed: list[list[int]] = self.of_model.allowed(image)
        return allowed

    def keep(self, image: Image.Image, **plan: Any) -> list[list[int]]:
        kept: list[list[int]] = self.of_model.keep(image, **plan)
        return kept

    def logprobs(
        self, text: str, images: Sequence[Image.Image], kept: Sequence[Kept], answer: Sequence[int]
    ) -> torch.Tensor:
        found: torch.Tensor = self.of_model.logprobs(text, images, kept, answer)
        return found


class OracleOfTiles(Oracle):
    """For the LLaVA families, whose text model knows nothing of where a token was."""

    def full(self, image: Image.Image) -> int:
        return int(self.of_model.columns**2)

    def visual(self, image: Image.Image, kept: Kept) -> torch.Tensor:
        """What the text model gets of an image, (tokens, width)."""
        indices = range(self.full(image)) if kept is None else kept[0]
        embeddings: torch.Tensor = self.of_model.embeddings(image, indices)
        return embeddings

    def logprobs(
        self, text: str, images: Sequence[Image.Image], kept: Sequence[Kept], answer: Sequence[int]
    ) -> torch.Tensor:
        visual = [self.visual(*of_image) for of_image in zip(images, kept, strict=True)]
        found: torch.Tensor = self.of_model.logprobs(text, visual, answer)
        return found


class OracleOfAnyres(OracleOfTiles):
    """For LLaVA-NeXT: tiles, padding that is never kept, newlines where nothing is pruned."""

    def full(self, image: Image.Image) -> int:
        return len(self.of_model.unpruned(image))

    def allowed(self, image: Image.Image) -> list[list[int]]:
        allowed: list[list[int]] = self.of_model.allowed(image)
        return allowed

    def keep(self, image: Image.Image, **plan: Any) -> list[list[int]]:
        kept: list[list[int]] = self.of_model.keep(image, **plan)
        return kept

    def visual(self, image: Image.Image, kept: Kept) -> torch.Tensor:
        of_model = self.of_model
        visual: torch.Tensor = (
            of_model.unpruned(image) if kept is None else of_model.embeddings(image, kept)
        )
        return visual


class OracleOfOnevision(OracleOfAnyres):
    """The same, and parts of several tiles whose share is larger."""

    def shares(self, image: Image.Image, tokens: int) -> list[int]:
        found: list[int] = self.of_model.shares(image, tokens)
        return found


class OracleOfFlatTiles(OracleOfTiles):
    """For InternVL: tiles one after another, all of which show the picture."""

    def full(self, image: Image.Image) -> int:
        count: int = self.of_model.count(image)
        return count

    def allowed(self, image: Image.Image) -> list[list[int]]:
        tile = list(range(self.of_model.columns**2))
        return [tile] * (self.full(image) // len(tile))

    def keep(self, image: Image.Image, **plan: Any) -> list[list[int]]:
        kept: list[list[int]] = self.of_model.keep(image, **plan)
        return kept

    def visual(self, image: Image.Image, kept: Kept) -> torch.Tensor:
        embeddings: torch.Tensor = self.of_model.embeddings(image, kept)
        return embeddings
