"""LLaVA-1.5: one square tile a picture, features from a single layer of the tower."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm import envs
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import Batch, Colour, FamilyAdapter, Grid, Shape, View, shown
from hiprune_vllm.models.pixtral import TOWER, PixtralAdapter
from hiprune_vllm.models.tiles import OF_THE_PAPER, TileAdapter, tile_columns
from hiprune_vllm.plan import About, TokenCount


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


class LlavaAdapter(TileAdapter):
    """`LlavaForConditionalGeneration`."""

    name = "llava"
    about = About(
        token="a patch of 14 x 14 pixels of the picture scaled to one tile; 576 a picture at 336",
        layer=OF_THE_PAPER,
        published="HiPrune's paper (7B, average over its benchmarks): 99.3, 97.5 and 92.7 % of the "
        "accuracy at 192, 128 and 64 tokens; EADP (ECCV 2026) counts 95.8 and 89.6 % at 128 and 64",
    )

    def of(self, hf_config: Any) -> FamilyAdapter:
        return PixtralAdapter() if hf_config.vision_config.model_type == TOWER else self

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

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        return [Grid(tile_columns(hf_config), tile_columns(hf_config))]

    def batch(self, model: Any, **kwargs: object) -> Batch:
        pixels = model._parse_and_validate_image_input(**kwargs)["pixel_values"]
        return Batch([tile[None] for tile in pixels], [()] * len(pixels))

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        return [View(0, 0, 0, shown(inputs["pixel_values"], mean, std))]
