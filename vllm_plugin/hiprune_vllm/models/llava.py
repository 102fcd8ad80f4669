"""LLaVA-1.5: one square tile a picture, features from a single layer of the tower."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm import envs
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import Colour, Encoded, Image, Part, Selection, View, shown
from hiprune_vllm.models.tiles import Tile, encode_tiles, tile_columns, tile_encoder
from hiprune_vllm.plan import Encoder, TokenCount
from hiprune_vllm.pruning.record import SumOverRanks
from hiprune_vllm.pruning.select import Region


def check_scaled(image_processor: Any, size: Any) -> None:
    """Refuses a picture that grows beyond all measure where its short side is scaled to the tile's.

    A picture of one row and some thousand columns would take gigabytes, of which the centre alone
    is used.

    Raises:
        VLLMValidationError: naming both sizes.
    """
    short = getattr(image_processor, "size", {}).get("shortest_edge")
    longest, shortest = max(size.width, size.height), min(size.width, size.height)
    limit = envs.VLLM_MAX_IMAGE_PIXELS
    if not short or limit <= 0 or short * (scaled := short * longest // shortest) <= limit:
        return
    raise VLLMValidationError(
        f"image_url must not be that long and narrow: {size.width} x {size.height} pixels would be "
        f"scaled to {short} x {scaled}, more than {limit} in all",
        parameter="image_url",
    )


class LlavaAdapter:
    """`LlavaForConditionalGeneration`."""

    mrope = False

    def encoder(self, hf_config: Any) -> Encoder:
        return tile_encoder("llava", hf_config)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        check_scaled(info.get_hf_processor().image_processor, images.get_image_size(index))
        count = info.get_max_image_tokens()  # every picture is scaled to one tile
        return TokenCount(count, count)

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        _, rows, columns = inputs["pixel_values"].shape
        patch: int = hf_config.vision_config.patch_size
        return (rows // patch) * (columns // patch)

    def embed(
        self,
        model: Any,
        images: Sequence[Image],
        sum_over_ranks: SumOverRanks | None,
        **kwargs: object,
    ) -> list[Encoded]:
        pixels = model._parse_and_validate_image_input(**kwargs)["pixel_values"]
        columns = tile_columns(model.config)
        whole = Region(0, columns, 0, columns)
        parts = [(Part(0, whole.size, whole, image.budget.keep),) for image in images]
        tiles = []
        for i, image in enumerate(images):
            known = image.known_of(parts[i])
            tiles.append(
                Tile(pixels[i], image.budget, known=known[0] if known else None, trace=image.trace)
            )
        encoder = self.encoder(model.config)
        kept, indices = encode_tiles(model, encoder, tiles, sum_over_ranks)
        projected = model.multi_modal_projector(torch.cat(kept)).split([len(i) for i in indices])
        return [
            Encoded(embeddings, None if image.budget.is_full else Selection(of_image, (index,)))
            for image, of_image, embeddings, index in zip(
                images, parts, projected, indices, strict=True
            )
        ]

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        return [View(0, 0, 0, shown(inputs["pixel_values"], mean, std))]
