"""LLaVA-1.5: one square tile a picture, features from a single layer of the tower."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hiprune_vllm.models.base import Encoded, Image
from hiprune_vllm.models.tiles import Tile, encode_tiles, tile_encoder
from hiprune_vllm.plan import Encoder, TokenCount
from hiprune_vllm.pruning.record import SumOverRanks


class LlavaAdapter:
    """`LlavaForConditionalGeneration`."""

    def encoder(self, hf_config: Any) -> Encoder:
        return tile_encoder("llava", hf_config)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        count = info.get_max_image_tokens()  # every picture is scaled to one tile
        return TokenCount(count, count)

    def embed(
        self,
        model: Any,
        images: Sequence[Image],
        sum_over_ranks: SumOverRanks | None,
        max_tokens: int,
        **kwargs: object,
    ) -> list[Encoded]:
        pixels = model._parse_and_validate_image_input(**kwargs)["pixel_values"]
        tiles = [
            Tile(pixels[i], image.budget, known=image.known[0] if image.known else None)
            for i, image in enumerate(images)
        ]
        encoder = self.encoder(model.config)
        kept, indices = encode_tiles(model, encoder, tiles, sum_over_ranks, max_tokens)
        projected = model.multi_modal_projector(torch.cat(kept)).split([len(i) for i in indices])
        return [
            Encoded(embeddings, None if image.budget.is_full else (index,))
            for image, embeddings, index in zip(images, projected, indices, strict=True)
        ]
