"""Gemma 3: a SigLIP tower whose patches are averaged 4x4, the picture and crops of it."""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch

from hiprune_vllm.models.base import (
    Batch,
    Colour,
    FamilyAdapter,
    Grid,
    Shape,
    Tower,
    UnsupportedCheckpoint,
    View,
    object_layer_of,
    shown,
)
from hiprune_vllm.models.images import Part
from hiprune_vllm.models.qwen2_vl import OF_MERGING
from hiprune_vllm.models.tiles import batch_of_tiles, check_tiles, cut_by_tile, tiles_kept
from hiprune_vllm.plan import About, Encoder, TokenCount


class Gemma3Adapter(FamilyAdapter):
    """`Gemma3ForConditionalGeneration`; crops are what its processor calls pan and scan."""

    about = About(
        token="4 x 4 patches, 56 x 56 pixels of the picture scaled to a square of 896, whatever "
        "its shape; 256 a picture, and 256 a crop where `do_pan_and_scan` is on",
        layer=OF_MERGING,
        dropped="the frame of a crop that keeps nothing",
    )

    misread = (
        "text right behind a picture must not begin with exactly one newline, which is taken for "
        "the picture's own"
    )

    def encoder(self, hf_config: Any) -> Encoder:
        vision = hf_config.vision_config
        if vision.model_type != "siglip_vision_model":
            raise UnsupportedCheckpoint(
                "pruning supports the vision tower siglip_vision_model, this checkpoint has "
                f"{vision.model_type}"
            )
        patches, tokens = vision.image_size // vision.patch_size, hf_config.mm_tokens_per_image
        if patches % isqrt(tokens) or isqrt(tokens) ** 2 != tokens:
            raise UnsupportedCheckpoint(
                "pruning needs tokens that are averages of as many patches each, this checkpoint "
                f"has mm_tokens_per_image {tokens} of {patches} x {patches} patches"
            )
        depth = vision.num_hidden_layers
        object_layer = object_layer_of(depth, depth, merging=True)
        return Encoder("gemma3", depth, object_layer, has_cls=False)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        count = info.get_num_image_tokens(
            image_width=size.width,
            image_height=size.height,
            processor=info.get_hf_processor(**options),
            mm_kwargs=options,
        )
        largest, crops = info.get_image_size_with_most_features(), {"do_pan_and_scan": True}
        most = info.get_num_image_tokens(
            image_width=largest.width,
            image_height=largest.height,
            processor=info.get_hf_processor(),
            mm_kwargs=crops,
        )
        check_tiles(count, most)
        return TokenCount(count, count)

    def placeholder(self, tokens: Sequence[int], is_embed: Sequence[bool], keep: int) -> list[int]:
        """Of the picture and of each crop its own, between a newline and a tag on either side."""
        return cut_by_tile(tokens, is_embed, keep, framed=lambda start, stop: (start - 2, stop + 2))

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        crops, found = int(inputs["num_patches"]), len(inputs["pixel_values"])
        if crops != found:
            raise RuntimeError(f"version drift: expected {crops} crops of a picture, got {found}")
        return found * int(hf_config.mm_tokens_per_image)

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        """One for the whole picture, and one for each of its crops."""
        side = isqrt(hf_config.mm_tokens_per_image)
        return [Grid(side, side)] * shape[0]

    def tower(self, model: Any) -> Tower:
        return Tower(
            model.vision_tower.vision_model.encoder.layers,
            attention="self_attn.attn",
            qkv="self_attn.qkv_proj",
            heads=model.config.vision_config.num_attention_heads,
            merge=model.multi_modal_projector.kernel_size,
        )

    def batch(self, model: Any, **kwargs: object) -> Batch:
        inputs = model._parse_and_validate_image_input(**kwargs)
        return batch_of_tiles(inputs["pixel_values"], inputs["num_patches"].tolist())  # on the CPU

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        """The crops that keep something.

        vLLM's projector averages over whole crops, so what it does stands here by its parts.
        """
        crops = tiles_kept(batch, parts)
        features = model._image_pixels_to_features(model.vision_tower, crops)
        projector = model.multi_modal_projector
        patches = features.view(-1, projector.kernel_size**2, features.shape[-1])
        normed = projector.mm_soft_emb_norm(patches.mean(dim=1))
        embeddings: torch.Tensor = normed @ projector.mm_input_projection_weight
        return embeddings.type_as(features)

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        """The whole picture, and its crops to the right of it."""
        return [
            View(number, number * pixels.shape[-1], 0, shown(pixels, mean, std))
            for number, pixels in enumerate(inputs["pixel_values"])
        ]
